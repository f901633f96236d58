"""Autocast where it would do harm: sums that have to stay in float32, and casts that would be made several times."""
from contextlib import nullcontext
from typing import Any, ContextManager

import torch

__all__ = ['cast_once', 'is_autocast', 'without_autocast']


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Return whether there is autocast for a type of device; torch before 2.15 cannot compile its own question."""
    return torch.amp.is_autocast_available(device_type)


def is_autocast(x: torch.Tensor) -> bool:
    """Return whether operations on `x` run under autocast."""
    device_type = x.device.type
    return has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(x: torch.Tensor) -> ContextManager[Any]:
    """Return a context in which operations on `x` keep its type."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def cast_once(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in the type that matrix products take under autocast, for several of them; a no-op without it."""
    if not torch.jit.is_scripting():
        if is_autocast(x) and x.dtype == torch.float32:
            return x.to(torch.get_autocast_dtype(x.device.type))
    return x
