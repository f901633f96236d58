"""Command line: export a model to a file, and keep the file only if its engine gives what the model gives.

    python -m timm_ls export MODEL OUT [--format onnx|openvino|pt2] [--pretrained | --checkpoint FILE]
        [--img-size H W | --img-size dynamic] [--features] [--precision f32|f16|int8] [--calibration DIR]
"""
import argparse
import copy
import importlib.util
import shutil
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
from torch.export import Dim

from .cli import load_model, open_image, our_model, output_file
from .pyramid_transformer import MIN_IMAGE_SIZE

__all__ = ['Check', 'check_file', 'export_file', 'main']

SUFFIXES = {'onnx': '.onnx', 'openvino': '.xml', 'pt2': '.pt2'}
PRECISIONS = ('f32', 'f16', 'int8')
PACKAGES = {'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('openvino',), 'pt2': ()}  # that formats need
# Largest error of any output, relative to its largest value: rounding in another order, or in fewer digits. Whether
# eight bits are enough is for the user to say, who gets the share of images whose class stays.
TOLERANCE = {'f32': 1e-4, 'f16': 3e-2, 'int8': .5}
MAX_IMAGE_SIZE = 4096  # of dynamic sizes, in pixels
Run = Callable[[torch.Tensor], List[torch.Tensor]]


@dataclass(frozen=True)
class Check:
    """What a file gives for a batch of images, compared with the model in eager mode.

    Attributes:
        batch: Images.
        size: Height and width in pixels.
        error: Largest difference of any output over its largest value.
        seconds: Of the file in its engine, median.
        eager_seconds: Of the model in eager mode, median, in turns with it.
    """

    batch: int
    size: Tuple[int, int]
    error: float
    seconds: float
    eager_seconds: float


class Outputs(nn.Module):
    """A model as engines take it: a tuple of tensors from float32 images, computed in the type of the model.

    Args:
        model: One of ours.
        features: The levels of the pyramid instead of the logits.
    """

    def __init__(self, model: nn.Module, features: bool):
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, image: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """From images [B, C, H, W] to logits, or to levels, the finest first; in float32."""
        model: Any = self.model
        x = image.to(next(model.parameters()).dtype)
        outputs = model.forward_intermediates(x, intermediates_only=True) if self.features else [model(x)]
        return tuple(output.float() for output in outputs)

    def names(self) -> List[str]:
        """Return a name for each output."""
        model: Any = self.model
        return [f'stride{info["reduction"]}' for info in model.feature_info] if self.features else ['logits']


def main(argv: Sequence[str]) -> None:
    """Run the command line."""
    args = parse_arguments(argv)
    model = load_model(args.model, args.pretrained, args.checkpoint)
    config = timm.data.resolve_data_config(model=model)
    size = None if args.img_size == 'dynamic' else args.img_size or config['input_size'][1:]
    images = None
    if args.calibration:
        images = calibration_images(args.calibration, config, size or config['input_size'][1:])
    outputs = Outputs(model, args.features)
    with tempfile.TemporaryDirectory(dir=Path(args.out).absolute().parent) as folder:
        path = Path(folder, 'model').with_suffix(SUFFIXES[args.format])
        export_file(outputs, path, args.format, size, args.precision, images)
        checks = check_file(outputs, path, args.format, size, args.precision)
        megabytes = sum(part.stat().st_size for part in path.parent.iterdir()) / 1e6
        print(f'{args.model} as {args.format}, {args.precision}, {megabytes:.1f} MB,'
              f' {"any height and width" if size is None else f"{size[0]} x {size[1]} pixels"}, any batch:')
        for check in checks:
            print(f'  {check.batch} x {check.size[0]} x {check.size[1]}: differs by {check.error:.1e} of the largest'
                  f' value; {check.seconds * 1e3:.1f} ms, eager {check.eager_seconds * 1e3:.1f} ms')
        if images is not None and not args.features:
            print(f'  top-1 class as in eager mode: {agreement(outputs, path, args.format, images):.1%}'
                  f' of {len(images)} images')
        worst = max(check.error for check in checks)
        if not worst <= TOLERANCE[args.precision]:
            raise SystemExit(
                f'Nothing was written: the file differs from the model by {worst:.1e} of the largest value, more than'
                f' {TOLERANCE[args.precision]:.0e}. Please report the model, the versions and this command.')
        for part in path.parent.iterdir():  # OpenVINO keeps weights in a file of their own
            shutil.move(part, Path(args.out).with_suffix(part.suffix))
    print(f'Written to {args.out}')


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read and check the arguments, before any work."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_ls export',
        description='Export a model to a file, and keep the file only if its engine gives what the model gives.')
    parser.add_argument('model', type=our_model, metavar='MODEL', help='model name (python -m timm_ls models)')
    parser.add_argument('out', metavar='OUT', type=output_file, help='file to write')
    parser.add_argument('--format', choices=SUFFIXES, help='default: as OUT ends, .onnx, .xml (OpenVINO) or .pt2')
    parser.add_argument('--pretrained', action='store_true', help='load the published weights of the model')
    parser.add_argument('--checkpoint', metavar='FILE', help="weights: the authors' .pth, our own, or safetensors")
    parser.add_argument('--img-size', nargs='+', metavar='PIXELS',
                        help='side, or height and width; or "dynamic": takes minutes and runs slower'
                             ' (default: the native size of the model)')
    parser.add_argument('--features', action='store_true', help='levels of the pyramid instead of logits')
    parser.add_argument('--precision', choices=PRECISIONS, default='f32',
                        help='of the weights; int8 quantizes products as well (default: %(default)s)')
    parser.add_argument('--calibration', metavar='DIR',
                        help='folder of images like those to come: int8 is fitted to them, top-1 classes are compared')
    args = parser.parse_args(argv)
    args.format = args.format or {suffix: name for name, suffix in SUFFIXES.items()}.get(Path(args.out).suffix)
    if args.format is None or Path(args.out).suffix != SUFFIXES[args.format]:
        parser.error(f'OUT ends with .onnx, .xml (OpenVINO) or .pt2, as its --format; got {args.out!r}')
    if args.img_size is not None and args.img_size != ['dynamic']:
        sides = [int(side) if side.isdecimal() else 0 for side in args.img_size]
        if len(sides) > 2 or min(sides) < MIN_IMAGE_SIZE:
            parser.error(
                f'--img-size takes a side or a height and a width from {MIN_IMAGE_SIZE} pixels, or "dynamic";'
                f' got {" ".join(args.img_size)}')
        args.img_size = sides[0], sides[-1]
    elif args.img_size is not None:
        args.img_size = 'dynamic'
    if args.precision == 'int8' and args.format == 'pt2':
        parser.error('--precision int8 is for onnx and openvino, whose engines quantize; pt2 takes f32 or f16')
    if args.precision == 'int8' and not args.calibration:
        parser.error('--precision int8 needs --calibration DIR: a folder of images like those to come')
    packages = PACKAGES[args.format] + (('nncf',) if (args.format, args.precision) == ('openvino', 'int8') else ())
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} is missing: pip install 'timm-ls[deploy]'.")
    return args


def calibration_images(
        folder: str,
        config: Dict[str, Any],
        size: Tuple[int, int],
        most: int = 300,
) -> List[torch.Tensor]:
    """Return up to so many images of a folder and its subfolders, evenly drawn, as a model takes them, [1, C, H, W].

    Raises:
        SystemExit: The folder holds none, or a file that is called an image is none.
    """
    paths = sorted(path for path in Path(folder).rglob('*') if path.suffix.lower() in timm.data.get_img_extensions())
    if not paths:
        raise SystemExit(f'No images in {folder}: expected files such as .jpg or .png, in subfolders or not.')
    transform: Any = timm.data.create_transform(**{**config, 'input_size': (config['input_size'][0], *size)})
    step = max(1, len(paths) / most)
    chosen = [paths[int(i * step)] for i in range(min(most, len(paths)))]
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    return [transform(open_image(str(path), mode)).unsqueeze(0) for path in chosen]


def export_file(
        outputs: Outputs,
        path: Path,
        fmt: str,
        size: Optional[Tuple[int, int]],
        precision: str = 'f32',
        images: Optional[Sequence[torch.Tensor]] = None,
        batch: Optional[int] = None,
) -> None:
    """Write a model to a file of an engine.

    Args:
        outputs: The model in eval mode.
        path: File to write.
        fmt: 'onnx', 'openvino' or 'pt2'.
        size: Height and width in pixels; None for any from 33 on.
        precision: 'f32', 'f16' or 'int8'.
        images: To fit 'int8' to.
        batch: Images; None for any number.
    """
    if precision == 'f16' and fmt != 'openvino':
        outputs = Outputs(copy.deepcopy(outputs.model).half(), outputs.features)
    x = torch.zeros(batch or 2, getattr(outputs.model, 'in_chans', 3), *(size or (96, 160)))
    shapes = (_dynamic_shapes(size, batch),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of exporters, about themselves
        if fmt == 'onnx':
            program = torch.onnx.export(
                outputs, (x,), dynamo=True, dynamic_shapes=shapes, input_names=['image'],
                output_names=outputs.names(), verbose=False)
            assert program is not None
            program.save(path)
            if precision == 'int8':
                _quantize_onnx(path, images or ())
        elif fmt == 'openvino':
            if size is None:  # a trace takes seconds, an export of symbolic sizes minutes
                _write_openvino(outputs, outputs, x, path, precision, images or ())
            else:
                exported = torch.export.export(outputs, (x,), dynamic_shapes=shapes)
                _write_openvino(exported, outputs, None, path, precision, images or ())
        else:
            torch.export.save(torch.export.export(outputs, (x,), dynamic_shapes=shapes), path)


def _dynamic_shapes(size: Optional[Tuple[int, int]], batch: Optional[int]) -> Dict[int, Any]:
    """Return what may vary; below 33 pixels, torch takes the last level, one token, for fixed."""
    shapes: Dict[int, Any] = {} if batch else {0: Dim('batch')}
    if size is None:
        shapes.update({2: Dim('height', min=33, max=MAX_IMAGE_SIZE), 3: Dim('width', min=33, max=MAX_IMAGE_SIZE)})
    return shapes


def _write_openvino(
        program: Any,
        outputs: Outputs,
        x: Optional[torch.Tensor],
        path: Path,
        precision: str,
        images: Sequence[torch.Tensor],
) -> None:
    """Write what OpenVINO makes of a program, or of a module and an example."""
    import openvino

    model = openvino.convert_model(program, example_input=x)
    for port, name in zip(model.outputs, outputs.names(), strict=True):
        port.get_tensor().set_names({name})
    model.inputs[0].get_tensor().set_names({'image'})
    if precision == 'int8':
        import nncf
        model = nncf.quantize(
            model, nncf.Dataset([image.numpy() for image in images]), model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images))
    openvino.save_model(model, path, compress_to_fp16=precision == 'f16')


def _quantize_onnx(path: Path, images: Sequence[torch.Tensor]) -> None:
    """Quantize products of weights, in the file, by ONNX Runtime's static quantization."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[torch.Tensor] = iter(images)

        def get_next(self) -> Optional[Dict[str, np.ndarray]]:
            image = next(self.rest, None)
            return None if image is None else {'image': image.numpy()}

    prepared = path.with_suffix('.prepared')
    quantization.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared, path, Reader(), per_channel=True, op_types_to_quantize=['MatMul', 'Gemm'],
        extra_options={'MatMulConstBOnly': True})
    prepared.unlink()


def load_file(path: Path, fmt: str, dtype: str = 'f32') -> Run:
    """Return a function from images to outputs that runs a file in its engine, on as many threads as torch takes.

    Args:
        path: The file.
        fmt: 'onnx', 'openvino' or 'pt2'.
        dtype: 'f32' or 'bf16', which OpenVINO computes in whatever the file holds.
    """
    if fmt == 'onnx':
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        return lambda x: [torch.from_numpy(y) for y in session.run(None, {'image': x.numpy()})]
    if fmt == 'openvino':
        import openvino
        compiled = openvino.Core().compile_model(path, 'CPU', {
            'INFERENCE_PRECISION_HINT': dtype,  # bf16 on some CPUs if nothing is said
            'INFERENCE_NUM_THREADS': torch.get_num_threads(),
            'NUM_STREAMS': 1,
        })
        return lambda x: [torch.from_numpy(y.copy()) for y in compiled(x.numpy()).values()]
    module = torch.export.load(path).module()
    return lambda x: list(module(x))


def check_file(
        outputs: Outputs,
        path: Path,
        fmt: str,
        size: Optional[Tuple[int, int]],
        precision: str = 'f32',
        repeats: int = 5,
) -> List[Check]:
    """Compare a file with its model: one image and three; at rectangles that were not captured, if it takes them."""
    run, checks = load_file(path, fmt), []
    model: Any = outputs.model
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for batch, rectangle in ((1, size or (224, 224)), (3, size or (100, 190))):
            x = torch.randn(batch, model.in_chans, *rectangle, generator=generator)
            pairs = list(zip(run(x), outputs(x), strict=True))
            error = max(((ours - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)
            if any(ours.shape != theirs.shape or not ours.isfinite().all() for ours, theirs in pairs):
                error = float('inf')
            seconds: Dict[Run, List[float]] = {run: [], outputs: []}
            for _ in range(repeats):
                for function, times in seconds.items():
                    start = time.perf_counter()
                    function(x)
                    times.append(time.perf_counter() - start)
            checks.append(Check(batch, rectangle, error, *map(statistics.median, seconds.values())))
    return checks


def agreement(outputs: Outputs, path: Path, fmt: str, images: Sequence[torch.Tensor]) -> float:
    """Return the share of images whose most probable class is that of the model in eager mode."""
    run = load_file(path, fmt)
    with torch.inference_mode():
        return statistics.mean(
            float(run(image)[0].argmax() == outputs(image)[0].argmax()) for image in images)
