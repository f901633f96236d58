"""Triton's kernels of landmarks against sums written out, and where `pool_tokens` takes them."""
import pytest
import torch
from triton_interpreter import DEVICE, needs_device

from timm_ls import attention_implementation
from timm_ls.ops.merge import pool_tokens

pytest.importorskip('triton', reason='triton is not installed: torch brings it along on Linux only')
from timm_ls.ops.triton import landmarks, self_check  # noqa: E402

pytestmark = needs_device


def oracle(logits, kv, num_heads):
    """Softmax-weighted means of tokens, one head at a time."""
    weights = logits.unflatten(2, (num_heads, -1))
    weights = torch.exp(weights - weights.amax(1, keepdim=True))
    heads = kv.unflatten(3, (num_heads, -1))
    sums = torch.einsum('bnhr,bnphd->brphd', weights, heads) / weights.sum(1).transpose(1, 2)[:, :, None, :, None]
    return sums.flatten(3)


def make_inputs(tokens, batch, heads, head_dim, rank, dtype=torch.float32):
    """As a layer has them: keys and values beside the queries."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch, tokens, heads * rank, generator=generator, dtype=torch.float64)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim, generator=generator, dtype=torch.float64)
    return logits.to(DEVICE, dtype), qkv.to(DEVICE, dtype)


def run(function, logits, qkv, heads):
    """Landmarks and gradients of both inputs."""
    logits, qkv = (x.detach().requires_grad_() for x in (logits, qkv))
    out = function(logits, qkv[..., qkv.shape[-1] // 3:].unflatten(-1, (2, -1)), heads)
    weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).sin().reshape(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [logits, qkv])]


def forced(*args):
    """`pool_tokens` by the kernels."""
    with attention_implementation('triton'):
        return pool_tokens(*args)


def difference(actual, expected):
    """Largest difference over the largest value, of all tensors, which are finite."""
    assert all(x.isfinite().all() for x in actual)
    return max(
        ((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-6)).item()
        for a, e in zip(actual, expected, strict=True) if e.numel() > 0)


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize('case', [(150, 2, 1, 32, 8), (15, 1, 2, 80, 4), (2, 1, 3, 5, 17), (20, 1, 1, 128, 1)], ids=str)
def test_values_and_gradients(case, dtype, bound):
    """Runs of tokens and two tokens, every kind of head, more landmarks than a block of 16; sums in float32."""
    inputs = make_inputs(*case, dtype=dtype)
    actual = run(forced, *inputs, case[2])
    assert {x.dtype for x in actual} == {dtype}
    assert difference(actual, run(oracle, *(x.double() for x in inputs), case[2])) <= bound


@pytest.mark.parametrize('programs, tokens', [(1, 210), (10 ** 6, 210), (10 ** 6, 1100)])  # the last: 35 runs
def test_runs(programs, tokens, monkeypatch):
    """The number of runs changes nothing, and twice the same gives the same bits."""
    monkeypatch.setattr(landmarks, 'PROGRAMS', programs)
    inputs = make_inputs(tokens, 1, 1, 16, 2)
    inputs[0][0, -40:] += 20  # the highest come last
    first, second = (run(forced, *inputs, 1) for _ in range(2))
    assert difference(first, run(oracle, *(x.double() for x in inputs), 1)) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_logits():
    """Of any size, in any run of tokens; and minus infinity, which is no weight."""
    logits, qkv = make_inputs(150, 1, 1, 16, 2)
    logits[0, :9] += 300
    logits[0, 90:120] = -1e4
    logits[0, 140:] = float('-inf')
    exact = run(oracle, logits.double(), qkv.double(), 1)[0]
    assert difference([run(forced, logits, qkv, 1)[0]], [exact]) <= 1e-5


def test_nothing_around_is_read():
    """Tokens within memory full of NaN."""
    logits, qkv = make_inputs(35, 2, 2, 16, 3)
    expected = run(forced, logits, qkv, 2)

    def surrounded(x):
        around = torch.full([n + 3 for n in x.shape], float('nan'), device=DEVICE)
        return around[tuple(slice(1, 1 + n) for n in x.shape)].copy_(x)

    planted = [surrounded(x).detach().requires_grad_() for x in (logits, qkv[..., 32:].unflatten(-1, (2, 32)))]
    out = forced(*planted, 2)
    weight = torch.linspace(-1, 2, out.numel(), device=DEVICE).sin().reshape(out.shape)
    grads = torch.autograd.grad(out, planted, weight)
    assert difference([out.detach(), grads[0], grads[1].flatten(2)], [*expected[:2], expected[2][..., 32:]]) <= 1e-6


def test_second_derivatives():
    """By plain operations."""
    results = []
    for function, dtype in ((forced, torch.float32), (oracle, torch.float64)):
        logits, qkv = (x.to(dtype).requires_grad_() for x in make_inputs(5, 1, 1, 4, 2))
        out = function(logits, qkv[..., 4:].unflatten(-1, (2, 4)), 1)
        grads = torch.autograd.grad(out.square().sum(), (logits, qkv), create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), (logits, qkv)))
    assert difference(*results) <= 1e-4


def test_operator(monkeypatch):
    """What torch asks of an operator, the values of the function, and a graph of any size."""
    monkeypatch.setenv('TIMM_LS_SELF_CHECK', 'skip')
    logits, qkv = make_inputs(21, 2, 1, 16, 4)
    inputs = [logits.requires_grad_(), qkv[..., 16:].unflatten(-1, (2, 16)).contiguous().requires_grad_()]
    torch.library.opcheck(landmarks.pool_operator, (*inputs, 1))
    plain = [x.detach() for x in inputs]
    out, lse = landmarks.pool_operator(*plain, 1)
    call = (out.cos(), *plain, out, lse, 1)
    torch.library.opcheck(landmarks.pool_operator_backward, call, test_utils=('test_schema', 'test_faketensor'))
    compiled = torch.compile(  # channels are numbers, as behind a linear layer
        lambda x, y: pool_tokens(x[..., :4], y[..., :16], 1), backend='aot_eager', fullgraph=True, dynamic=True)
    results = []
    for function in (lambda *x: forced(*x, 1), lambda *x: landmarks.pool_operator(*x, 1)[0], compiled):
        y = function(*inputs)
        results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize('how, expected', [
    ('auto', 1), ('triton', 1), ('tiled', 0), ('one part', 0), ('float64', 0), ('65 landmarks', 0), ('wide heads', 0),
    ('torch.func', 0), ('traced', 0), ('checked', 0)])
def test_where_they_are_taken(how, expected, monkeypatch):
    """For keys and values where the kernels of attention may be; elsewhere plain operations give the same."""
    found = 'outputs differ' if how == 'checked' else None
    monkeypatch.setattr(self_check, 'failure', lambda *args: found)
    calls, forward = [], landmarks._forward
    monkeypatch.setattr(landmarks, '_forward', lambda *args: calls.append(1) or forward(*args))
    rank, head_dim = 65 if how == '65 landmarks' else 2, 136 if how == 'wide heads' else 8
    logits, qkv = make_inputs(6, 1, 1, head_dim, rank, torch.float64 if how == 'float64' else torch.float32)
    values = qkv[..., head_dim:].unflatten(-1, (2, head_dim))[:, :, :1 if how == 'one part' else 2]

    def pool(logits):
        return pool_tokens(logits, values, 1)

    with attention_implementation(how if how in ('triton', 'tiled') else 'auto'):
        if how == 'torch.func':
            out = torch.func.vmap(pool)(logits[None])[0]
        else:
            out = (torch.jit.trace(pool, logits, check_trace=False) if how == 'traced' else pool)(logits)
    assert len(calls) == expected
    assert difference([out], [oracle(logits.double(), values.double(), 1)]) <= 1e-5
