"""Index tensors that depend on sizes only, made with NumPy; kept on devices to which they would have to be copied."""
from functools import lru_cache
from typing import Any, Callable

import numpy as np
import torch

from .._compat import is_fake_mode

__all__ = ['on_device']


def on_device(make: Callable[..., Any], device: torch.device, *args: Any) -> Any:
    """Return what a function of sizes makes, an array, a named tuple with arrays or a tuple of such, on a device.

    Args:
        make: Remembers what it made.
        device: Where to.
        *args: Of `make`.
    """
    if device.type == 'cpu' or is_fake_mode():  # shares the array's memory; fake tensors must not be kept
        return _to(device, make(*args))
    return _kept(make, device, *args)


@lru_cache(maxsize=64)
def _kept(make: Callable[..., Any], device: torch.device, *args: Any) -> Any:
    with torch.inference_mode(False):
        return _to(device, make(*args))


def _to(device: torch.device, made: Any) -> Any:
    if isinstance(made, np.ndarray):
        return torch.from_numpy(made).to(device)
    if type(made) is tuple:
        return tuple(_to(device, each) for each in made)
    return made._replace(**{
        name: torch.from_numpy(value).to(device) for name, value in made._asdict().items()
        if isinstance(value, np.ndarray)})
