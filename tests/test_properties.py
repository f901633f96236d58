"""What holds for any input: drawn sizes, batches, types and memory layouts against plain contiguous float32 copies.

The draws are the same in every run. `PROPERTY_EFFORT=20 python -m pytest tests/test_properties.py -s` tries twenty
times as many; `-s` shows the numbers of cases and the worst errors.
"""
import collections
import copy
import io
import math
import os
import pickle
import queue
import threading
from functools import cache

import pytest
import timm
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from timm_ls import FullAttention2d, LongShortAttention2d, attention_implementation
from timm_ls.ops import chunks
from timm_ls.ops.windows import axis_spans, head_plan, tile_plan

MODELS = ('test_vil_ls', 'test_cvt_ls')
EFFORT = int(os.environ.get('PROPERTY_EFFORT', 1))
# Largest difference against the largest value, by the type computed in
BOUNDS = {'float64': 1e-4, 'float32': 1e-4, 'bfloat16': .1, 'float16': .02}

cases = collections.Counter()
worst = collections.defaultdict(float)


def examples(count):
    """Settings of a property: a fixed sequence of draws, so many times the effort."""
    return settings(phases=[Phase.generate],
        max_examples=count * EFFORT, derandomize=True, deadline=None, database=None, print_blob=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example])


@pytest.fixture(scope='module', autouse=True)
def report():
    """Counts and errors of all cases, printed at the end."""
    yield
    print(f'\n{sum(cases.values())} cases: ' + ', '.join(f'{name} {count}' for name, count in sorted(cases.items())))
    for (name, dtype), error in sorted(worst.items()):
        print(f'worst error of {name}, {dtype}: {error:.1e}')


@cache
def shared_model(name, dtype=torch.float32):
    """A trained model, whose values are of the sizes that occur; not to be changed."""
    return timm.create_model(name, pretrained=True).to(dtype).eval()


def compare(name, dtype, actual, expected):
    """Compare lists of tensors, each against the largest value among the expected, and keep the worst."""
    key = str(dtype).removeprefix('torch.')
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.isfinite().all()
        if e.numel() > 0:
            error = ((a.double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-30)).item()
            worst[name, key] = max(worst[name, key], error)
            assert error <= BOUNDS[key], (name, key, error)


# Mostly small, as time goes with the pixels; up to 700, as a rule with a short other side
sides = st.one_of(st.integers(32, 72), st.integers(32, 110), st.integers(32, 72), st.integers(32, 700))
image_sizes = st.one_of(
    *[st.tuples(sides, sides).filter(lambda size: size[0] * size[1] <= 200 ** 2)] * 15,
    st.tuples(*[st.integers(32, 700)] * 2))


def few(batch, size):
    """A batch size that is cut where the images are large."""
    return batch if size[0] * size[1] <= 200 ** 2 else min(batch, 1)


layouts = st.sampled_from(
    ['contiguous', 'channels_last', 'transposed', 'cropped', 'strided', 'one image', 'one channel', 'flipped'])
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
seeds = st.integers(0, 2 ** 32 - 1)


def laid_out(layout, batch, channels, height, width, dtype, seed):
    """Images with values that depend on the seed only, laid out in memory in different ways."""
    def draw(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    if layout == 'channels_last':
        return draw(batch, channels, height, width).to(memory_format=torch.channels_last)
    if layout == 'transposed':
        return draw(width, height, channels, batch).permute(3, 2, 1, 0)
    if layout == 'cropped':
        return draw(batch, channels + 1, height + 5, width + 3)[:, 1:, 2:2 + height, 3:]
    if layout == 'strided':
        return draw(batch, channels, 2 * height, 3 * width)[:, :, ::2, 1::3]
    if layout == 'one image':
        return draw(1, channels, height, width).expand(batch, -1, -1, -1)
    if layout == 'one channel':
        return draw(batch, 1, height, width).expand(-1, channels, -1, -1)
    if layout == 'flipped':
        return draw(batch, channels, height, width).flip(3).mT.contiguous().mT
    return draw(batch, channels, height, width)


def forward_and_backward(model, x, gradients=True):
    """Logits and all levels, then the gradients of the image and of every parameter."""
    x = x.detach()  # of the same layout
    if gradients:
        x.requires_grad_()
    features, levels = model.forward_intermediates(x)
    logits = model.forward_head(features)
    outputs = [logits, *levels]
    if not gradients:
        return outputs, []
    model.zero_grad()
    # of every level as much as of the logits, and no gradient too large or too small for float16
    loss = (logits.float() * torch.linspace(-1, 1, logits.shape[1])).sum()
    for level in levels:
        loss = loss + level.float().square().sum() / max(1, level.numel()) ** .5
    loss.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [output.detach() for output in outputs], [x.grad, *grads]


@examples(40)
@given(
    name=st.sampled_from(MODELS), size=image_sizes, batch=st.integers(0, 5), layout=layouts, dtype=dtypes,
    training=st.booleans(), gradients=st.booleans(), implementation=st.sampled_from(['auto', 'auto', 'masked']),
    seed=seeds)
def test_equals_a_plain_copy(name, size, batch, layout, dtype, training, gradients, implementation, seed):
    """Values and gradients in any layout and type are those of a contiguous float32 copy of image and model."""
    x = laid_out(layout, few(batch, size), 3, *size, dtype, seed)
    model = copy.deepcopy(shared_model(name, dtype)).train(training)
    plain = copy.deepcopy(shared_model(name, dtype)).float().train(training)  # the same rounded weights
    with attention_implementation(implementation):
        outputs, grads = forward_and_backward(model, x, gradients)
    expected, expected_grads = forward_and_backward(plain, x.float().contiguous().clone(), gradients)
    assert all(output.dtype == dtype for output in outputs)
    compare('values', dtype, outputs, expected)
    compare_gradients('', dtype, grads, expected_grads)
    cases[f'copy, {str(dtype).removeprefix("torch.")}'] += 1


def compare_gradients(label, dtype, grads, expected):
    """All finite; those of the parameters against the largest of all, as some are sums that cancel."""
    assert all(grad.isfinite().all() for grad in grads)
    if not expected:
        return
    compare(f'{label}image gradients', dtype, grads[:1], expected[:1])
    compare(f'{label}gradients', dtype, *(
        [torch.cat([grad.double().flatten() for grad in some[1:]])] for some in (grads, expected)))


@examples(12)
@given(
    name=st.sampled_from(MODELS), size=image_sizes, batch=st.integers(0, 3), layout=layouts,
    dtype=st.sampled_from([torch.bfloat16, torch.float16]), gradients=st.booleans(), seed=seeds)
def test_autocast(name, size, batch, layout, dtype, gradients, seed):
    """Under autocast the same model and image give float32 weights finite gradients, and values that are close."""
    x = laid_out(layout, few(batch, size), 3, *size, torch.float32, seed)
    model = copy.deepcopy(shared_model(name))
    with torch.autocast('cpu', dtype):
        outputs, grads = forward_and_backward(model, x, gradients)
    expected, expected_grads = forward_and_backward(model, x.contiguous(), gradients)
    assert all(grad.dtype == torch.float32 for grad in grads)
    compare('autocast values', dtype, outputs, expected)
    compare_gradients('autocast ', dtype, grads, expected_grads)
    cases[f'autocast, {str(dtype).removeprefix("torch.")}'] += 1


@examples(18)
@given(
    name=st.sampled_from(MODELS), size=image_sizes, batch=st.integers(0, 5), layout=layouts,
    dtype=dtypes, autocast=st.booleans(), seed=seeds)
def test_repeats_bit_for_bit(name, size, batch, layout, dtype, autocast, seed):
    """The same again: by the same model, its copy and its pickle, under no_grad and inference_mode."""
    x = laid_out(layout, few(batch, size), 3, *size, dtype, seed)
    model = shared_model(name, dtype)
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=autocast and dtype == torch.float32)
    with autocast:
        with torch.no_grad():
            expected = model(x)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(other(x), expected)
    assert expected.shape == (x.shape[0], 10)
    cases['repeats'] += 1


@examples(14)
@given(name=st.sampled_from(MODELS), size=image_sizes, batch=st.integers(2, 5), layout=layouts, seed=seeds)
def test_batch_equals_singles(name, size, batch, layout, seed):
    """An image gives the same levels and logits whatever its neighbours in the batch."""
    batch = max(2, few(batch, size))
    x = laid_out(layout, batch, 3, *size, torch.float32, seed)
    model = shared_model(name)
    with torch.inference_mode():
        features, together = model.forward_intermediates(x)
        together = [model.forward_head(features), *together]
        for i in range(batch):
            features, alone = model.forward_intermediates(x[i:i + 1])
            alone = [model.forward_head(features), *alone]
            compare('images alone', torch.float32, alone, [level[i:i + 1] for level in together])
    cases['batch'] += 1


map_sides = st.one_of(st.integers(1, 12), st.integers(1, 33))


@examples(150)
@given(
    kind=st.sampled_from([LongShortAttention2d, FullAttention2d]), num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 7, 8]), size=st.tuples(map_sides, map_sides), batch=st.integers(0, 5), layout=layouts,
    dtype=dtypes, window_size=st.integers(1, 9), rank=st.integers(0, 8), num_global_tokens=st.integers(0, 3),
    update=st.sampled_from(['outputs', 'keys']), rel_pos_bias=st.booleans(), training=st.booleans(),
    implementation=st.sampled_from(['tiled', 'masked']), seed=seeds)
def test_attention_layers(
        kind, num_heads, head_dim, size, batch, layout, dtype, window_size, rank, num_global_tokens, update,
        rel_pos_bias, training, implementation, seed):
    """A layer on its own: any map, layout and type against a contiguous float32 copy, and image by image."""
    torch.manual_seed(seed)
    dim = num_heads * head_dim
    kwargs = dict(num_heads=num_heads, num_global_tokens=num_global_tokens, rel_pos_bias=rel_pos_bias)
    if kind is LongShortAttention2d:
        kwargs.update(window_size=window_size, rank=rank, global_update=update)
    layer = kind(dim, **kwargs).train(training)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=.5 if parameter.ndim > 1 else .2)
    layer = layer.to(dtype)
    plain = copy.deepcopy(layer).float()
    x = laid_out(layout, batch, dim, *size, dtype, seed).permute(0, 2, 3, 1)  # NHWC
    tokens = torch.randn(1, num_global_tokens, dim).to(dtype).expand(batch, -1, -1) if num_global_tokens else None
    results = []
    for module, image, token in (
            (layer, x, tokens), (plain, x.float().contiguous(), None if tokens is None else tokens.float())):
        image = image.detach().requires_grad_()
        with attention_implementation(implementation if module is layer else 'auto'):
            out, token_out = module(image, token)
        (out.float().square().sum() + (0 if token_out is None else token_out.float().sum())).backward()
        assert (token_out is None) == (tokens is None)
        outputs = [out.detach()] if token_out is None else [out.detach(), token_out.detach()]
        results.append((outputs, [image.grad] + [
            torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]))
    compare('layer values', dtype, results[0][0], results[1][0])
    compare_gradients('layer ', dtype, results[0][1], results[1][1])
    cases[f'layer, {str(dtype).removeprefix("torch.")}'] += 1


@examples(4)
@given(
    name=st.sampled_from(MODELS), sizes=st.lists(image_sizes, min_size=4, max_size=4, unique=True),
    implementations=st.lists(st.sampled_from(['auto', 'masked']), min_size=4, max_size=4),
    gradients=st.booleans(), seed=seeds)
def test_threads(name, sizes, implementations, gradients, seed):
    """Four threads on one model, at sizes and implementations of their own, get what one thread gets, bit for bit."""
    model = shared_model(name)
    images = [laid_out('contiguous', 1, 3, *size, torch.float32, seed) for size in sizes]

    def run(x, implementation):
        x = x.clone().requires_grad_(gradients)
        with attention_implementation(implementation):
            logits = model(x)
        return [logits.detach(), torch.autograd.grad(logits.square().sum(), x)[0]] if gradients else [logits.detach()]

    expected = [run(*job) for job in zip(images, implementations)]
    for cached in (axis_spans, tile_plan, head_plan):  # to be filled by all at once
        cached.cache_clear()
    results, barrier = queue.SimpleQueue(), threading.Barrier(4)

    def work(index):
        try:
            barrier.wait()
            results.put((index, [run(images[index], implementations[index]) for _ in range(2)]))
        except Exception as error:
            results.put((index, error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in threads:
        index, outcome = results.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        for repeat in outcome:
            assert all(torch.equal(a, e) for a, e in zip(repeat, expected[index], strict=True)), (index, sizes)
    cases['threads'] += 1


def classify(model, x, results):
    """What the spawned process does: answer with plain bytes, which need no shared memory."""
    file = io.BytesIO()
    with torch.inference_mode():
        torch.save(model(x), file)
    results.put(file.getvalue())


def test_spawned_process():
    """Models travel to a process that starts from nothing, by pickle, and give the same there, bit for bit."""
    context = torch.multiprocessing.get_context('spawn')
    results = context.Queue()
    x = laid_out('contiguous', 2, 3, 50, 71, torch.float32, 0)
    model = torch.nn.ModuleList(shared_model(name) for name in MODELS)
    process = context.Process(target=classify, args=(Both(*model), x, results))
    process.start()
    try:
        answer = torch.load(io.BytesIO(results.get(timeout=240)))
    finally:
        process.join(240)
    assert process.exitcode == 0
    with torch.inference_mode():  # as there: torch has other kernels where a gradient is wanted
        expected = Both(*model)(x)
    assert torch.equal(answer, expected)


class Both(torch.nn.Module):
    """Logits of two models: one process for both."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x)])


@pytest.mark.parametrize('name', MODELS)
def test_transforms(name, monkeypatch):
    """`torch.func` gives the model's own gradients, image by image too, and its outputs, where it goes in chunks."""
    model, x = copy.deepcopy(shared_model(name)).eval().double(), torch.randn(2, 3, 45, 70, dtype=torch.float64)
    params = dict(model.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(model, params, (x,)).square().sum()

    loss(params, x).backward()
    grads = torch.func.grad(loss)(params, x)
    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x[:, None])
    for key, parameter in params.items():
        if parameter.grad is not None:
            bound = dict(rtol=0, atol=1e-10 * max(1., parameter.grad.abs().max().item()))
            torch.testing.assert_close(grads[key], parameter.grad, **bound)
            torch.testing.assert_close(per_image[key].sum(dim=0), parameter.grad, **bound)
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 1)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(model)(x[:, None])[:, 0], model(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize('name', MODELS)
def test_forward_mode(name):
    """Derivatives by `forward_ad` along a direction of images and parameters: finite differences in float64."""
    model, x = copy.deepcopy(shared_model(name)).double(), torch.randn(2, 3, 45, 70, dtype=torch.float64)
    inputs = {'x': x, **dict(model.named_parameters())}
    generator = torch.Generator().manual_seed(0)
    direction = {
        key: torch.randn(value.shape, generator=generator, dtype=value.dtype) * value.detach().std(correction=0)
        for key, value in inputs.items()}

    def logits(inputs):
        return torch.func.functional_call(model, {key: inputs[key] for key in inputs if key != 'x'}, (inputs['x'],))

    with forward_ad.dual_level():
        dual = {key: forward_ad.make_dual(value, direction[key]) for key, value in inputs.items()}
        out = forward_ad.unpack_dual(logits(dual))
    with torch.no_grad():
        torch.testing.assert_close(out.primal, model(x), rtol=1e-12, atol=1e-12)
        step = 1e-6
        there, back = (logits({key: value + sign * step * direction[key] for key, value in inputs.items()})
                       for sign in (1, -1))
    expected = (there - back) / (2 * step)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(out.tangent, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('training', [False, True])
def test_empty_batch(name, training):
    """No images: no logits, levels of the right shapes, gradients that are zero or absent, and statistics as before."""
    model = copy.deepcopy(shared_model(name)).train(training)
    before = copy.deepcopy(model.state_dict())
    outputs, grads = forward_and_backward(model, torch.randn(0, 3, 45, 70))
    assert outputs[0].shape == (0, 10)
    for level, info in zip(outputs[1:], model.feature_info, strict=True):
        stride = info['reduction']
        assert level.shape == (0, info['num_chs'], math.ceil(45 / stride), math.ceil(70 / stride))
    assert grads[0].shape == (0, 3, 45, 70) and not any(grad.any() for grad in grads)
    for key, value in model.state_dict().items():
        assert 'num_batches_tracked' in key or torch.equal(value, before[key]), key
