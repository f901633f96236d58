"""Layers of other projects, adopted: their values and gradients, names and weights; what cannot be reproduced stays.

The oracle is a dense layer written from the equations, and Surya itself where it is installed:
`pip install --no-deps terratorch-surya einops`.
"""
import copy
import importlib
import json
import warnings
import weakref

import dense_layer
import pytest
import torch
from golden_fill import load_case
from layers import randomise
from paths import RECIPES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import timm_ls
from timm_ls import LongShortAttention2d, adopt
from timm_ls._compat import fake_mode
from timm_ls.adopt import AdoptedAttention
from timm_ls.attention import chunked
from timm_ls.ops import chunks


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


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('nglo, update', [(0, 'outputs'), (2, 'outputs'), (1, 'keys')])
def test_chunks(monkeypatch, nglo, update, grad):
    """However small the chunks: in inference a layer goes through a map in rows, in training sums are in parts."""
    model, ours = build(w=2, dp_rank=2, nglo=nglo, rpe=True, update=update)
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 4000)
    x = tokens(model, 11, 10)
    if grad:
        assert_same(ours, model, x, 11, 10)
        return
    runs = []
    run = chunked._long_short
    monkeypatch.setattr(chunked, '_long_short', lambda *args: runs.append(args) or run(*args))
    with torch.no_grad():
        assert_close({'output': ours.eval()(x, 11, 10)}, {'output': model.eval()(x, 11, 10)})
        assert runs
        with torch.autocast('cpu', torch.bfloat16):
            assert ours.attn(x, 11, 10).dtype == model.attn(x, 11, 10).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r'Expected tokens \[batch, . \+ 11 \* 9, C\]'):
            ours(x, 11, 9)
        runs.clear()
        for hooked in (ours.attn.qkv, ours.attn.to_dynamic_projection):
            handle = hooked.register_forward_hook(lambda module, args, output: None)
            ours(x, 11, 10)
            handle.remove()
    assert not runs


def test_size_from_tokens():
    """A square map by default, one side from the other, and an error where tokens are no such map."""
    model, ours = build(w=2, nglo=1)
    x = tokens(model, 6, 6)
    layer = ours.attn
    expected = layer(x, 6, 6)
    for size in ((), (6,), (None, 6)):
        assert layer(x, *size).equal(expected)
    assert layer(x, ny=4).equal(layer(x, 9, 4)) and layer(x, nx=4).equal(layer(x, 4, 9))
    for wrong in ((5, 6), (5,), (7, 7)):
        with pytest.raises(ValueError, match='Expected tokens'):
            layer(x, *wrong)
    with pytest.raises(ValueError, match='Expected tokens'):
        layer(x[:, 2:])


# What stays


@every_source
def test_names_and_objects(source):
    """Parameters are the very same, in the same order; state dicts load both ways, other models' too."""
    settings = dict(w=2, dp_rank=2, nglo=1, rpe=True, qkv_bias=True)
    torch.manual_seed(0)
    model = Block(SOURCES[source]()(24, 3, **settings))
    before, parts = dict(model.named_parameters()), (model.attn.qkv, model.attn.proj, model.attn.to_dynamic_projection)
    keys = list(model.state_dict())
    (report,) = adopt(model)
    assert report.name == 'attn' and report.found.endswith('.AttentionLS')
    assert report.made == (
        'AdoptedAttention(dim=24, num_heads=3, window_size=2, rank=2, num_global_tokens=1, rel_pos_bias=True,'
        " global_update='keys')")
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert parts == (model.attn.qkv, model.attn.proj, model.attn.to_dynamic_projection)
    assert list(model.state_dict()) == keys and 'attn.relative_position_index' in keys

    theirs, ours = build(source, **settings)
    randomise(theirs, 5)
    x = tokens(theirs, 8, 8)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, x)
    randomise(ours, 6)
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs, x)


def test_places_and_modes():
    """A layer that is in two places is one layer afterwards; training mode and frozen parameters stay."""
    shared = dense_layer.AttentionLS(24, 3, w=2)
    shared.dual_ln_full.requires_grad_(False)
    model = nn.ModuleDict({'a': shared, 'b': nn.ModuleList([shared]), 'c': dense_layer.AttentionLS(24, 3, w=3).eval()})
    assert [adopted.name for adopted in adopt(model)] == ['a', 'b.0', 'c']
    assert model['a'] is model['b'][0] and type(model['a']) is AdoptedAttention
    assert model['a'].training and model['a'].dual_ln_full.training and not model['c'].training
    assert not model['c'].dual_ln_full.training
    assert [p.requires_grad for p in model['a'].dual_ln_full.parameters()] == [False, False]
    assert adopt(model) == []  # once is enough
    copied = copy.deepcopy(model)
    assert copied['a'].qkv is not model['a'].qkv and copied['a'] is copied['b'][0]


@every_source
def test_lora(source):
    """LoRA of peft before and after: the same modules are matched, trained and merged."""
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=4, target_modules=['qkv', 'proj'], init_lora_weights=False)

    def adapted(model, before=None):
        torch.manual_seed(1)
        model = copy.deepcopy(model)
        if before is True:
            adopt(model)
        model = peft.get_peft_model(model, config)
        if before is False:
            adopt(model)
        assert isinstance(model.base_model.model.attn, AdoptedAttention) == (before is not None)
        return model.eval()

    theirs, _ = build(source, w=2, dp_rank=2)
    x = tokens(theirs, 8, 8)
    expected = adapted(theirs)
    for model in (adapted(theirs, before=True), adapted(theirs, before=False)):
        assert list(model.state_dict()) == list(expected.state_dict())
        assert_same(model, expected, x)
        assert len(values_and_gradients(model, x)[1]) == 1 + 4  # the input, and two factors each of qkv and proj
        assert_close({'output': model.merge_and_unload()(x)}, {'output': expected(x)})


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_activation_checkpointing(use_reentrant):
    """The same values and gradients."""
    model, ours = build(w=2, dp_rank=2, rpe=True)
    x = tokens(model, 6, 4)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ours

        def forward(self, x):
            return checkpoint(self.model, x, 6, 4, use_reentrant=use_reentrant)

    for actual, expected in zip(values_and_gradients(Checkpointed(), x), values_and_gradients(ours, x, 6, 4)):
        assert_close({name.removeprefix('model.'): value for name, value in actual.items()}, expected, 1e-6)


@pytest.mark.parametrize('nglo', [0, 1])
@every_source
def test_autocast(source, nglo):
    """The type that theirs returns, and values and gradients as close to those of float32 as theirs are, nearly."""
    model, ours = build(source, w=2, dp_rank=2, nglo=nglo)
    x = tokens(model, 8, 8)
    exact = values_and_gradients(model, x)
    with torch.autocast('cpu', torch.bfloat16):
        actual, theirs = values_and_gradients(ours, x), values_and_gradients(model, x)
        assert ours.attn(x).dtype == model.attn(x).dtype == torch.bfloat16

    def error(result):
        return [max((a.float() - e).abs().max() for a, e in zip(part.values(), wanted.values(), strict=True)) / max(
            e.abs().max() for e in wanted.values()) for part, wanted in zip(result, exact)]

    print(error(actual), error(theirs))
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(error(actual), error(theirs), strict=True))


def test_compiled():
    """One graph, at any rectangle."""
    model, ours = build(w=2, dp_rank=2, nglo=1, rpe=True)
    compiled = torch.compile(ours, fullgraph=True, backend='aot_eager', dynamic=True)
    for size in ((6, 4), (5, 9), (8, 8)):
        x = tokens(model, *size)
        for actual, expected in zip(values_and_gradients(compiled, x, *size), values_and_gradients(ours, x, *size)):
            assert_close({name.removeprefix('_orig_mod.'): value for name, value in actual.items()}, expected)


# Refusals


class Doubled(dense_layer.AttentionLS):
    """The same names, other values."""

    def forward(self, *args):
        return 2 * super().forward(*args)


class Detached(dense_layer.AttentionLS):
    """The same values, other gradients."""

    def forward(self, x, *args):
        return super().forward(x, *args) + 0 * x - (x - x.detach())


class Failing(dense_layer.AttentionLS):
    def forward(self, *args):
        raise RuntimeError('only for squares of 64')


def changed(**attributes):
    layer = dense_layer.AttentionLS(24, 3, w=2)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def without(name):
    layer = dense_layer.AttentionLS(24, 3, w=2)
    delattr(layer, name)
    return layer


def hooked():
    layer = dense_layer.AttentionLS(24, 3, w=2)
    layer.dual_ln_dp.register_forward_hook(lambda *args: None)
    return layer


def vision_longformer():
    layer = nn.Module()
    layer.query, layer.kv, layer.proj = nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(24, 24)
    return layer


REFUSED = {
    'other values': (lambda: Doubled(24, 3, w=2), 'it computes something else: .* differ from those of our layer by'),
    'other gradients': (lambda: Detached(24, 3, w=2), 'it computes something else'),
    'fails': (lambda: Failing(24, 3, w=2), 'it fails on maps of 6 x 6 tokens: RuntimeError: only for squares of 64'),
    'scale': (lambda: changed(scale=1.), r'it scales logits by 1, expected .* = 0\.353553'),
    'dropout': (lambda: changed(attn_drop=nn.Dropout(.1)), r'it drops attention weights \(attn_drop\)'),
    'window': (lambda: changed(window_size=1), 'its window_size is 1'),
    'missing': (lambda: without('proj_drop'), 'it has no proj_drop'),
    'more': (lambda: changed(gate=nn.Linear(2, 2)), 'it has gate beside qkv, '),
    'norm': (lambda: changed(dual_ln_dp=nn.Identity()), 'dual_ln_dp is a Identity, expected a LayerNorm'),
    'hook': (hooked, 'it has hooks, which would be lost'),
    'meta': (lambda: dense_layer.AttentionLS(24, 3, w=2).to('meta'), 'it is on the meta device: load its weights'),
    'sequence': (
        lambda: changed(dual_ln_s=nn.Identity(), dual_ln_l=nn.Identity(), dconv_fc=nn.Identity()),
        'it attends over sequences, adopted are layers over maps'),
    'ViL': (vision_longformer, "Vision Longformer's attention is another one: timm_ls.warm_start takes"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refusals(case):
    """With the reason and where; nothing is replaced then, not even what could be."""
    make, reason = REFUSED[case]
    known = dense_layer.AttentionLS(24, 3, w=2)
    model = nn.ModuleDict({'known': known, 'blocks': nn.ModuleList([make(), make()])})
    with pytest.raises(ValueError, match=rf'^Nothing was replaced\. \w+: {reason}.* \(in blocks\.0, blocks\.1\)\.$'):
        adopt(model)
    assert model['known'] is known


def test_nothing_to_adopt():
    """An error without long-short attention and for a layer alone; an empty list where all is ours already."""
    with pytest.raises(ValueError, match='No long-short attention in Sequential: expected modules with qkv'):
        adopt(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match='AttentionLS is the layer itself: give a module that holds it'):
        adopt(dense_layer.AttentionLS(24, 3))
    assert adopt(nn.Sequential(LongShortAttention2d(24, 3))) == []
    assert adopt(timm_ls.LongShortAttention2d(24, 3).requires_grad_(False)) == []


# Surya


def build_surya(**settings):
    """Surya, its own class, of two blocks with attention on 8 x 8 tokens, all parameters alive; two equal ones."""
    torch.manual_seed(0)
    model = surya('helio_spectformer', 'HelioSpectFormer')(**dict(dict(
        img_size=32, patch_size=4, in_chans=3, embed_dim=24, time_embedding=dict(type='linear', time_dim=2), depth=3,
        n_spectral_blocks=1, num_heads=3, mlp_ratio=2., drop_rate=0., window_size=2, dp_rank=4, finetune=False),
        **settings))
    randomise(model, 0)
    return model, copy.deepcopy(model)


def surya_batch():
    generator = torch.Generator().manual_seed(3)
    return {'ts': torch.randn(2, 3, 2, 32, 32, generator=generator), 'time_delta_input': torch.zeros(2, 2)}


@pytest.mark.parametrize('rpe', [False, True])
@pytest.mark.parametrize('checkpoint_layers', [None, [0, 1, 2]])
def test_surya_trains_the_same(rpe, checkpoint_layers):
    """Outputs and gradients of three steps of training, by an optimizer that was made before; weights after them."""
    theirs, ours = build_surya(rpe=rpe, checkpoint_layers=checkpoint_layers)
    runs = []
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=.9)
        if model is ours:
            assert [adopted.name for adopted in adopt(model)] == [
                f'backbone.blocks_attention.{i}.attn' for i in range(2)]
        results = []
        for _ in range(3):
            optimizer.zero_grad()
            out = model(surya_batch())
            out.square().mean().backward()
            results += [{'output': out.detach()}, {name: p.grad.clone() for name, p in model.named_parameters()}]
            optimizer.step()
        runs.append([*results, {name: value.clone() for name, value in model.state_dict().items()}])
    for actual, expected in zip(*runs, strict=True):
        assert_close(actual, expected)
    assert not runs[0][0]['output'].allclose(runs[0][2]['output'], rtol=1e-3)  # it learned


# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what was made and is alive, and their peak; given tensors count nothing."""

    def __init__(self, *given):
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, count):
        self.bytes += count
        self.peak = max(self.peak, self.bytes)


def peak_bytes(model, mode, dtype):
    """Bytes of tensors at the peak of a pass over 128 x 128 tokens of 1280 channels, in which nothing is computed."""
    with fake_mode():
        model.load_state_dict({name: torch.empty(x.shape) for name, x in model.state_dict().items()}, assign=True)
        x = torch.empty(1, 128 * 128, 1280, requires_grad=mode != 'inference')
        model.train(mode != 'inference')
        live = LiveBytes(x, *model.parameters())
        with live, torch.set_grad_enabled(mode != 'inference'):
            with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
                out = checkpoint(model, x, use_reentrant=False) if mode == 'checkpoint' else model(x)
            if mode != 'inference':
                out.sum().backward()
        return live.peak


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('mode', ['inference', 'training', 'checkpoint'])
def test_memory(mode, dtype):
    """At most half of what Surya's layer takes."""
    theirs = nn.Sequential(surya()(1280, 16, dp_rank=4, nglo=0))
    ours = copy.deepcopy(theirs)
    adopt(ours)
    actual, wanted = (peak_bytes(model, mode, dtype) for model in (ours, theirs))
    print(f'{actual >> 20} MiB, theirs {wanted >> 20}: {actual / wanted:.2f}')
    assert actual <= .5 * wanted


@pytest.mark.slow
def test_cost(monkeypatch, capsys):
    """The recipe that measures both: the same outputs, a time and two peaks."""
    surya()
    monkeypatch.syspath_prepend(str(RECIPES))
    report = importlib.import_module('adopt_cost').main(['--tokens', '16384', '--turns', '1'])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    assert report['difference'] < 2e-5 and report['times_faster'] > 0
    assert 0 < report['peak_mib']['ours'] < report['peak_mib']['theirs']
