"""Linear layers by oneDNN, for those who ask for it: exact float32 on a CPU, whatever modules and weights a model has.

On some CPUs (AMD's, with torch built on MKL) torch's float32 products run at about half of oneDNN's rate, which torch
takes for convolutions: a linear layer is a 1 x 1 convolution of a channels-last map. Calls of `F.linear` are seen
within `linear_implementation('onednn')`: modules stay torch's own, and LoRA, quantized weights and hooks work. Compare
with `python -m timm_ls.benchmark MODEL --linear default onednn`.
"""
import math
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ._compat import function_modes
from .ops.capture import ContextSetting, needs_plain_operations

__all__ = ['OneDnnLinear', 'linear_implementation']

IMPLEMENTATIONS = ('default', 'onednn')
_implementation: ContextSetting[str] = ContextSetting('timm_ls_linear_implementation', 'onednn')  # within OneDnnLinear
MIN_TOKENS = 256  # fewer do not make up for the copy of the weights that oneDNN makes in each call
MIN_ELEMENTS = 20480  # torch keeps convolutions of as many or fewer for its own code, which is slow
MIN_SIDE = 8  # of the map that tokens are viewed as: the gradients of thinner ones are slow


@contextmanager
def linear_implementation(name: str) -> Iterator[None]:
    """Choose how linear layers are computed, of any model: in float32, on a CPU, in eager mode.

    Weights and results stay the same, up to rounding. Checkpointed layers of other models than ours do not work within:
    torch computes them again, in the backward pass, where it is not seen.

    Args:
        name: 'default' for what torch takes, or 'onednn'.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'Unknown linear implementation {name!r}: expected one of {", ".join(IMPLEMENTATIONS)}.')
    token = _implementation.set(name)
    try:
        with OneDnnLinear() if name == 'onednn' else nullcontext():
            yield
    finally:
        _implementation.reset(token)


class OneDnnLinear(TorchFunctionMode):
    """Within, linear layers of any model run by oneDNN: those of plain float32 tensors on a CPU in eager mode."""

    def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Sequence[type],
            args: Tuple[Any, ...] = (),
            kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and _implementation.get() == 'onednn' and not needs_plain_operations():
            return linear(*args, **kwargs)
        return func(*args, **kwargs)


def as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that, whenever and wherever it is called, computes its linear layers as it would now."""
    if not any(isinstance(mode, OneDnnLinear) for mode in function_modes()):
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        with OneDnnLinear():
            return function(*args, **kwargs)

    return call


def linear(input: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """`F.linear` by oneDNN, or, for what that would not speed up or change, as it is."""
    if input.ndim > 1 and weight.ndim == 2 and all(is_plain(x) for x in (input, weight, bias) if x is not None):
        tokens = input.numel() // max(1, input.shape[-1])
        if tokens >= MIN_TOKENS and input.numel() > MIN_ELEMENTS and is_available():
            height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)  # as square as can be
            if height >= MIN_SIDE or not torch.is_grad_enabled():
                return convolve(input, weight, bias, height)
    return F.linear(input, weight, bias)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], height: int) -> torch.Tensor:
    """A linear layer over tokens [..., C], as a 1 x 1 convolution of a map of `height` rows, channels last."""
    maps = x.reshape(1, height, -1, x.shape[-1]).permute(0, 3, 1, 2)
    # a dilated convolution goes to oneDNN, with one thread too; dilation means nothing to a kernel of one pixel
    out = F.conv2d(maps, weight[:, :, None, None], bias, dilation=2)
    return out.permute(0, 2, 3, 1).reshape(x.shape[:-1] + (weight.shape[0],))


def is_plain(x: torch.Tensor) -> bool:
    """Whether it is a float32 tensor on a CPU, none of a class of its own."""
    return (
        type(x) in (torch.Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == 'cpu'
        and x.layout == torch.strided)


def is_available() -> bool:
    """Whether convolutions of float32 go to oneDNN, and nobody asked for less precision, there or in products."""
    onednn: Any = torch.backends.mkldnn
    settings = [getattr(onednn, name, None) for name in ('conv', 'matmul')]  # None: a torch without them
    return (
        onednn.is_available() and onednn.enabled and not torch.is_autocast_enabled('cpu')
        and all(getattr(setting, 'fp32_precision', 'none') in ('none', 'ieee') for setting in settings))
