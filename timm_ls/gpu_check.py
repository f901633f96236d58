"""Command line: is the Triton kernel right on this GPU, how fast is it there, and what would be faster.

    python -m timm_ls.gpu_check [--minutes 8] [--out DIR] [--reference DIR] [--device cuda]

Goes through `PIECES`, each for its share of the minutes, and then, while there is time, through what they left. Writes
DIR/report.json after every row, so that what was measured survives being cut off, and at the end tables to
DIR/report.md, and to DIR/overrides.json where another implementation than the kernel is faster.

With `--device cpu`, in a process with TRITON_INTERPRET=1, it does the same with a few tokens: to see that it runs.
"""
import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import timm
import torch

from .benchmark import RELEASED, Setting, build, describe_error, describe_machine, make_step
from .cli import available_device, output_folder, reference_folder, synchronize
from .ops.overrides import gpu_family
from .ops.triton import attention as triton_attention
from .ops.triton import self_check
from .ops.window_attention import attention_implementation, window_attention
from .ops.windows import halo_width

__all__ = ['main']

Row = Dict[str, Any]
NOT_FINISHED = 'not finished'
IMPLEMENTATIONS, OTHERS = ('triton', 'masked', 'tiled'), ('flex_attention', 'natten')
PEERS = (
    'swin_small_patch4_window7_224', 'swinv2_small_window8_256', 'convnext_small', 'hiera_small_224',
    'vit_small_patch16_224')
BANDWIDTH, FLOPS = 3e12, 4e14  # bytes and half-precision operations per second to measure attention by: an H100's


class Scale(NamedTuple):
    """What is measured, on a GPU or, to see that it runs, on a CPU."""

    model: str
    compiled_model: str  # a small one, of which a compiled training step is to be right
    peers: Tuple[str, ...]
    image_sizes: Tuple[int, ...]
    kernels: Tuple[Tuple[int, int], ...]  # windows and head widths
    dtypes: Tuple[str, ...]
    executions: Tuple[str, ...]
    compiler: str
    seconds: float  # of repetitions of what is timed
    max_batch: int


GPU = Scale(
    'vil_ls_medium_hires', 'test_vil_ls', PEERS, (1024, 224, 2048, 512),
    ((7, 32), (7, 64), (2, 80), (8, 32), (4, 64), (3, 16), (1, 32), (5, 48), (6, 96), (9, 24), (10, 128), (14, 64)),
    ('bfloat16', 'float32', 'float16'), ('eager', 'compiled'), 'inductor', .3, 64)
CPU = Scale('test_vil_ls', 'test_vil_ls', ('test_vit',), (32,), ((5, 8),), ('float32',), ('eager',), 'aot_eager', 0., 1)


class Report:
    """Everything measured so far, on disk at any time."""

    def __init__(self, folder: Path, minutes: float, machine: Row):
        self.folder = folder
        self.end = self.piece_end = time.monotonic() + 60 * minutes
        self.data: Dict[str, Any] = dict(machine=machine, minutes=minutes, unfinished=[], pieces={})

    def start_piece(self, share: float) -> None:
        """Give a piece some of the time that is left."""
        self.piece_end = time.monotonic() + share * (self.end - time.monotonic())

    def left(self) -> float:
        """Seconds until the time of the piece is over."""
        return self.piece_end - time.monotonic()

    def add(self, piece: str, rows: Sequence[Row]) -> None:
        """Add rows to a piece and write everything."""
        self.data['pieces'].setdefault(piece, []).extend(rows)
        write(self.folder / 'report.json', json.dumps(self.data, indent=1))


def write(path: Path, text: str) -> None:
    """Write a file in one step."""
    with tempfile.NamedTemporaryFile('w', dir=path.parent, suffix='.tmp', delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line; `argv` defaults to that of the process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ['--kernel']:  # what this command runs in processes of its own
        print(json.dumps(kernel_row(argv[1], argv[2], int(argv[3]), int(argv[4]))))
        return
    parser = argparse.ArgumentParser(prog='python -m timm_ls.gpu_check', description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--minutes', type=float, default=8., metavar='N', help='when to stop (default: %(default)s)')
    parser.add_argument('--out', type=output_folder, default='gpu_check', metavar='DIR', help='default: %(default)s')
    parser.add_argument('--reference', type=reference_folder, metavar='DIR',
                        help="the authors' imagenet/ folder: their code joins the models")
    parser.add_argument('--device', type=available_device, default='cuda', help='default: %(default)s')
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if not args.minutes > 0:
        parser.error(f'--minutes takes a positive number, got {args.minutes}')
    if triton_attention.triton is None:
        parser.error('triton is not installed; torch brings it along on Linux')
    if device.type != 'cuda' and not triton_attention.is_interpreted():
        parser.error(f'the kernel is for CUDA devices; to run it on {device}, set TRITON_INTERPRET=1')
    args.out.mkdir(parents=True, exist_ok=True)
    scale = GPU if device.type == 'cuda' else CPU
    gpu = gpu_family(device) if device.type == 'cuda' else 'none'
    machine = dict(describe_machine(args.device, scale.dtypes), gpu=gpu, triton=triton_attention.triton.__version__)
    report = Report(args.out, args.minutes, machine)
    unfinished = {name: piece(args, scale, report) for name, piece in PIECES.items()}
    for is_second in (False, True):  # the second time, each may take all that is left
        to_come = list(unfinished)
        while to_come:
            report.start_piece(1. if is_second else SHARES[to_come[0]] / sum(SHARES[name] for name in to_come))
            name = to_come.pop(0)
            if run_piece(name, unfinished[name], report):
                del unfinished[name]
    report.data['unfinished'] = list(unfinished)
    report.add('overrides', overrides(report.data))
    write(args.out / 'overrides.json', json.dumps(report.data['pieces']['overrides'], indent=1))
    write(args.out / 'report.md', markdown(report.data))
    conclude(report)


def conclude(report: Report) -> None:
    """Say where the report is and whether the kernels are right; exits with status 1 unless they were seen to be."""
    rows = report.data['pieces'].get('kernels', [])
    num_right = sum(row.get('passed', False) for row in rows)
    num_unfinished = sum(row.get('error') == NOT_FINISHED for row in rows)
    num_wrong = len(rows) - num_right - num_unfinished
    print(f'{report.folder / "report.md"}: {num_right} kinds of kernel calls are right, {num_wrong} wrong or failed,'
          f' {num_unfinished} not finished')
    if num_wrong > 0 or num_right == 0:
        raise SystemExit(1)


def run_piece(name: str, rows: Iterator[Row], report: Report) -> bool:
    """Add the rows of a piece while it has time; return whether these were all."""
    while report.left() > 0:
        try:
            row = next(rows, None)
        except Exception as error:  # one piece that fails leaves the others
            row = dict(error=error_line(error))
        if row is None:
            return True
        report.add(name, [row])
        print(f'{name}: {line(row)}', flush=True)
    return False


def error_line(error: Exception) -> str:
    """What an error says on its first line."""
    return f'{type(error).__name__}: {(str(error).strip() or "no message").splitlines()[0][:300]}'


# Pieces: generators of rows

def check_kernels(args: argparse.Namespace, scale: Scale, report: Report) -> Iterator[Row]:
    """Outputs and gradients of the kernel against the masked form in float64; several processes compile at a time."""
    calls = [(dtype, window, head_dim) for window, head_dim in scale.kernels for dtype in scale.dtypes]

    def run(dtype: str, window: int, head_dim: int) -> Row:
        call = dict(dtype=dtype, window=window, head_dim=head_dim)
        command = [sys.executable, '-m', 'timm_ls.gpu_check', '--kernel', args.device, *map(str, call.values())]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=max(1, report.left()))
        except subprocess.TimeoutExpired:
            return dict(call, error=NOT_FINISHED)
        if result.returncode != 0:
            return dict(call, error=(result.stderr.strip() or 'killed').splitlines()[-1][:300])
        return dict(call, **json.loads(result.stdout.splitlines()[-1]))

    with ThreadPoolExecutor(num_processes()) as pool:
        for future in as_completed([pool.submit(run, *call) for call in calls]):
            yield future.result()


def num_processes() -> int:
    """How many may compile kernels at a time."""
    return max(1, min(16, (os.cpu_count() or 1) - 2))


def kernel_row(device_name: str, dtype_name: str, window: int, head_dim: int) -> Row:
    """Largest differences of a kind of call, whether rounding explains them, whether two runs have the same bits."""
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    start = time.perf_counter()
    errors: Dict[str, float] = {}
    large = [self_check.Case(1, 190, 190, 9, True)] * (device.type == 'cuda')  # several blocks in every loop
    for _, name, error in self_check.attention_differences(device, dtype, window, head_dim, True, large):
        errors[name] = max(error, errors.get(name, 0.), key=lambda e: (e != e, e))  # NaN is the worst
    case = self_check.Case(1, window + 1, 2 * window + 1, 3, True)
    inputs = self_check.make_inputs(case, device, dtype, window, 2, head_dim)
    runs = []
    for _ in range(2):
        out = triton_attention.triton_attention(*inputs, window, 2)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), [x for x in inputs if x is not None])])
    return dict(
        passed=all(error <= self_check.TOLERANCES[self_check.precision(dtype)] for error in errors.values()),
        same_bits=all(torch.equal(a, b) for a, b in zip(*runs)), seconds=time.perf_counter() - start, **errors)


def check_modes(args: argparse.Namespace, scale: Scale, report: Report) -> Iterator[Row]:
    """A model with the kernel against the masked form, in the ways that people run it."""
    device = torch.device(args.device)
    size = min(scale.image_sizes)
    for name, mode in modes(scale).items():
        start = time.perf_counter()
        model = scale.compiled_model if name == 'compiled' else scale.model
        try:
            kernel, masked = (
                [x.cpu() for x in mode(form, model, size, device)] for form in ('triton', 'masked'))
        except Exception as error:  # each is worth knowing
            yield dict(mode=name, error=error_line(error))
            continue
        # all gradients as one: some are zero but for rounding
        grads, wanted = (torch.cat([x.flatten() for x in (*xs[1:], xs[0][:0])]) for xs in (kernel, masked))
        yield dict(
            mode=name, logits=self_check.relative_error(kernel[0], masked[0].double()),
            gradients=self_check.relative_error(grads, wanted.double()), seconds=time.perf_counter() - start)


def run_model(
        implementation: str,
        name: str,
        size: int,
        device: torch.device,
        dtype: Optional[torch.dtype] = None,
        prepare: Callable[[torch.nn.Module], Any] = lambda model: model,
        memory_format: torch.memory_format = torch.contiguous_format,
) -> List[torch.Tensor]:
    """Logits and gradients of all parameters, of the same model and images every time."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, num_classes=10)
    model = model.to(device).to(memory_format=memory_format)
    x = torch.randn(2, 3, size, size).to(device, memory_format=memory_format)
    run = prepare(model)
    with attention_implementation(implementation), torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = run(x).float()
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def checkpointed(model: Any) -> torch.nn.Module:
    """A model that recomputes its blocks in the backward pass."""
    model.set_grad_checkpointing(True)
    return model


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(os.path.join(folder, 'store'), 1)
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def run_distributed(implementation: str, name: str, size: int, device: torch.device) -> List[torch.Tensor]:
    """`run_model` in DistributedDataParallel."""
    with process_group(device):
        return run_model(implementation, name, size, device, prepare=torch.nn.parallel.DistributedDataParallel)


def run_chosen(
        implementation: str,
        name: str,
        size: int,
        device: torch.device,
        dtype: Optional[torch.dtype] = None,
) -> List[torch.Tensor]:
    """`run_model`, in place of the kernel with what is chosen for a user; a self-check that fails is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'The Triton kernels')
        return run_model('auto' if implementation == 'triton' else implementation, name, size, device, dtype)


def run_beside_cpu(implementation: str, name: str, size: int, device: torch.device) -> List[torch.Tensor]:
    """`run_model`, of the masked form on the CPU."""
    return run_model(implementation, name, size, torch.device('cpu') if implementation == 'masked' else device)


def run_graph(implementation: str, name: str, size: int, device: torch.device) -> List[torch.Tensor]:
    """Logits of a captured CUDA graph, of other images than those it was captured with."""
    if device.type != 'cuda':
        raise RuntimeError('there are CUDA graphs on CUDA devices only')
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, num_classes=10).eval().to(device)
    x = torch.randn(2, 3, size, size).to(device)
    with torch.no_grad(), attention_implementation(implementation):
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(x)
        x.copy_(x.flip(0))
        graph.replay()
    return [logits.float()]


def modes(scale: Scale) -> Dict[str, Callable[..., List[torch.Tensor]]]:
    """The ways to run a model, from an implementation, a model's name, an image size and a device."""
    return {
        'as chosen, float32': run_chosen,
        'as chosen, autocast bfloat16': partial(run_chosen, dtype=torch.bfloat16),
        'float32': run_model,
        'float32, the masked form on the CPU': run_beside_cpu,
        'autocast bfloat16': partial(run_model, dtype=torch.bfloat16),
        'autocast float16': partial(run_model, dtype=torch.float16),
        'channels_last': partial(run_model, memory_format=torch.channels_last),
        'gradient checkpointing': partial(run_model, prepare=checkpointed),
        'CUDA graph': run_graph,
        'DistributedDataParallel': run_distributed,
        'compiled': partial(run_model, prepare=partial(torch.compile, backend=scale.compiler)),
    }


class Stage(NamedTuple):
    """The maps of attention in a stage of a model."""

    side: int
    dim: int
    num_heads: int
    window_size: int
    num_additional: int
    batch: int


def stages(scale: Scale, size: int) -> List[Stage]:
    """Those of the model for images of some size, in batches that fill a GPU."""
    model: Any = timm.create_model(scale.model, img_size=size, device='meta')
    found, side = [], size
    for stage in model.stages:
        side = -(-side // stage.embed.patch_size)
        attn = stage.blocks[0].attn
        if hasattr(attn, 'window_size'):
            found.append(Stage(side, attn.dim, attn.num_heads, attn.window_size, attn.rank + attn.num_global_tokens,
                               min(scale.max_batch, max(1, (1024 // size) ** 2))))
    return found


def time_attention(args: argparse.Namespace, scale: Scale, report: Report) -> Iterator[Row]:
    """Attention alone, in each stage of the model, beside what its bytes and its products take at least."""
    device = torch.device(args.device)
    settings = [(dtype, size) for dtype in scale.dtypes for size in scale.image_sizes]
    calls = [(*setting, names) for names in (('triton', 'masked'), ('tiled',)) for setting in settings]
    calls.insert(len(scale.image_sizes), (*settings[0], OTHERS))  # these compile for long: once is enough
    for dtype, size, names in calls:
        for stage in stages(scale, size):
            inputs = stage_inputs(stage, device, getattr(torch, dtype))
            for name in names:
                shared = dict(
                    image_size=size, map=stage.side, channels=stage.dim, head_dim=stage.dim // stage.num_heads,
                    window=stage.window_size, batch=stage.batch, dtype=dtype, implementation=name)
                try:
                    attend = attention(name, device)
                    yield dict(shared, **attention_times(attend, inputs, stage, scale, name in IMPLEMENTATIONS))
                except Exception as error:  # other people's, or out of memory
                    yield dict(shared, error=describe_error(error))


def stage_inputs(stage: Stage, device: torch.device, dtype: torch.dtype) -> List[torch.Tensor]:
    """Queries and keys side by side as a layer makes them, additional keys and the bias."""
    w, halo = stage.window_size, stage.window_size + 2 * halo_width(stage.window_size)
    shapes = [(stage.batch, stage.side, stage.side, 3 * stage.dim), (stage.batch, stage.num_additional, 2, stage.dim),
              (stage.num_heads, w, w, halo, halo)]
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def attention(name: str, device: torch.device) -> Callable[..., torch.Tensor]:
    """Ours or one of others, from queries, keys, additional keys and a bias."""
    if name == 'flex_attention':
        return FlexAttention(compiled=device.type == 'cuda')
    if name == 'natten':
        return neighborhood_attention

    def ours(*call: Any) -> torch.Tensor:
        with attention_implementation(name):
            return window_attention(*call)
    return ours


def attention_times(
        attend: Callable[..., torch.Tensor],
        inputs: List[torch.Tensor],
        stage: Stage,
        scale: Scale,
        trains: bool,
) -> Row:
    """Milliseconds of the device forward and with the backward pass, as multiples of the least, and memory."""
    qkv = inputs[0]
    tokens, C = qkv[..., 0].numel(), stage.dim
    keys = (stage.window_size + 2 * halo_width(stage.window_size)) ** 2 + stage.num_additional
    row = {}
    for name, maps, products in (('forward', 4, 2), ('train', 12, 7))[:1 + trains]:
        step = partial(attention_step, attend, inputs, stage, name == 'train')
        seconds, peak = measure_graph(step, qkv.device, scale.seconds)
        least = max(maps * tokens * C * qkv.element_size() / BANDWIDTH, 2 * products * tokens * C * keys / FLOPS)
        row.update({f'{name}_ms': seconds * 1e3, f'{name}_of_least': seconds / least, f'{name}_MiB': peak})
    return row


def attention_step(
        attend: Callable[..., torch.Tensor],
        inputs: List[torch.Tensor],
        stage: Stage,
        trains: bool,
) -> None:
    """Run attention, and its backward pass if it is to train."""
    qkv, additional, bias = inputs
    C = stage.dim
    with torch.set_grad_enabled(trains):
        out = attend(
            qkv[..., :C], qkv[..., C:].unflatten(-1, (2, C)), additional, bias, stage.window_size, stage.num_heads)
    if trains:
        torch.autograd.grad(out, inputs, out.detach())


def measure(step: Callable[[], Any], device: torch.device, seconds: float) -> Tuple[float, Optional[float]]:
    """Median seconds of a step, and the MiB that it takes at its peak above what there was before."""
    step()
    synchronize(device)
    peak = None
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        peak = (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20
    times: List[float] = []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < seconds and len(times) < 100:
        begin = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times), peak


def measure_graph(
        step: Callable[[], Any],
        device: torch.device,
        seconds: float,
) -> Tuple[float, Optional[float]]:
    """`measure` as a CUDA graph where there are any: the time of the device, not that of the launches."""
    if device.type != 'cuda':
        return measure(step, device, seconds)
    peak = measure(step, device, 0.)[1]
    graph, replays = torch.cuda.CUDAGraph(), 10  # at a time, to wait for the device rarely
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        for _ in range(replays):
            graph.replay()

    return measure(replay, device, seconds)[0] / replays, peak


class FlexAttention:
    """The same attention by torch's flex_attention: tokens by window, a block mask, the bias by position."""

    def __init__(self, compiled: bool):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        self.create_block_mask, self.compiled = create_block_mask, compiled
        self.attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        self.masks: Dict[Tuple[int, ...], Any] = {}

    def __call__(
            self,
            q: torch.Tensor,
            kv: torch.Tensor,
            additional_kv: torch.Tensor,
            bias: torch.Tensor,
            window_size: int,
            num_heads: int,
    ) -> torch.Tensor:
        """See `window_attention`."""
        H, W = q.shape[1:3]
        E, w, p = additional_kv.shape[1], window_size, halo_width(window_size)
        key = (H, W, E, w)
        index = torch.arange(H * W, device=q.device)
        order = (index // W // w * (W + w) + index % W // w).argsort(stable=True)  # by window
        y, x = order // W, order % W
        top, left = y // w * w - p, x // w * w - p

        def place(query: torch.Tensor, number: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
            token = (number - E).clamp(min=0)
            return y[token] - top[query], x[token] - left[query]

        def sees(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
            i, j = place(query, number)
            return (number < E) | (i >= 0) & (i < w + 2 * p) & (j >= 0) & (j < w + 2 * p)

        def add_bias(
                logit: torch.Tensor,
                b: torch.Tensor,
                h: torch.Tensor,
                query: torch.Tensor,
                number: torch.Tensor,
        ) -> torch.Tensor:
            i, j = (n.clamp(0, w + 2 * p - 1) for n in place(query, number))
            return logit + torch.where(number < E, 0., bias[h, y[query] % w, x[query] % w, i, j])

        if key not in self.masks:
            self.masks[key] = self.create_block_mask(
                sees, None, None, H * W, E + H * W, device=q.device, **dict(_compile=True) if self.compiled else {})
        pairs = torch.cat([additional_kv, kv.flatten(1, 2)[:, order]], dim=1).unflatten(-1, (num_heads, -1))
        queries = q.flatten(1, 2)[:, order].unflatten(-1, (num_heads, -1)).transpose(1, 2)
        out = self.attend(
            queries, pairs[:, :, 0].transpose(1, 2), pairs[:, :, 1].transpose(1, 2), score_mod=add_bias,
            block_mask=self.masks[key])
        return out.transpose(1, 2).flatten(2)[:, order.argsort()].unflatten(1, (H, W))


def neighborhood_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: torch.Tensor,
        window_size: int,
        num_heads: int,
) -> torch.Tensor:
    """NATTEN's, of about as many keys, which slide with each query; without bias and additional keys."""
    from natten import na2d
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (q, kv[..., 0, :], kv[..., 1, :]))
    return na2d(q, k, v, kernel_size=window_size + 2 * halo_width(window_size) - 1 + window_size % 2).flatten(3)


def time_models(args: argparse.Namespace, scale: Scale, report: Report) -> Iterator[Row]:
    """Models: ours with each implementation, the released code, others of the size; one image, and as many as fit."""
    device = torch.device(args.device)
    ours = [f'{scale.model}/{name}' for name in ('triton', 'masked')]
    others = [RELEASED + scale.model] * bool(args.reference) + list(scale.peers)
    settings = [
        (execution, size, batch, mode) for execution in scale.executions for size in scale.image_sizes
        for batch in (1, None) for mode in ('forward', 'train')]
    peaks: Dict[Tuple[str, str, int], Optional[float]] = {}
    for execution, size, batch, mode in settings:
        for label in ours + others:
            setting = Setting(mode, batch or 1, scale.dtypes[0], execution, size, size, args.device, args.reference)
            name, _, implementation = label.partition('/')
            if device.type == 'cuda':
                torch.cuda.empty_cache()
            if batch is None:
                peak = peaks.get((label, mode, size))
                setting = replace(setting, batch_size=largest_batch(peak, device, scale.max_batch))
                if setting.batch_size == 1:  # measured before
                    continue
            shared = dict(model=label, image_size=size, batch=setting.batch_size, mode=mode, execution=execution,
                          dtype=setting.dtype)
            try:
                torch.compiler.reset()
                with attention_implementation(implementation or 'auto'):
                    torch.manual_seed(0)
                    with device:  # random numbers come faster there
                        model = build(name, setting)
                    seconds, peak = measure(make_step(model, setting), device, scale.seconds)
                    if (device.type, execution, mode) == ('cuda', 'eager', 'forward'):
                        shared['graph_ms'] = graph_milliseconds(model, setting, scale.seconds)
            except Exception as error:  # other people's models, or out of memory
                yield dict(shared, error=describe_error(error))
                continue
            peaks.setdefault((label, mode, size), peak)
            yield dict(shared, ms=seconds * 1e3, images_per_s=setting.batch_size / seconds, MiB=peak)


def graph_milliseconds(model: torch.nn.Module, setting: Setting, seconds: float) -> Optional[float]:
    """Median time of the forward pass as a CUDA graph, which the CPU launches at once; None if it cannot be one."""
    device = torch.device(setting.device)
    x = torch.randn(setting.batch_size, 3, setting.height, setting.width, device=device)
    with torch.no_grad(), torch.autocast(device.type, getattr(torch, setting.dtype), cache_enabled=False):
        try:
            return measure_graph(partial(model, x), device, seconds)[0] * 1e3
        except Exception:  # other people's models may wait for the device
            return None


def largest_batch(peak: Optional[float], device: torch.device, limit: int) -> int:
    """The largest power of two of images that should fit, by what one takes in MiB."""
    if peak is None or device.type != 'cuda':
        return limit
    batch = 1
    while batch < limit and 2 * batch * peak * 2 ** 20 < .8 * torch.cuda.mem_get_info(device)[0]:
        batch *= 2
    return batch


def profile_models(args: argparse.Namespace, scale: Scale, report: Report) -> Iterator[Row]:
    """The ten operators that take most of a model's time."""
    device = torch.device(args.device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for mode in ('forward', 'train'):
        size = scale.image_sizes[0]
        setting = Setting(mode, 1, scale.dtypes[0], 'eager', size, size, args.device, None)
        with attention_implementation('triton'):
            step = make_step(build(scale.model, setting), setting)
            step()
            with torch.profiler.profile(activities=activities) as profile:
                step()

        def own_time(event: Any) -> float:
            return event.self_device_time_total if device.type == 'cuda' else event.self_cpu_time_total

        events = sorted(
            (event for event in profile.key_averages()  # on a GPU, kernels; what launched them has the same times
             if device.type != 'cuda' or event.device_type == torch.autograd.DeviceType.CUDA),
            key=own_time, reverse=True)
        total = sum(map(own_time, events))
        for event in events[:10]:
            yield dict(mode=mode, image_size=size, operator=event.key[:80], calls=event.count,
                       ms=own_time(event) / 1e3, share=own_time(event) / total)


CANDIDATES = {
    'forward': [
        (64, 16, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 4, 4), (64, 32, 2, 3), (64, 64, 8, 2),
        (32, 32, 2, 2), (32, 64, 2, 3)],
    'query_grad': [
        (64, 16, 4, 2), (64, 64, 4, 2), (64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 8, 2), (64, 64, 8, 2), (32, 32, 2, 2),
        (32, 64, 4, 2)],
    'key_grad': [
        (16, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 3), (16, 64, 4, 3), (32, 64, 8, 2), (64, 64, 8, 2), (32, 32, 2, 2),
        (64, 32, 4, 2)],
    'bias_grad': [(64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 8, 2), (32, 32, 4, 2), (64, 32, 4, 1)],
    'additional_grad': [(64, 16, 1, 2), (128, 16, 4, 2), (64, 16, 4, 3), (64, 16, 2, 2), (32, 16, 1, 2)],
}


def time_blocks(args: argparse.Namespace, scale: Scale, report: Report) -> Iterator[Row]:
    """Other blocks, warps and stages of each kernel than ours, by the time of the pass that it belongs to."""
    device, dtype = torch.device(args.device), getattr(torch, scale.dtypes[0])
    some = stages(scale, scale.image_sizes[0])[:3]
    calls = [(stage, kernel, blocks) for stage in some for kernel, candidates in CANDIDATES.items() for blocks in (
        triton_attention.kernel_blocks(kernel, dtype, stage.dim // stage.num_heads),
        *(triton_attention.Blocks(*candidate) for candidate in candidates))]
    if device.type == 'cuda':  # one after the other they would compile for minutes
        sizes = {
            (stage.window_size, stage.dim // stage.num_heads, kernel, blocks): None for stage, kernel, blocks in calls}
        with ProcessPoolExecutor(num_processes(), multiprocessing.get_context('spawn')) as pool:
            for future in [pool.submit(compile_blocks, args.device, scale.dtypes[0], *size) for size in sizes]:
                future.exception()  # timing it fails too, and says so
    for stage, kernel, blocks in calls:
        inputs, head_dim = stage_inputs(stage, device, dtype), stage.dim // stage.num_heads
        step = partial(attention_step, triton_attention.triton_attention, inputs, stage, kernel != 'forward')
        row = dict(kernel=kernel, map=stage.side, head_dim=head_dim, dtype=scale.dtypes[0], **blocks._asdict(),
                   ours=blocks == triton_attention.kernel_blocks(kernel, dtype, head_dim))
        try:
            with other_blocks(kernel, blocks):
                seconds, _ = measure_graph(step, device, scale.seconds / 2)
            yield dict(row, ms=seconds * 1e3)
        except Exception as error:  # too much shared memory for this device
            yield dict(row, error=describe_error(error))


def compile_blocks(
        device_name: str,
        dtype_name: str,
        window: int,
        head_dim: int,
        kernel: str,
        blocks: triton_attention.Blocks,
) -> None:
    """Have a kernel with some blocks in Triton's cache."""
    stage = Stage(4 * window, 2 * head_dim, 2, window, 9, 1)
    inputs = stage_inputs(stage, torch.device(device_name), getattr(torch, dtype_name))
    with other_blocks(kernel, blocks):
        attention_step(triton_attention.triton_attention, inputs, stage, kernel != 'forward')
    synchronize(torch.device(device_name))


@contextmanager
def other_blocks(kernel: str, blocks: triton_attention.Blocks) -> Iterator[None]:
    """Launch one kernel with other blocks, and the others as usual."""
    usual = triton_attention.kernel_blocks

    def chosen(name: str, dtype: torch.dtype, head_dim: int) -> triton_attention.Blocks:
        return blocks if name == kernel else usual(name, dtype, head_dim)

    setattr(triton_attention, 'kernel_blocks', chosen)  # noqa: B010
    try:
        yield
    finally:
        setattr(triton_attention, 'kernel_blocks', usual)  # noqa: B010


PIECES: Dict[str, Callable[[argparse.Namespace, Scale, Report], Iterator[Row]]] = {
    'kernels': check_kernels,
    'modes': check_modes,
    'models': time_models,
    'profile': profile_models,
    'blocks': time_blocks,
    'attention': time_attention,
}
SHARES = dict(kernels=.25, modes=.1, models=.3, profile=.05, blocks=.15, attention=.15)  # of the minutes


# Results

def overrides(data: Row) -> List[Row]:
    """Where another implementation was faster than the kernel at every size, forward and training step together."""
    calls: Dict[Tuple[Any, ...], Dict[str, float]] = {}
    for row in data['pieces'].get('attention', []):
        if row.get('implementation') in IMPLEMENTATIONS and 'error' not in row:
            key = row['dtype'], row['window'], row['head_dim'], row['map'], row['batch']
            calls.setdefault(key, {})[row['implementation']] = row['forward_ms'] + row['train_ms']
    fastest: Dict[Tuple[Any, ...], Set[str]] = {}
    for (dtype, window, head_dim, *_), times in calls.items():
        fastest.setdefault((dtype, window, head_dim), set()).add(min(times, key=lambda name: times[name]))
    return [
        dict(gpu=data['machine']['gpu'], dtype=dtype, window_size=window, head_dim=head_dim, implementation=name)
        for (dtype, window, head_dim), (name, *others) in fastest.items() if name != 'triton' and not others]


def line(row: Row) -> str:
    """A row on one line."""
    return ', '.join(f'{name} {cell(value)}' for name, value in row.items())


def cell(value: Any) -> str:
    """A value for people: three digits."""
    return '' if value is None else f'{value:.3g}' if isinstance(value, float) else str(value)


def markdown(data: Row) -> str:
    """All pieces as tables."""
    machine = data['machine']
    versions = ', '.join(f'{name} {machine[name]}' for name in ('torch', 'triton', 'timm'))
    lines = [f'# {machine["device"]}, {machine["gpu"]}, {versions}', '']
    if data['unfinished']:
        lines += [f'Not finished in {data["minutes"]:g} minutes: {", ".join(data["unfinished"])}.', '']
    for name, rows in data['pieces'].items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines += [f'## {name}', '', *(PIECES[name].__doc__ or '').splitlines()[:1], ''] if name in PIECES else [
            f'## {name}', '']
        lines += ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)] if rows else ['None.']
        for row in rows:
            lines.append('| ' + ' | '.join(cell(row.get(column)).replace('|', '/') for column in columns) + ' |')
        lines.append('')
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
