"""The Triton kernel: the contract's tests under the interpreter, machine code without a GPU, a torch without Triton."""
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

from timm_ls import LongShortAttention2d, attention_implementation

pytest.importorskip('triton', reason='triton is not installed: torch brings it along on Linux only')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason='no CUDA device: test_under_the_interpreter runs this in a process of its own')
not_interpreted = pytest.mark.skipif(INTERPRETED, reason='has nothing to do with the interpreter')


@not_interpreted
def test_under_the_interpreter():
    """What needs a device, here and among the tests of the contract, on a CPU; none of it is skipped."""
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', '-s', '-k', 'triton',
         'tests/ops/test_window_attention.py', 'tests/ops/test_triton.py::test_layer'],
        capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, TRITON_INTERPRET='1'))
    print('\n'.join(line for line in result.stdout.splitlines() if 'e-0' in line), result.stdout.splitlines()[-1])
    assert result.returncode == 0 and 'skipped' not in result.stdout, result.stdout[-3000:]


def difference(actual, expected):
    """Largest difference over the largest value, of all tensors, which are finite."""
    assert all(x.isfinite().all() for x in (*actual, *expected))
    return max(
        ((a.float() - e.float()).abs().max() / e.float().abs().max().clamp(min=1e-6)).item()
        for a, e in zip(actual, expected, strict=True) if e.numel() > 0)


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
    print(f'layer, {global_update}: {worst:.1e}')
    assert worst <= 1e-5


@not_interpreted
@pytest.mark.parametrize('dtype', ['bf16', pytest.param('fp32', marks=pytest.mark.slow)])
def test_compiles_for_a_gpu(dtype, tmp_path, monkeypatch):
    """Both kernels, to machine code, without a GPU."""
    backends = pytest.importorskip('triton.backends.compiler')
    compiler = pytest.importorskip('triton.compiler')
    from timm_ls.ops import triton
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    constants = dict(WINDOW=7, P=3, HAS_BIAS=True, BLOCK_Q=64, BLOCK_K=32, BLOCK_D=32)
    types = {name: 'constexpr' for name in constants} | dict(scale='fp32')
    types |= dict.fromkeys(('lse', 'grad_kv', 'grad_extra', 'grad_bias'), '*fp32')
    types |= dict.fromkeys(('q', 'kv', 'extra_kv', 'bias', 'out', 'grad_out', 'grad_q'), f'*{dtype}')
    for kernel in (triton.forward_kernel, triton.backward_kernel):
        source = compiler.ASTSource(kernel, {name: types.get(name, 'i32') for name in kernel.arg_names}, constants)
        compiled = compiler.compile(source, target=backends.GPUTarget('cuda', 80, 32))
        assert compiled.metadata.shared < 160 * 1024  # bytes of shared memory of such a device
        assert compiled.asm['cubin']


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
