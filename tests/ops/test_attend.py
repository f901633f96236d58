"""Attention over keys that are all there: fused or plain, in every type, against float64."""
import pytest
import torch

from timm_ls.ops.attend import attend, attend_heads, softmax


def exact(q, k, v, bias):
    logits = q.double() @ k.double().mT * q.shape[-1] ** -.5
    return (logits + (0 if bias is None else bias.double())).softmax(-1) @ v.double()


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('bias', ['none', 'fixed', 'learned'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attend(dtype, bias, fused):
    """Values and gradients, a few roundings away."""
    torch.manual_seed(0)
    q, k, v, b = (torch.randn(shape).to(dtype) for shape in ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), (1, 3, 7, 9)))
    inputs = [x.requires_grad_() for x in ((q, k, v, b) if bias == 'learned' else (q, k, v))]
    b = None if bias == 'none' else b
    bound = 8 * torch.finfo(dtype).eps
    for needs_grad in (True, False):
        with torch.set_grad_enabled(needs_grad):
            out, expected = attend(q, k, v, b, 0., fused), exact(q, k, v, b)
        assert out.dtype == dtype
        assert (out.double() - expected).abs().max() < bound * expected.abs().max()
        if needs_grad:
            grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)]
            for grad, wanted in zip(*grads, strict=True):
                assert (grad.double() - wanted.double()).abs().max() < bound * wanted.abs().max()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_softmax_is_in_float32(dtype):
    """Over more tokens than half precision can count; in float64 where that is given."""
    weights = softmax(torch.zeros(1, 3000, 4, dtype=dtype), dim=1)
    assert weights.dtype == torch.float32 and torch.allclose(weights.sum(1), torch.ones(1, 4))
    assert softmax(torch.zeros(2, dtype=torch.float64), dim=0).dtype == torch.float64


def test_dropout():
    """Of weights: a value that all share is kept or scaled, at random; nothing is dropped with a probability of 0."""
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 4, 2000, 8), torch.ones(1, 4, 2000, 8)
    for fused in (True, False):
        torch.manual_seed(0)
        out, again = attend(q, k, v, None, .5, fused), attend(q, k, v, None, .5, fused)
        assert not torch.equal(out, again) and (out - 1).abs().max() < .5
        assert (attend(q, k, v, None, 0., fused) - 1).abs().max() < 1e-5


def test_heads():
    """Each head has its own channels, which lie next to each other."""
    q, k, v = (torch.randn(2, n, 12, dtype=torch.float64) for n in (3, 5, 5))
    bias = torch.randn(1, 3, 3, 5, dtype=torch.float64)
    out = attend_heads(q, k, v, bias, 3, 0., True)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        torch.testing.assert_close(out[..., part], exact(q[..., part], k[..., part], v[..., part], bias[:, head]))
