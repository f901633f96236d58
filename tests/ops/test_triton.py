"""Triton's kernels of window attention: beside the contract's tests, what is theirs alone; a torch without Triton."""
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import reference
import torch
from layers import run as run_layer
from layers import worst as worst_of_all
from paths import ROOT
from test_window_attention import arguments, call, draw, forced, random_case, with_gradients, worst
from triton_interpreter import DEVICE, needs_device, not_interpreted, run_interpreted

from timm_ls import LongShortAttention2d, attention_implementation
from timm_ls.ops.window_attention import WindowCall, implementations, window_attention

pytest.importorskip('triton', reason='triton is not installed: torch brings it along on Linux only')
from timm_ls.ops.triton import attention  # noqa: E402
from timm_ls.ops.triton.attention import triton_attention, why_not  # noqa: E402

TRITON = implementations()['triton']


@not_interpreted
@pytest.mark.parametrize('marker', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_under_the_interpreter(marker):
    """What needs a device, here and among the tests of the contract, on a CPU."""
    print(run_interpreted(
        '-m', marker, '-k', 'triton or gpu_check',
        *(f'tests/ops/test_{name}.py' for name in (
            'window_attention', 'triton', 'triton_landmarks', 'triton_self_check')),
        'tests/test_gpu_check.py'))


def compare(case, dtype=torch.float32, seed=0):
    """How far values and gradients are from those of the oracle in float64, from the same numbers."""
    tensors = draw(case, seed, DEVICE)
    expected = with_gradients(reference.window_attention, case, tensors)
    typed = [None if x is None else x.to(dtype) for x in tensors]
    return worst(with_gradients(forced(TRITON), case, typed), expected)


# Values and gradients

# window, height, width, batch, heads, channels per head, additional keys, bias, first row, rows (None for all)
CASES = [
    (1, 5, 9, 2, 1, 16, 1, True, 0, None),  # no halo, tiles of 4 x 8 windows, cut by the edge of the map
    (2, 9, 11, 1, 1, 80, 4, True, 2, 5),  # as in Surya; heads of 64 + 16 channels, tiles of 2 x 4 windows
    (2, 3, 2, 1, 2, 16, 0, False, 0, None),  # a table without a bias
    (6, 7, 8, 1, 1, 96, 0, True, 0, None),
    (7, 15, 22, 1, 1, 8, 9, True, 0, None),  # a window with a whole halo
    (7, 8, 3, 2, 1, 128, 40, False, 0, None),  # additional keys in several blocks
    (10, 11, 3, 1, 1, 40, 2, True, 0, None),  # two blocks of queries
]


@needs_device
@pytest.mark.parametrize('case', CASES, ids=str)
def test_tiles_and_widths(case):
    """Every kind of tile, border and head width."""
    error = compare(case)
    print(f'{case}: {error:.1e}')
    assert error <= TRITON.tolerance


@needs_device
@pytest.mark.slow
def test_oracle_sweep():
    """The contract's random settings."""
    errors = [compare(random_case(seed), seed=seed) for seed in range(90)]
    print(f'float32 {max(errors):.1e}')
    assert max(errors) <= TRITON.tolerance


@needs_device
@pytest.mark.parametrize('dtype, bound', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_half_precision(dtype, bound):
    """Products and sums in float32: errors are those of inputs, weights and results rounded once."""
    error = compare((7, 8, 9, 1, 1, 80, 9, True, 0, None), dtype)
    print(f'{dtype}: {error:.1e}')
    assert error <= bound


@needs_device
@pytest.mark.parametrize('blocks', [(16, 32), (32, 16)])
def test_blocks(blocks, monkeypatch):
    """The size of blocks changes nothing: the interpreter takes others than compiled kernels."""
    monkeypatch.setattr(attention, 'kernel_blocks', lambda *args: attention.Blocks(*blocks, 4, 2))
    assert compare((5, 6, 4, 1, 1, 24, 3, True, 0, None)) <= TRITON.tolerance


@needs_device
@pytest.mark.parametrize('programs', [1, 7])
def test_splits(programs, monkeypatch):
    """Neither does the number of programs that sums are split over; runs of tiles cross rows and images."""
    monkeypatch.setattr(attention, 'PROGRAMS', programs)
    monkeypatch.setattr(attention, 'kernel_blocks', lambda *args: attention.Blocks(32, 16, 4, 2))
    assert compare((2, 9, 11, 3, 1, 4, 2, True, 0, None)) <= TRITON.tolerance


@needs_device
def test_same_bits_twice():
    """No gradient depends on the order of programs; torch's deterministic mode has nothing to refuse."""
    case = (3, 7, 10, 2, 1, 16, 5, True, 0, None)
    tensors = [x.float() for x in draw(case, device=DEVICE)]
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (with_gradients(forced(TRITON), case, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_device
@pytest.mark.parametrize('needed', range(4))
def test_gradients_of_some_inputs(needed):
    """One input learns alone, as the bias does when the rest is frozen."""
    results = []
    for function, dtype in ((triton_attention, torch.float32), (reference.window_attention, torch.float64)):
        inputs = arguments((3, 4, 5, 1, 1, 16, 2, True, 0, None), DEVICE, dtype)
        inputs[needed].requires_grad_()
        results.append(torch.autograd.grad(function(*inputs, 3, 1).square().sum(), inputs[needed]))
    assert worst(*results) <= TRITON.tolerance


@needs_device
def test_second_derivatives():
    """By plain operations."""
    case, results = (2, 3, 4, 1, 1, 4, 1, True, 2, None), []
    for function, dtype in ((triton_attention, torch.float32), (reference.window_attention, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in draw(case, device=DEVICE)]
        grads = torch.autograd.grad(call(function, case, *inputs).square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs))
    assert worst(*results) <= 1e-4


@needs_device
def test_nan_stays_in_its_tile():
    """Small windows share a tile and its keys: one that is not a number spoils their queries, and no others."""
    q, kv, *rest = arguments((2, 6, 10, 1, 1, 4, 1, True, 0, None), DEVICE)
    kv[0, 0, 0] = math.nan
    out = triton_attention(q, kv, *rest, 2, 1)
    assert out[0, :4, :8].isnan().all() and out[0, 4:].isfinite().all() and out[0, :, 8:].isfinite().all()


@needs_device
def test_layer():
    """Gradients of a layer's input, its global tokens and every parameter, the bias table among them."""
    torch.manual_seed(0)
    layer = LongShortAttention2d(8, 2, window_size=3, rank=4, num_global_tokens=2).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    inputs = [torch.randn(1, 4, 5, 8, device=DEVICE), torch.randn(1, 2, 8, device=DEVICE)]
    results = (run_layer(layer, *inputs, name) for name in ('triton', 'masked'))
    assert all(worst_of_all(*pair) <= 1e-5 for pair in zip(*results, strict=True))


# Graphs


@needs_device
def test_operator():
    """What torch asks of an operator (aliases, types, layouts, varying sizes), and the values of the function."""
    case = (2, 3, 5, 1, 1, 16, 2, True, 0, None)
    inputs = [x.float() for x in draw(case, device=DEVICE)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    qkv, additional, bias = leaves
    tensors = [qkv[..., :16].detach().requires_grad_(), qkv[..., 16:].unflatten(-1, (2, 16)).detach().requires_grad_()]
    torch.library.opcheck(attention.triton_operator, (*tensors, additional, bias, 2, 1, 0, True))
    plain = [x.detach() for x in (*tensors, additional, bias)]
    out, lse = attention.triton_operator(*plain, 2, 1, 0, True)
    for bias, needs_bias in ((plain[3], True), (None, False)):
        torch.library.opcheck(
            attention.triton_operator_backward,
            (out.cos(), *plain[:3], bias, out, lse, 2, 1, 0, needs_bias), test_utils=('test_schema', 'test_faketensor'))
    results = [
        with_gradients(function, case, inputs)
        for function in (triton_attention, lambda *args: attention.triton_operator(*args, True)[0])]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_device
def test_graphs(monkeypatch):
    """Compiled, and exported on request, with sizes left open: one operator each way, and what eager mode gives."""
    monkeypatch.setenv('TIMM_LS_SELF_CHECK', 'skip')

    def attend(qkv, additional, bias):
        kv = qkv[..., 16:].unflatten(-1, (2, 16))
        return window_attention(qkv[..., :16], kv, additional, bias, 3, 1).square()

    def inputs(*size):
        return [x.float() for x in draw((3, *size, 2, 1, 16, 2, True, 0, None), device=DEVICE)]

    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager
        graphs.append(str(graph.code))
        return aot_eager(graph, inputs)

    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    counts = []
    for size in ((6, 7), (8, 4)):  # of which none equals another size, which would count as one
        leaves = [x.requires_grad_() for x in inputs(*size)]
        results = []
        for function in (attend, compiled):
            out = function(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        counts.append(len(graphs))
    assert counts[0] == counts[1] and graphs[-1].count('timm_ls.triton_window_attention.default') == 1

    class Attend(torch.nn.Module):
        def forward(self, qkv, additional, bias):
            return attend(qkv, additional, bias)

    height, width = torch.export.Dim('height', min=2), torch.export.Dim('width', min=2)
    programs = []
    for implementation in ('auto', 'triton'):
        with attention_implementation(implementation):
            programs.append(torch.export.export(
                Attend(), tuple(inputs(5, 7)), dynamic_shapes=({1: height, 2: width}, None, None)))
    names = 'timm_ls.triton_window_attention.default'
    assert [str(program.graph).count(names) for program in programs] == [0, 1]  # others than this machine may run it
    assert torch.equal(programs[1].module()(*inputs(8, 4)), attend(*inputs(8, 4)))


# What is taken


def window_call(**changes):
    """A call that is taken."""
    return WindowCall(**dict(dict(
        window_size=3, num_heads=2, head_dim=16, first_row=0, dropout_p=0., fused=True, device=torch.device(DEVICE),
        dtype=torch.float32, needs_grad=True, captured=False, compiled=False, fixed_size=False, plain=False),
        **changes))


@needs_device
@pytest.mark.parametrize('change, words', [
    (dict(dtype=torch.float64), 'it takes torch.float32, torch.bfloat16, torch.float16, not torch.float64'),
    (dict(head_dim=136), 'it takes heads of up to 128 channels, not 136'),
    (dict(window_size=17), 'it takes windows of up to 16 x 16, not 17 x 17'),
    (dict(dropout_p=.1), 'attention dropout is active'),
    (dict(fused=False), "timm's fused attention is off"),
])
def test_why_not(change, words):
    assert why_not(window_call()) is None and words in why_not(window_call(**change))


@needs_device
def test_transforms_are_refused():
    """Eager ones, and one within a graph."""
    words = 'torch.func or forward-mode derivatives need plain operations'
    with torch.autograd.forward_ad.dual_level():
        assert why_not(window_call()) == words
    seen = []

    def look(x):
        seen.append(why_not(window_call()))
        return x if seen[-1] is None else x + 1

    x = torch.zeros(2, 3)
    torch.func.vmap(look)(x)
    assert seen == [words]
    out = torch.compile(lambda x: torch.func.vmap(look)(x), backend='eager', fullgraph=True)(x)
    assert torch.equal(out, x + 1)


@pytest.mark.parametrize('change, words', [
    (dict(device='cpu'), r'it is for CUDA devices, not for cpu; .* \(TRITON_INTERPRET=1\)'),
    (dict(hip='6.0'), "it is for NVIDIA's devices"),
    (dict(available=False), 'there is no CUDA device here'),
    (dict(capability=(7, 5)), 'compute capability 8.0'),
    (dict(triton=None), 'it needs triton'),
    (dict(), None)])
def test_devices(change, words, monkeypatch):
    """What a call on a GPU is refused for, without one."""
    options = dict(dict(
        device='cuda:0', hip=None, available=True, capability=(8, 0), triton=attention.triton), **change)
    monkeypatch.setattr(attention, 'triton', options['triton'])
    monkeypatch.setattr(attention, 'is_interpreted', lambda: False)
    monkeypatch.setattr(torch.version, 'hip', options['hip'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: options['available'])
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: options['capability'])
    reason = why_not(window_call(device=torch.device(options['device'])))
    assert reason is None if words is None else re.search(words, reason)


def test_maps_too_wide():
    """Offsets within a tile have 32 bits: a map of more is an error that says what to do."""
    q, kv = (torch.empty(1, device='meta').expand(1, 7, 2 ** 22, *parts) for parts in ((16,), (2, 16)))
    with pytest.raises(RuntimeError, match=r"fewer than 2 \*\* 31 .* 4194304 tokens of 16 channels .*\('tiled'\)"):
        attention._Call(q, kv, q[:, 0, :1, None].expand(1, 1, 2, 16), None, 16, 1, 0)


@pytest.mark.parametrize('precision, expected', [('tf32', True), ('ieee', False), (True, True), (False, False)])
def test_tf32(precision, expected, monkeypatch):
    """One product of TF32 in place of three, in float32, if torch is allowed the same: asked in either of its ways."""
    name = 'allow_tf32' if isinstance(precision, bool) else 'fp32_precision'
    monkeypatch.setattr(torch.backends.cuda, 'matmul', SimpleNamespace(**{name: precision}))
    for dtype, flag in ((torch.float32, expected), (torch.bfloat16, False)):
        tensors = (torch.zeros(1, 1, 1, *parts, dtype=dtype) for parts in ((16,), (2, 16)))
        call = attention._Call(*tensors, torch.zeros(1, 0, 2, 16, dtype=dtype), None, 3, 1, 0)
        assert call.arguments['TF32'] == flag


@not_interpreted
def test_without_triton():
    """Asking for it says at once what is missing; without asking, nothing misses it."""
    code = '\n'.join([
        'import sys', 'sys.modules["triton"] = None', 'import torch, timm_ls',
        'layer, x = timm_ls.LongShortAttention2d(8, 2, window_size=3), torch.randn(1, 5, 7, 8)', 'layer(x)',
        'timm_ls.explain_attention(layer, x)', 'print("without asking")',
        'with timm_ls.attention_implementation("triton"): layer(x)'])
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and result.stdout == 'without asking\n'
    assert 'needs triton' in result.stderr.splitlines()[-1], result.stderr
