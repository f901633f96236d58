"""Checkpoints: reading a file, unwrapping what it holds, telling whether it fits."""
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Mapping, Union

import torch
import torch.nn as nn
from safetensors.torch import load_file

__all__ = ['check_state_dict', 'load_checkpoint', 'read_checkpoint', 'unwrap_state_dict', 'without_wrappers']


def unwrap_state_dict(checkpoint: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """Find the weights in a checkpoint: the released `{'net': ...}`, timm's wrappers, with or without `module.`.

    Raises:
        RuntimeError: There are no weights in it.
    """
    for key in ('net', 'state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, dict):
        raise RuntimeError(f'Expected a dictionary of weights in the checkpoint, got {type(checkpoint).__name__}.')
    weights = {}
    for name, value in checkpoint.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise RuntimeError(
                f'Expected a dictionary from parameter names to tensors, got {name!r}: {type(value).__name__}.')
        weights[without_wrappers(name)] = value
    if not weights:
        raise RuntimeError('The checkpoint holds no weights.')
    return weights


def without_wrappers(name: str) -> str:
    """Return a parameter's name without what DDP and `torch.compile` put in front of it."""
    while name.startswith(('module.', '_orig_mod.')):
        name = name.split('.', 1)[1]
    return name


def check_state_dict(state_dict: Mapping[str, Any], model: nn.Module, most: int = 3) -> None:
    """Raise one readable error unless weights and model have the same names and shapes.

    Args:
        state_dict: Weights, already converted to our names.
        model: The model they are meant for.
        most: How many differences of each kind to name.

    Raises:
        RuntimeError: They differ.
    """
    expected = {name: tuple(value.shape) for name, value in nn.Module.state_dict(model).items()}
    given = {name: tuple(value.shape) for name, value in state_dict.items()}
    differences = {
        'missing': [name for name in expected if name not in given],
        'not part of the model': [name for name in given if name not in expected],
        'of another shape': [
            f'{name} {given[name]} instead of {shape}'
            for name, shape in expected.items() if given.get(name, shape) != shape],
    }
    lines = [
        f'  {len(names)} {kind}: {", ".join(names[:most])}{", ..." if len(names) > most else ""}'
        for kind, names in differences.items() if names]
    if lines:
        raise RuntimeError(
            f'The checkpoint does not fit {type(model).__name__} as built: {len(given)} tensors given,'
            f' {len(expected)} expected.\n' + '\n'.join(lines) +
            '\nCreate the model that the checkpoint was made for (same name, num_classes, in_chans and options).')


def read_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Read a checkpoint file, safetensors or PyTorch's own format, into memory.

    A pickle is read with `weights_only`: it cannot run code. All that it may hold beyond what PyTorch allows is the
    `argparse.Namespace` with its options that timm's train.py adds.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged or holds something else than weights.
    """
    path = Path(path)
    if not path.is_file():
        found = 'it is a folder' if path.is_dir() else 'there is nothing'
        raise FileNotFoundError(
            f'No checkpoint file at {path}: {found}. Expected a .safetensors or .pth file of weights.')
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # each format fails in its own ways on a damaged file
        # torch puts advice around the cause, to load with weights_only=False among it
        cause = (str(error).partition('WeightsUnpickler error: ')[2] or str(error)).strip().partition('\n')[0]
        raise RuntimeError(
            f'Could not read {path} ({path.stat().st_size} bytes) as a checkpoint: expected a complete .safetensors'
            f' or .pth file of weights. Download it again if it was cut short. Cause: {cause}') from error


def load_checkpoint(model: nn.Module, path: Union[str, Path]) -> None:
    """Load a checkpoint file into one of our models: the authors' `.pth`, our own, or safetensors.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged, holds something else than weights, or fits another architecture; or the model
            is none of ours.
    """
    convert: Any = getattr(model, 'convert_state_dict', None)
    if convert is None:
        raise RuntimeError(
            f'Expected a model of timm_ls to load {path} into, got {type(model).__name__}:'
            ' timm.create_model(name, checkpoint_path=path) loads weights of the models of timm.')
    checkpoint = read_checkpoint(path)
    try:
        weights = convert(checkpoint)
    except RuntimeError as error:
        raise RuntimeError(f'{path}: {error}') from error
    check_state_dict(weights, model)
    model.load_state_dict(weights)
