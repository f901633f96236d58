"""The contract of window attention, for every registered implementation, against an oracle in float64; their choice.

Implementations come from the registry: a new one is tested here once it is registered. One that needs a device is
skipped without it; `test_triton.py` runs those of Triton under its interpreter.
"""
import dataclasses
import random
import threading

import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from small_models import create
from triton_interpreter import INTERPRETED

import timm_ls
from timm_ls import LongShortAttention2d, attention_implementation, explain_attention
from timm_ls.ops import chunks, overrides
from timm_ls.ops import masked as masked_module
from timm_ls.ops import window_attention as registry
from timm_ls.ops.window_attention import (
    Implementation,
    implementations,
    recorded_choices,
    register_implementation,
    window_attention,
)

HALF = [torch.bfloat16, torch.float16]
ALL = list(implementations().values())
every_implementation = pytest.mark.parametrize('implementation', ALL, ids=lambda each: each.name)
on_any_device = pytest.mark.parametrize(
    'implementation', [each for each in ALL if each.device is None], ids=lambda each: each.name)

# window, height, width, batch, heads, channels per head, additional keys, bias, first row, rows (None for all)
CASES = [
    (7, 9, 8, 1, 2, 8, 9, True, 0, None),
    (7, 7, 7, 2, 1, 16, 0, False, 0, None),  # the first keys of the halo lie outside the map
    (8, 13, 8, 1, 1, 32, 9, True, 8, None),  # the last window, cut by the end of the map
    (3, 7, 5, 2, 2, 5, 0, True, 3, 3),
    (4, 1, 10, 2, 1, 20, 3, True, 0, None),
    (1, 3, 2, 1, 3, 4, 1, True, 1, 1),
    (2, 5, 6, 1, 1, 8, 0, False, 0, 4),
    (9, 11, 4, 1, 1, 8, 40, True, 0, None),
    (3, 8, 4, 3, 1, 4, 2, False, 6, 2),
    (5, 12, 3, 2, 1, 8, 1, True, 0, 10),
]


def device_for(implementation):
    """Where to test it; skips if there is no such device."""
    if implementation.device is None or INTERPRETED:
        return 'cpu'
    if implementation.device == 'cuda' and torch.cuda.is_available():
        return 'cuda'
    pytest.skip(f'{implementation.name} needs a {implementation.device} device; test_triton.py interprets it')


def draw(case, seed=0, device='cpu'):
    """Queries, keys and values (views of one tensor, as layers have them), additional ones, the bias, in float64.

    Their values are those of half-precision numbers, so that every type holds them exactly.
    """
    window, height, width, batch, heads, head_dim, num_additional, has_bias, first_row, rows = case
    generator = torch.Generator().manual_seed(seed)
    halo = window + 2 * (window // 2)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16().half().double().to(device)

    qkv = normal(batch, height, width, 3 * heads * head_dim)
    additional = normal(batch, num_additional, 2, heads * head_dim)
    bias = 2 * normal(heads, window, window, halo, halo) if has_bias else None
    return qkv, additional, bias


def call(attend, case, qkv, additional, bias, **kwargs):
    """`attend` of a case; queries are rows of the map, keys and values its other channels."""
    window, height, width, batch, heads, head_dim, _, _, first_row, rows = case
    channels = heads * head_dim
    q = qkv[:, first_row:height if rows is None else first_row + rows, :, :channels]
    return attend(q, qkv[..., channels:].unflatten(-1, (2, channels)), additional, bias, window, heads, first_row)


def with_gradients(attend, case, tensors):
    """Output, and gradients of a loss over it for all tensors but None."""
    tensors = [None if x is None else x.detach().requires_grad_() for x in tensors]
    out = call(attend, case, *tensors)
    loss = (out * out.detach().cos() + out.square()).sum()  # weighs every number differently
    return [out.detach(), *torch.autograd.grad(loss, [x for x in tensors if x is not None])]


def forced(implementation):
    """`window_attention` by one implementation."""
    def attend(*args):
        with attention_implementation(implementation.name):
            return window_attention(*args)

    return attend


def worst(actual, expected):
    """Largest difference of any tensor over its largest value; all are finite."""
    assert all(x.isfinite().all() for x in actual)
    return max(
        ((a.double() - e.double()).abs().max() / e.abs().max().clamp(min=1e-6)).item()
        for a, e in zip(actual, expected, strict=True) if e.numel() > 0)


# Values and gradients


@every_implementation
@pytest.mark.parametrize('case', CASES, ids=str)
def test_oracle(implementation, case):
    """Values and all gradients within the tolerance of the registry: of keys that no query sees as well."""
    tensors = draw(case, device=device_for(implementation))
    expected = with_gradients(reference.window_attention, case, tensors)
    narrow = [None if x is None else x.float() for x in tensors]
    error = worst(with_gradients(forced(implementation), case, narrow), expected)
    print(f'{implementation.name}, {case}: {error:.1e}')
    assert error <= implementation.tolerance <= 1e-5


def random_case(seed):
    """Settings of a call, over everything that has an effect."""
    rng = random.Random(seed)
    window, height = 1 + seed % 9, rng.choice([1, 2, 3, 5, 7, 8, 11, 12])
    first_row = rng.randrange(0, height, window) if rng.random() < .5 else 0
    rows = min(height - first_row, window * rng.randint(1, 3)) if rng.random() < .5 else None
    return (
        window, height, rng.choice([1, 2, 4, 6, 7, 9, 13]), rng.choice([1, 2]), rng.choice([1, 2, 3]),
        rng.choice([1, 4, 5]), rng.choice([0, 1, 4, 9]), rng.random() < .6, first_row, rows)


@on_any_device
def test_oracle_sweep(implementation):
    """Many random settings, in float64 and in float32."""
    errors = []
    for seed in range(90):
        case = random_case(seed)
        tensors = draw(case, seed)
        expected = with_gradients(reference.window_attention, case, tensors)
        exact = worst(with_gradients(forced(implementation), case, tensors), expected)
        narrow = [None if x is None else x.float() for x in tensors]
        errors.append((exact, worst(with_gradients(forced(implementation), case, narrow), expected)))
        assert errors[-1][0] <= 1e-12 and errors[-1][1] <= implementation.tolerance, (seed, case, errors[-1])
    print(f'{implementation.name}: float64 {max(e[0] for e in errors):.1e}, float32 {max(e[1] for e in errors):.1e}')


@every_implementation
@pytest.mark.parametrize('dtype', [*HALF, torch.float64])
def test_types(implementation, dtype):
    """Results of the type of the queries, rounded a few times; a device's kernel may refuse a type, and says so."""
    case = (3, 8, 5, 2, 2, 8, 5, True, 3, None)
    tensors = draw(case, device=device_for(implementation))
    expected = with_gradients(reference.window_attention, case, tensors)
    typed = [x.to(dtype) for x in tensors]
    try:
        actual = with_gradients(forced(implementation), case, typed)
    except RuntimeError as refusal:
        assert implementation.device is not None
        assert 'does not take this call: it takes' in str(refusal) and f'not {dtype}' in str(refusal)
        return
    assert {x.dtype for x in actual} == {dtype}
    error = worst(actual, expected)
    print(f'{implementation.name}, {dtype}: {error:.1e}')
    assert error <= (1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps)


@every_implementation
def test_layouts(implementation):
    """Whatever the strides of its inputs, the same as of contiguous copies."""
    case, device = (3, 5, 4, 2, 2, 5, 2, True, 3, None), device_for(implementation)
    q, kv, additional, bias = arguments(case, device)
    expected = separate_gradients(implementation, case, [q, kv, additional, bias])

    def spread(x):
        """In every other place along each axis."""
        apart = x.new_full([2 * n for n in x.shape], 1e4)
        view = apart[tuple(slice(0, 2 * n, 2) for n in x.shape)]
        return view.copy_(x)

    def reversed_axes(x):
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))

    for layout in (spread, reversed_axes):
        actual = separate_gradients(implementation, case, [layout(x) for x in (q, kv, additional, bias)])
        assert worst(actual, expected) <= implementation.tolerance
    # one image, and one key, many times over
    one = [x[:1].expand_as(x) for x in (q, kv, additional)]
    expected = separate_gradients(implementation, case, [*(x.clone() for x in one), bias])
    assert worst(separate_gradients(implementation, case, [*one, bias]), expected) <= implementation.tolerance


def arguments(case, device='cpu', dtype=torch.float32):
    """Contiguous queries, keys and values, additional ones and bias of a case."""
    window, height, _, _, heads, head_dim, _, _, first_row, rows = case
    qkv, additional, bias = draw(case, device=device)
    channels = heads * head_dim
    q = qkv[:, first_row:height if rows is None else first_row + rows, :, :channels]
    kv = qkv[..., channels:].unflatten(-1, (2, channels))
    return [x.to(dtype).contiguous() for x in (q, kv, additional, bias)]


def separate_gradients(implementation, case, tensors):
    """Output and the gradients of tensors that are arguments as they are."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    with attention_implementation(implementation.name):
        out = window_attention(*tensors, case[0], case[4], case[8])
    return [out.detach(), *torch.autograd.grad(out.square().sum() + out.sum(), tensors, materialize_grads=True)]


@every_implementation
@pytest.mark.parametrize('poison', [float('nan'), 1e4])
@pytest.mark.parametrize('case', [(4, 1, 10, 1, 1, 8, 3, True, 0, None), (3, 7, 2, 1, 2, 5, 0, True, 3, 3)], ids=str)
def test_nothing_outside_the_map_matters(monkeypatch, implementation, poison, case):
    """Poison in memory around all inputs and in fresh buffers; finite poison in what is gathered for no key."""
    device = device_for(implementation)
    tensors = arguments(case, device)
    expected = separate_gradients(implementation, case, tensors)

    def fill(x):
        return x.fill_(poison) if x.is_floating_point() else x

    def surrounded(x):
        around = x.new_full([n + 9 for n in x.shape], poison)
        view = around[tuple(slice(4, 4 + n) for n in x.shape)]
        return view.copy_(x)

    for owner, name in ((torch.Tensor, 'new_empty'), (torch, 'empty'), (torch, 'empty_like')):
        empty = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, empty=empty, **k: fill(empty(*a, **k)))
    planted = plant_in_gathered(monkeypatch) if poison == 1e4 else None
    actual = separate_gradients(implementation, case, [surrounded(x) for x in tensors])
    assert worst(actual, expected) <= .1 * implementation.tolerance
    if planted is not None and implementation.name == 'masked':
        assert sum(planted) > 0


def plant_in_gathered(monkeypatch):
    """Put 1e4 in the place of keys and values that `masked` gathers where there is no key; returns how many."""
    key_index, index_select, outside, planted = masked_module.key_index, torch.Tensor.index_select, [], []

    def remember(*args):
        index, valid = key_index(*args)
        outside.append((index, ~valid))
        return index, valid

    def select(self, dim, index):
        values = index_select(self, dim, index)
        for keys, missing in outside:
            if torch.equal(index // 2, keys):  # keys and values lie in turns
                planted.append(missing.sum().item())
                return torch.where(missing[:, None], torch.full_like(values, 1e4), values)
        return values

    monkeypatch.setattr(masked_module, 'key_index', remember)
    monkeypatch.setattr(torch.Tensor, 'index_select', select)
    return planted


@every_implementation
def test_nan_reaches_those_who_see_it(implementation):
    """A key that is not a number spoils the queries in whose halo it lies, and no other."""
    case = (5, 11, 12, 2, 1, 4, 1, True, 0, None)  # Triton's kernels take one such window at a time
    tensors = arguments(case, device_for(implementation))
    for y, x in ((0, 0), (4, 3), (10, 11)):
        q, kv, additional, bias = (t.clone() for t in tensors)
        kv[1, y, x] = float('nan')
        with attention_implementation(implementation.name), torch.no_grad():
            out = window_attention(q, kv, additional, bias, 5, 1)
        for i in range(11):
            for j in range(12):
                sees = (y, x) in reference.window_keys(i, j, 11, 12, 5)
                assert out[1, i, j].isnan().all() if sees else out[1, i, j].isfinite().all(), (y, x, i, j)
        assert out[0].isfinite().all()


@every_implementation
def test_images_do_not_mix(implementation):
    """A batch gives what its images give alone; none gives nothing, and a backward pass."""
    case = (3, 5, 7, 3, 2, 4, 3, True, 3, None)
    tensors = arguments(case, device_for(implementation))
    together = separate_gradients(implementation, case, tensors)
    alone = [separate_gradients(implementation, case, [*(x[b:b + 1] for x in tensors[:3]), tensors[3]])
             for b in range(3)]
    joined = [torch.cat([part[i] for part in alone]) for i in range(4)] + [sum(part[4] for part in alone)]
    assert worst(together, joined) <= implementation.tolerance
    nothing = separate_gradients(implementation, case, [*(x[:0] for x in tensors[:3]), tensors[3]])
    assert [x.shape for x in nothing[1:]] == [(0, *x.shape[1:]) for x in tensors[:3]] + [tensors[3].shape]
    assert not nothing[4].any()


@every_implementation
def test_large_bias(implementation):
    """One that exceeds what an exponential can hold changes nothing if it is the same for all keys."""
    case = (3, 4, 4, 1, 1, 4, 0, True, 0, None)
    tensors = arguments(case, device_for(implementation))
    results = [separate_gradients(implementation, case, [*tensors[:3], torch.full_like(tensors[3], value)])
               for value in (0., 200.)]
    assert worst(results[1][:3], results[0][:3]) <= 1e-4


@every_implementation
def test_mixed_types(implementation):
    """Keys that autocast left in float32 beside queries in half precision: as if cast first, forward and backward."""
    half = HALF[0]
    tensors = arguments((3, 5, 9, 1, 2, 4, 3, True, 0, None), device_for(implementation))
    tensors = [x + .1 * x.cos() for x in tensors]  # with all of float32's digits
    results = []
    for dtype in (torch.float32, half):
        kinds = (half, dtype, dtype, torch.float32)
        inputs = [t.to(kind).detach().requires_grad_() for t, kind in zip(tensors, kinds, strict=True)]
        with attention_implementation(implementation.name):
            out = window_attention(*inputs, window_size=3, num_heads=2)
        out.float().square().sum().backward()
        assert out.dtype == half
        results.append([out] + [t.grad.to(half) for t in inputs])
    for wide, narrow in zip(*results):
        assert torch.equal(wide, narrow)


# Which one is taken


@pytest.fixture
def dummy():
    """Registers implementations that are gone afterwards; each counts its calls and computes what 'masked' does."""
    before = list(registry._implementations)

    def register(name, why_not=lambda call: None, rank=100):
        calls = []

        def attend(q, kv, additional_kv, bias, call):
            calls.append(call)
            return implementations()['masked'].attend(q, kv, additional_kv, bias, call)

        register_implementation(Implementation(name, attend, why_not, rank))
        return calls

    yield register
    registry._implementations[:] = before


def taken(function, *args):
    """The names of what computes the calls of a function, and why not the others, of the first."""
    with recorded_choices() as choices:
        function(*args)
    return [choice.name for choice in choices], choices[0].why_not if choices else None


def test_a_new_implementation_is_taken(dummy, monkeypatch):
    """For whole maps and in chunked inference, by models of both families, with the right queries and values."""
    x = torch.randn(2, 3, 64, 80)
    for name in ('vil_ls_small_hires', 'cvt_ls_13'):
        model = create(name).eval()
        num_layers = sum(len(stage.blocks) for stage in model.stages)
        with torch.no_grad():
            expected = model(x)
        calls = dummy('dummy')
        whole = model(x)
        assert len(calls) == num_layers
        assert all(call.needs_grad and call.first_row == 0 for call in calls)
        calls.clear()
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(chunks, 'CPU_CHUNK_BYTES', 1)
            in_chunks = model(x)
        assert len(calls) > 2 * num_layers and max(call.first_row for call in calls) > 0
        assert not any(call.needs_grad for call in calls)
        for actual in (whole, in_chunks):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_new_implementation_is_refused(dummy, monkeypatch):
    """With its reason, where it does not apply: another takes the call, or none if it is forced."""
    calls = dummy('dummy', lambda call: 'it knows the first rows only' if call.first_row > 0 else None)
    model, x = create('vil_ls_small_hires').eval(), torch.randn(1, 3, 64, 80)
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 1)
    with torch.no_grad():
        names, _ = taken(model, x)
        assert set(names) == {'dummy', 'tiled'} and names.count('dummy') == len(calls)
        with attention_implementation('dummy'), pytest.raises(
                RuntimeError, match=r"^attention_implementation\('dummy'\) does not take this call: it knows the"):
            model(x)


def test_rank_decides(dummy):
    """The highest that takes a call; one that is registered again takes the place of the first."""
    layer, x = LongShortAttention2d(8, 2, window_size=3), torch.randn(1, 5, 7, 8)
    low, high = dummy('low', rank=50), dummy('high', rank=60)
    layer(x)
    assert (len(low), len(high)) == (0, 1)
    again = dummy('high', lambda call: 'no', rank=60)
    assert taken(layer, x) == (['low'], {
        'triton': 'it is for CUDA devices, not for cpu', 'high': 'no',
        'tiled': "comes after 'low'", 'grouped': 'it is for graphs', 'masked': "comes after 'low'"})
    assert (len(low), len(high), len(again)) == (1, 1, 0)
    assert list(implementations()) == ['high', 'low', 'triton', 'tiled', 'grouped', 'masked']
    dummy('high', rank=-1)
    assert list(implementations())[-1] == 'high'


@pytest.mark.parametrize('fastest, forced, expected', [
    ('masked', 'auto', 'masked'), ('masked', 'tiled', 'tiled'), ('grouped', 'auto', 'tiled'), (None, 'auto', 'tiled')])
def test_measured_on_a_gpu(monkeypatch, fastest, forced, expected):
    """What was the fastest there is asked first, for such calls; what does not take them is passed over."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    row = dict(gpu='sm_90', dtype='bfloat16', window_size=7, head_dim=32, implementation=fastest)
    monkeypatch.setattr(overrides, 'OVERRIDES', () if fastest is None else (row,))
    monkeypatch.setattr(registry, '_implementations', [
        each if each.name != 'triton' else dataclasses.replace(each, why_not=lambda call: 'not here') for each in ALL])
    call = registry.WindowCall(
        7, 3, 32, 0, 0., True, torch.device('cuda'), torch.bfloat16, True, False, False, False, False)
    with attention_implementation(forced):
        assert registry.choose(call).name == expected
        for change in (dict(window_size=8), dict(head_dim=64), dict(dtype=torch.float32)):
            assert registry.choose(dataclasses.replace(call, **change)).name == 'tiled'


def test_forcing():
    """Within the context only, in this thread only; the innermost counts; a name that does not exist is refused."""
    layer, x = LongShortAttention2d(8, 2, window_size=3), torch.randn(1, 5, 7, 8)
    assert taken(layer, x)[0] == ['tiled']
    elsewhere = []
    with attention_implementation('masked'):
        assert taken(layer, x) == (['masked'], {name: "'masked' is forced" for name in implementations()
                                                if name != 'masked'})
        thread = threading.Thread(target=lambda: elsewhere.extend(taken(layer, x)[0]))
        thread.start()
        thread.join()
        with attention_implementation('auto'):
            assert taken(layer, x)[0] == ['tiled']
        assert taken(layer, x)[0] == ['masked']
    assert taken(layer, x)[0] == ['tiled'] == elsewhere
    with pytest.raises(ValueError, match="'flash': expected one of auto, triton, tiled, grouped, masked"):
        with attention_implementation('flash'):
            pass


@pytest.mark.skipif(INTERPRETED, reason='the interpreter takes tensors on any device')
def test_a_kernel_for_a_device_is_refused_on_another():
    layer = LongShortAttention2d(8, 2, window_size=3)
    with attention_implementation('triton'), pytest.raises(RuntimeError, match='for CUDA devices, not for cpu'):
        layer(torch.randn(1, 5, 7, 8))


def in_training(layer, x):
    layer.train()(x)


def unfused(layer, x):
    layer.fused_attn = False
    layer(x)


class FirstOutput(torch.nn.Module):
    """Of a layer: its map."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def traced(layer, x):
    torch.jit.trace(FirstOutput(layer), x, check_trace=False)


def exported(layer, x):
    torch.export.export(FirstOutput(layer), (x,))


def under_grad(layer, x):
    torch.func.grad(lambda x: layer(x)[0].sum())(x)


def under_jvp(layer, x):
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, x))


def of_any_size(layer, x):
    dims = torch.export.Dim('height', min=4), torch.export.Dim('width', min=4)
    torch.export.export(FirstOutput(layer), (x,), dynamic_shapes=({1: dims[0], 2: dims[1]},))


def of_any_batch(layer, x):
    torch.export.export(
        FirstOutput(layer), (x.expand(2, -1, -1, -1),), dynamic_shapes=({0: torch.export.Dim('batch')},))


def test_indices_of_an_exported_graph_are_whole():
    """None is cut from another: exporters compare all such operators in pairs, for minutes."""
    layer = LongShortAttention2d(32, 2, window_size=4, rank=2)
    program = torch.export.export(FirstOutput(layer), (torch.randn(2, 9, 14, 32),))
    nodes = [node for node in program.graph.nodes if node.op == 'call_function']
    operators = [(node.target, getattr(node.meta['val'], 'dtype', None)) for node in nodes]
    assert (torch.ops.aten.index_select.default, torch.float32) in operators
    assert (torch.ops.aten.slice.Tensor, torch.int64) not in operators


def test_norm_of_keys_and_values_when_compiled():
    """As they lie, [B, N, 2, C]: inductor writes what a norm of three dimensions gives transposed."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(LongShortAttention2d(32, 2, window_size=4, rank=2), backend=backend)(torch.randn(1, 9, 14, 32))
    norms = [node for graph in graphs for node in graph.graph.nodes if node.target is F.layer_norm]
    shapes = [tuple(node.args[0].meta['example_value'].shape) for node in norms]
    assert shapes == [(1, 9 * 14, 2, 32), (1, 2, 2, 32)]  # and landmarks


@pytest.mark.parametrize('function, expected, reason', [
    (in_training, 'masked', 'attention dropout is active'),
    (unfused, 'masked', "timm's fused attention is off"),
    (traced, 'masked', 'a graph is captured'),
    (exported, 'grouped', 'a graph is captured'),
    (of_any_batch, 'grouped', 'a graph is captured'),
    (of_any_size, 'masked', 'a graph is captured'),
    (under_grad, 'masked', 'torch.func or forward-mode derivatives'),
    (under_jvp, 'masked', 'torch.func or forward-mode derivatives'),
])
def test_where_tiles_are_not_taken(function, expected, reason):
    """What is taken instead, and the reason; forced, tiles are an error, and what is taken instead gives the same."""
    def layer():
        return LongShortAttention2d(8, 2, window_size=3, attn_drop=.5).eval()

    x = torch.randn(1, 5, 7, 8)
    names, why_not = taken(function, layer(), x)
    assert set(names) == {expected} and reason in why_not['tiled']
    with attention_implementation('tiled'), pytest.raises(Exception, match=reason):
        function(layer(), x)


def test_groups_outside_graphs():
    """They run where they are asked for, but not where plain operations are needed."""
    layer, x = LongShortAttention2d(8, 2, window_size=3), torch.randn(1, 5, 7, 8)
    with attention_implementation('grouped'):
        assert taken(layer, x)[0] == ['grouped']
        with pytest.raises(RuntimeError, match='torch.func or forward-mode derivatives'):
            under_jvp(layer, x)


def test_other_devices():
    """The backward pass of tiles was written for some; elsewhere they are for inference."""
    call = dict(window_size=3, num_heads=1, head_dim=4, first_row=0, dropout_p=0., fused=True,
                dtype=torch.float32, captured=False, compiled=False, fixed_size=False, plain=False)
    for device, needs_grad, expected in (
            ('cpu', True, 'tiled'), ('cuda', True, 'tiled'), ('mps', False, 'tiled'), ('mps', True, 'masked')):
        chosen = registry.choose(registry.WindowCall(device=torch.device(device), needs_grad=needs_grad, **call))
        assert chosen.name == expected, (device, needs_grad)


def test_plain_form_on_request():
    """Without torch's fused attention, as timm chooses for export, the same values and gradients."""
    case = (4, 6, 9, 1, 3, 4, 5, True, 0, None)
    expected = with_gradients(reference.window_attention, case, draw(case))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, 'scaled_dot_product_attention', None)
        actual = with_gradients(lambda *args: window_attention(*args, fused=False), case, draw(case))
    assert worst(actual, expected) < 1e-12


@pytest.mark.parametrize('how', ['training', 'inference', 'chunks', 'dropout', 'exportable', 'masked', 'float16'])
@pytest.mark.parametrize('name', ['vil_ls_small', 'cvt_ls_13'])
def test_explanation_is_what_runs(monkeypatch, name, how):
    """Layer by layer: what is taken, how often, and why not the others."""
    kwargs = dict(attn_drop_rate=.1) if how == 'dropout' else dict(exportable=True) if how == 'exportable' else {}
    model, x = create(name, **kwargs).train(how in ('training', 'dropout')), torch.randn(2, 3, 70, 90)
    if how == 'chunks':
        monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 30000)
    if how == 'float16':
        model, x = model.half(), x.half()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.set_grad_enabled(how in ('training', 'dropout')), attention_implementation(
            'masked' if how == 'masked' else 'auto'):
        explained = explain_attention(model, x)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        with recorded_choices() as choices:
            model(x)
    layers = [key for key, module in model.named_modules() if isinstance(module, timm_ls.attention.LongShortAttention)]
    assert [choice.layer for choice in explained] == layers
    assert [choice.implementation for choice in explained for _ in range(choice.num_calls)] == [
        choice.name for choice in choices]
    assert sum(choice.num_calls for choice in explained) == len(choices)
    start = 0
    for choice in explained:
        assert choice.why_not == choices[start].why_not
        start += choice.num_calls
    expected = 'masked' if how in ('masked', 'dropout', 'exportable') else 'tiled'
    assert {choice.implementation for choice in explained} == {expected}
    assert (max(choice.num_calls for choice in explained) > 1) == (how == 'chunks')
    lines = str(explained).splitlines()
    chunked = f' in {explained[0].num_calls} row chunks' if how == 'chunks' else ''
    assert lines[0] == f'{layers[0]}: {expected}{chunked}' and lines[1].startswith('    not triton: ')
    assert len(lines) == len(layers) * len(implementations())


def test_explanation_of_a_layer():
    """A layer of one's own, or a model without any."""
    layer, x = LongShortAttention2d(8, 2, window_size=3), torch.randn(1, 5, 7, 8)
    explained = explain_attention(torch.nn.ModuleDict(dict(mine=layer))['mine'], x)
    assert [(choice.layer, choice.implementation) for choice in explained] == [('', 'tiled')]
    assert explain_attention(timm.create_model('test_resnet'), torch.randn(1, 3, 64, 64)) == []
    with pytest.raises(TypeError, match='Expected a tensor .* got str'):
        explain_attention(layer, 'image.jpg')
