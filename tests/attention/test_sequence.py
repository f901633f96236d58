"""Attention over sequences and its models: an oracle, the released vectors, masks, causality, generation, cost."""
import copy
import random

import numpy as np
import pytest
import reference_sequence
import torch
import torch.nn.functional as F
from golden_fill import load_case
from layers import randomise
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_ls import CausalLongShortAttention1d, LongShortAttention1d
from timm_ls.attention import sequence
from timm_ls.ops import chunks
from timm_ls.sequence import CausalLanguageModel, SequenceEncoder, convert_released

NUM_CASES = 200


def bidirectional(seed):
    """A layer and its input, over all that has an effect: x, mask or None, global tokens or None."""
    rng = random.Random(seed)
    num_heads, g = rng.choice([1, 2, 3]), rng.choice([0, 1, 3])
    layer = LongShortAttention1d(
        num_heads * rng.choice([4, 5, 8]), num_heads, window_size=1 + seed % 9, rank=rng.choice([0, 1, 4, 8]),
        num_global_tokens=g, qkv_bias=rng.random() < .8, dtype=torch.float64)
    generator = randomise(layer, seed)
    B, N = 1 + seed % 2, rng.choice([1, 2, 3, 5, 8, 13, 16, 24, 31])
    x = torch.randn(B, N, layer.dim, generator=generator, dtype=torch.float64)
    mask = None
    if rng.random() < .7:
        mask = torch.rand(B, N, generator=generator) < rng.choice([.3, .8])
        mask[:, rng.randrange(N)] = rng.random() < .9  # at times a sequence in which nothing counts
    return layer, x, mask, torch.randn(B, g, layer.dim, generator=generator, dtype=torch.float64) if g else None


def causal(seed):
    """A layer and its input: x, memory or None."""
    rng = random.Random(seed)
    num_heads = rng.choice([1, 2, 3])
    layer = CausalLongShortAttention1d(
        num_heads * rng.choice([4, 6, 8]), num_heads, window_size=1 + seed % 9,
        segment_size=rng.choice([1, 2, 3, 4, 8]), rank=rng.choice([0, 1, 2, 4]),
        max_segments=rng.choice([None, None, 1, 2, 5, 1000]), qkv_bias=rng.random() < .8, dtype=torch.float64)
    generator = randomise(layer, seed)
    B, N = 1 + seed % 2, rng.choice([1, 2, 3, 5, 8, 13, 16, 24, 31])
    M = layer.segment_size * rng.choice([1, 2, 5])
    x, memory = (torch.randn(B, n, layer.dim, generator=generator, dtype=torch.float64) for n in (N, M))
    return layer, x, memory if rng.random() < .6 else None


def oracle(layer, params, *inputs):
    """All outputs that mean something, in one vector."""
    if isinstance(layer, LongShortAttention1d):
        x, mask, tokens = inputs
        tokens = x[:, :0] if tokens is None else tokens
        outs = []
        for b in range(x.shape[0]):
            keep = list(range(x.shape[1])) if mask is None else mask[b].nonzero().flatten().tolist()
            outs += reference_sequence.bidirectional(
                params, x[b], keep, tokens[b], layer.num_heads, layer.window_size, layer.rank)
        return torch.cat([out.flatten() for out in outs])
    x, memory = inputs
    memory = x[:, :0] if memory is None else memory
    return torch.stack([reference_sequence.causal(
        params, x[b], memory[b], layer.num_heads, layer.window_size, layer.segment_size, layer.rank,
        layer.max_segments) for b in range(x.shape[0])]).flatten()


def ours(layer, params, *inputs):
    """The same by the layer."""
    if isinstance(layer, LongShortAttention1d):
        x, mask, tokens = inputs
        y, tokens = functional_call(layer, params, inputs)
        keep = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        return torch.cat([
            out for b in range(x.shape[0])
            for out in (y[b][keep[b]].flatten(), *([] if tokens is None else [tokens[b].flatten()]))])
    return functional_call(layer, params, inputs).flatten()


def differentiate(function, layer, *inputs):
    """Value, and gradients of a loss by all inputs and parameters."""
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    inputs = [x.detach().clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    out = function(layer, params, *inputs)
    (out.square().sum() + out.sum()).backward()
    leaves = [x for x in inputs if x is not None and x.requires_grad] + list(params.values())
    return out.detach(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def worst(actual, expected):
    """Largest difference over all tensors, against the largest value among them."""
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True) if e.numel() > 0]
    scale = max((e.abs().max().item() for _, e in pairs), default=0.)
    return max(((a - e).abs().max().item() for a, e in pairs), default=0.) / max(scale, 1e-30)


@pytest.mark.parametrize('part', range(4))
@pytest.mark.parametrize('make', [bidirectional, causal])
def test_oracle_sweep(monkeypatch, make, part):
    """Values and gradients over random settings, as a whole and a block at a time, in float64 and float32."""
    errors = {}
    for seed in range(part, NUM_CASES, 4):
        monkeypatch.setattr(sequence, 'MIN_BLOCK', 32 if seed % 3 == 0 else 1)
        layer, *inputs = make(seed)
        expected, expected_grads = differentiate(oracle, layer, *inputs)
        single = copy.deepcopy(layer).float()
        singles = [x.float() if x is not None and x.is_floating_point() else x for x in inputs]
        for chunk_bytes in (2 ** 26, 1):
            monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', chunk_bytes)
            for dtype, arguments in (('float64', (layer, *inputs)), ('float32', (single, *singles))):
                value, grads = differentiate(ours, *arguments)
                errors[seed, dtype, chunk_bytes] = worst([value], [expected]), worst(grads, expected_grads)
    for dtype, bound in (('float64', 1e-10), ('float32', 1e-5)):
        values = {key: error for key, error in errors.items() if key[1] == dtype}
        key, grad_key = max(values, key=lambda k: values[k][0]), max(values, key=lambda k: values[k][1])
        print(f'{dtype}: {len(values)} runs, worst value {values[key][0]:.1e}, gradient {values[grad_key][1]:.1e}')
        assert values[key][0] <= bound, (key, values[key])
        assert values[grad_key][1] <= bound, (grad_key, values[grad_key])


def released(case):
    """A golden case: its description, its vectors, its parameters by the authors' names."""
    meta, params, golden = load_case(case)
    return meta, golden, {name: value.requires_grad_() for name, value in params.items()}


def assert_released(golden, actual):
    """Every vector of a case, to 2e-5 of its largest value."""
    assert set(actual) == set(golden.files) - {'keep'}
    for name, value in actual.items():
        expected = golden[name]
        np.testing.assert_allclose(
            value.detach().numpy(), expected, rtol=0, atol=2e-5 * abs(expected).max(), err_msg=name)


@pytest.mark.parametrize('case', [
    'seq_bi_d48_h3_w4_r2_n32_nocls', 'seq_bi_d64_h2_w8_r4_n64', 'seq_bi_d64_h4_w16_r8_n128_mask'])
def test_released_bidirectional(case):
    """Outputs, what is written at padded positions included, and gradients; the parameters fit strictly."""
    meta, golden, params = released(case)
    g, length = int(meta['class_token']), meta['length']
    layer = LongShortAttention1d(meta['dim'], meta['num_heads'], meta['window_size'], meta['rank'], g)
    layer.load_state_dict(convert_released(params))
    rng = np.random.RandomState(7)
    x = torch.from_numpy(rng.standard_normal((2, length, meta['dim'])).astype(np.float32)).requires_grad_()
    tokens = torch.from_numpy(rng.standard_normal((2, g, meta['dim'])).astype(np.float32)) if g else None
    keep = torch.from_numpy(golden['keep']).bool()
    y, tokens = functional_call(layer, convert_released(params), (x, keep[:, g:], tokens))
    output = torch.cat([tokens, y], dim=1) if g else y
    output[keep].square().mean().backward()
    assert_released(golden, {
        'output': output, 'grad_input': x.grad,
        **{name: params[name.removeprefix('grad_')].grad for name in golden.files
           if name.startswith('grad_') and name != 'grad_input'}})


def test_released_causal():
    """A language model called twice, the second time with the memory of the first."""
    meta, golden, params = released('seq_ar_d64_h4_l2_c8_r2_w16')
    length = meta['tokens_per_call']
    model = CausalLanguageModel(
        meta['vocab'], meta['dim'], meta['depth'], meta['num_heads'], meta['window_size'], meta['segment_size'],
        meta['rank'], memory_length=meta['memory'], mlp_ratio=meta['mlp_dim'] / meta['dim'])
    model.load_state_dict(convert_released(params))
    tokens = torch.from_numpy(np.random.RandomState(7).randint(0, meta['vocab'], (2, 2 * length)))
    first, memory = model(tokens[:, :length], model.zero_memory(2))
    second, memory = functional_call(model, convert_released(params), (tokens[:, length:], memory))
    log_probs = torch.cat([first, second], dim=1).log_softmax(dim=-1)
    loss = F.nll_loss(log_probs[:, length:-1].flatten(0, 1), tokens[:, length + 1:].flatten())
    loss.backward()
    assert_released(golden, {
        'log_probs': log_probs, 'cache_last': memory[-1], 'loss': loss,
        **{name: params[name.removeprefix('grad_')].grad for name in golden.files if name.startswith('grad_')}})


def test_convert_released_takes_what_it_knows():
    """A bare causal layer, one without biases, fairseq's wrapping; what is missing or unknown is an error."""
    _, _, params = released('seq_ar_d64_h4_l2_c8_r2_w16')
    prefix = 'layers.1.attn.'
    names = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    layer = CausalLongShortAttention1d(64, 4, 16, 8, 2)
    layer.load_state_dict(convert_released(names))
    assert torch.equal(layer.content_bias, names['r_w_bias'][0, :, 0, 0])
    assert torch.equal(layer.qkv.weight[64:128], names['proj_key.weight'])

    without = {name: value for name, value in names.items()
               if name not in ('proj_query.bias', 'proj_key.bias', 'proj_val.bias', 'proj_out.bias')}
    layer = CausalLongShortAttention1d(64, 4, 16, 8, 2, qkv_bias=False)
    layer.load_state_dict(convert_released(without))
    assert torch.equal(layer.proj.bias, torch.zeros(64))

    wrapped = {'model': {f'decoder.model.{name}': value for name, value in params.items()}}
    wrapped['model']['decoder.model.out_emb.weight'] = params['in_emb.weight']
    wrapped['model']['decoder.model.pos_emb.inv_freq'] = torch.zeros(32)
    expected = convert_released(params)
    converted = convert_released(wrapped)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], value) for name, value in expected.items())

    with pytest.raises(RuntimeError, match='expected all or none of proj_query, proj_key, proj_val to have a bias'):
        convert_released({name: value for name, value in names.items() if name != 'proj_key.bias'})
    _, _, bidirectional_params = released('seq_bi_d48_h3_w4_r2_n32_nocls')
    with pytest.raises(RuntimeError, match='no counterpart of conv.weight'):
        convert_released({**bidirectional_params, 'conv.weight': torch.zeros(3, 1, 3, 1)})
    with pytest.raises(RuntimeError, match='Expected parameters of the authors'):
        convert_released({'qkv.weight': torch.zeros(3, 1)})
    with pytest.raises(RuntimeError, match='Expected parameters of the authors'):
        convert_released({**bidirectional_params, **names})


@pytest.mark.parametrize('chunk_bytes, min_block', [(1, 1), (2 ** 26, 32)])
@pytest.mark.parametrize('seed', range(0, 40, 3))
def test_what_is_behind_the_mask_changes_nothing(monkeypatch, seed, chunk_bytes, min_block):
    """NaN behind the mask: the same bits in values and gradients, none of its own; other lengths of padding as well."""
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', chunk_bytes)
    monkeypatch.setattr(sequence, 'MIN_BLOCK', min_block)
    layer, x, _, tokens = bidirectional(seed)
    mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(seed)) < .6
    poisoned = x.masked_fill(~mask[..., None], float('nan'))
    value, grads = differentiate(ours, layer, x, mask, tokens)
    poisoned_value, poisoned_grads = differentiate(ours, layer, poisoned, mask, tokens)
    assert torch.equal(value, poisoned_value)
    assert all(torch.equal(*pair) for pair in zip(grads, poisoned_grads, strict=True))
    assert not poisoned_grads[0][~mask].any()
    y, _ = layer(poisoned, mask, tokens)
    assert torch.equal(y[~mask], layer.proj.bias.expand_as(y[~mask]))

    longer = F.pad(x, (0, 0, 0, 7), value=float('nan'))
    value, _ = differentiate(ours, layer, x, None, tokens)
    padded_value, _ = differentiate(ours, layer, longer, torch.arange(longer.shape[1]).expand(x.shape[0], -1)
                                    < x.shape[1], tokens)
    torch.testing.assert_close(padded_value, value, rtol=0, atol=1e-12)


def test_sequence_in_which_nothing_counts():
    """Its global tokens attend to themselves; its neighbor in the batch does not notice."""
    layer, x, _, _ = bidirectional(7)
    tokens = torch.randn(2, 2, layer.dim, dtype=torch.float64)
    layer = LongShortAttention1d(layer.dim, 1, 4, 2, num_global_tokens=2, dtype=torch.float64)
    x = torch.full((2, 9, layer.dim), float('nan'), dtype=torch.float64)
    x[1] = torch.randn(9, layer.dim)
    mask = torch.tensor([[False] * 9, [True] * 9])
    y, out = layer(x, mask, tokens)
    q, k, v = layer.qkv(tokens[0]).chunk(3, dim=-1)
    among = (q @ k.T / layer.dim ** .5).softmax(-1) @ v
    torch.testing.assert_close(out[0], layer.proj(among), rtol=0, atol=1e-12)
    alone = layer(x[1:], None, tokens[1:])
    torch.testing.assert_close((y[1:], out[1:]), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize('seed', range(0, 60, 4))
def test_causality(monkeypatch, seed):
    """Outputs up to a token depend on tokens up to it alone: the same bits, and no gradient from later ones."""
    monkeypatch.setattr(sequence, 'MIN_BLOCK', 1)
    layer, x, memory = causal(seed)
    for t in {0, x.shape[1] // 2, x.shape[1] - 1}:
        changed = torch.cat([x[:, :t + 1], torch.full_like(x[:, t + 1:], 1e3)], dim=1).requires_grad_()
        out = layer(changed, memory)
        assert torch.equal(out[:, :t + 1], layer(x, memory)[:, :t + 1])
        out[:, :t + 1].sum().backward()
        assert not changed.grad[:, t + 1:].any()


@pytest.mark.parametrize('window, segment, rank, max_segments', [
    (16, 8, 2, None), (16, 8, 1, 6), (5, 8, 2, 1), (24, 7, 3, 6), (1, 1, 1, 4), (9, 4, 0, None)])
def test_steps_equal_the_parallel_form(window, segment, rank, max_segments):
    """512 tokens one by one, after a beginning of any length, with and without memory."""
    torch.manual_seed(0)
    layer = CausalLongShortAttention1d(16, 2, window, segment, rank, max_segments=max_segments)
    randomise(layer, 0)
    x, memory = torch.randn(2, 540, 16), torch.randn(2, segment * 5, 16)
    for beginning, past in ((1, None), (28, memory)):
        with torch.inference_mode():
            expected = layer(x, past)[:, :beginning + 512]
            out, cache = layer.prefill(x[:, :beginning], past)
            outs = [out]
            for t in range(beginning, beginning + 512):
                out, cache = layer.step(x[:, t:t + 1], cache)
                outs.append(out)
        assert (torch.cat(outs, dim=1) - expected).abs().max() <= 1e-5 * expected.abs().max()


class Count(TorchDispatchMode):
    """Elements that operations write, views left out: what a computation costs, whatever else a machine does."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.elements += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
                             and x.untyped_storage().data_ptr() not in inputs)
        return out


def test_a_step_costs_the_same_at_any_position():
    """What is kept, and what is computed, over a whole period of segments, early and late."""
    layer = CausalLongShortAttention1d(16, 2, window_size=12, segment_size=8, rank=2, max_segments=4)
    costs, kept = [], []
    with torch.no_grad():
        _, cache = layer.prefill(torch.randn(1, 63, 16))
        _, cache = layer.step(torch.randn(1, 1, 16), cache)
        for _ in range(20):
            with Count() as count:
                sizes = []
                for _ in range(8):
                    _, cache = layer.step(torch.randn(1, 1, 16), cache)
                    sizes.append(sum(x.untyped_storage().nbytes() for x in cache))
            costs.append(count.elements)
            kept.append(sizes)
    assert min(costs) > 0 and len(set(costs)) == 1
    assert all(sizes == kept[0] for sizes in kept)
    # a window, landmarks, a segment, and the terms of the former two
    assert max(kept[0]) <= 4 * 16 * (2 * 12 + 2 * 8 + 8 + 12 + 8) * 2


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('layer', [
    LongShortAttention1d(16, 2, 8, 4, num_global_tokens=1),
    CausalLongShortAttention1d(16, 2, 16, 8, 2, max_segments=6),
], ids=['bidirectional', 'causal'])
def test_cost_is_linear_in_length(monkeypatch, layer, training):
    """Elements written, and elements kept for the backward pass, per token: the same at 8 times the length."""
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 2 ** 18)
    tokens = torch.randn(1, 1, 16) if isinstance(layer, LongShortAttention1d) else None

    def cost(length):
        x, kept = torch.randn(1, length, 16, requires_grad=training), {}

        def pack(saved):
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with Count() as count, torch.set_grad_enabled(training):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
                out = layer(x, None, tokens)[0] if tokens is not None else layer(x)
            if training:
                out.sum().backward()
        return count.elements / length, sum(kept.values()) / length

    (short, short_kept), (long, long_kept) = cost(2048), cost(2048 * 8)
    assert 0 < long < 1.02 * short
    assert long_kept <= 1.02 * short_kept and (short_kept > 0) == training


def test_memory_of_one_head_continues_a_sequence():
    """With one head landmarks are the same whether keys or hidden states are distilled: two calls equal one."""
    for seed in range(12):
        rng = random.Random(seed)
        layer = CausalLongShortAttention1d(
            8, 1, rng.choice([3, 8, 13]), 4, rng.choice([0, 1, 3]), rng.choice([None, 2]), dtype=torch.float64)
        randomise(layer, seed)
        x = torch.randn(2, 45, 8, dtype=torch.float64)
        cut = 4 * rng.choice([1, 3, 6])
        torch.testing.assert_close(layer(x[:, cut:], x[:, :cut]), layer(x)[:, cut:], rtol=0, atol=1e-12)


def test_memory_of_the_language_model():
    """It holds the last tokens, in whole segments, as each block got them, with no gradient; it may begin empty."""
    torch.manual_seed(0)
    model = CausalLanguageModel(11, 16, 2, 2, window_size=6, segment_size=4, rank=2, memory_length=12)
    tokens = torch.randint(0, 11, (2, 24))
    blocks_saw = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: blocks_saw.append(args[0]))
    memory = None
    for start, stop, held in ((0, 3, 0), (3, 9, 4), (9, 24, 12)):
        before = memory
        _, memory = model(tokens[:, start:stop], memory)
        assert memory.shape == (2, 2, held, 16) and not memory.requires_grad
        saw, blocks_saw[:] = torch.stack(blocks_saw), []
        everything = saw if before is None else torch.cat([before, saw], dim=2)
        assert torch.equal(memory, everything[:, :, everything.shape[2] - held:])
    assert CausalLanguageModel(11, 16, 1, 2, 6, 4, 2)(tokens)[1] is None


def test_generation():
    """Greedy: each token is the likeliest after all before it. Drawn: by the logits, and again with the same seed."""
    torch.manual_seed(0)
    model = CausalLanguageModel(13, 16, 2, 2, window_size=6, segment_size=4, rank=2, max_segments=3).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=.2)
    beginning = torch.randint(0, 13, (2, 5))
    greedy = model.generate(beginning, 40, temperature=0)
    assert torch.equal(greedy[:, :5], beginning)
    assert torch.equal(greedy[:, 5:], model(greedy)[0].argmax(-1)[:, 4:-1])
    drawn = [model.generate(beginning, 10, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)
    logits = model(beginning[:1])[0][0, -1]
    first = model.generate(beginning[:1].expand(4000, -1), 1, 2., torch.Generator().manual_seed(0))[:, -1]
    frequencies = first.bincount(minlength=13) / 4000
    torch.testing.assert_close(frequencies, (logits / 2).softmax(-1), rtol=0, atol=.03)


def test_encoder_ignores_padding():
    """Sequences of a batch have the features they have alone, whatever token numbers stand in the padding."""
    torch.manual_seed(0)
    encoder = SequenceEncoder(20, 64, dim=16, window_size=4, rank=3, num_global_tokens=2).eval()
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=.2)
    lengths = [37, 64, 1]
    tokens = torch.randint(0, 20, (3, 64))
    mask = torch.arange(64) < torch.tensor(lengths)[:, None]
    x, g = encoder(tokens.masked_fill(~mask, -10 ** 9), mask)
    for b, length in enumerate(lengths):
        alone = encoder(tokens[b:b + 1, :length])
        torch.testing.assert_close((x[b:b + 1, :length], g[b:b + 1]), alone, rtol=0, atol=1e-5)
    assert not x[~mask].any()
    with pytest.raises(ValueError, match='65 tokens: expected at most max_length=64'):
        encoder(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize('model, stds', [
    (SequenceEncoder(100, 400, dim=64, num_global_tokens=8), {'embed.weight': .02, 'pos_embed': .02}),
    (CausalLanguageModel(100, 128, 2, 4, 8, 4, 2), {
        'embed.weight': .02, 'blocks.1.attn.qkv.weight': .02, 'blocks.0.mlp.fc1.weight': .02,
        'blocks.0.attn.content_bias': .02, 'blocks.0.norm1.weight': .02}),
], ids=['encoder', 'language model'])
def test_init_weights(model, stds):
    """Parameters are drawn afresh, all of them, with the spread that is documented."""
    for parameter in model.parameters():
        parameter.data.fill_(7.)
    model.init_weights()
    parameters = dict(model.named_parameters())
    assert not [name for name, value in parameters.items() if (value == 7.).any()]
    for name, std in stds.items():
        assert abs(parameters[name].std().item() / std - 1) < .2
        assert abs(parameters[name].mean().item() - ('norm' in name)) < .01
    assert not parameters['blocks.0.norm1.bias'].any()


def inputs_of(layer, length, batch=2):
    """Inputs of a layer or a model, seeded by the length."""
    generator = torch.Generator().manual_seed(length)
    if isinstance(layer, (SequenceEncoder, CausalLanguageModel)):
        tokens = torch.randint(0, 20, (batch, length), generator=generator)
        return (tokens, torch.rand(batch, length, generator=generator) < .7)[:1 + isinstance(layer, SequenceEncoder)]
    x = torch.randn(batch, length, 32, generator=generator)
    if isinstance(layer, LongShortAttention1d):
        return x, torch.rand(batch, length, generator=generator) < .7, torch.randn(batch, 1, 32, generator=generator)
    return x, torch.randn(batch, 16, 32, generator=generator)


CAPTURED = {
    'bidirectional': lambda: LongShortAttention1d(32, 2, 8, 4, num_global_tokens=1),
    'causal': lambda: CausalLongShortAttention1d(32, 2, 8, 4, 2),
    'causal, limited': lambda: CausalLongShortAttention1d(32, 2, 8, 4, 2, max_segments=3),
    'encoder': lambda: SequenceEncoder(20, 1000, 32, depth=1),
    'language model': lambda: CausalLanguageModel(20, 32, 1, 2, 8, 4, 2),
}
SLOW = ('causal, limited', 'encoder', 'language model')  # they hold what the first two do
captured = pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CAPTURED])


def assert_same(graph, layer, lengths, batch=2):
    for length in lengths:
        inputs = inputs_of(layer, length, batch)
        torch.testing.assert_close(graph(*inputs), layer(*inputs), rtol=1e-4, atol=2e-5)


@captured
@pytest.mark.parametrize('backend, training', [
    ('eager', False),
    pytest.param('aot_eager', False, marks=pytest.mark.slow),
    pytest.param('aot_eager', True, marks=pytest.mark.slow),
])
def test_compile(name, backend, training):
    """One graph for all lengths of more than a block, one for those of a block; in training their gradients too.

    torch begins the first one again where a number of the model is a symbol to it (`tensorify_python_scalars`).
    """
    torch.manual_seed(0)
    layer = CAPTURED[name]().train(training)
    torch._dynamo.reset()
    counter, counts = CompileCounterWithBackend(backend), []
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for length in (50, 64, 128, 200, 33, 35):
        inputs = inputs_of(layer, length)
        with torch.set_grad_enabled(training):
            assert_same(compiled, layer, [length])
        if training:
            grads = [torch.autograd.grad(tree_leaves(run(*inputs))[0].square().sum(), list(layer.parameters()),
                                         allow_unused=True) for run in (compiled, layer)]
            for actual, expected in zip(*grads, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
        counts.append(counter.frame_count)
    one_block = name == 'encoder'  # whose blocks have 40 tokens
    assert counts[0] <= 2 and counts[:4] == counts[:1] * 4
    assert counts[0] <= counts[4] == counts[5] <= counts[0] + one_block
    if backend != 'eager':
        with torch.no_grad():
            assert_same(compiled, layer, [7])


@captured
@pytest.mark.parametrize('strict, batch', [
    (True, {0: Dim('batch')}),
    pytest.param(True, {}, marks=pytest.mark.slow),
    pytest.param(False, {0: Dim('batch')}, marks=pytest.mark.slow),
], ids=['strict', 'fixed batch', 'not strict'])
def test_export(name, strict, batch):
    """One program for any length, with any batch or with one of its own."""
    torch.manual_seed(0)
    layer = CAPTURED[name]().eval()
    lengths = [50, 64, 33, 128, 200, 9, 8, 2]
    inputs = inputs_of(layer, 50)
    shapes = tuple({**batch, **({1: Dim('length', max=1000)} if x.shape[1] == 50 else {})} for x in inputs)
    program = torch.export.export(layer, inputs, dynamic_shapes=shapes, strict=strict).module()
    assert_same(program, layer, lengths)
    if batch:
        assert_same(program, layer, lengths[:2], batch=3)


def half_layers():
    yield LongShortAttention1d(32, 2, 8, 4, num_global_tokens=1)
    yield CausalLongShortAttention1d(32, 2, 8, 4, 2)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [False, True])
def test_half_precision(dtype, autocast):
    """Close to float32, of the type asked for, with finite gradients."""
    for layer in half_layers():
        torch.manual_seed(0)
        inputs = inputs_of(layer, 50)
        expected = tree_leaves(layer(*inputs))
        if autocast:
            with torch.autocast('cpu', dtype):
                outs = tree_leaves(layer(*inputs))
        else:
            layer = layer.to(dtype)
            outs = tree_leaves(layer(*[x if x.dtype == torch.bool else x.to(dtype) for x in inputs]))
        for out, reference in zip(outs, expected, strict=True):
            assert out.dtype == dtype
            torch.testing.assert_close(out.float(), reference, rtol=0, atol=.02 * reference.abs().max().item())
        sum(out.float().square().sum() for out in outs).backward()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize('make', [
    lambda **drop: LongShortAttention1d(16, 2, 4, 2, **drop),
    lambda **drop: CausalLongShortAttention1d(16, 2, 4, 2, 1, **drop),
])
def test_dropout(make):
    """Of weights: all dropped leave the bias, none in eval mode, half of them the same mean; of the output."""
    torch.manual_seed(0)
    x = torch.randn(1, 12, 16)

    def run(layer, x=x):
        return tree_leaves(layer(x))[0]

    all_dropped = make(attn_drop=1.)
    torch.testing.assert_close(run(all_dropped), all_dropped.proj.bias.expand(1, 12, 16))
    plain, half = make(), make(attn_drop=.5)
    for layer in (plain, half):
        layer.load_state_dict(all_dropped.state_dict())
    torch.testing.assert_close(run(all_dropped.eval()), run(plain))
    draws = run(half, x.expand(5000, -1, -1))
    assert draws.std(dim=0).min() > 0
    torch.testing.assert_close(draws.mean(dim=0), run(plain)[0], rtol=0, atol=.05)
    assert not run(make(proj_drop=1.)).any()


def test_dropout_is_the_same_when_recomputed(monkeypatch):
    """By chunks, the backward pass drops what the forward pass dropped: numeric gradients agree."""
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 1)
    monkeypatch.setattr(sequence, 'MIN_BLOCK', 1)
    for layer in (LongShortAttention1d(4, 1, 2, 1, attn_drop=.5, dtype=torch.float64),
                  CausalLongShortAttention1d(4, 1, 2, 2, 1, attn_drop=.5, dtype=torch.float64)):

        def run(x, layer=layer):
            torch.manual_seed(0)
            return tree_leaves(layer(x))[0]

        assert torch.autograd.gradcheck(run, torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True))


def test_meta_device():
    with torch.device('meta'):
        assert LongShortAttention1d(16, 2, 4, 2)(torch.empty(2, 9, 16))[0].shape == (2, 9, 16)
        assert CausalLanguageModel(20, 16, 1, 2, 4, 2, 1)(torch.zeros(2, 9, dtype=torch.long))[0].shape == (2, 9, 20)


@pytest.mark.parametrize('build, message', [
    (lambda: LongShortAttention1d(16, 3, 4, 2), 'dim=16 is not divisible by num_heads=3'),
    (lambda: LongShortAttention1d(16, 2, 0, 2), 'window_size=0, rank=2, .*: expected window_size >= 1, rank >= 0'),
    (lambda: LongShortAttention1d(16, 2, 4, -1), 'rank=-1'),
    (lambda: LongShortAttention1d(16, 2, 4, 2, num_global_tokens=-1), 'num_global_tokens=-1'),
    (lambda: CausalLongShortAttention1d(15, 3, 4, 2, 1), 'dim=15: expected an even number'),
    (lambda: CausalLongShortAttention1d(16, 2, 4, 0, 1), 'segment_size=0'),
    (lambda: CausalLongShortAttention1d(16, 2, 4, 2, 1, max_segments=0), 'max_segments=0'),
    (lambda: CausalLanguageModel(9, 16, 1, 2, 4, 3, 1, memory_length=4), 'memory_length=4: expected a multiple of'),
    (lambda: LongShortAttention1d(16, 2, 4, 2)(torch.zeros(2, 0, 16)), r'length >= 1; got \[2, 0, 16\]'),
    (lambda: LongShortAttention1d(16, 2, 4, 2)(torch.zeros(2, 8)), r'Expected tokens as \[batch, length, 16\]'),
    (lambda: LongShortAttention1d(16, 2, 4, 2)(torch.zeros(2, 8, 16), torch.ones(2, 8)), 'got torch.float32'),
    (lambda: LongShortAttention1d(16, 2, 4, 2)(torch.zeros(2, 8, 16), torch.ones(2, 9).bool()), r'got .*\[2, 9\]'),
    (lambda: LongShortAttention1d(16, 2, 4, 2)(torch.zeros(2, 8, 16), None, torch.zeros(2, 1, 16)),
     'Expected 0 global tokens'),
    (lambda: LongShortAttention1d(16, 2, 4, 2, 1)(torch.zeros(2, 8, 16)), 'Expected 1 global tokens'),
    (lambda: CausalLongShortAttention1d(16, 2, 4, 2, 1)(torch.zeros(2, 8, 16), torch.zeros(2, 3, 16)),
     r'Expected memory as \[2, M, 16\], M a multiple of segment_size=2; got \[2, 3, 16\]'),
    (lambda: CausalLongShortAttention1d(16, 2, 4, 2, 1)(torch.zeros(2, 8, 15)), r'got \[2, 8, 15\]'),
    (lambda: CausalLongShortAttention1d(16, 2, 4, 2, 1).step(torch.zeros(2, 2, 16), None),
     r'Expected one token, \[batch, 1, 16\]; got \[2, 2, 16\]'),
    (lambda: CausalLanguageModel(9, 16, 2, 2, 4, 2, 1)(torch.zeros(1, 3).long(), torch.zeros(3, 1, 2, 16)),
     r'Expected memory as \[2, batch, length, 16\].*; got \[3, 1, 2, 16\]'),
    (lambda: CausalLanguageModel(9, 16, 2, 2, 4, 2, 1).generate(torch.zeros(1, 3).long(), 2, -1.),
     'temperature=-1.0: expected 0'),
])
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
