"""The LayerNorm of half precision: values and gradients of float64, the type that was asked for; what is refused."""
import re

import pytest
import torch
import torch.nn as nn

from timm_ls import FullAttention2d, LongShortAttention2d
from timm_ls.attention.layers import LayerNorm, check_tokens
from timm_ls.ops import chunks

KINDS = {'affine': {}, 'no bias': dict(bias=False), 'not affine': dict(elementwise_affine=False)}


def build(kind, dtype, **settings):
    """A norm over 12 channels, and one of torch's in float64 with the same parameters."""
    torch.manual_seed(0)
    norm = LayerNorm(12, eps=1e-3, **settings, **KINDS[kind])
    for parameter in norm.parameters():
        parameter.data = torch.randn(12)
    norm = norm.to(dtype)
    exact = nn.LayerNorm(12, eps=1e-3, **KINDS[kind]).double()
    exact.load_state_dict({name: value.double() for name, value in norm.state_dict().items()})
    return norm, exact


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(kind, frozen, dtype):
    """Those of torch's norm in float64, rounded; of frozen parameters as well, and without gradients."""
    norm, exact = build(kind, dtype)
    norm.requires_grad_(not frozen)
    x, grad = torch.randn(2, 5, 12).to(dtype).requires_grad_(), torch.randn(2, 5, 12).to(dtype)
    out = norm(x)
    out.backward(grad)
    x_exact = x.detach().double().requires_grad_()
    expected = exact(x_exact)
    expected.backward(grad.double())
    bound = 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        for actual in (out, norm(x)):
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(x.grad.double(), x_exact.grad, rtol=bound, atol=5 * bound)
    for parameter, wanted in zip(norm.parameters(), exact.parameters(), strict=True):
        assert (parameter.grad is None) == frozen
        if not frozen:
            assert parameter.grad.dtype == dtype
            torch.testing.assert_close(parameter.grad.double(), wanted.grad, rtol=bound, atol=5 * bound)


@pytest.mark.parametrize('keep_type', [False, True])
@pytest.mark.parametrize('given', [torch.float32, torch.bfloat16])
def test_type_under_autocast(keep_type, given):
    """torch's, which is the input's on a CPU; that of the input too where it is to be kept, rounded once."""
    norm, exact = build('affine', torch.float32, keep_type=keep_type)
    x = torch.randn(2, 5, 12).to(given)
    with torch.autocast('cpu', torch.bfloat16):
        out, torchs = norm(x), nn.LayerNorm(12)(x)
    assert out.dtype == given == torchs.dtype
    bound = torch.finfo(given).eps
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=bound, atol=4 * bound)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_graphs(dtype):
    """Scripted, traced and exported the same."""
    norm, _ = build('affine', dtype)
    x = torch.randn(2, 5, 12).to(dtype)
    with torch.no_grad():
        expected = norm(x)
        exported = torch.export.export(norm, (x,)).module()
        for graph in (torch.jit.script(norm), torch.jit.trace(norm, x), torch.fx.symbolic_trace(norm), exported):
            torch.testing.assert_close(graph(x), expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', ['affine', 'no bias'])
@pytest.mark.parametrize('chunk_bytes', [1, 300, 8 * 2 ** 20])
def test_chunks_of_a_part(monkeypatch, chunk_bytes, kind, dtype):
    """Keys and values beside queries, a chunk at a time: values and gradients of all of them at once."""
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', chunk_bytes)
    norm, exact = build(kind, dtype, in_chunks=True)
    x, grad = torch.randn(2, 7, 3, 12).to(dtype).requires_grad_(), torch.randn(2, 7, 2, 12).to(dtype)
    out = norm(x[:, :, 1:])
    assert '_LayerNorm' in type(out.grad_fn).__name__ and out.is_contiguous()
    out.backward(grad)
    x_exact = x.detach().double().requires_grad_()
    expected = exact(x_exact[:, :, 1:])
    expected.backward(grad.double())
    bound = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(x.grad.double(), x_exact.grad, rtol=bound, atol=5 * bound)
    for parameter, wanted in zip(norm.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), wanted.grad, rtol=bound, atol=5 * bound)


@pytest.mark.parametrize('kind', ['affine', 'no bias'])
def test_second_derivatives_in_chunks(kind):
    """Of input, weight and bias."""
    norm, _ = build(kind, torch.float64, in_chunks=True)
    inputs = (torch.randn(2, 3, 3, 12, dtype=torch.float64).requires_grad_(), *norm.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: norm(x[:, :, 1:]), inputs)


def test_wrong_number_of_tokens():
    """The message says what was expected, in the order of the arguments."""
    expected = re.escape(
        'Expected tokens [batch, 1 + 4 * 6, C]: global tokens (num_global_tokens), then a map of 4 rows and 6 columns;'
        ' got [2, 24, 8].')
    with pytest.raises(ValueError, match=expected):
        check_tokens(torch.zeros(2, 24, 8), (4, 6), 1)
    check_tokens(torch.zeros(2, 25, 8), (4, 6), 1)


@pytest.mark.parametrize('kind', [LongShortAttention2d, FullAttention2d])
@pytest.mark.parametrize('shape', [(1, 16, 5, 4), (1, 5, 16), (1, 0, 5, 16), (2, 5, 4, 8)], ids=str)
def test_what_is_no_map(kind, shape):
    """Channels first, a sequence, no rows, other channels."""
    layer = kind(16, 2)
    with pytest.raises(ValueError, match=re.escape(f'[batch, rows, columns, 16], channels last; got {list(shape)}')):
        layer(torch.randn(shape))
