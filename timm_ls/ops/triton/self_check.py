"""Do the kernels compute what they should, on this device? Found out where they run, before they are trusted.

The first time that a process would take them for a device, dtype, window (or number of landmarks) and head width,
`failure` runs them on a few small maps beside plain operations in float64, forward and, where gradients are needed,
backward. What was found is kept on disk, for the device, the driver, torch, triton and the source of the kernels, and
later processes look it up. Nothing is timed: what is chosen depends on nothing but that record.

`TIMM_LS_SELF_CHECK=skip` trusts the kernels unseen; `always` checks once in every process, whatever the record says. A
kernel that leaves the device itself unusable (an illegal address) is beyond what a process can check and survive.
"""
import ctypes
import hashlib
import inspect
import json
import os
import sys
import tempfile
import threading
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..masked import plain_attention
from ..merge import pool_plain
from . import attention, landmarks

__all__ = ['failure']

# Largest difference over the largest value that the rounding of inputs, weights and results explains; 'tf32' is float32
# with products as the user allows them. A wrong scale or mask makes a difference of tenths.
TOLERANCES = {'float32': 1e-4, 'tf32': 2e-2, 'bfloat16': 4e-2, 'float16': 5e-3}
SETTING = 'TIMM_LS_SELF_CHECK'

_lock = threading.Lock()
_known: Dict[Tuple[Any, ...], Optional[str]] = {}  # what was found, by what was checked; None is good
_has_warned = False


class Record(NamedTuple):
    """What a check has found; None if nothing is wrong."""

    seen: Optional[str]
    is_final: bool = True  # whether another run would find the same


@torch.compiler.assume_constant_result
def failure(
        kind: str,
        device: torch.device,
        dtype: torch.dtype,
        size: int,
        head_dim: int,
        needs_grad: bool,
) -> Optional[str]:
    """Return why the kernels are not to be trusted with such a call, or None if they are.

    It raises nothing that a kernel raises, and warns once in a process. The check runs in a thread of its own, because
    modes of the caller (autocast, fake tensors, inference, checkpointing, ...) are those of its thread. Compilers take
    the answer for a constant.

    Args:
        kind: Of the kernels, a name in `DIFFERENCES`.
        device: Where the tensors of the call are.
        dtype: Their type.
        size: Rows and columns of a window; the number of landmarks.
        head_dim: Channels of a head.
        needs_grad: Whether the call is to have a gradient.

    Raises:
        ValueError: The environment variable TIMM_LS_SELF_CHECK is neither 'skip' nor 'always'.
    """
    setting = os.environ.get(SETTING, '')
    if setting not in ('', 'skip', 'always'):
        raise ValueError(f"{SETTING}={setting!r}: expected 'skip', 'always', or that it is not set.")
    if setting == 'skip':
        return None
    call = kind, device, dtype, size, head_dim, needs_grad
    key = (*call, precision(dtype))
    with _lock:  # other threads wait for the answer
        if key not in _known:
            subject = describe(*call)
            record = None if setting == 'always' else read_record(subject)
            if record is None and device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
                seen = 'they were not checked before this CUDA graph was captured: run the model once before'
                return warn(seen, kind, size, head_dim, dtype)
            if record is None:
                record = run_apart(*call)
                if record.is_final:
                    write_record(subject, record.seen)
            _known[key] = record.seen
        found = _known[key]
        return None if found is None else warn(found, kind, size, head_dim, dtype)


def warn(seen: str, kind: str, size: int, head_dim: int, dtype: torch.dtype) -> str:
    """Say what was seen, the first time in this process, and return it."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        what = f'windows of {size} x {size}' if kind == 'window attention' else f'{size} landmarks'
        warnings.warn(
            f'The Triton kernels of {kind} are not used, but a slower form: {seen} ({what}, heads of {head_dim}'
            f' channels, {dtype}). {SETTING}=always checks them again.', stacklevel=3)
    return seen


def precision(dtype: torch.dtype) -> str:
    """Return the name of a type, or 'tf32' for float32 with products that the user lets be of TF32."""
    is_tf32 = dtype == torch.float32 and attention.allows_tf32()
    return 'tf32' if is_tf32 else str(dtype).removeprefix('torch.')


# Records


def describe(
        kind: str,
        device: torch.device,
        dtype: torch.dtype,
        size: int,
        head_dim: int,
        needs_grad: bool,
) -> Dict[str, Any]:
    """Return all that the result of a check may depend on."""
    return dict(
        **describe_device(device), kind=kind, precision=precision(dtype), size=size, head_dim=head_dim,
        backward=needs_grad, torch=torch.__version__, **describe_kernels())


def describe_device(device: torch.device) -> Dict[str, Any]:
    """Return a device's name and driver; two devices of a kind are one."""
    if device.type != 'cuda':
        return dict(device=device.type)
    return dict(
        device=torch.cuda.get_device_name(device), capability=list(torch.cuda.get_device_capability(device)),
        driver=driver_version())


@cache
def driver_version() -> int:
    """Return the version of CUDA that the driver knows, as a number; torch has no name for it."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL('nvcuda.dll' if sys.platform == 'win32' else 'libcuda.so.1')
        driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):  # it is elsewhere: a record does not tell drivers apart
        pass
    return version.value


@cache
def describe_kernels() -> Dict[str, Any]:
    """Return the version of the compiler and what the kernels are."""
    modules = (attention, attention.kernels, landmarks, landmarks.landmark_kernels)
    source = ''.join(map(inspect.getsource, modules))
    return dict(
        triton=attention.triton.__version__, interpreted=attention.is_interpreted(),
        kernels=hashlib.sha256(source.encode()).hexdigest())


def record_file(subject: Dict[str, Any]) -> Path:
    """Return where a record is kept: in the user's cache."""
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'timm_ls' / 'self_check'
    name = json.dumps(subject, sort_keys=True)
    return folder / f'{hashlib.sha256(name.encode()).hexdigest()[:32]}.json'


def read_record(subject: Dict[str, Any]) -> Optional[Record]:
    """Return what an earlier process has found, if anything can be read of it."""
    try:
        content = json.loads(record_file(subject).read_text())
        if content['subject'] == subject and isinstance(content['seen'], (str, type(None))):
            return Record(content['seen'])
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):  # none, no home, cut off, of another kind
        pass
    return None


def write_record(subject: Dict[str, Any], seen: Optional[str]) -> None:
    """Keep what was found, in one step, so that no process reads half of it; where nothing can be written, do not."""
    try:
        path = record_file(subject)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile('w', dir=path.parent, suffix='.tmp', delete=False) as file:
            json.dump(dict(subject=subject, seen=seen), file, indent=2)
        os.replace(file.name, path)
    except (OSError, RuntimeError):
        pass


# The check


def run_apart(*call: Any) -> Record:
    """Run `check` in a thread of its own; what it raises is found too."""
    found: List[Record] = []

    def run() -> None:
        try:
            found.append(Record(check(*call)))
        except Exception as error:  # the kernels' compiler and the device's driver may raise anything
            text = (str(error).strip() or 'no message').splitlines()[0]
            found.append(Record(f'they raised {type(error).__name__}: {text[:300]}', is_final=False))

    thread = threading.Thread(target=run, name='timm_ls self-check', daemon=True)
    thread.start()
    thread.join()
    return found[0]


class Case(NamedTuple):
    """Maps to check kernels on."""

    batch: int
    height: int
    width: int
    num_additional: int
    has_bias: bool
    first_row: int = 0


def cases(window_size: int) -> Iterator[Case]:
    """Maps with whole and clipped regions and a ragged end; a part of the rows; a halo that is larger than the map."""
    rows, cols = (n * window_size for n in attention.TILES.get(window_size, (1, 1)))
    yield Case(2, 3 * rows - window_size // 2, 3 * cols - window_size // 2, 9, True)
    # a window of one key alone has no gradient to compare
    yield Case(1, rows + window_size + 1, cols, int(window_size == 1), False, window_size)
    yield Case(1, 1, window_size // 2 + 1, 1, True)


def attention_differences(
        device: torch.device,
        dtype: torch.dtype,
        window_size: int,
        head_dim: int,
        needs_grad: bool,
        more_cases: Sequence[Case] = (),
) -> Iterator[Tuple[str, str, float]]:
    """For all cases, how far outputs and gradients are from those in float64, from the same numbers.

    Yields:
        The map, what differs, and by which part of the largest value.
    """
    num_heads = 2
    names = ('queries', 'keys and values', 'additional keys and values', 'the bias')
    for case in (*cases(window_size), *more_cases):
        def attend(function: Any, inputs: Any, case: Case = case) -> torch.Tensor:
            q, *others = inputs
            return function(q[:, case.first_row:], *others, window_size, num_heads, case.first_row)

        inputs = make_inputs(case, device, dtype, window_size, num_heads, head_dim)
        ours, exact = partial(attend, attention.triton_attention), partial(attend, plain_attention)
        for name, error in compare(ours, exact, inputs, names, needs_grad):
            yield f'{case.batch} maps of {case.height} x {case.width}', name, error


def landmark_differences(
        device: torch.device,
        dtype: torch.dtype,
        rank: int,
        head_dim: int,
        needs_grad: bool,
) -> Iterator[Tuple[str, str, float]]:
    """The same for landmarks: several runs of tokens, and two tokens, as one alone gives logits no gradient."""
    generator = torch.Generator().manual_seed(0)
    num_heads, names = 2, ('logits', 'keys and values')

    def pool(function: Any, inputs: Any) -> torch.Tensor:
        logits, kv = inputs
        return function(logits, kv, num_heads)

    ours, exact = partial(pool, landmarks.triton_pool_tokens), partial(pool, pool_plain)
    for batch, tokens in ((2, 200), (1, 2)):
        shapes = (batch, tokens, num_heads * rank), (batch, tokens, 2, num_heads * head_dim)
        inputs = [draw(shape, generator, device, dtype) for shape in shapes]
        for name, error in compare(ours, exact, inputs, names, needs_grad):
            yield f'{batch} maps of {tokens} tokens', name, error


def compare(
        function: Callable[[Sequence[Any]], torch.Tensor],
        exact: Callable[[Sequence[Any]], torch.Tensor],
        inputs: Sequence[Optional[torch.Tensor]],
        names: Sequence[str],
        needs_grad: bool,
) -> Iterator[Tuple[str, float]]:
    """How far a function's output and gradients are from those of an exact one in float64, by parts of the largest."""
    wide = [None if x is None else x.detach().double().requires_grad_(needs_grad) for x in inputs]
    with torch.set_grad_enabled(needs_grad):
        out, expected = function(inputs), exact(wide)
    yield 'outputs', relative_error(out, expected)
    if needs_grad:
        weight = torch.linspace(-2, 3, out.numel(), device=out.device, dtype=torch.float64).sin().reshape(out.shape)
        grads, wanted = (
            torch.autograd.grad(y, [x for x in xs if x is not None], weight.to(y.dtype))
            for y, xs in ((out, inputs), (expected, wide)))
        for name, x, y in zip(names, grads, wanted):
            yield f'gradients of {name}', relative_error(x, y)


def make_inputs(
        case: Case,
        device: torch.device,
        dtype: torch.dtype,
        window_size: int,
        num_heads: int,
        head_dim: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
    """Return queries, keys, additional keys and a bias or None, with gradients; the same numbers everywhere."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width, num_additional, has_bias, _ = case
    C, halo = num_heads * head_dim, window_size + 2 * (window_size // 2)
    shapes = [
        (batch, height, width, C), (batch, height, width, 2, C), (batch, num_additional, 2, C),
        (num_heads, window_size, window_size, halo, halo)]
    q, kv, additional_kv, bias = (draw(shape, generator, device, dtype) for shape in shapes)
    return q, kv, additional_kv, bias if has_bias else None


def draw(
        shape: Tuple[int, ...],
        generator: torch.Generator,
        device: torch.device,
        dtype: torch.dtype,
) -> torch.Tensor:
    """Return normal numbers, with a gradient."""
    return torch.randn(shape, generator=generator, device='cpu', dtype=torch.float32).to(device, dtype).requires_grad_()


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the largest difference over the largest value of `y`."""
    if y.numel() == 0:
        return 0.
    x, y = x.detach().double(), y.detach()
    return ((x - y).abs().max() / y.abs().max().clamp(min=1e-6)).item()


DIFFERENCES = {'window attention': attention_differences, 'landmarks': landmark_differences}


def check(
        kind: str,
        device: torch.device,
        dtype: torch.dtype,
        size: int,
        head_dim: int,
        needs_grad: bool,
) -> Optional[str]:
    """Compare kernels with plain operations; return where they differ by more than rounding explains, if they do."""
    tolerance = TOLERANCES[precision(dtype)]
    for place, name, error in DIFFERENCES[kind](device, dtype, size, head_dim, needs_grad):
        if not error <= tolerance:  # NaN is not
            return (f'{name} differ from those of plain operations by {error:.1e} of the largest, {tolerance:.0e}'
                    f' expected, on {place}')
    return None
