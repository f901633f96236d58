"""What the kernels become on GPUs that are not here: registers spilled, tensor cores used, nothing added atomically."""
import itertools
import os
import re
import subprocess

import pytest
import torch
from triton_interpreter import INTERPRETED

triton = pytest.importorskip('triton', reason='triton is not installed: torch brings it along on Linux only')
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from timm_ls.ops.triton import attention, kernels, landmark_kernels, landmarks  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason='the interpreter compiles nothing')
KERNELS = ('forward', 'query_grad', 'key_grad', 'bias_grad', 'additional_grad')
LANDMARK_KERNELS = ('landmark', 'landmark_grad')
DTYPES = {torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16'}
SHARED_MEMORY = {80: 163, 90: 227, 120: 99}  # KiB that a program can have


def compile_kernel(name, dtype, head_dim, capability, window):
    """Compile a kernel as it is launched; with its block sizes."""
    is_landmark = name in LANDMARK_KERNELS
    kernel = getattr(landmark_kernels if is_landmark else kernels, f'{name}_kernel')
    q, kv, additional = (torch.empty(*shape, head_dim, dtype=dtype) for shape in ((1, 1, 1), (1, 1, 1, 2), (1, 1, 2)))
    call = attention._Call(q, kv, additional, None, window, 1, 0)
    if is_landmark:
        blocks, known = attention.Blocks(landmarks.block_size(head_dim), 16, 4, 2), landmarks.constants(head_dim, 8)
    else:
        blocks = call.blocks(name)
        constants = attention.block_constants(name, blocks, head_dim)
        known = dict(call.arguments, **constants, HAS_TABLE=True, SAVE_LSE=True)
    sizes = ('H', 'W', 'E')  # whose names are short, not constants'
    constants = {n: known[n] for n in kernel.arg_names if n.isupper() and n not in sizes}
    types = dict.fromkeys(constants, 'constexpr') | dict(scale='fp32')
    maps = ('q', 'kv', 'additional', 'table', 'out', 'grad_out', 'grad_q', 'grad_kv', 'logits', 'grad_logits')
    sums = ('lse', 'row_sums', 'partial') + ('out', 'grad_out') * is_landmark
    types |= dict.fromkeys(maps, f'*{DTYPES[dtype]}') | dict.fromkeys(sums, '*fp32')
    source = ASTSource(kernel, {n: types.get(n, 'i32') for n in kernel.arg_names}, constants)
    return triton.compile(
        source, target=GPUTarget('cuda', capability, 32),
        options=dict(num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True)), blocks


def report(compiled, folder):
    """Registers and spilled bytes per thread, and how often some instructions occur."""
    tool = os.path.join(os.path.dirname(triton.__file__), 'backends', 'nvidia', 'bin', 'cuobjdump')
    (folder / 'cubin').write_bytes(compiled.asm['cubin'])
    usage = subprocess.run(
        [tool, '-res-usage', str(folder / 'cubin')], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
    ptx = compiled.asm['ptx']
    return dict(
        registers=registers, stack=stack, shared=compiled.metadata.shared,
        tensor_core=len(re.findall(r'\b(?:wgmma\.mma_async|mma\.sync)', ptx)),
        atomic=len(re.findall(r'\b(?:atom|red)\.', ptx)), copies=len(re.findall(r'cp\.async\.c[ag]\.shared', ptx)),
        narrow=len(re.findall(r'ld\.global\S*\.b16|cp\.async\.c[ag]\.shared\S* [^,]*, [^,]*, 0x2', ptx)))


def stack_limit(name, dtype, head_dim):
    """Bytes of registers that may be spilled, per thread."""
    if name == 'forward':
        return 0 if head_dim <= 64 else 512 if dtype == torch.float32 else 64
    if dtype != torch.float32:
        return 64
    return 256 if head_dim <= 64 else 640


SOME = [
    ('forward', torch.bfloat16, 32, 90, 7),
    ('forward', torch.bfloat16, 64, 120, 7),
    ('forward', torch.bfloat16, 80, 90, 2),
    ('forward', torch.float16, 128, 80, 8),
    ('forward', torch.float32, 64, 90, 7),
    ('query_grad', torch.bfloat16, 64, 90, 7),
    ('query_grad', torch.float32, 64, 80, 7),
    ('key_grad', torch.bfloat16, 64, 80, 7),
    ('key_grad', torch.float32, 64, 90, 7),
    ('bias_grad', torch.bfloat16, 32, 90, 7),
    ('bias_grad', torch.float32, 64, 80, 7),
    ('additional_grad', torch.float32, 80, 90, 7),
    ('landmark', torch.bfloat16, 32, 90, 1),
]
ALL = [(*case, 7) for case in itertools.product(KERNELS, DTYPES, (16, 32, 64, 80, 128), SHARED_MEMORY)]
ALL += [(*case, 1) for case in itertools.product(LANDMARK_KERNELS, DTYPES, (32, 64, 80, 128), SHARED_MEMORY)]
ALL += [(name, dtype, d, 90, window) for name, dtype in itertools.product(KERNELS, DTYPES)
        for window, d in ((1, 32), (2, 80), (3, 32), (4, 64), (5, 32), (8, 64), (10, 32))]


@pytest.mark.parametrize('name, dtype, head_dim, capability, window', [
    *SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in SOME)], ids=str)
def test_registers(name, dtype, head_dim, capability, window, tmp_path, monkeypatch):
    """No or few spilled registers, products in tensor cores, aligned copies, memory that the device has, no atomics."""
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    try:
        compiled, blocks = compile_kernel(name, dtype, head_dim, capability, window)
    except RuntimeError as error:
        if capability == 120 and 'sm_120' in str(error):
            pytest.skip(f'this compiler does not know sm_120: {error}')
        raise
    found = report(compiled, tmp_path)
    print(f'{name:15} {DTYPES[dtype]} d {head_dim:3} w {window} sm_{capability} {tuple(blocks)}: {found}')
    assert found['stack'] <= stack_limit(name, dtype, head_dim)
    assert found['tensor_core'] > 0
    assert found['atomic'] == 0
    assert found['shared'] <= SHARED_MEMORY[capability] * 1024
    reads_ahead = name != 'landmark_grad' and (name, window, dtype == torch.float32) != ('key_grad', 1, False)
    assert found['copies'] >= 3 or not reads_ahead  # of keys, values, the bias, or what else a loop reads
    assert name in LANDMARK_KERNELS or found['narrow'] == 0
