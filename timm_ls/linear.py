"""Linear layers by oneDNN, where that is faster: exact float32 on a CPU, whatever modules and weights a model has.

On some CPUs (AMD's, with torch built on MKL) torch's float32 products run at about half of oneDNN's rate, which torch
takes for convolutions: a linear layer is a 1 x 1 convolution of a channels-last map. Blocks compute theirs within
`linear_mode`, which sees calls of `F.linear`: modules stay torch's own, and LoRA, quantised weights and hooks work.
"""
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .tracing import is_traced

__all__ = ['OneDnnLinear', 'linear_implementation', 'linear_mode']

IMPLEMENTATIONS = ('auto', 'default', 'onednn')
MIN_TOKENS = 256  # fewer do not make up for the copy of the weights that oneDNN makes in each call
MIN_ELEMENTS = 20480  # torch keeps convolutions of as many or fewer for its own code, which is slow
MIN_SIDE = 8  # of the map that tokens are viewed as: the gradients of thinner ones are slow
MIN_GAIN = 1.15  # less is within the noise of a measurement


def check_implementation(name: str) -> str:
    """Return `name` if it is an implementation; raise a ValueError if not."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'Unknown linear implementation {name!r}: expected one of {", ".join(IMPLEMENTATIONS)}.')
    return name


_default = check_implementation(os.environ.get('TIMM_LS_LINEAR', 'auto'))
_implementation: ContextVar[str] = ContextVar('timm_ls_linear_implementation', default=_default)


@contextmanager
def linear_implementation(name: str) -> Iterator[None]:
    """Force how blocks compute their linear layers: in float32, on a CPU, in eager mode, with or without a gradient.

    Weights and results stay the same, up to rounding. The environment variable `TIMM_LS_LINEAR`, read when the package
    is imported, sets the default for all threads.

    Args:
        name: 'onednn', 'default' (what torch takes), or 'auto': oneDNN where it was measured to be faster, by at least
            15% in some milliseconds of products, once in the process for inference and once for training, when a map
            of 256 tokens or more first comes by.

    Raises:
        ValueError: The name is unknown.
    """
    token = _implementation.set(check_implementation(name))
    try:
        yield
    finally:
        _implementation.reset(token)


def linear_mode(x: torch.Tensor) -> ContextManager[Any]:
    """What a block has to enter before it sees a map [B, H, W, C]; does nothing where torch's way is taken."""
    name = 'default' if isinstance(x, torch.fx.Proxy) or is_traced() else _implementation.get()
    if name == 'default' or not (is_plain(x) and x.numel() >= MIN_TOKENS * x.shape[-1] and is_available()):
        return nullcontext()
    if name == 'auto' and not is_faster(torch.is_grad_enabled()):
        return nullcontext()
    return OneDnnLinear()


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
        if func is F.linear and not is_traced():
            return linear(*args, **kwargs)
        return func(*args, **kwargs)


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


_measuring = threading.Lock()


def is_faster(train: bool) -> bool:
    """Whether oneDNN is faster by `MIN_GAIN`, forward or, in training, forward and backward; measured once."""
    with _measuring:  # concurrent threads would disturb each other, and might decide differently
        return _is_faster(train)


@lru_cache(maxsize=2)
def _is_faster(train: bool) -> bool:
    # in a thread of its own: what the caller has set for its own does not reach it, such as checkpointing, whose hooks
    # would run a block, which asks for this answer, in the middle of the measurement
    with ThreadPoolExecutor(max_workers=1) as executor:
        return executor.submit(measure, train).result()


def measure(train: bool) -> bool:
    """Time products by both ways in turns; see `is_faster`."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 192, generator=generator), torch.randn(768, 192, generator=generator)
    x.requires_grad_(train), weight.requires_grad_(train)
    ways: List[Callable[[], torch.Tensor]] = [lambda: F.linear(x, weight), lambda: convolve(x, weight, None, 16)]
    seconds: List[List[float]] = [[], []]
    for turn in range(7):
        for way, times in zip(ways, seconds):
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                out = way()
                if train:
                    torch.autograd.grad(out, (x, weight), out.detach())
            if turn > 0:  # the first one warms up
                times.append(time.perf_counter() - start)
    return min(seconds[0]) >= MIN_GAIN * min(seconds[1])  # the least disturbed of each
