"""Inference in row chunks, and full attention in chunks of its queries: the same values, bounded chunks."""
import random

import pytest
import torch
from small_models import perturbed

import timm_ls
from timm_ls import attention_implementation
from timm_ls.attention import chunked, full
from timm_ls.attention.chunked import row_chunks, runs_in_chunks, token_span
from timm_ls.cvt_ls import ConvFullAttention
from timm_ls.ops import chunks
from timm_ls.ops.chunks import equal_chunks
from timm_ls.ops.window_attention import recorded_choices

VARIANTS = {
    'vil_ls_tiny': {},
    'vil_ls_tiny_hires': {},
    'vil_ls_tiny_hires keys': dict(global_update='keys', num_global_tokens=(2, 1, 0, 3)),
    'vil_ls_tiny no bias': dict(rel_pos_bias=False, rank=0),
    'cvt_ls_13': dict(num_global_tokens=(1, 0, 2)),
    'cvt_ls_13 full': dict(attn_types=('ls', 'full', 'full'), rel_pos_bias=True, num_global_tokens=(0, 2, 1)),
    'cvt_ls_13 plain': timm_ls.cvt_ls.PLAIN_CVT,
}


def build(variant: str, dtype=torch.float64, **kwargs):
    return perturbed(variant.split()[0], dtype, **dict(VARIANTS[variant], **kwargs))


def chunks_of(monkeypatch, size: int) -> None:
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', size)


def outputs(model, x):
    features, levels = model.forward_intermediates(x)
    return [model.forward_head(features), features] + levels


def tokens_of(block, size, batch=1):
    """A sequence for a block, global tokens first."""
    g = block.attn.num_global_tokens
    weight = block.norm1.weight
    return torch.randn(batch, g + size[0] * size[1], len(weight), dtype=weight.dtype)


@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_the_whole(monkeypatch, variant):
    """In chunks of any size, logits, class tokens and every level are those of the whole map."""
    rng = random.Random(variant)
    model = build(variant)
    for _ in range(6):
        x = torch.randn(rng.choice([1, 2, 5]), 3, rng.randint(32, 150), rng.randint(32, 150), dtype=torch.float64)
        with torch.no_grad():
            chunks_of(monkeypatch, 10 ** 9)
            expected = outputs(model, x)
            for size in (1, rng.randint(2000, 50000), 200000):
                chunks_of(monkeypatch, size)
                for actual, wanted in zip(outputs(model, x), expected, strict=True):
                    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize('variant', ['vil_ls_tiny', 'cvt_ls_13'])
def test_layers_see_chunks(monkeypatch, variant):
    """No layer sees or makes more of a map than a chunk, rounded up to a row of windows; together they see it once.

    Of the MLP, that is its hidden layer, and a token.
    """
    model = build(variant)
    chunks_of(monkeypatch, 12000)
    block = model.stages[0].blocks[0]
    seen = {layer: [] for layer in (block.norm1, block.attn.proj, block.mlp)}
    for layer, shapes in seen.items():
        def forward(x, *args, forward=layer.forward, shapes=shapes):
            shapes.append(tuple(x.shape))
            return forward(x, *args)
        monkeypatch.setattr(layer, 'forward', forward)
    with torch.no_grad():
        model(torch.randn(2, 3, 160, 60, dtype=torch.float64))
    g, margin = block.attn.num_global_tokens, block.attn.margin
    rows = 12000 // (15 * 12 * 8) // 3 * 3  # in a chunk
    for layer, shapes in seen.items():
        sizes = [torch.Size(shape[:-1]).numel() for shape in shapes]
        if layer is block.norm1:  # rows around a chunk are seen as well
            assert max(sizes) <= (rows + 2 * margin) * 15 + g
            overlap = 4 * margin * (-(-40 // rows) - 1) * 15
            assert sum(sizes) == 2 * (40 * 15 + g) + overlap
        elif layer is block.attn.proj:
            assert max(sizes) <= rows * 15 and sum(sizes) == 2 * (40 * 15 + g)
        else:
            assert max(sizes) <= 12000 // (block.mlp.fc1.out_features * 8) and sum(sizes) == 2 * (40 * 15 + g)


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_attention_goes_in_chunks(monkeypatch, variant):
    """But for full attention with strided keys, which only plain CvT has."""
    chunks_of(monkeypatch, 1)
    with torch.no_grad():
        for stage in build(variant).stages:
            for block in stage.blocks:
                strided = isinstance(block.attn, ConvFullAttention) and block.attn.kv_stride > 1
                assert runs_in_chunks(block, tokens_of(block, (6, 6))) == (not strided)
                assert strided == (variant == 'cvt_ls_13 plain')


def test_who_sees_the_whole(monkeypatch):
    """Chunks are for inference: not where gradients are needed, a graph is captured, or a layer is hooked."""
    chunks_of(monkeypatch, 1)
    model = build('vil_ls_tiny')
    block = model.stages[0].blocks[0]
    x = tokens_of(block, (6, 6))
    assert not runs_in_chunks(block, x)  # grad mode
    assert not runs_in_chunks(block, x.requires_grad_())
    x = x.detach()
    with torch.no_grad():
        assert runs_in_chunks(block, x)
        with attention_implementation('masked'):
            assert runs_in_chunks(block, x)
        block.train()
        assert not runs_in_chunks(block, x)
        block.eval()
        handle = block.register_forward_hook(lambda *a: None)  # of the block itself: sees the whole anyway
        assert runs_in_chunks(block, x)
        handle.remove()
        for layer in (block.norm1, block.attn, block.attn.qkv, block.mlp.fc1, block.drop_path1):
            for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
                lengths = []
                handle = register(lambda module, args, out=None, to=lengths: to.append(args[0].shape[1]))
                assert not runs_in_chunks(block, x)
                block(x, (6, 6))
                assert lengths == [37]
                handle.remove()
        handle = block.attn.qkv.register_full_backward_hook(lambda *a: None)
        assert not runs_in_chunks(block, x)
        handle.remove()
        assert runs_in_chunks(block, x)
        seen = []
        torch.vmap(lambda x: seen.append(runs_in_chunks(block, x)) or x)(x[None])
        with torch.autograd.forward_ad.dual_level():
            seen.append(runs_in_chunks(block, x))
        assert seen == [False, False]


def test_plain_form_goes_in_chunks(monkeypatch):
    """Without torch's fused attention too, and by every implementation that is forced."""
    model, x = build('vil_ls_tiny'), torch.randn(2, 3, 70, 50, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        chunks_of(monkeypatch, 1)
        for module in model.modules():
            if hasattr(module, 'fused_attn'):
                module.fused_attn = False
        with recorded_choices() as choices:
            torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-11)
        assert {choice.name for choice in choices} == {'masked'} and len(choices) > 10


def test_small_maps_stay_whole():
    """What fits into a chunk is not cut."""
    block = build('vil_ls_tiny', torch.float32).stages[0].blocks[0]
    with torch.no_grad():
        limit = chunks.CPU_CHUNK_BYTES // 4 // 12
        assert not runs_in_chunks(block, torch.empty(1, limit, 12))
        assert runs_in_chunks(block, torch.empty(1, limit + 1, 12))


def test_cuts(monkeypatch):
    """Groups and runs of rows cover everything once, keep windows whole, and hold no more than a chunk."""
    rng = random.Random(0)
    for _ in range(300):
        total, most, step = rng.randint(0, 60), rng.randint(0, 40), rng.randint(1, 9)
        cuts = equal_chunks(total, most, step)
        assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(total))
        lengths = [cut.stop - cut.start for cut in cuts]
        assert all(cut.start % step == 0 for cut in cuts) and max(lengths, default=0) <= max(step, most)
        assert len(set(lengths[:-1])) <= 1 and len(cuts) <= -(-total // (max(1, most // step) * step))
        assert not cuts or (lengths[0] - step) * len(cuts) < total  # as equal as can be

        H, W, C = (rng.randint(1, 40) for _ in range(3))
        g, size = rng.randint(0, 3), rng.choice([1, 1000, 30000, 10 ** 6])
        chunks_of(monkeypatch, size)
        x = torch.empty(1, g + H * W, C, device='cpu')
        rows = row_chunks(x, (H, W), step)
        assert all(cut.start % step == 0 for cut in rows)
        assert all(cut.stop - cut.start <= step or (cut.stop - cut.start) * W * C * 4 <= size for cut in rows)
        spans = [token_span(cut, W, g) for cut in rows]  # global tokens go with the first rows
        assert [i for span in spans for i in range(span.start, span.stop)] == list(range(g + H * W))
        wide = row_chunks(x, (H, W), step, row_bytes=size)
        assert all(cut.stop - cut.start <= step for cut in wide)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('variant', ['vil_ls_tiny', 'cvt_ls_13'])
def test_autocast(monkeypatch, variant, dtype):
    """Types come out as from the whole map, and values as near to float32."""
    model, x = build(variant, torch.float32), torch.randn(2, 3, 90, 60)
    window_attention, types = chunked.window_attention, set()

    def recorded(q, kv, *args, **kwargs):
        types.add((q.dtype, kv.dtype))
        return window_attention(q, kv, *args, **kwargs)

    monkeypatch.setattr(chunked, 'window_attention', recorded)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast('cpu', dtype):
            whole = model(x)
            assert not types
            chunks_of(monkeypatch, 4000)
            in_chunks = model(x)
    assert in_chunks.dtype == whole.dtype and types == {(dtype, dtype)}
    error = (whole.float() - exact).norm()
    assert 0 < (in_chunks.float() - exact).norm() < 2 * error


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(monkeypatch, dtype):
    """A converted model: of its type, and as near to float32 as the whole map."""
    model, x = build('vil_ls_tiny_hires', torch.float32), torch.randn(2, 3, 90, 60).to(dtype)
    with torch.no_grad():
        exact = model.to(dtype).float()(x.float())
        model = model.to(dtype)
        whole = model(x)
        chunks_of(monkeypatch, 4000)
        in_chunks = model(x)
    assert in_chunks.dtype == dtype
    assert 0 < (in_chunks.float() - exact).norm() < 2 * (whole.float() - exact).norm()


@pytest.mark.parametrize('variant', ['vil_ls_tiny', 'cvt_ls_13 plain'])
def test_full_attention_by_rows(monkeypatch, variant):
    """Where a full-attention bias would not fit, it exists for some queries at a time: same values and gradients.

    The backward pass makes it anew.
    """
    kwargs = dict(rel_pos_bias=True) if variant.startswith('cvt') else {}
    model = build(variant, **kwargs)
    x = torch.randn(2, 3, 150, 220, dtype=torch.float64)
    attend_grid_rows, calls = full.attend_grid_rows, []

    def recorded(q, k, v, parts, size, first_row, num_rows, *args):
        calls.append(num_rows == size[0])  # all rows at once?
        return attend_grid_rows(q, k, v, parts, size, first_row, num_rows, *args)

    monkeypatch.setattr(full, 'attend_grid_rows', recorded)

    def run():
        model.zero_grad()
        calls.clear()
        logits = model(x)
        logits.square().sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, expected_grads = run()
    assert calls and all(calls)
    for size in (1, 40000):
        for module in model.modules():
            if isinstance(module, timm_ls.attention.FullAttention):
                module.bias_bytes = size
        actual, grads = run()
        assert not all(calls)
        num_calls = len(calls)
        calls.clear()
        with torch.no_grad():
            model(x)
        assert num_calls == sum(1 if whole else 2 for whole in calls)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
        for name, grad in grads.items():
            bound = 1e-11 * max(1., expected_grads[name].abs().max().item())
            torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=bound)
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=0, atol=1e-11)
