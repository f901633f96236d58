"""The attention layers against the oracle, the released vectors, and what may never change a result."""
import gc
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from golden_fill import fill
from torch.utils._python_dispatch import TorchDispatchMode

import timm_ls.rel_pos
import timm_ls.window_attention
from timm_ls import GlobalAttention2d, LongShortAttention2d, attention_implementation
from timm_ls.rel_pos import RelPosBias2d, expand_aliased_table, grid_bias, resize_bias_table
from timm_ls.vil_ls import RELEASED_ATTENTION_NAMES
from timm_ls.window import axis_spans

GOLDEN = Path(__file__).parent / 'golden'
IMPLEMENTATIONS = ('tiled', 'masked')
NUM_CASES = 220


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


def randomise(module, seed):
    """Give every parameter values that matter: scales near 1, everything else of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim >= 2 and 'rel_pos' not in name:
            noise = 1.5 * noise / parameter.shape[-1] ** .5
        elif 'norm' in name and name.endswith('weight'):
            noise = 1 + .2 * noise
        parameter.data.copy_(noise)
    return generator


def build(seed, size, **settings):
    layer = LongShortAttention2d(dtype=torch.float64, **settings)
    generator = randomise(layer, seed)
    B = 1 + seed % 2
    x = torch.randn(B, *size, layer.dim, generator=generator, dtype=torch.float64)
    tokens = torch.randn(B, layer.num_global_tokens, layer.dim, generator=generator, dtype=torch.float64)
    return layer, x, tokens


def run(layer, x, tokens, implementation):
    """Output and gradients of a layer, all in one list: of the map, the tokens, the inputs, the parameters."""
    x, tokens = x.detach().clone().requires_grad_(), tokens.detach().clone().requires_grad_()
    layer.zero_grad()
    with attention_implementation(implementation):
        y, t = layer(x, tokens if tokens.shape[1] > 0 else None)
    loss = y.square().sum() + y.sum()
    if t is not None:
        loss = loss + (t.square() * 2).sum()
    loss.backward()
    outputs = [y.detach()] + ([t.detach()] if t is not None else [])
    return outputs, [x.grad] + ([tokens.grad] if t is not None else []) + [p.grad for p in layer.parameters()]


def expect(layer, x, tokens, oracle):
    """The same by the oracle, image by image, gradients by autograd."""
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x, tokens = x.detach().clone().requires_grad_(), tokens.detach().clone().requires_grad_()
    pairs = [oracle(params, x[b], tokens[b]) for b in range(x.shape[0])]
    y = torch.stack([pair[0] for pair in pairs])
    t = torch.stack([pair[1] for pair in pairs])
    has_tokens = tokens.shape[1] > 0
    loss = y.square().sum() + y.sum() + ((t.square() * 2).sum() if has_tokens else 0)
    loss.backward()
    outputs = [y.detach()] + ([t.detach()] if has_tokens else [])
    grads = [x.grad] + ([tokens.grad] if has_tokens else []) + [p.grad for p in params.values()]
    return outputs, grads


def worst(actual, expected):
    """Largest difference over all tensors, against the largest value among them."""
    scale = max(e.abs().max().item() for e in expected if e.numel())
    return max((a.double() - e.double()).abs().max().item() for a, e in zip(actual, expected) if e.numel()) / scale


def test_oracle_sweep():
    """Values and gradients of both implementations over random settings, in float64 and float32."""
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


@pytest.mark.parametrize('seed', range(24))
def test_full_attention_matches_oracle(seed):
    """Full attention, on its own grid and on others, whose bias table is then resized."""
    rng = random.Random(seed)
    num_heads, g = rng.choice([1, 2, 3]), rng.choice([0, 1, 3])
    size = rng.choice([1, 2, 4, 5]), rng.choice([1, 3, 4, 6])
    grid = size if seed % 3 == 0 else (rng.choice([1, 2, 3, 5]), rng.choice([2, 3, 4, 6]))
    layer = GlobalAttention2d(num_heads * 4, num_heads, grid, g, rel_pos_bias=seed % 4 != 1, dtype=torch.float64)
    generator = randomise(layer, seed)
    x = torch.randn(2, *size, layer.qkv.in_features, generator=generator, dtype=torch.float64)
    tokens = torch.randn(2, g, layer.qkv.in_features, generator=generator, dtype=torch.float64)
    expected, expected_grads = expect(
        layer, x, tokens, lambda p, a, t: reference.full_attention(p, a, t, num_heads))
    outputs, grads = run(layer, x, tokens, 'auto')
    assert worst(outputs, expected) < 1e-10
    assert worst(grads, expected_grads) < 1e-10
    layer.fused_attn = False
    assert worst(run(layer, x, tokens, 'auto')[0], expected) < 1e-10


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
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
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_released_vectors(case, implementation):
    """Output and every gradient of the released layer, its aliased bias table included."""
    meta = json.loads((GOLDEN / f'{case}.json').read_text())
    golden = np.load(GOLDEN / f'{case}.npz')
    layer = LongShortAttention2d(meta['dim'], meta['num_heads'], meta['window'], meta['rank'], num_global_tokens=1)
    ours = {}
    for name in meta['params']:
        middle, _, leaf = name.rpartition('.')
        ours[name] = f"{RELEASED_ATTENTION_NAMES[f'attn.{middle}' if middle else f'attn.{name}']}"
        ours[name] = ours[name].removeprefix('attn.') + (f'.{leaf}' if middle else '')
    weights = {ours[name]: torch.from_numpy(fill(name, tuple(shape))) for name, shape in meta['params'].items()}
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


def test_aliased_table_expansion():
    """Every offset keeps the value that the released index reads for it."""
    for w in range(1, 12):
        p = w // 2
        table = torch.randn(2 * (w + p - 1) * (w + 2 * p + 1) + 1, 3)
        dense = expand_aliased_table(table)
        assert dense.shape == (3, 2 * (w + p) - 1, 2 * (w + p) - 1)
        for dy in range(dense.shape[1]):
            for dx in range(dense.shape[2]):
                assert torch.equal(dense[:, dy, dx], table[dy * (w + 2 * p) + dx])
    with pytest.raises(ValueError, match=r'shape \(254, 3\) fits no window size'):
        expand_aliased_table(torch.zeros(254, 3))


@pytest.mark.parametrize('old, new', [((27, 27), (27, 27)), ((13, 9), (27, 5)), ((27, 27), (1, 3)), ((1, 1), (5, 5)),
                                      ((27, 27), (39, 55))])
def test_resized_table(old, new):
    """Bicubic by the oracle's weights; the identity at the same size; half precision rounds the result alone."""
    table = torch.randn(2, *old, dtype=torch.float64)
    expected = torch.stack([reference.resize_matrix(old[0], new[0]) @ head @ reference.resize_matrix(old[1], new[1]).T
                            for head in table])
    torch.testing.assert_close(resize_bias_table(table, new), expected, rtol=0, atol=1e-12)
    half = table.bfloat16()
    assert torch.equal(resize_bias_table(half, new), resize_bias_table(half.float(), new).bfloat16())
    if old == new:
        assert torch.equal(resize_bias_table(table, new), table)


@pytest.mark.parametrize('with_grad', [False, True])
def test_bias_of_rows(with_grad):
    """Every query of some rows finds the bias of its offset to every key, on maps of any size, keys at any stride."""
    rng = random.Random(0)
    for _ in range(20):
        height, width, key_stride, g = rng.randint(1, 7), rng.randint(1, 7), rng.randint(1, 3), rng.randint(0, 2)
        num_rows = rng.randint(1, height)
        table = torch.randn(2, num_rows + height - 1, 2 * width - 1)
        global_bias = torch.randn(2, g) if g > 0 else None
        with torch.set_grad_enabled(with_grad):
            bias = grid_bias(table, global_bias, num_rows, (height, width), key_stride)
        keys = list(itertools.product(range(0, height, key_stride), range(0, width, key_stride)))
        expected = torch.empty(2, num_rows * width, g + len(keys))
        for y, x in itertools.product(range(num_rows), range(width)):
            for i, (key_y, key_x) in enumerate(keys):
                expected[:, y * width + x, g + i] = table[:, y - key_y + height - 1, x - key_x + width - 1]
        if global_bias is not None:
            expected[..., :g] = global_bias[:, None]
        assert torch.equal(bias, expected)


@pytest.mark.parametrize('poison', [float('nan'), 1e4])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize('size, window', [((5, 9), 7), ((8, 3), 4), ((7, 7), 7), ((1, 11), 3)])
def test_nothing_outside_the_map_matters(monkeypatch, implementation, poison, size, window):
    """Poison in memory around the map, in whatever is gathered for positions outside it, and in fresh buffers."""
    layer, x, tokens = build(0, size=size, dim=8, num_heads=2, window_size=window, rank=4, num_global_tokens=1)
    expected, expected_grads = run(layer, x, tokens, implementation)

    around = torch.full((x.shape[0], size[0] + 9, size[1] + 9, layer.dim), poison, dtype=x.dtype)
    around[:, 4:4 + size[0], 4:4 + size[1]] = x
    view = around[:, 4:4 + size[0], 4:4 + size[1]]

    window_index, index_select = timm_ls.window_attention.window_index, torch.Tensor.index_select
    outside, planted = {}, []

    def remember_outside(*args):
        index, valid = window_index(*args)
        outside[id(index)] = index, ~valid
        return index, valid

    def poisoned_select(self, dim, index):
        values = index_select(self, dim, index)
        if id(index) not in outside:
            return values
        planted.append(outside[id(index)][1].sum().item())
        return torch.where(outside[id(index)][1][:, None], torch.full_like(values, poison), values)

    monkeypatch.setattr(timm_ls.window_attention, 'window_index', remember_outside)
    monkeypatch.setattr(torch.Tensor, 'index_select', poisoned_select)
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, 'new_empty', lambda self, *a, **k: empty(self, *a, **k).fill_(poison))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, 'empty_like', lambda *a, **k: empty_like(*a, **k).fill_(poison))

    x = view.detach().requires_grad_()
    t = tokens.detach().clone().requires_grad_()
    layer.zero_grad()
    with attention_implementation(implementation):
        y, token_out = layer(x, t)
    (y.square().sum() + y.sum() + (token_out.square() * 2).sum()).backward()
    grads = [x.grad, t.grad] + [p.grad for p in layer.parameters()]
    assert worst([y, token_out], expected) <= 1e-12
    assert worst(grads, expected_grads) <= 1e-12
    if implementation == 'masked':
        assert len(planted) == 2 and (sum(planted) > 0)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_images_do_not_mix(implementation):
    """A batch gives what its images give alone, in tiles of many images and of part of one."""
    layer, x, tokens = build(3, size=(9, 16), dim=12, num_heads=3, window_size=4, rank=4, num_global_tokens=3)
    x, tokens = torch.randn(5, 9, 16, 12, dtype=torch.float64), torch.randn(5, 3, 12, dtype=torch.float64)
    with attention_implementation(implementation), torch.no_grad():
        together = layer(x, tokens)
        alone = [layer(x[b:b + 1], tokens[b:b + 1]) for b in range(5)]
    for part in range(2):
        torch.testing.assert_close(together[part], torch.cat([pair[part] for pair in alone]), rtol=0, atol=1e-12)


@pytest.mark.parametrize('tile_bytes', [1, 2000, 10 ** 9])
def test_tile_size_changes_nothing(monkeypatch, tile_bytes):
    """Cutting the work differently gives the same values and gradients."""
    layer, x, tokens = build(3, size=(13, 22), dim=12, num_heads=3, window_size=3, rank=4, num_global_tokens=1)
    expected, expected_grads = run(layer, x, tokens, 'tiled')
    monkeypatch.setattr(timm_ls.streaming, 'CPU_PIECE_BYTES', tile_bytes)
    outputs, grads = run(layer, x, tokens, 'tiled')
    assert worst(outputs, expected) <= 1e-12
    assert worst(grads, expected_grads) <= 1e-12


def test_tiles_are_bounded(monkeypatch):
    """Tiles hold each query once, and gather no more than a piece, or one window's keys, however long a map's sides."""
    rng = random.Random(0)
    for _ in range(200):
        B, H, W, w, C = rng.randint(1, 5), *rng.choice([(9, 200), (200, 9), (30, 40)]), rng.randint(1, 5), 4
        size = rng.choice([1, 3000, 30000, 10 ** 7])
        monkeypatch.setattr(timm_ls.streaming, 'CPU_PIECE_BYTES', size)
        maps, seen = torch.zeros(B, H, W, 2, C), torch.zeros(B, H, W, 1)
        first = rng.randrange(0, H, w)  # of some rows
        rows = min(H - first, w * rng.randint(1, 9))
        for tile in timm_ls.window_attention._tiles(H, torch.zeros(B, rows, W, C), w, first):
            keys = tile.keys(maps, w, 1)
            assert keys.numel() * 4 <= max(size, keys[:, :1, :1, :1].numel() * 4)
            tile.queries(seen[:, first:first + rows], w, 1, first).add_(1)
        assert (seen[:, first:first + rows] == 1).all() and seen.sum() == B * rows * W


@pytest.mark.parametrize('with_bias', [False, True])
@pytest.mark.parametrize('dtype, num_extra', [(torch.float32, 3), (torch.bfloat16, 0)])
def test_operator(with_bias, dtype, num_extra):
    """The operator of compiled graphs: what torch asks of one (aliases, types, layouts, varying sizes) and values."""
    q, kv, extra = (torch.randn(2, *size, 8, dtype=dtype) for size in ((5, 9), (5, 9, 2), (num_extra, 2)))
    inputs = [q.transpose(1, 2).contiguous().transpose(1, 2), kv, extra]
    inputs += [torch.randn(2, 3, 3, 5, 5, dtype=dtype)] if with_bias else []
    inputs = [t.requires_grad_() for t in inputs]
    args = (*inputs, *[None] * (not with_bias), 3, 2)
    torch.library.opcheck(timm_ls.window_attention.tiled_attention, args)
    plain = [None if t is None else t.detach() for t in args[:4]]
    torch.library.opcheck(
        timm_ls.window_attention.tiled_attention_backward, (plain[0].cos(), *plain, plain[0].sin(), 3, 2))
    with attention_implementation('tiled'):
        expected = timm_ls.window_attention.window_attention(*args)
    out = timm_ls.window_attention.tiled_attention(*args)
    assert torch.equal(out, expected)
    for grad, wanted in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (out, expected)), strict=True):
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_mixed_types(implementation):
    """Keys that autocast left in float32 beside queries in bfloat16: as if cast first, forward and backward."""
    torch.manual_seed(0)
    q, kv, extra = torch.randn(1, 5, 9, 8), torch.randn(1, 5, 9, 2, 8), torch.randn(1, 3, 2, 8)
    bias = torch.randn(2, 3, 3, 5, 5)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.clone().requires_grad_() for t in (q.bfloat16(), kv.to(dtype), extra.to(dtype), bias)]
        with attention_implementation(implementation):
            out = timm_ls.window_attention.window_attention(*inputs, window_size=3, num_heads=2)
        out.float().square().sum().backward()
        results.append([out] + [t.grad.bfloat16() for t in inputs])
        assert out.dtype == torch.bfloat16
    for wide, narrow in zip(*results):
        assert torch.equal(wide, narrow)


def test_plain_path():
    """Without torch's fused attention, as timm chooses for export, the same values and gradients."""
    layer, x, tokens = build(5, size=(6, 9), dim=12, num_heads=3, window_size=4, rank=4, num_global_tokens=1)
    expected, expected_grads = run(layer, x, tokens, 'auto')
    layer.fused_attn = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, 'scaled_dot_product_attention', None)
        outputs, grads = run(layer, x, tokens, 'auto')
    assert worst(outputs, expected) < 1e-12
    assert worst(grads, expected_grads) < 1e-12


def test_table_is_replaced_only_for_another_size():
    """An optimizer holds the parameter: a table that fits stays the same object, a frozen one stays frozen."""
    bias = RelPosBias2d(2, (5, 7))
    table = bias.table.requires_grad_(False)
    bias.set_table_size((5, 7))
    assert bias.table is table
    bias.set_table_size((9, 7))
    assert bias.table.shape == (2, 9, 7) and not bias.table.requires_grad
    assert torch.equal(bias.table, resize_bias_table(table, (9, 7)))


def test_remembered_table():
    """Inference resizes a table once, and anew for other weights, by whatever way they came, sizes and types."""
    bias = RelPosBias2d(2, (5, 7))
    resize, resized = timm_ls.rel_pos.resize_bias_table, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_ls.rel_pos, 'resize_bias_table', lambda *args: resized.append(args) or resize(*args))

        def table(*size, num_resized):
            resized.clear()
            actual = bias(size, size)[0]
            assert torch.equal(actual, resize(bias.table, (2 * size[0] - 1, 2 * size[1] - 1)))
            assert len(resized) == num_resized
            return actual

        with torch.inference_mode():
            table(5, 3, num_resized=1)
        with torch.no_grad():
            first = table(5, 3, num_resized=0)
            assert table(3, 4, num_resized=0) is bias.table
            bias.table.data.mul_(2.)
            assert torch.equal(table(5, 3, num_resized=1), 2. * first)
            bias.table[0, 0, 0] += 1.
            table(5, 3, num_resized=1)
            table(5, 4, num_resized=1)
            bias.double()
            assert table(5, 4, num_resized=1).dtype == torch.float64
            table(5, 4, num_resized=0)
        table(5, 4, num_resized=1).sum().backward()  # a gradient needs its own
        assert bias.table.grad.abs().sum() > 0
    other = RelPosBias2d(2, (5, 7))
    with torch.no_grad():
        other((4, 4), (4, 4))
    assert other in timm_ls.rel_pos._last_resized
    kept = len(timm_ls.rel_pos._last_resized)
    del other
    gc.collect()
    assert len(timm_ls.rel_pos._last_resized) < kept


class Kernels(TorchDispatchMode):
    """Within, the names of the operators that torch runs."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('make', [LongShortAttention2d, GlobalAttention2d])
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


@pytest.mark.parametrize('make', [LongShortAttention2d, GlobalAttention2d])
def test_projections_have_a_bias_unless_told_otherwise(make):
    """As released."""
    for given, expected in (({}, True), (dict(qkv_bias=True), True), (dict(qkv_bias=False), False)):
        layer = make(8, 2, **given)
        assert (layer.qkv.bias is not None) == expected and layer.proj.bias is not None


def test_axis_spans():
    """Spans hold each window's queries and valid keys once, in order, and are few however long the axis."""
    for window in range(1, 10):
        for size in range(1, 60):
            spans = axis_spans(size, window)
            assert len(spans) <= 4
            queries = []
            for span in spans:
                for n in range(span.count):
                    start = span.query_start + n * window
                    queries += range(start, start + span.query_size)
                    keys = range(span.key_start + n * window, span.key_start + n * window + span.key_size)
                    valid = [k for k in range(start - window // 2, start + window + window // 2) if 0 <= k < size]
                    assert list(keys) == valid
                    assert keys[0] - (start - window // 2) == span.halo_offset
            assert queries == list(range(size))


def test_forcing_an_implementation():
    """The choice is scoped, and a name that does not exist is refused."""
    chosen = []
    original = timm_ls.window_attention._masked
    layer, x, _ = build(0, size=(5, 5), dim=8, num_heads=2, window_size=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_ls.window_attention, '_masked', lambda *a: chosen.append(1) or original(*a))
        layer(x)
        assert not chosen
        with attention_implementation('masked'):
            layer(x)
        assert len(chosen) == 1
        layer(x)
        assert len(chosen) == 1
    with pytest.raises(ValueError, match="'flash': expected one of auto, tiled, masked, triton"):
        with attention_implementation('flash'):
            pass


@pytest.mark.parametrize('kind', ['attn_drop', 'proj_drop'])
@pytest.mark.parametrize('make', [LongShortAttention2d, GlobalAttention2d])
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


@pytest.mark.parametrize('by_pieces', [False, True])
@pytest.mark.parametrize('make', [LongShortAttention2d, GlobalAttention2d])
def test_number_of_global_tokens(make, by_pieces):
    """Too few, too many or none where there should be some: an error, never a result."""
    x = torch.randn(1, 4, 5, 8)
    for expected, given in ((2, 1), (2, 3), (2, 0), (0, 1)):
        layer = make(8, 2, num_global_tokens=expected)
        tokens = torch.randn(1, given, 8) if given else None
        with torch.no_grad(), pytest.raises(ValueError, match=f'Expected {expected} global tokens .* got {given}'):
            if by_pieces:
                layer.forward_by_pieces(x, tokens, torch.nn.Identity(), torch.add)
            else:
                layer(x, tokens)


@pytest.mark.parametrize('make, message', [
    (lambda: GlobalAttention2d(8, 2, num_global_tokens=-1), 'num_global_tokens=-1: expected 0 or more'),
    (lambda: LongShortAttention2d(10, 3), 'dim=10 is not divisible by num_heads=3'),
    (lambda: GlobalAttention2d(10, 3), 'dim=10 is not divisible by num_heads=3'),
    (lambda: LongShortAttention2d(8, 2, window_size=0), 'window_size=0.*expected window_size >= 1'),
    (lambda: LongShortAttention2d(8, 2, rank=-1), 'rank=-1'),
    (lambda: LongShortAttention2d(8, 2, global_update='values'), "='values': expected 'outputs' or 'keys'"),
])
def test_bad_settings(make, message):
    """What was given and what is expected, in one ValueError."""
    with pytest.raises(ValueError, match=message):
        make()
