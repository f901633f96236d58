"""Relative position bias on 2-D grids: one dense table of offsets, its expansion, resizing and conversion."""
from copy import copy
from functools import lru_cache
from typing import Any, Final, Mapping, Optional, Tuple

import numpy as np
import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

from ..ops.capture import ceil_div, is_captured
from ..ops.indices import on_device
from ..ops.windows import halo_width

__all__ = [
    'RelPosBias2d',
    'dense_table',
    'expand_aliased_table',
    'position_bias',
    'resize_bias_table',
    'resize_tables',
]

torch.fx.wrap('as_value')  # what mode a graph is captured in says nothing of the modes it will run in

MAX_INDEX: Final[int] = 2 ** 20  # values that are looked up by an index of their own, which takes 8 bytes each


def resize_bias_table(table: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Resize a bias table to another number of offsets: bicubic, the zero offset staying in the middle.

    Computed in float32 at least, so that half-precision tables lose nothing more than their own rounding.

    Args:
        table: [num_heads, rows, cols].
        size: New rows and columns.

    Returns:
        [num_heads, rows, cols] of the new size, in the dtype of `table`; `table` itself when its size does not change.
    """
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(wide.unsqueeze(0), size=size, mode='bicubic', align_corners=False)
    return resized.squeeze(0).to(table.dtype)


def resize_tables(weights: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """Return weights with bias tables resized to those of a model with other grids or windows, the rest as it is."""
    resized = {}
    for name, parameter in model.named_parameters():
        table = weights.get(name) if name.endswith('.rel_pos.table') else None
        if isinstance(table, torch.Tensor) and table.ndim == 3 and table.shape[0] == parameter.shape[0]:
            if table.shape != parameter.shape:
                resized[name] = resize_bias_table(table, (parameter.shape[1], parameter.shape[2]))
    if resized:
        weights = copy(weights)  # with the versions of modules that torch notes on it
        weights.update(resized)  # type: ignore[attr-defined]
    return weights


def fit_bias_table(table: torch.Tensor, grid_size: Tuple[int, int]) -> torch.Tensor:
    """Return the table of the offsets within a grid: as it is, or resized to them."""
    size = (2 * grid_size[0] - 1, 2 * grid_size[1] - 1)
    # a comparison of symbolic sizes would tie the graph to one image size; resizing to the same size is the identity
    if is_captured() or table.shape[1] != size[0] or table.shape[2] != size[1]:
        table = resize_bias_table(table, size)
    return table


def position_bias(
        table: torch.Tensor,
        query_size: Tuple[int, int],
        key_size: Tuple[int, int],
        key_stride: int = 1,
) -> torch.Tensor:
    """Look up the bias of every query for every key.

    The offset of query row `y` to key row `k` is found at table row `y - k + key rows - 1`, likewise for columns:
    the first query sees the last key at the table's first row, the last query the first key at its last row.

    Args:
        table: One value per head and offset, [num_heads, query rows + key rows - 1, query cols + key cols - 1].
        query_size: Rows and columns of the queries.
        key_size: Rows and columns of the grid of keys.
        key_stride: Rows and columns of that grid from one key to the next.

    Returns:
        Bias, [num_heads, query rows, query cols, key rows / stride, key cols / stride], rounded up.
    """
    (qh, qw), (kh, kw) = query_size, key_size
    if not torch.jit.is_scripting():
        if not is_captured() and qh * qw * kh * kw <= MAX_INDEX:
            index = on_device(position_index, table.device, qh, qw, kh, kw, key_stride)
            shape = (table.shape[0], qh, qw, ceil_div(kh, key_stride), ceil_div(kw, key_stride))
            return table.flatten(1).gather(1, index.expand(table.shape[0], -1)).view(shape)
    # one gather per axis, whose indices are broadcast, not stored, and whose dimensions are not split: symbolic sizes
    # are hard to divide
    device, heads = table.device, table.shape[0]
    rows = torch.arange(qh, device=device)[:, None] - torch.arange(kh, device=device) + kh - 1
    cols = torch.arange(qw, device=device)[:, None] - torch.arange(kw, device=device) + kw - 1
    bias = table[:, None].expand(-1, qh, -1, -1).gather(2, rows[None, :, :, None].expand(heads, -1, -1, qw + kw - 1))
    index = cols[None, None, :, None].expand(heads, qh, -1, kh, -1)
    bias = bias[:, :, None].expand(-1, -1, qw, -1, -1).gather(4, index)
    return bias[..., ::key_stride, ::key_stride]


@lru_cache(maxsize=32)
def position_index(qh: int, qw: int, kh: int, kw: int, key_stride: int) -> np.ndarray:
    """Return where `position_bias` finds its values in a flattened table."""
    rows = np.arange(qh)[:, None] - np.arange(0, kh, key_stride) + kh - 1
    cols = np.arange(qw)[:, None] - np.arange(0, kw, key_stride) + kw - 1
    return (rows[:, None, :, None] * (qw + kw - 1) + cols[:, None, :]).reshape(-1)


def expand_aliased_table(table: torch.Tensor) -> torch.Tensor:
    """Turn the released window bias table into a dense one, without loss.

    The released code stores `2 (w + p - 1) (w + 2p + 1) + 1` rows and reads offset `(dy, dx)`, counted from 0, at
    row `dy * (w + 2p) + dx`: the stride is shorter than a row of offsets, so that several offsets share a value.

    Args:
        table: As released, [rows, num_heads].

    Returns:
        Dense table, [num_heads, 2 (w + p) - 1, 2 (w + p) - 1].

    Raises:
        ValueError: No window size has that many rows.
    """
    for window_size in range(1, 65):
        p = halo_width(window_size)
        if table.shape[0] == 2 * (window_size + p - 1) * (window_size + 2 * p + 1) + 1:
            offsets = torch.arange(2 * (window_size + p) - 1, device=table.device)
            return table[offsets[:, None] * (window_size + 2 * p) + offsets[None, :]].permute(2, 0, 1).contiguous()
    raise ValueError(
        f'A released window bias table of shape {tuple(table.shape)} fits no window size: expected'
        ' 2 (w + p - 1) (w + 2p + 1) + 1 rows with p = w // 2, for example 253 for w = 7 or 375 for w = 8.')


def dense_table(table: torch.Tensor, aliased: bool) -> torch.Tensor:
    """Return a bias table as released, [rows, num_heads], as ours, [num_heads, rows of offsets, columns of offsets].

    Args:
        table: As released; returned as it is if it is ours.
        aliased: It is one of windows (`expand_aliased_table`), not of a whole grid.
    """
    if table.ndim != 2:
        return table
    if aliased:
        return expand_aliased_table(table)
    side = round(table.shape[0] ** 0.5)  # released models are square
    return table.T.reshape(-1, side, side)


class RelPosBias2d(nn.Module):
    """Learned relative position bias for patch tokens and, optionally, global tokens.

    Args:
        num_heads: Attention heads.
        table_size: Offsets along rows and columns: query size + key size - 1 on each axis.
        num_global_tokens: Global tokens, each with a bias for all patches, from all patches, and for each other
            (0 leaves these out).
        device: Where to create parameters.
        dtype: Their type.
    """

    def __init__(
            self,
            num_heads: int,
            table_size: Tuple[int, int],
            num_global_tokens: int = 0,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        self.table = nn.Parameter(torch.empty(num_heads, table_size[0], table_size[1], **dd))
        self.global_patch: Optional[nn.Parameter] = None
        self.global_global: Optional[nn.Parameter] = None
        if num_global_tokens > 0:
            # [0]: global queries, patch keys; [1]: patch queries, global keys
            self.global_patch = nn.Parameter(torch.empty(2, num_heads, num_global_tokens, **dd))
            self.global_global = nn.Parameter(torch.empty(num_heads, num_global_tokens, num_global_tokens, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all biases from a truncated normal of standard deviation 0.02, as released."""
        for parameter in self.parameters():
            trunc_normal_(parameter, std=.02)

    @torch.jit.ignore
    def set_table_size(self, table_size: Tuple[int, int]) -> None:
        """Resize the table in place of the old one, keeping its `requires_grad`."""
        if tuple(self.table.shape[1:]) != tuple(table_size):
            table = resize_bias_table(self.table.detach(), table_size)
            self.table = nn.Parameter(table, requires_grad=self.table.requires_grad)

    def forward(self) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        """Return the parameters. The one way to them: some bring them in when a module is called.

        Returns:
            The table, [num_heads, rows, cols]. For global tokens (None without), the bias of their queries for patches
            and of patches for them, [2, num_heads, g], and among them, [num_heads, g, g].
        """
        global_patch = None if self.global_patch is None else as_value(self.global_patch)
        global_global = None if self.global_global is None else as_value(self.global_global)
        return as_value(self.table), global_patch, global_global


def as_value(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter as a module may return it: in inference mode, it must not say that it needs a gradient.

    There it has none, and torch's `ModuleTracker`, which counts operations, fails on looking for it.
    """
    if torch.jit.is_scripting() or is_captured():
        return parameter
    else:
        return parameter.detach() if torch.is_inference_mode_enabled() else parameter
