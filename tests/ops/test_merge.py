"""Sums over tokens, in parts and over a million of them: those of float64, in every type and on every CPU.

A CPU that multiplies float16 in float16 loses a sum of a million numbers; torch sums some gradients in the type of the
input. Wherever the package sums over tokens, the result is to be as good as its type can hold.
"""
import random
from functools import cache, partial

import pytest
import torch
from small_models import create

from timm_ls import attention_implementation
from timm_ls.attention import LongShortAttention
from timm_ls.attention.layers import LayerNorm
from timm_ls.ops import chunks, merge
from timm_ls.ops.attend import attend_heads
from timm_ls.ops.merge import attend_few, pool_tokens, query_logits, softmax_sum
from timm_ls.ops.window_attention import window_attention

MANY = [684784, 10 ** 6]  # 1 / 684784 lies between two numbers of float16
many_tokens = pytest.mark.parametrize('num_tokens', MANY)
half_precision = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])


def draw(*shape, dtype=torch.float64, seed=0):
    """Normal numbers that every type holds exactly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().half().to(dtype)


def pooled(logits, values, num_heads):
    """Means of values [B, N, P, C] by a softmax over tokens of logits [B, N, heads * m], in the type given."""
    weights = logits.unflatten(2, (num_heads, -1)).softmax(dim=1)
    return torch.einsum('bnhm,bnphd->bmphd', weights, values.unflatten(3, (num_heads, -1))).flatten(3)


def assert_close(actual, expected, tolerance):
    """Within a part of the largest value, and of the type of `actual`."""
    error = (actual.double() - expected.double()).abs().max().item() / expected.double().abs().max().item()
    print(f'{error:.1e}')
    assert error <= tolerance


# In parts


@pytest.mark.parametrize('spread', [1., 30., 1000.])
def test_parts_make_the_whole(spread):
    """However tokens are divided and in whatever order the parts are merged; logits that exponentials cannot hold."""
    rng = random.Random(0)
    for seed in range(20):
        N, heads, m = rng.randint(1, 60), rng.randint(1, 3), rng.randint(1, 4)
        logits, values = spread * draw(2, N, heads * m, seed=seed), draw(2, N, 2, heads * 4, seed=seed + 1)
        cuts = sorted(rng.randint(0, N) for _ in range(rng.randint(0, 6)))
        parts = [softmax_sum(logits[:, a:b], values[:, a:b], heads) for a, b in zip([0, *cuts], [*cuts, N]) if a < b]
        rng.shuffle(parts)
        while len(parts) > 1:
            part = parts.pop(rng.randrange(len(parts)))
            at = rng.randrange(len(parts))
            parts[at] = parts[at].merge(part)
        torch.testing.assert_close(parts[0].output(), pooled(logits, values, heads), rtol=0, atol=1e-12)
        expected = logits.transpose(1, 2).logsumexp(dim=2).unflatten(1, (heads, m))
        torch.testing.assert_close(parts[0].log_sum_exp(), expected, rtol=1e-12, atol=1e-12)


def test_attention_of_a_few_queries():
    """Merged over parts of the keys, global tokens attend as by one softmax over all."""
    q, k, v = draw(2, 3, 8), draw(2, 50, 8, seed=1), draw(2, 50, 8, seed=2)
    parts = [softmax_sum(query_logits(q, k[:, a:b], 2), v[:, a:b, None], 2) for a, b in ((0, 1), (1, 30), (30, 50))]
    out = parts[0].merge(parts[1]).merge(parts[2]).output()[:, :, 0]
    heads = [x.unflatten(2, (2, 4)).transpose(1, 2) for x in (q, k, v)]
    weights = (heads[0] @ heads[1].mT / 2.).softmax(-1)
    torch.testing.assert_close(out, (weights @ heads[2]).transpose(1, 2).flatten(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('chunk_bytes', [1, 3000, 10 ** 9])
@pytest.mark.parametrize('in_chunks', [False, True])
def test_pool_tokens(monkeypatch, dtype, chunk_bytes, in_chunks):
    """Values, gradients and their gradients, in chunks of any size where asked for or the values are of half precision.
    """
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', chunk_bytes)
    logits, values = draw(2, 60, 6, dtype=dtype), draw(2, 60, 2, 8, dtype=dtype, seed=1)
    eps = max(torch.finfo(dtype).eps, 1e-12)

    def run(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (logits, values)]
        out = function(*inputs, 2)
        loss = (out * out.detach().cos()).sum()
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        return [out, *first, *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)]

    results = run(partial(pool_tokens, in_chunks=in_chunks), dtype)
    assert ('_PoolTokens' in results[0].grad_fn.name()) == (in_chunks or dtype.itemsize < 4)
    for actual, expected in zip(results, run(pooled, torch.float64), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, (8 if in_chunks else 4) * eps)


@pytest.mark.parametrize('answers', [('not here', None), (None, 'failed'), (None, None)])
def test_kernels_are_asked_about_a_call(monkeypatch, answers):
    """Kernels for landmarks hear device, type, rank and head width, and compute what nothing speaks against."""
    landmarks = pytest.importorskip('timm_ls.ops.triton.landmarks')
    self_check = pytest.importorskip('timm_ls.ops.triton.self_check')
    asked = []
    monkeypatch.setattr(merge, 'TRITON_IS_INTERPRETED', True)
    monkeypatch.setattr(landmarks, 'why_not', lambda *args: asked.append(args) or answers[0])
    monkeypatch.setattr(self_check, 'failure', lambda *args: asked.append(args) or answers[1])
    monkeypatch.setattr(landmarks, 'triton_pool_tokens', lambda *args: 'by kernels')
    logits, values = draw(1, 10, 9), draw(1, 10, 2, 12)
    by_kernels = isinstance(pool_tokens(logits, values, 3), str)
    assert by_kernels == (answers == (None, None))
    question = (values.device, values.dtype, 3, 4)
    assert asked == [question, ('landmarks', *question, False)][:1 if answers[0] else 2]
    asked.clear()
    assert isinstance(pool_tokens(logits, values[:, :, :1], 3), torch.Tensor) and asked == []


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_types_under_autocast(dtype):
    """Landmarks are of the type of keys and values, their sums in float32, whatever autocast is told."""
    logits, values = draw(1, 3000, 2, dtype=dtype), 1 + draw(1, 3000, 2, 4, dtype=dtype, seed=1)
    with torch.autocast('cpu', torch.float16):
        out = pool_tokens(logits, values, 1)
        part = softmax_sum(logits, values, 1)
    assert out.dtype == dtype and {x.dtype for x in part} == {torch.float32}
    assert_close(out, pooled(logits.double(), values.double(), 1), max(1e-6, torch.finfo(dtype).eps))
    assert_close(part.output(), pooled(logits.double(), values.double(), 1), 1e-6)


# Over very many tokens


@many_tokens
@half_precision
def test_landmarks(num_tokens, dtype):
    """Values, and gradients of projection logits and values."""
    logits, values = draw(1, num_tokens, 2, dtype=dtype), (1 + draw(1, num_tokens, 2, 4, seed=1)).to(dtype)
    grad = 2e4 * draw(1, 2, 2, 4, dtype=dtype, seed=2).clamp(-2, 2)  # gradients that float16 can hold

    def run(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (logits, values)]
        out = function(*inputs, 1)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    for actual, expected in zip(run(pool_tokens, dtype), run(pooled, torch.float64), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, torch.finfo(dtype).eps)
    constant = pool_tokens(torch.zeros_like(logits), torch.ones_like(values), 1)
    assert (constant == 1).all()


@many_tokens
@half_precision
@pytest.mark.parametrize('in_parts', [False, True])
def test_global_tokens(num_tokens, dtype, in_parts):
    """What a few queries attend to, whole and in parts; with the gradient of the queries, which all tokens add to."""
    q, keys = draw(1, 2, 8, dtype=dtype), draw(1, num_tokens, 8, dtype=dtype, seed=1)
    means = (1 + draw(1, num_tokens, 8, seed=2)).to(dtype)
    grad = draw(1, 2, 8, dtype=dtype, seed=3)

    def attend(q, k, v):
        if not in_parts:
            return attend_few(q, k, v, 2, 0., True)
        half = num_tokens // 2
        parts = [softmax_sum(query_logits(q, k[:, s], 2), v[:, s, None], 2) for s in (slice(half), slice(half, None))]
        return parts[0].merge(parts[1]).output()[:, :, 0]

    def exact(q, k, v):
        return attend_heads(q, k, v, None, 2, 0., False)

    for values in (keys, means):
        assert_close(attend(q, keys, values), exact(q.double(), keys.double(), values.double()), torch.finfo(dtype).eps)
    assert_close(attend(q, keys, torch.ones_like(keys)), torch.ones_like(q), 1e-6)
    results = []
    for function, kind in ((attend, dtype), (exact, torch.float64)):
        query, k = q.to(kind).requires_grad_(), keys.to(kind)
        out = function(query, k, k)
        results.append(torch.autograd.grad(out, query, grad.to(out.dtype))[0])
    assert_close(*results, torch.finfo(dtype).eps)


@many_tokens
@half_precision
@pytest.mark.parametrize('pooling', ['avg', 'avg beside a token', 'max'])
def test_means(num_tokens, dtype, pooling):
    """Pooling before the classifier."""
    token = pooling == 'avg beside a token'
    model = create('vil_ls_tiny_hires', embed_dims=(8, 8, 8, 8), num_heads=(1, 1, 1, 1), num_classes=0,
                   num_global_tokens=(0, 0, 0, int(token)), global_pool=pooling.split()[0]).to(dtype).eval()
    features = (1 + draw(1, num_tokens, 8)).to(dtype)
    if token:
        out = model.forward_head(torch.cat([features[:, :1], features], dim=1))
    else:
        out = model.forward_head(features.transpose(1, 2).unflatten(2, (-1, 8)))
    expected = features.double().amax(1) if pooling == 'max' else features.double().mean(1)
    assert out.dtype == dtype
    assert_close(out, expected, torch.finfo(dtype).eps)


@many_tokens
@half_precision
@pytest.mark.parametrize('how', ['converted', 'autocast', 'autocast, type kept'])
def test_layer_norm(num_tokens, dtype, how):
    """Gradients of weight and bias, which every token adds to."""
    norm = LayerNorm(8, keep_type=how.endswith('kept'), dtype=torch.float64)
    norm.weight.data.uniform_(.5, 1.5), norm.bias.data.normal_()
    norm = norm.to(dtype if how == 'converted' else torch.float32)
    exact = torch.nn.LayerNorm(8, dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in norm.state_dict().items()})
    x, grad = draw(1, num_tokens, 8, dtype=dtype), (.02 + .02 * draw(1, num_tokens, 8, seed=1)).to(dtype)
    expected = torch.autograd.grad(exact(x.double()), exact.parameters(), grad.double())
    with torch.autocast('cpu', dtype, enabled=how != 'converted'):
        out = norm(x)
    assert how == 'autocast' or out.dtype == dtype
    for actual, wanted in zip(torch.autograd.grad(out, norm.parameters(), grad.to(out.dtype)), expected, strict=True):
        assert_close(actual, wanted, 2 * torch.finfo(dtype).eps)


@cache
def shared_gradients(dtype):
    """Of the bias of the logits and of additional keys, which the windows of a map of a million tokens share."""
    tensors = [draw(1, 1000, 1000, 4, dtype=dtype), draw(1, 1000, 1000, 2, 4, dtype=dtype, seed=1),
               draw(1, 2, 2, 4, dtype=dtype, seed=2), draw(1, 2, 2, 4, 4, dtype=dtype, seed=3)]
    inputs = [x.requires_grad_() for x in tensors]
    with attention_implementation('tiled'):
        out = window_attention(*inputs, window_size=2, num_heads=1)
    grad = (2 + draw(1, 1000, 1000, 4, seed=4)) / 64
    return torch.autograd.grad(out, inputs[2:], grad.to(dtype))


@half_precision
def test_bias_tables_and_additional_keys(dtype):
    """Gradients of what all windows share."""
    for actual, expected in zip(shared_gradients(dtype), shared_gradients(torch.float64), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, 4 * torch.finfo(dtype).eps)


@cache
def learned_token(global_update, dtype):
    """Output and gradient of a global token of a layer over very many tokens."""
    layer = LongShortAttention(8, 1, window_size=2, rank=1, num_global_tokens=1, global_update=global_update)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = .5 * draw(*parameter.shape, dtype=dtype, seed=i)
    x, token = draw(1, MANY[0], 8, dtype=dtype), draw(1, 1, 8, dtype=dtype, seed=1).requires_grad_()
    out = layer(torch.cat([token, x], dim=1), (MANY[0] // 8, 8))
    loss = 1e-3 * out[:, 1:].to(torch.promote_types(dtype, torch.float32)).sum() + out[:, :1].sum()
    return out[:, :1].detach(), torch.autograd.grad(loss, token)[0]


@half_precision
@pytest.mark.parametrize('global_update', ['outputs', 'keys'])
def test_learned_global_tokens(dtype, global_update):
    """A gradient through a layer: from every token that attends to it, and from all that it attends to."""
    expected = learned_token(global_update, torch.float64)
    for actual, wanted in zip(learned_token(global_update, dtype), expected, strict=True):
        assert_close(actual, wanted, 10 * torch.finfo(dtype).eps)
