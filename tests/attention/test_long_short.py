"""Long-short attention layers against the oracle and the released vectors, and what may never change a result."""
import random

import numpy as np
import pytest
import reference
import torch
from golden_fill import load_case
from layers import draw_inputs, expect, randomise, run, worst
from torch.utils._python_dispatch import TorchDispatchMode

from timm_ls import FullAttention2d, LongShortAttention2d, attention_implementation
from timm_ls.attention import FullAttention, LongShortAttention
from timm_ls.attention.rel_pos import expand_aliased_table
from timm_ls.ops.window_attention import implementations
from timm_ls.vil_ls import RELEASED_ATTENTION_NAMES

IMPLEMENTATIONS = [each.name for each in implementations().values() if each.device is None]
NUM_CASES = 220
every_implementation = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
both_kinds = pytest.mark.parametrize('make', [LongShortAttention2d, FullAttention2d])


def random_case(seed):
    """Settings of one attention layer and its input, over everything that has an effect."""
    rng = random.Random(seed)
    num_heads = rng.choice([1, 2, 3])
    return dict(
        num_heads=num_heads,
        dim=num_heads * rng.choice([8, 10] if num_heads == 1 else [4, 5, 8]),
        window_size=1 + seed % 9,
        rank=rng.choice([0, 1, 4, 8]),
        num_global_tokens=rng.choice([0, 1, 3]),
        rel_pos_bias=rng.random() < .6,
        global_update=rng.choice(['outputs', 'keys']),
        qkv_bias=rng.random() < .8,
        size=(rng.choice([1, 2, 3, 5, 7, 8, 11, 12]), rng.choice([1, 2, 4, 6, 7, 9, 13])),
    )


def build(seed, size, **settings):
    layer = LongShortAttention2d(dtype=torch.float64, **settings)
    return layer, *draw_inputs(layer, seed, size, 1 + seed % 2)


def test_oracle_sweep():
    """Values and gradients of all implementations over random settings, in float64 and float32."""
    errors = {}
    for seed in range(NUM_CASES):
        case = random_case(seed)
        layer, x, tokens = build(seed, **case)
        expected, expected_grads = expect(layer, x, tokens, lambda p, a, t, case=case: reference.long_short_attention(
            p, a, t, case['num_heads'], case['window_size'], case['rank'], case['global_update']))
        for implementation in IMPLEMENTATIONS:
            outputs, grads = run(layer, x, tokens, implementation)
            errors[seed, implementation, 'float64'] = worst(outputs, expected), worst(grads, expected_grads)
        single = LongShortAttention2d(**{k: v for k, v in case.items() if k != 'size'})
        single.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
        for implementation in IMPLEMENTATIONS:
            outputs, grads = run(single, x.float(), tokens.float(), implementation)
            errors[seed, implementation, 'float32'] = worst(outputs, expected), worst(grads, expected_grads)
    for dtype, bound, grad_bound in (('float64', 1e-10, 1e-10), ('float32', 1e-5, 1e-5)):
        values = {key: error for key, error in errors.items() if key[2] == dtype}
        key, grad_key = max(values, key=lambda k: values[k][0]), max(values, key=lambda k: values[k][1])
        print(f'{dtype}: {len(values)} runs, worst value {values[key][0]:.1e}, gradient {values[grad_key][1]:.1e}')
        assert values[key][0] <= bound, (key, random_case(key[0]), values[key])
        assert values[grad_key][1] <= grad_bound, (grad_key, random_case(grad_key[0]), values[grad_key])


@every_implementation
@pytest.mark.parametrize('settings', [
    dict(dim=4, num_heads=2, window_size=2, rank=2, num_global_tokens=1),
    dict(dim=3, num_heads=1, window_size=3, rank=0, num_global_tokens=0, rel_pos_bias=False),
    dict(dim=4, num_heads=1, window_size=3, rank=1, num_global_tokens=2, global_update='keys'),
])
def test_gradcheck(implementation, settings):
    """Analytic gradients, and gradients of these, equal numeric ones, for inputs and parameters."""
    layer, x, tokens = build(1, size=(4, 5), **settings)
    x, tokens = x[:1].requires_grad_(), tokens[:1].requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def function(x, tokens, *params):
        with attention_implementation(implementation):
            y, t = torch.func.functional_call(layer, dict(zip(names, params)), (x, tokens if len(tokens[0]) else None))
        return y if t is None else (y, t)

    params = [p.detach().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(function, (x, tokens, *params), eps=1e-6, atol=1e-7, rtol=1e-5)
    if implementation == 'tiled':  # for the masked form it may take one of torch's that has no second derivative
        inputs = (x, tokens, *params)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
        outputs = function(*inputs)
        loss = (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).square().sum()
        expected = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        actual = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        for a, e in zip(actual, expected):
            assert a is e is None or torch.allclose(a, e, rtol=0, atol=1e-10)


@pytest.mark.parametrize('case', ['attn_d48_h1_w8_r4_s24', 'attn_d64_h2_w2_r2_s6', 'attn_d96_h3_w7_r8_s28'])
@every_implementation
def test_released_vectors(case, implementation):
    """Output and every gradient of the released layer, its aliased bias table included."""
    meta, released, golden = load_case(case)
    layer = LongShortAttention2d(meta['dim'], meta['num_heads'], meta['window'], meta['rank'], num_global_tokens=1)
    ours = {}
    for name in released:
        middle, _, leaf = name.rpartition('.')
        ours[name] = f"{RELEASED_ATTENTION_NAMES[f'attn.{middle}' if middle else f'attn.{name}']}"
        ours[name] = ours[name].removeprefix('attn.') + (f'.{leaf}' if middle else '')
    weights = {ours[name]: value for name, value in released.items()}
    weights['rel_pos.table'] = expand_aliased_table(weights['rel_pos.table'])
    layer.load_state_dict(weights)

    side = meta['tokens_per_side']
    x = np.random.RandomState(7).standard_normal((2, side * side + 1, meta['dim']))
    x = torch.from_numpy(x.astype(np.float32)).requires_grad_()
    with attention_implementation(implementation):
        y, tokens = layer(x[:, 1:].unflatten(1, (side, side)), x[:, :1])
    output = torch.cat([tokens, y.flatten(1, 2)], dim=1)
    output.square().mean().backward()
    expected = golden['output']
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=0, atol=5e-6 * abs(expected).max())

    compared = 0
    for key in golden.files:
        if not key.startswith('grad_'):
            continue
        name = key.removeprefix('grad_')
        if name == 'input':
            grad = x.grad
        else:
            grad = layer.get_parameter(ours[name]).grad
        if ours.get(name) == 'rel_pos.table':
            w, halo = meta['window'], meta['window'] // 2
            offsets = torch.arange(2 * (w + halo) - 1)
            rows = (offsets[:, None] * (w + 2 * halo) + offsets).flatten()
            grad = torch.zeros(golden[key].shape).index_add_(0, rows, grad.flatten(1).T)
        # the dynamic projection's bias has no gradient: a softmax does not see a shift
        scale = max(abs(golden[key]).max(), 1e-3)
        np.testing.assert_allclose(grad.numpy(), golden[key], rtol=0, atol=2e-5 * scale, err_msg=key)
        compared += 1
    assert compared == 5


def test_sequence_and_map_are_the_same():
    """The layer of blocks takes and returns one sequence, global tokens first; that of maps has the same weights."""
    for make, sequence in ((LongShortAttention2d, LongShortAttention), (FullAttention2d, FullAttention)):
        for g in (0, 2):
            layer = make(8, 2, num_global_tokens=g, dtype=torch.float64)
            plain = sequence(8, 2, num_global_tokens=g, dtype=torch.float64)
            x, tokens = draw_inputs(layer, 0, (5, 9), batch=2)
            plain.load_state_dict(layer.state_dict())
            y, t = layer(x, tokens if g > 0 else None)
            out = plain(torch.cat([tokens, x.flatten(1, 2)], dim=1), (5, 9))
            assert torch.equal(out[:, g:].unflatten(1, (5, 9)), y)
            assert t is None if g == 0 else torch.equal(out[:, :g], t)


class Kernels(TorchDispatchMode):
    """Within, the names of the operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@both_kinds
def test_kernels(make):
    """Inference takes torch's fused kernel, particular about its bias; nothing takes torch's own plain form."""
    layer = make(8, 2, num_global_tokens=1)
    x, tokens = torch.randn(2, 15, 9, 8), torch.randn(2, 1, 8)
    fused, plain = '_scaled_dot_product_flash_attention_for_cpu', {'_safe_softmax', 'isneginf', 'eq', 'where'}
    with torch.no_grad(), Kernels() as kernels:
        layer(x, tokens)
    assert fused in kernels.names and not kernels.names & plain, kernels.names
    assert ('_softmax' in kernels.names) == (make is LongShortAttention2d)  # of landmarks
    with Kernels() as kernels:
        layer(x, tokens)
    assert '_softmax' in kernels.names and not kernels.names & plain, kernels.names


@both_kinds
def test_projections_have_a_bias_unless_told_otherwise(make):
    """As released."""
    for given, expected in (({}, True), (dict(qkv_bias=True), True), (dict(qkv_bias=False), False)):
        layer = make(8, 2, **given)
        assert (layer.qkv.bias is not None) == expected and layer.proj.bias is not None


@pytest.mark.parametrize('kind', ['attn_drop', 'proj_drop'])
@both_kinds
def test_dropout_acts_in_training_only(make, kind):
    """Dropout of attention weights, or of outputs, changes map and token in training, at random, and nothing else."""
    layer = make(8, 2, num_global_tokens=1, dtype=torch.float64, **{kind: .5})
    generator = randomise(layer, 0)
    x, token = (torch.randn(1, *size, 8, generator=generator, dtype=torch.float64) for size in ((6, 6), (1,)))
    inputs = x.expand(400, -1, -1, -1), token.expand(400, -1, -1)
    torch.manual_seed(0)
    trained, expected = layer.train()(*inputs), layer.eval()(*inputs)
    for y, wanted in zip(trained, expected, strict=True):
        torch.testing.assert_close(wanted, wanted[:1].expand_as(wanted))
        assert not torch.equal(y[0], y[1])
    # not the token's mean: its logits are of the map's outputs
    assert (trained[0].mean(0) - expected[0][0]).abs().mean() < .25 * expected[0][0].abs().mean()


@both_kinds
def test_number_of_global_tokens(make):
    """Too few, too many or none where there should be some: an error, never a result."""
    x = torch.randn(1, 4, 5, 8)
    for expected, given in ((2, 1), (2, 3), (2, 0), (0, 1)):
        layer = make(8, 2, num_global_tokens=expected)
        tokens = torch.randn(1, given, 8) if given else None
        with pytest.raises(ValueError, match=f'Expected {expected} global tokens .* got {given}'):
            layer(x, tokens)


@pytest.mark.parametrize('make', [LongShortAttention, FullAttention])
def test_number_of_tokens(make):
    """A sequence of another length than its global tokens and map make: an error."""
    layer = make(8, 2, num_global_tokens=2)
    for shape, size in (((1, 20, 8), (4, 5)), ((1, 23, 8), (4, 5)), ((1, 22, 8), (4, 4)), ((4, 5, 2, 8), (4, 5))):
        with pytest.raises(ValueError, match=rf'2 \+ {size[0]} \* {size[1]}, C\].* got \[{shape[0]}, {shape[1]}'):
            layer(torch.randn(shape), size)


@pytest.mark.parametrize('make, message', [
    (lambda: FullAttention2d(8, 2, num_global_tokens=-1), 'num_global_tokens=-1: expected 0 or more'),
    (lambda: LongShortAttention2d(10, 3), 'dim=10 is not divisible by num_heads=3'),
    (lambda: FullAttention2d(10, 3), 'dim=10 is not divisible by num_heads=3'),
    (lambda: LongShortAttention2d(8, 2, window_size=0), 'window_size=0.*expected window_size >= 1'),
    (lambda: LongShortAttention2d(8, 2, rank=-1), 'rank=-1'),
    (lambda: LongShortAttention2d(8, 2, global_update='values'), "='values': expected 'outputs' or 'keys'"),
])
def test_bad_settings(make, message):
    """What was given and what is expected, in one ValueError."""
    with pytest.raises(ValueError, match=message):
        make()
