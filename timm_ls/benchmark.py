"""Command line: speed and memory of our models, of timm's and of the released code, side by side.

    python -m timm_ls.benchmark [MODEL ...] [--reference DIR] [--img-size 224 448 800x1333] [--batch-size 1 8]
        [--mode forward train] [--dtype float32 bfloat16 pure_bfloat16]
        [--execution eager compiled channels_last openvino onnxruntime]
        [--linear default onednn] [--device cuda] [--allocator tuned] [--baseline MODEL] [--json FILE] [--plot FILE]

Models that share a setting are timed in turns, in one process; peak memory is measured in a process of its own for
each. Ratios are medians of the ratios within a turn, so that a machine that slows down slows down both sides. A model
may say how it runs itself: `compiled:vil_ls_tiny_hires vil_ls_tiny_hires` compares two executions of one model.
"""
import argparse
import ctypes
import gc
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from .cli import (
    available_device,
    import_matplotlib,
    known_model,
    output_file,
    picture_file,
    reference_folder,
    synchronize,
    whole_number,
)
from .complexity import count_launches, count_macs
from .export import Outputs, export_file, load_file
from .linear import linear_implementation

__all__ = ['main']

MODES = ('forward', 'train')
PURE = 'pure_'  # in front of a type that weights and images are of; without it, autocast
DTYPES = ('float32', 'bfloat16', 'float16', PURE + 'bfloat16', PURE + 'float16')
ENGINES = {'openvino': 'openvino', 'onnxruntime': 'onnx'}  # and their file formats
EXECUTIONS = ('eager', 'compiled', 'channels_last', *ENGINES)
LINEAR = ('default', 'onednn')
RELEASED = 'released:'  # label of the authors' code, in front of the name of our model
# glibc never hands a block back to the system, and so never maps and clears its pages again
TUNED_ALLOCATOR = {'MALLOC_MMAP_THRESHOLD_': str(2 ** 34), 'MALLOC_TRIM_THRESHOLD_': str(2 ** 34)}


@dataclass(frozen=True)
class Setting:
    """What the models of one comparison share."""

    mode: str
    batch_size: int
    dtype: str
    execution: str
    height: int
    width: int
    device: str
    reference: Optional[str]  # the authors' imagenet/ folder
    linear: str = 'default'

    def kind(self) -> str:
        """All but the image size, as text."""
        linear = '' if self.linear == 'default' else f', {self.linear} linear layers'
        return f'{self.mode}, batch {self.batch_size}, {self.dtype}, {self.execution}{linear}'


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line; `argv` defaults to that of the process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ['--peak-memory']:  # what this command runs in a process of its own
        print(json.dumps(peak_memory(argv[1], Setting(**json.loads(argv[2])))))
        return
    args = parse_arguments(argv)
    if args.allocator == 'tuned' and not TUNED_ALLOCATOR.items() <= os.environ.items():  # read when a process starts
        command = [sys.executable, '-m', 'timm_ls.benchmark', *argv]
        raise SystemExit(subprocess.run(command, env={**os.environ, **TUNED_ALLOCATOR}).returncode)

    report = dict(machine=describe_machine(args.device, args.dtype), baseline=args.baseline, cells=[])
    print(machine_line(report['machine']), flush=True)
    settings = [
        Setting(mode, batch_size, dtype, execution, height, width, args.device, args.reference, linear)
        for mode in args.mode for batch_size in args.batch_size for dtype in args.dtype
        for execution in args.execution for linear in args.linear for height, width in args.img_size]
    progress = tqdm(total=len(settings) * len(args.models) * (args.repeats + 2), leave=False, disable=None)
    for setting in settings:
        report['cells'] += compare(args.models, setting, args, report['machine']['matmul_gflops'], progress)
    progress.close()
    report['growth'] = list(growth(report['cells']))
    print_report(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + '\n')
    if args.plot:
        plot(report, args.plot)


def parse_arguments(argv: List[str]) -> argparse.Namespace:
    """Read and check the arguments, before anything is measured."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_ls.benchmark', description='Speed and memory of models, ours and others, side by side.')
    parser.add_argument('models', nargs='*', type=known_label, metavar='MODEL',
                        help='timm model names, perhaps with an execution: compiled:vil_ls_tiny (default: %(default)s)',
                        default=['vil_ls_small_hires', 'swin_tiny_patch4_window7_224'])
    parser.add_argument('--reference', type=reference_folder, metavar='DIR',
                        help="the authors' imagenet/ folder: their code joins our models, with the same weights")
    parser.add_argument('--img-size', nargs='+', type=image_size, default=[(224, 224), (448, 448), (896, 896)],
                        metavar='SIZE', help='sides or HEIGHTxWIDTH, in pixels (default: 224 448 896)')
    parser.add_argument('--batch-size', nargs='+', type=whole_number(), default=[1], metavar='N',
                        help='images per call; 1 for latency (default: 1)')
    parser.add_argument('--mode', nargs='+', choices=MODES, default=['forward'],
                        help='forward under no_grad, or a training step: forward and backward (default: forward)')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['float32'],
                        help='float32, autocast to another, or weights and images of another (default: float32)')
    parser.add_argument('--execution', nargs='+', choices=EXECUTIONS, default=['eager'],
                        help='how models run, in torch or in an engine; several are compared (default: eager)')
    parser.add_argument('--linear', nargs='+', choices=LINEAR, default=['default'],
                        help="linear layers of all models in float32 on a CPU: torch's (default) or oneDNN's (onednn)")
    parser.add_argument('--device', default='cpu', type=available_device, help='torch device (default: %(default)s)')
    parser.add_argument('--allocator', choices=('default', 'tuned'), default='default',
                        help="tuned: with glibc's MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ raised")
    parser.add_argument('--repeats', type=whole_number(), default=5, metavar='N',
                        help='timed turns (default: %(default)s)')
    parser.add_argument('--baseline', metavar='MODEL', help='what ratios refer to (default: the last of all models)')
    parser.add_argument('--no-memory', action='store_true', help='do not measure memory')
    parser.add_argument('--json', type=output_file, metavar='FILE', help='write everything measured')
    parser.add_argument('--plot', type=picture_file, metavar='FILE', help='draw time and memory against pixels')
    args = parser.parse_args(argv)

    if args.reference:
        args.models = args.models + [RELEASED + name for name in args.models if name.startswith('vil_ls')]
    args.models = list(dict.fromkeys(args.models))
    args.baseline = args.baseline or args.models[-1]
    if args.baseline not in args.models:
        parser.error(f'baseline {args.baseline!r} is not compared; compared are {", ".join(args.models)}')
    if args.plot:
        import_matplotlib()
    if args.allocator == 'tuned' and platform.libc_ver()[0] != 'glibc':
        parser.error('--allocator tuned is for glibc, which this system does not use')
    return args


def known_label(text: str) -> str:
    """A label: the name of a model, perhaps with an execution in front, 'compiled:vil_ls_tiny'; a type of argument."""
    execution, _, name = text.rpartition(':')
    if execution and execution not in EXECUTIONS:
        raise argparse.ArgumentTypeError(
            f'unknown execution {execution!r} in {text!r}: expected one of {", ".join(EXECUTIONS)}')
    known_model(name)
    return text


def image_size(text: str) -> Tuple[int, int]:
    """Height and width from '224' or '800x1333'."""
    sides = text.split('x')
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 32 for side in sides):
        raise argparse.ArgumentTypeError(f'{text!r} is no image size: expected a side or HEIGHTxWIDTH, from 32 pixels')
    return int(sides[0]), int(sides[-1])


# Statistics

def interquartile_range(values: Sequence[float]) -> float:
    """Width of the middle half of the values; 0 for a single one."""
    if len(values) < 2:
        return 0.
    first, _, third = statistics.quantiles(values, n=4, method='inclusive')
    return third - first


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of values measured in the same turn."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> Optional[float]:
    """Exponent `e` of the least-squares fit `values = c * sizes ** e` in logarithms; None without two sizes."""
    if len(set(sizes)) < 2 or min(values) <= 0:
        return None
    return statistics.linear_regression([math.log(s) for s in sizes], [math.log(v) for v in values]).slope


# Models

def build(label: str, setting: Setting) -> nn.Module:
    """Create a model with random weights, made for the setting's image size where that is an option."""
    size = (setting.height, setting.width)
    if label.startswith(RELEASED):
        return build_released(label.removeprefix(RELEASED), setting.reference, size)
    try:
        return timm.create_model(label, img_size=size)
    except TypeError:  # takes images of any size
        return timm.create_model(label)


def apply_label(label: str, setting: Setting) -> Tuple[str, Setting]:
    """The model that a label names, and the setting with the label's execution, if it names one."""
    execution, _, name = label.rpartition(':')
    return (name, replace(setting, execution=execution)) if execution in EXECUTIONS else (label, setting)


def build_released(name: str, reference: str, size: Tuple[int, int]) -> nn.Module:
    """The authors' model of the same architecture as our model `name`."""
    if size[0] != size[1]:
        raise ValueError('square images only')
    folder = Path(reference, 'models')
    spec = importlib.util.spec_from_file_location(
        'timm_ls_released', folder / '__init__.py', submodule_search_locations=[str(folder)])
    module = sys.modules['timm_ls_released'] = importlib.util.module_from_spec(spec)
    sys.modules.setdefault('timm.models.layers', timm.layers)  # where these layers were then
    spec.loader.exec_module(module)
    arch = released_architecture(timm.create_model(name, device='meta'))
    return module.MsViT(arch, img_size=size[0], attn_type='ls', norm_embed=True)


def released_architecture(model: nn.Module) -> str:
    """The authors' description of one of our models, such as 'l1,h3,d96,n1,s1,g1,p4,f7,a0,r8_l2,...'."""
    window_size = next(m.window_size for m in model.modules() if hasattr(m, 'window_size'))
    stages = []
    for i, stage in enumerate(model.stages):
        attn = stage.blocks[0].attn
        fields = dict(
            l=i + 1,
            h=attn.num_heads,
            d=model.feature_info[i]['num_chs'],
            n=len(stage.blocks),
            s=int(model.attn_types[i] == 'ls'),
            g=attn.num_global_tokens,
            p=stage.embed.patch_size,
            f=window_size,
            a=0,
            r=getattr(attn, 'rank', 0),
        )
        stages.append(','.join(f'{key}{value}' for key, value in fields.items()))
    return '_'.join(stages)


def as_dtype(name: str) -> torch.dtype:
    """The type that one of `DTYPES` computes in."""
    return getattr(torch, name.removeprefix(PURE))


def make_step(model: nn.Module, setting: Setting) -> Callable[[], torch.Tensor]:
    """A function that runs the model once in the given setting and returns the logits."""
    device = torch.device(setting.device)
    if setting.execution in ENGINES:
        return make_engine_step(model, setting)
    memory_format = torch.channels_last if setting.execution == 'channels_last' else torch.contiguous_format
    model = model.to(device, memory_format=memory_format).train(setting.mode == 'train')
    run = torch.compile(model, dynamic=False) if setting.execution == 'compiled' else model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch_size, 3, setting.height, setting.width, generator=generator)
    x = x.to(device, memory_format=memory_format)
    target = torch.zeros(setting.batch_size, dtype=torch.long, device=device)
    dtype, is_pure = as_dtype(setting.dtype), setting.dtype.startswith(PURE)
    if is_pure:
        model, x = model.to(dtype), x.to(dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not is_pure)

    def step() -> torch.Tensor:
        with torch.set_grad_enabled(setting.mode == 'train'), autocast, linear_implementation(setting.linear):
            logits = run(x)
            if setting.mode == 'train':
                loss = F.cross_entropy(logits.float(), target)
        if setting.mode == 'train':
            loss.backward()
            model.zero_grad(set_to_none=True)
        synchronize(device)
        return logits.detach()

    return step


def make_engine_step(model: nn.Module, setting: Setting) -> Callable[[], torch.Tensor]:
    """`make_step` in an engine, from a file of the setting's size."""
    fmt = ENGINES[setting.execution]
    if setting.mode == 'train' or setting.device != 'cpu' or setting.linear != 'default':
        raise ValueError('engines run forward passes on a CPU')
    if setting.dtype != 'float32' and (fmt, setting.dtype) != ('openvino', 'bfloat16'):
        raise ValueError(f'{setting.dtype} in {setting.execution}')
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch_size, 3, setting.height, setting.width, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.xml' if fmt == 'openvino' else 'model.onnx')
        size = setting.height, setting.width
        export_file(Outputs(model.eval(), features=False), path, fmt, size, batch=setting.batch_size)
        run = load_file(path, fmt, 'f32' if setting.dtype == 'float32' else 'bf16')
        run(x)  # the file may be mapped until then
    return lambda: run(x)[0]


# Measurements

def compare(
        labels: List[str],
        setting: Setting,
        args: argparse.Namespace,
        matmul_gflops: Dict[str, float],
        progress: tqdm,
) -> List[Dict[str, Any]]:
    """Measure all models in one setting; what does not run says why under 'error'."""
    cells = {}
    for label in labels:
        _, own = apply_label(label, setting)
        fields = {name: value for name, value in asdict(own).items() if name not in ('device', 'reference')}
        cells[label] = dict(
            model=label, comparison=setting.kind(), kind=own.kind(), **fields, seconds=[], median_s=None, iqr_s=None,
            images_per_s=None, speed=None, peak_bytes=None, memory=None, macs=None, matmul_fraction=None, launches=None,
            max_difference=None, error=None)
    for cell in cells.values():
        progress.set_description(f'{cell["model"]} {setting.height}x{setting.width}', refresh=True)
        if not args.no_memory:  # first: what would take this process down takes down another
            cell.update(run_peak_memory(cell['model'], setting))
        progress.update()

    time_in_turns(cells, setting, args.repeats, progress)
    base = cells[args.baseline]
    for cell in cells.values():
        if cell['error'] is None:
            cell.update(summarize(cell, base, setting, matmul_gflops[setting.dtype]))
    return list(cells.values())


def summarize(cell: Dict[str, Any], base: Dict[str, Any], setting: Setting, matmul_gflops: float) -> Dict[str, Any]:
    """The fields that follow from what was measured for a model and for the baseline."""
    seconds = cell['seconds']
    median = statistics.median(seconds)
    fields = dict(median_s=median, iqr_s=interquartile_range(seconds), images_per_s=setting.batch_size / median)
    if cell['macs']:  # a backward pass costs twice the forward
        operations = 2 * cell['macs'] * setting.batch_size * (3 if setting.mode == 'train' else 1)
        fields['matmul_fraction'] = operations / median / 1e9 / matmul_gflops
    if base['error'] is None:
        fields['speed'] = paired_ratio(base['seconds'], seconds)
        if cell['peak_bytes'] and base['peak_bytes']:
            fields['memory'] = cell['peak_bytes'] / base['peak_bytes']
    return fields


def time_in_turns(cells: Dict[str, Dict[str, Any]], setting: Setting, repeats: int, progress: tqdm) -> None:
    """Time the models in turns, in both directions alternately; fill in the cells' seconds, macs and differences."""
    labelled = {label: apply_label(label, setting) for label in cells}
    if any(own.execution == 'compiled' for _, own in labelled.values()):
        torch.compiler.reset()
    models, steps, logits = {}, {}, {}

    def attempt(label: str, function: Callable[[], Any]) -> Any:
        if cells[label]['error'] is not None:
            return None
        try:
            return function()
        except Exception as error:  # other people's models fail in many ways, and the others go on
            cells[label]['error'] = describe_error(error)
            steps.pop(label, None)
            return None

    for label in cells:
        torch.manual_seed(0)
        models[label] = attempt(label, lambda label=label: build(*labelled[label]))
        ours = label.removeprefix(RELEASED)
        if models[label] is not None and models.get(ours) is not None and ours != label:
            models[ours].load_state_dict(models[label].state_dict())  # same weights
    for label in cells:
        if label.startswith(RELEASED):  # the same arithmetic as ours
            cells[label]['macs'] = cells[label.removeprefix(RELEASED)]['macs']
        elif models[label] is not None:
            cells[label]['macs'] = macs(models[label], setting)
        steps[label] = attempt(label, lambda label=label: make_step(models[label], labelled[label][1]))
        logits[label] = attempt(label, lambda label=label: steps[label]())  # allocates, compiles
        if labelled[label][1].execution == 'eager' and cells[label]['error'] is None:
            cells[label]['launches'] = attempt(label, lambda label=label: count_launches(steps[label]))
        progress.update()
    for turn in range(repeats):
        for label in list(steps)[::-1 if turn % 2 else 1]:
            start = time.perf_counter()
            attempt(label, lambda label=label: steps[label]())
            if cells[label]['error'] is None:
                cells[label]['seconds'].append(time.perf_counter() - start)
            progress.update()
    for label in cells:
        theirs = logits.get(RELEASED + label)
        if theirs is not None and logits[label] is not None:
            difference = (logits[label].float() - theirs.float()).abs().max() / theirs.float().abs().max()
            cells[label]['max_difference'] = difference.item()
    models.clear(), steps.clear()
    gc.collect()
    if setting.device.startswith('cuda'):
        torch.cuda.empty_cache()


def macs(model: nn.Module, setting: Setting) -> Optional[int]:
    """Multiply-adds of one image's forward pass; None for a model that they cannot be counted for."""
    try:
        return count_macs(model, (setting.height, setting.width))
    except Exception:  # an operator that does not run on the meta device, for example
        return None


def describe_error(error: Exception) -> str:
    """One short line."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return 'out of memory'
    return f'not supported: {text[:80]}'


def run_peak_memory(label: str, setting: Setting) -> Dict[str, Any]:
    """`peak_memory` in a process of its own, which may die of it."""
    command = [sys.executable, '-m', 'timm_ls.benchmark', '--peak-memory', label, json.dumps(asdict(setting))]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode < 0:
        return dict(error='out of memory' if result.returncode == -9 else f'killed by signal {-result.returncode}')
    if result.returncode > 0:
        return dict(error=f'not supported: {(result.stderr.strip() or "failed").splitlines()[-1][:80]}')
    return json.loads(result.stdout.splitlines()[-1])


def peak_memory(label: str, setting: Setting) -> Dict[str, Any]:
    """Bytes that one call takes above the process at rest, once everything that stays has been allocated."""
    try:
        name, setting = apply_label(label, setting)
        step = make_step(build(name, setting), setting)
        step()
        if setting.device.startswith('cuda'):
            torch.cuda.reset_peak_memory_stats()
            rest = torch.cuda.memory_allocated()
            step()
            return dict(peak_bytes=torch.cuda.max_memory_allocated() - rest)
        if not sys.platform.startswith('linux'):
            return dict(peak_bytes=None)
        gc.collect()
        if platform.libc_ver()[0] == 'glibc':
            ctypes.CDLL(None).malloc_trim(0)  # hand back what lies free, which is not at rest
        Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
        rest = resident_bytes('VmRSS')
        step()
        return dict(peak_bytes=resident_bytes('VmHWM') - rest)
    except Exception as error:  # as in `time_in_turns`
        return dict(error=describe_error(error))


def resident_bytes(field: str) -> int:
    """Resident memory of this process now ('VmRSS') or at its peak ('VmHWM')."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ':'))


def matmul_rate(device: str, dtype: str) -> float:
    """Giga-operations per second of large square matrix products: what a model could reach at best."""
    n = 1024 if device == 'cpu' else 8192
    a = torch.randn(n, n, device=device, dtype=as_dtype(dtype))
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        a @ a
        synchronize(a.device)
        seconds.append(time.perf_counter() - start)
    return 2 * n ** 3 / statistics.median(seconds[1:]) / 1e9


def growth(cells: List[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
    """Exponents of time and memory against the number of pixels, for each model and kind of setting."""
    groups: Dict[Tuple, List[Dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell['model'], cell['kind']), []).append(cell)
    for (model, kind), group in groups.items():
        fits = {}
        for name, field in (('time', 'median_s'), ('memory', 'peak_bytes')):
            points = [(cell['height'] * cell['width'], cell[field]) for cell in group if cell[field]]
            fits[name] = fit_exponent(*zip(*points, strict=True)) if points else None
        if any(value is not None for value in fits.values()):
            yield dict(model=model, kind=kind, **fits)


# Reports

def describe_machine(device: str, dtypes: Sequence[str] = ()) -> Dict[str, Any]:
    """Hardware, versions, what this process was given of them, and the rate of matrix products in some types."""
    if device.startswith('cuda'):
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path('/proc/cpuinfo')
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        name = next((line.split(': ')[1] for line in lines if line.startswith('model name')), platform.processor())
    return dict(
        device=name,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        allocator={key: value for key, value in os.environ.items() if key.startswith(('MALLOC_', 'LD_PRELOAD'))},
        torch=torch.__version__,
        timm=timm.__version__,
        matmul_gflops={dtype: matmul_rate(device, dtype) for dtype in dtypes},
    )


def machine_line(machine: Dict[str, Any]) -> str:
    """The machine as text."""
    rates = ', '.join(f'{rate:.0f} GFLOP/s in {dtype}' for dtype, rate in machine['matmul_gflops'].items())
    allocator = ' '.join(f'{key}={value}' for key, value in machine['allocator'].items()) or 'default'
    return (f'{machine["device"]}, {machine["cores"]} cores, {machine["threads"]} threads, torch {machine["torch"]},'
            f' timm {machine["timm"]}\nallocator: {allocator}; matrix products: {rates}')


def print_report(report: Dict[str, Any]) -> None:
    """Print a table per comparison, and how time and memory grow."""
    def number(value: Optional[float], text: str) -> str:
        return '-' if value is None else format(value, text)

    comparison = None
    width = max(len(cell['model']) for cell in report['cells'])
    for cell in report['cells']:
        if cell['comparison'] != comparison:
            comparison = cell['comparison']
            print(f'\n{comparison}; times faster and share of memory against {report["baseline"]}')
            print(f'{"size":>9}  {"model":{width}}  {"ms":>8}  {"IQR":>7}  {"images/s":>8}  {"faster":>6}'
                  f'  {"peak MiB":>8}  {"memory":>6}  of matmul  {"launches":>8}')
        head = f'{cell["height"]}x{cell["width"]}'.rjust(9) + f'  {cell["model"]:{width}}'
        if cell['error']:
            print(f'{head}  {cell["error"]}')
            continue
        mebibytes = cell['peak_bytes'] and cell['peak_bytes'] / 2 ** 20
        print(f'{head}  {cell["median_s"] * 1e3:8.1f}  {cell["iqr_s"] * 1e3:7.1f}  {cell["images_per_s"]:8.2f}'
              f'  {number(cell["speed"], ".2f"):>6}  {number(mebibytes, ".0f"):>8}  {number(cell["memory"], ".2f"):>6}'
              f'  {number(cell["matmul_fraction"], ".0%"):>9}  {number(cell["launches"], "d"):>8}')
    differences = [cell['max_difference'] for cell in report['cells'] if cell['max_difference'] is not None]
    if differences:
        print(f'\nLogits differ from those of the released code by at most {max(differences):.1e} of the largest.')
    if report['growth']:
        print('\ngrowth: exponents of the number of pixels')
    for fit in report['growth']:
        print(f'  {fit["model"]:{width}}  {fit["kind"]}: time {number(fit["time"], ".2f")},'
              f' memory {number(fit["memory"], ".2f")}')


def plot(report: Dict[str, Any], path: str) -> None:
    """Draw time per image and peak memory against the number of pixels, a line per model and kind of setting."""
    import_matplotlib().use('agg')
    import matplotlib.pyplot as plt

    lines: Dict[str, List[Dict[str, Any]]] = {}
    for cell in report['cells']:
        if cell['error'] is None:
            lines.setdefault(f'{cell["model"]}\n{cell["kind"]}', []).append(cell)
    panels = [('seconds per image', lambda cell: 1 / cell['images_per_s'])]
    if any(cell['peak_bytes'] for cell in report['cells']):
        panels.append(('peak memory above rest, MiB', lambda cell: (cell['peak_bytes'] or math.nan) / 2 ** 20))
    if any(cell['launches'] for cell in report['cells']):
        panels.append(('operators that reach the device', lambda cell: cell['launches'] or math.nan))
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False, layout='constrained')
    for axis, (title, value) in zip(axes[0], panels, strict=True):
        for label, cells in lines.items():
            cells = sorted(cells, key=lambda cell: cell['height'] * cell['width'])
            axis.plot([cell['height'] * cell['width'] for cell in cells], list(map(value, cells)), 'o-', label=label)
        axis.set(xlabel='pixels', title=title)
        if lines:
            axis.loglog()
            axis.legend(fontsize=8)
        axis.grid(True, which='both', alpha=.2)
    figure.suptitle(machine_line(report['machine']), fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    main()
