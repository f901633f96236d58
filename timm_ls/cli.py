"""What the command lines share: arguments whose errors come before the work, waiting for a device, matplotlib."""
import argparse
from pathlib import Path
from types import ModuleType

import torch

__all__ = ['available_device', 'import_matplotlib', 'output_file', 'synchronize']


def available_device(text: str) -> str:
    """The name of a torch device that is there; a type of argument."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not available here: {error}') from error
    return text


def output_file(text: str) -> str:
    """The path of a file to write, in a folder that exists; a type of argument."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f'no folder to write {text!r} to')
    return text


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type != 'cpu':
        torch.accelerator.synchronize()


def import_matplotlib() -> ModuleType:
    """matplotlib, for drawing and its sample photo; exits with what to install if it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("Drawing needs matplotlib: pip install 'timm-ls[demo]'.") from error
    return matplotlib
