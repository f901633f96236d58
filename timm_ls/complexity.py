"""What a model costs: parameters, multiply-adds and launches, counted operator by operator."""
import copy
from typing import Any, Callable

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .ops.window_attention import attention_implementation
from .pyramid_transformer import ImageSize, grid_size

__all__ = ['count_launches', 'count_macs', 'count_parameters']


def count_parameters(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, img_size: ImageSize = 224) -> int:
    """Multiply-adds of one image's forward pass, in matrix products and convolutions, as eager mode executes them.

    Counted by torch's `FlopCounterMode` on a copy on the meta device: nothing is computed. Keys outside the image
    count for nothing, as they are never attended.

    Args:
        model: Takes images [B, in_chans, H, W]; 3 channels if it does not say.
        img_size: Side, or height and width, in pixels.
    """
    height, width = grid_size(img_size, 1)
    model = copy.deepcopy(model).to('meta').eval()
    image = torch.zeros(
        1, getattr(model, 'in_chans', 3), height, width, device='meta', dtype=next(model.parameters()).dtype)
    counter = FlopCounterMode(display=False)
    with attention_implementation('tiled'), counter:
        model(image)
    return counter.get_total_flops() // 2


# Allocate or rename, and compute nothing; other views say that they are
FREE = frozenset((
    'empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', '_unsafe_view', '_reshape_alias',
    'lift_fresh', 'detach', 'promote_types', 'is_same_size'))


class _Launches(TorchDispatchMode):
    """Counts operators that compute something."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name.split('::')[-1] not in FREE:
            self.count += 1
        return func(*args, **(kwargs or {}))


def count_launches(function: Callable[[], Any]) -> int:
    """Return how many operators reach the device while a function runs, views and allocations left out.

    Each is a kernel, or a few, that a GPU has to launch; small images take as long as their launches.
    """
    with _Launches() as launches:
        function()
    return launches.count
