"""Work by pieces: what is allocated on the way is as large as a piece, or a few times that.

A block in inference keeps keys and values of the whole map, queries in the memory of its result, and everything else
(norms, projections, attention, the MLP and its hidden layer) for one piece at a time. `Block` decides whether it goes
that way. Tiles of window attention are pieces as well.
"""
from typing import Callable, List, Optional

import torch
import torch.fx
import torch.nn as nn

from .tracing import ceil_div, is_traced

__all__ = ['Finish', 'Tokenwise', 'image_groups', 'may_go_by_pieces', 'piece_bytes', 'row_pieces']

Tokenwise = Callable[[torch.Tensor], torch.Tensor]  # treats tokens one by one
Finish = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # likewise, from two maps

# Bytes of a map, of gathered keys or of an MLP's hidden layer to take at a time. On a CPU queries, keys and values of a
# piece stay below the 32 MB from which glibc maps memory anew for every tensor; fewer bytes make more calls, more are
# no faster. Elsewhere a piece has to keep a large device busy.
CPU_PIECE_BYTES = 8 * 2 ** 20
PIECE_BYTES = 64 * 2 ** 20


def piece_bytes(x: torch.Tensor) -> int:
    """Bytes of a map, or of gathered keys, on the device of `x` to take at a time."""
    return CPU_PIECE_BYTES if x.device.type == 'cpu' else PIECE_BYTES


def may_go_by_pieces(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a module may see a map [B, H, W, C] by pieces: it is larger than one, and nobody wants to see it whole.

    That is whoever needs a gradient, captures a graph, trains, or has put hooks on one of the module's layers.
    """
    if torch.is_grad_enabled() or isinstance(x, torch.fx.Proxy) or is_traced() or module.training:
        return False
    if x.numel() * x.element_size() <= piece_bytes(x):
        return False
    layers = (layer for child in module.children() for layer in child.modules())
    return not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def image_groups(x: torch.Tensor) -> List[slice]:
    """Cut a batch of maps [B, ...] into groups of whole images, of a piece at most if more than one."""
    B = x.shape[0]
    size = max(1, piece_bytes(x) // max(1, x[:1].numel() * x.element_size()))
    size = ceil_div(B, ceil_div(B, size))  # as equal as can be
    return [slice(start, min(B, start + size)) for start in range(0, B, size)]


def row_pieces(x: torch.Tensor, step: int = 1, row_bytes: Optional[int] = None) -> List[slice]:
    """Cut maps [B, H, W, C] into runs of rows, all but the last of a multiple of `step` rows.

    Args:
        x: The maps.
        step: Rows that stay together.
        row_bytes: Bytes that count for a row of the maps, if other than its own.
    """
    H = x.shape[1]
    if row_bytes is None:
        row_bytes = x[:, :1].numel() * x.element_size()
    steps = max(1, piece_bytes(x) // max(1, row_bytes * step))
    pieces = ceil_div(H, steps * step)
    size = ceil_div(ceil_div(H, step), pieces) * step  # as equal as can be
    return [slice(start, min(H, start + size)) for start in range(0, H, size)]
