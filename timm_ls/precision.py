"""Command line: how far reduced precision is from float64, at the logits and at every level of the pyramid.

    python -m timm_ls.precision [MODEL ...] [--img-size H W] [--device cuda] [--json FILE]

Prints a table per model, and fails if any value or gradient is NaN or infinite.
"""
import argparse
import copy
import json
import math
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .benchmark import describe_machine
from .cli import available_device, load_model, our_model, output_file

__all__ = ['main']

FORMATS = ('float32', 'tf32', 'bfloat16 autocast', 'float16 autocast', 'bfloat16', 'float16')
INPUTS = {'normal': 1., 'x 100': 100., 'x 0.01': .01, 'one-hot landmarks': 1.}
ONE_HOT_SCALE = 1000.  # on the weights of the dynamic projection: its softmax then picks single tokens


@dataclass(frozen=True)
class Row:
    """Errors of one format on one kind of input, against float64."""

    model: str
    format: str
    input: str
    errors: Tuple[float, ...]  # logits, then each level: largest difference over largest value; NaN if any value is
    finite_values: bool
    finite_gradients: bool

    @property
    def finite(self) -> bool:
        """Whether neither values nor gradients hold NaN or infinities."""
        return self.finite_values and self.finite_gradients


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line; `argv` defaults to that of the process.

    Raises:
        SystemExit: Wrong arguments, or a value or gradient that is NaN or infinite.
    """
    parser = argparse.ArgumentParser(
        prog='python -m timm_ls.precision', description='Errors of reduced precision against float64, as a table.')
    parser.add_argument('models', nargs='*', type=our_model, metavar='MODEL', default=['vil_ls_small', 'cvt_ls_13'],
                        help='model names (default: %(default)s)')
    parser.add_argument('--img-size', nargs='+', type=int, default=[224], metavar='PIXELS',
                        help='side, or height and width (default: 224)')
    parser.add_argument('--device', default='cpu', type=available_device, help='torch device (default: %(default)s)')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write everything measured')
    args = parser.parse_args(argv)
    if len(args.img_size) > 2 or min(args.img_size) < 32:
        parser.error(f'--img-size takes a side or a height and a width from 32 pixels, got {args.img_size}')

    device = torch.device(args.device)
    machine = describe_machine(args.device)
    print(f'{machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}, timm {machine["timm"]}')
    rows: List[Row] = []
    for name in args.models:
        torch.manual_seed(0)
        model = load_model(name, pretrained=False, checkpoint=None)
        use_order_one_weights(model)
        found = measure(name, model.to(device), (args.img_size[0], args.img_size[-1]))
        print_table(name, found, args.img_size)
        rows += found
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=machine, rows=list(map(asdict, rows))), indent=2) + '\n')
    broken = [f'{row.model}, {row.format}, {row.input}' for row in rows if not row.finite]
    if broken:
        raise SystemExit('NaN or Inf: ' + '; '.join(broken))


def use_order_one_weights(model: nn.Module) -> None:
    """Draw matrices so that every layer gives values of order one, and attention is far from uniform.

    With the small weights that training starts from, attention adds next to nothing, and its errors would not count.
    """
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -.5)


def available_formats(device: torch.device) -> Dict[str, str]:
    """The formats, each with why it cannot be measured on the device, or ''."""
    why_not = dict.fromkeys(FORMATS, '')
    if device.type != 'cuda':
        why_not['tf32'] = f'a format of CUDA devices, not of {device.type}'
    elif torch.cuda.get_device_capability(device) < (8, 0):
        why_not['tf32'] = 'needs compute capability 8.0'
    return why_not


def measure(name: str, model: nn.Module, img_size: Tuple[int, int]) -> List[Row]:
    """Run a model in every format that its device has, on every kind of input, and compare with float64.

    Args:
        name: For the rows.
        model: In float32, on its device; left as it is.
        img_size: Height and width in pixels.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, *img_size, generator=generator).to(device)
    rows = []
    for kind, factor in INPUTS.items():
        subject = copy.deepcopy(model).eval()
        if kind == 'one-hot landmarks':
            for module_name, module in subject.named_modules():
                if module_name.endswith('dynamic_projection'):
                    module.weight.data.mul_(ONE_HOT_SCALE)
        expected, _ = run(copy.deepcopy(subject).double(), image.double() * factor, 'float64')
        for fmt, why_not in available_formats(device).items():
            if not why_not:
                outputs, gradients = run(copy.deepcopy(subject), image * factor, fmt)
                rows.append(Row(
                    name, fmt, kind, tuple(map(relative_error, outputs, expected)),
                    all(bool(output.isfinite().all()) for output in outputs),
                    all(bool(gradient.isfinite().all()) for gradient in gradients)))
    return rows


def run(model: Any, image: torch.Tensor, fmt: str) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
    """Logits and all levels, and the gradients of image and parameters, of a model that this may change."""
    dtype = getattr(torch, 'float32' if fmt == 'tf32' else fmt.split()[0])
    autocast = fmt.endswith('autocast')
    if not autocast:
        model, image = model.to(dtype), image.to(dtype)
    image.requires_grad_()
    with tf32(fmt == 'tf32'), torch.autocast(image.device.type, dtype if autocast else None, enabled=autocast):
        features, levels = model.forward_intermediates(image)
        logits = model.forward_head(features)
        weights = torch.linspace(-1, 1, logits.shape[1], device=image.device)
        (logits.to(torch.promote_types(logits.dtype, torch.float32)) * weights).sum().backward()
    tensors = [image, *model.parameters()]
    return [logits.detach(), *(level.detach() for level in levels)], [t.grad for t in tensors if t.grad is not None]


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow or forbid that CUDA devices round the factors of float32 products to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference against the largest value."""
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def print_table(name: str, rows: List[Row], img_size: Sequence[int]) -> None:
    """Print the rows of a model in Markdown, and what could not be measured."""
    levels = len(rows[0].errors) - 1
    size = ' x '.join(map(str, img_size if len(img_size) == 2 else [img_size[0]] * 2))
    print(f'\n`{name}` at {size} pixels, largest error against float64 over the largest value\n')
    print('| format | input | logits | ' + ' | '.join(f'level {i + 1}' for i in range(levels)) + ' | NaN or Inf |')
    print('|---' * (levels + 4) + '|')
    for row in rows:
        where = [text for text, finite in (('values', row.finite_values), ('gradients', row.finite_gradients))
                 if not finite]
        errors = ' | '.join('-' if math.isnan(error) else f'{error:.0e}' for error in row.errors)
        print(f'| {row.format} | {row.input} | {errors} | {" and ".join(where) or "none"} |')
    missing = set(FORMATS) - {row.format for row in rows}
    for fmt in sorted(missing):
        print(f'\n{fmt}: not measured, a format that this device does not have.')
    sys.stdout.flush()


if __name__ == '__main__':
    main()
