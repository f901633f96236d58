"""The Triton kernel against the tiled form: on a CUDA device where there is one, and always under the interpreter."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_ls import LongShortAttention2d, attention_implementation
from timm_ls.window_attention import window_attention

pytest.importorskip('triton', reason='triton is not installed: torch brings it along on Linux only')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason='no CUDA device: test_under_the_interpreter runs this in a process of its own')


def test_under_the_interpreter():
    """All the tests below, on a CPU."""
    if INTERPRETED:
        pytest.skip('this is that process')
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', '-s', __file__],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=dict(os.environ, TRITON_INTERPRET='1'))
    print('\n'.join(line for line in result.stdout.splitlines() if 'largest difference' in line))
    assert result.returncode == 0 and f'{len(CASES) + 5} passed' in result.stdout, result.stdout[-3000:]


def difference(actual, expected):
    """Largest difference over the largest value, of all tensors, which are finite."""
    assert all(x.isfinite().all() for x in (*actual, *expected))
    return max(
        ((a.float() - e.float()).abs().max() / e.float().abs().max().clamp(min=1e-6)).item()
        for a, e in zip(actual, expected, strict=True) if e.numel() > 0)


# window, height, width, batch, heads, channels per head, extra keys, bias
CASES = [
    (7, 9, 15, 1, 2, 8, 9, True),
    (7, 7, 7, 2, 1, 16, 0, False),  # the first block of keys lies outside the map
    (8, 13, 8, 1, 1, 32, 9, True),
    (3, 7, 5, 2, 2, 5, 0, True),
    (4, 1, 10, 2, 1, 20, 3, True),
    (1, 3, 2, 1, 3, 4, 1, True),
    (2, 5, 6, 1, 1, 8, 0, False),
    (9, 11, 4, 1, 1, 8, 40, True),
]


@needs_device
@pytest.mark.parametrize('window, height, width, batch, heads, head_dim, extra, has_bias', CASES)
def test_agrees_with_tiles(window, height, width, batch, heads, head_dim, extra, has_bias):
    """Values and gradients to 1e-5: ragged maps, tiles of queries, several blocks of keys, inputs that are views."""
    torch.manual_seed(0)
    C, halo = heads * head_dim, window + 2 * (window // 2)
    qkv = torch.randn(batch, height, width, 3 * C, device=DEVICE)
    bias = 2 * torch.randn(heads, window, window, halo, halo, device=DEVICE) if has_bias else None
    extra_kv = torch.randn(batch, extra, 2, C, device=DEVICE)
    results = []
    for implementation in ('tiled', 'triton'):
        inputs = [x.clone().requires_grad_() for x in (qkv, extra_kv, bias) if x is not None]
        q, kv = inputs[0][..., :C], inputs[0][..., C:].unflatten(-1, (2, C))
        with attention_implementation(implementation):
            out = window_attention(q, kv, inputs[1], inputs[2] if has_bias else None, window, heads)
        grads = torch.autograd.grad(out.square().sum() + out.sum(), inputs)
        results.append([out.detach(), *grads])
    worst = difference(results[1], results[0])
    print(f'largest difference {worst:.1e}')
    assert worst <= 1e-5


@needs_device
@pytest.mark.parametrize('global_update, rank, tokens, rel_pos_bias', [('outputs', 4, 2, True), ('keys', 0, 1, False)])
def test_layer(global_update, rank, tokens, rel_pos_bias):
    """A layer: gradients of its input, its global tokens and every parameter, the bias table among them."""
    torch.manual_seed(0)
    layer = LongShortAttention2d(
        8, 2, window_size=3, rank=rank, num_global_tokens=tokens, rel_pos_bias=rel_pos_bias,
        global_update=global_update).to(DEVICE)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    inputs = [torch.randn(1, 5, 7, 8, device=DEVICE), torch.randn(1, tokens, 8, device=DEVICE)]
    results = []
    for implementation in ('tiled', 'triton'):
        x, t = (tensor.clone().requires_grad_() for tensor in inputs)
        named = {name: p for name, p in layer.named_parameters() if name != 'dynamic_projection.bias'}  # gradient zero
        with attention_implementation(implementation):
            y, u = layer(x, t)
        grads = torch.autograd.grad(y.square().sum() + u.square().sum(), [x, t, *named.values()])
        results.append([y.detach(), u.detach(), *grads])
    worst = difference(results[1], results[0])
    print(f'largest difference {worst:.1e}')
    assert worst <= 1e-5


@needs_device
def test_large_bias():
    """One that exceeds what an exponential can hold changes nothing if it is the same for all keys."""
    torch.manual_seed(0)
    results = []
    for value in (0., 200.):
        inputs = [x.to(DEVICE).requires_grad_() for x in (
            torch.ones(1, 4, 4, 4), torch.arange(128.).reshape(1, 4, 4, 2, 4) / 128, torch.ones(1, 0, 2, 4))]
        bias = torch.full((1, 3, 3, 5, 5), value, device=DEVICE, requires_grad=True)
        with attention_implementation('triton'):
            out = window_attention(*inputs, bias, window_size=3, num_heads=1)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs[:2])])
    assert difference(results[1], results[0]) <= 1e-4


@needs_device
def test_half_precision():
    """Sums in float32, inputs and results in float16."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 5, 6, 8), torch.randn(1, 5, 6, 2, 8), torch.randn(1, 2, 2, 8), torch.randn(2, 3, 3, 5, 5)]
    results = []
    for implementation, dtype in (('tiled', torch.float32), ('triton', torch.float16)):
        tensors = [x.half().to(DEVICE, dtype).requires_grad_() for x in inputs]
        with attention_implementation(implementation):
            out = window_attention(*tensors, window_size=3, num_heads=2)
        grads = torch.autograd.grad(out.sum(), tensors)
        assert {x.dtype for x in (out, *grads)} == {dtype}
        results.append([out.detach(), *grads])
    assert difference(results[1], results[0]) <= 5e-3


@pytest.mark.skipif(INTERPRETED, reason='the interpreter takes tensors on any device')
def test_cpu_is_refused():
    layer = LongShortAttention2d(8, 2, window_size=3)
    with attention_implementation('triton'), pytest.raises(RuntimeError, match='for CUDA devices.*tensors on cpu'):
        layer(torch.randn(1, 5, 7, 8))


@needs_device
def test_double_is_refused():
    layer = LongShortAttention2d(8, 2, window_size=3, dtype=torch.float64, device=DEVICE)
    with attention_implementation('triton'), pytest.raises(RuntimeError, match='bfloat16.*not torch.float64'):
        layer(torch.randn(1, 5, 7, 8, dtype=torch.float64, device=DEVICE))


@pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing')
@pytest.mark.parametrize('dtype', ['bf16', pytest.param('fp32', marks=pytest.mark.slow)])
def test_compiles_for_a_gpu(dtype, tmp_path, monkeypatch):
    """Both kernels, to machine code, without a GPU."""
    backends = pytest.importorskip('triton.backends.compiler')
    compiler = pytest.importorskip('triton.compiler')
    from timm_ls import triton_attention
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    constants = dict(WINDOW=7, P=3, HAS_BIAS=True, BLOCK_Q=64, BLOCK_K=32, BLOCK_D=32)
    types = {name: 'constexpr' for name in constants} | dict(scale='fp32')
    types |= dict.fromkeys(('lse', 'grad_kv', 'grad_extra', 'grad_bias'), '*fp32')
    types |= dict.fromkeys(('q', 'kv', 'extra_kv', 'bias', 'out', 'grad_out', 'grad_q'), f'*{dtype}')
    for kernel in (triton_attention.forward_kernel, triton_attention.backward_kernel):
        source = compiler.ASTSource(kernel, {name: types.get(name, 'i32') for name in kernel.arg_names}, constants)
        compiled = compiler.compile(source, target=backends.GPUTarget('cuda', 80, 32))
        assert compiled.metadata.shared < 160 * 1024  # bytes of shared memory of such a device
        assert compiled.asm['cubin']


@pytest.mark.skipif(INTERPRETED, reason='has nothing to do with the interpreter')
def test_without_triton():
    """Asking for it says at once what is missing; without asking, nothing misses it."""
    code = '\n'.join([
        'import sys', 'sys.modules["triton"] = None', 'import torch, timm_ls',
        'timm_ls.LongShortAttention2d(8, 2, window_size=3)(torch.randn(1, 5, 7, 8))',
        'with timm_ls.attention_implementation("triton"): pass'])
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError: attention_implementation('triton') needs triton" in result.stderr
