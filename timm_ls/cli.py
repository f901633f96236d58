"""What the command lines share: arguments whose errors come before the work, models and images that may not be read."""
import argparse
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Optional

import timm
import torch
from PIL import Image

from .pretrained.checkpoint import load_checkpoint

__all__ = [
    'available_device', 'import_matplotlib', 'known_model', 'load_model', 'open_image', 'our_model', 'output_file',
    'output_folder', 'picture_file', 'reference_folder', 'synchronize', 'whole_number']

PICTURE_TYPES = ('.png', '.jpg', '.jpeg', '.webp', '.pdf', '.svg')


def available_device(text: str) -> str:
    """The name of a torch device that is there; a type of argument."""
    try:
        torch.zeros(1, device=text).item()  # 'meta' has no values to give
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not available here: {error}') from error
    return text


def whole_number(smallest: int = 1) -> Callable[[str], int]:
    """A type of argument: whole numbers from `smallest` on."""
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f'expected a whole number from {smallest} on, got {text!r}')
        return int(text)

    return read


def known_model(text: str) -> str:
    """The name of a model of this package or of timm; a type of argument."""
    if not timm.is_model(text):
        raise argparse.ArgumentTypeError(
            f"unknown model {text!r}: neither one of ours (python -m timm_ls models) nor one of timm's")
    return text


def our_model(text: str) -> str:
    """The name of a model of this package; a type of argument."""
    if not timm.is_model(text) or not timm.model_entrypoint(text).__module__.startswith('timm_ls.'):
        raise argparse.ArgumentTypeError(f'{text!r} is no model of ours: python -m timm_ls models lists them')
    return text


def output_file(text: str) -> str:
    """The path of a file to write, in a folder that exists; a type of argument."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f'no folder to write {text!r} to')
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f'{text!r} is a folder: expected the name of a file to write')
    return text


def output_folder(text: str) -> Path:
    """A folder to write to, which is there or can be made; a type of argument."""
    path = Path(text)
    if not next(folder for folder in (path, *path.absolute().parents) if folder.exists()).is_dir():
        raise argparse.ArgumentTypeError(f'no folder can be made at {text!r}: a file is in the way')
    return path


def picture_file(text: str) -> str:
    """The path of a picture to write, of a type that matplotlib writes; a type of argument."""
    if Path(text).suffix.lower() not in PICTURE_TYPES:
        raise argparse.ArgumentTypeError(f'expected a name that ends with {", ".join(PICTURE_TYPES)}, got {text!r}')
    return output_file(text)


def reference_folder(text: str) -> str:
    """The authors' imagenet/ folder; a type of argument."""
    if not (Path(text) / 'models' / 'msvit.py').is_file():
        raise argparse.ArgumentTypeError(f"no models/msvit.py in {text!r}: expected the authors' imagenet/ folder")
    return text


def load_model(name: str, pretrained: bool, checkpoint: Optional[str]) -> Any:
    """A model in eval mode, with the weights that were asked for; exits with a message if there are none."""
    try:
        model = timm.create_model(name, pretrained=pretrained)
        if checkpoint:
            load_checkpoint(model, checkpoint)
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    return model.eval()


def open_image(path: str, mode: str = 'RGB') -> Image.Image:
    """An image in a mode of PIL; exits with a message if the file holds none."""
    try:
        picture: Image.Image = Image.open(path)
        if picture.mode.startswith('I'):  # 16 bits, which the conversion would cut off, not scale
            picture = picture.point(lambda value: value / 256).convert('L')
        return picture.convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL calls a damaged PNG a SyntaxError
        raise SystemExit(f'Could not read {path} as an image: {error}') from error


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
