"""Layers of other projects, adopted: their values and gradients, names and weights; what cannot be reproduced stays.

The oracle is a dense layer written from the equations, and the layer of Surya where it is installed:
`pip install --no-deps terratorch-surya einops`.
"""
import copy
import warnings

import dense_layer
import pytest
import torch
from golden_fill import load_case
from layers import randomise
from torch import nn

from timm_ls import adopt
from timm_ls.adopt import AdoptedAttention


def surya(name='transformer_ls', attribute='AttentionLS'):
    """A class of the installed Surya."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # it imports from timm.models.layers
        module = pytest.importorskip(
            f'terratorch_surya.models.{name}', reason='pip install --no-deps terratorch-surya einops')
    return getattr(module, attribute)


SOURCES = {'dense': lambda: dense_layer.AttentionLS, 'surya': surya}
every_source = pytest.mark.parametrize('source', SOURCES)


class Block(nn.Module):
    """What holds a layer, as a residual branch; `args` are the rows and columns of the map, or nothing."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x, *args):
        return x + self.attn(x, *args)


def build(source='dense', dim=24, num_heads=3, **settings):
    """A model with one layer, all parameters alive, and a copy of it that is adopted."""
    torch.manual_seed(0)
    model = Block(SOURCES[source]()(dim, num_heads, **settings))
    randomise(model, 0)
    ours = copy.deepcopy(model)
    report = adopt(ours)
    assert [adopted.name for adopted in report] == ['attn'] and isinstance(ours.attn, AdoptedAttention)
    return model, ours


def tokens(model, rows, columns, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    attn = model.attn
    return torch.randn(batch, attn.nglo + rows * columns, attn.dual_ln_full.normalized_shape[0], generator=generator)


def values_and_gradients(model, x, *args):
    """Output, and the gradients of the input and of what is trained, by name."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x, *args)
    (out.float().square().sum() + out.sum()).backward()
    return {'output': out.detach()}, {'input': x.grad} | {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
        if p.requires_grad}


def assert_close(actual, expected, bound=2e-5):
    """Equal by name and in order, within a bound relative to the largest."""
    assert list(actual) == list(expected)
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= bound * scale, name


def assert_same(ours, model, x, *args, bound=2e-5):
    for actual, expected in zip(values_and_gradients(ours, x, *args), values_and_gradients(model, x, *args)):
        assert_close(actual, expected, bound)


@pytest.mark.parametrize('rpe', [False, True])
@pytest.mark.parametrize('nglo', [0, 1])
@pytest.mark.parametrize('rank', [0, 2, 4])
@every_source
def test_values_and_gradients(source, rank, nglo, rpe):
    """Those of the layer, of a square map and, which only the dense layer takes, of rectangles that w does not divide.
    """
    for w in (2, 3):
        model, ours = build(source, w=w, dp_rank=rank, nglo=nglo, rpe=rpe, qkv_bias=rpe)
        assert_same(ours, model, tokens(model, 12, 12))
        assert_same(ours, model, tokens(model, 12, 12), 12, 12)
        if source == 'dense':
            assert_same(ours, model, tokens(model, 5, 8), 5, 8)
            assert_same(ours, model, tokens(model, 7, 3), 7, 3)


@pytest.mark.parametrize('case', ['attn_d48_h1_w8_r4_s24', 'attn_d64_h2_w2_r2_s6', 'attn_d96_h3_w7_r8_s28'])
def test_released_vectors(case):
    """Output and gradients of the released layer itself, of its aliased bias table too."""
    import numpy as np
    meta, released, golden = load_case(case)
    model = Block(dense_layer.AttentionLS(
        meta['dim'], meta['num_heads'], qkv_bias=True, rpe=True, dp_rank=meta['rank'], w=meta['window'],
        update='outputs'))
    adopt(model)
    print(model.attn.load_state_dict(released, strict=False))
    side = meta['tokens_per_side']
    x = np.random.RandomState(7).standard_normal((2, side * side + 1, meta['dim'])).astype(np.float32)
    x = torch.from_numpy(x).requires_grad_()
    out = model.attn(x, side, side)
    out.square().mean().backward()
    assert_close({'output': out.detach()}, {'output': torch.from_numpy(golden['output'])}, 5e-6)
    for name in (name for name in golden.files if name.startswith('grad_')):
        grad = x.grad if name == 'grad_input' else model.attn.get_parameter(name.removeprefix('grad_')).grad
        assert_close({name: grad}, {name: torch.from_numpy(golden[name])})
