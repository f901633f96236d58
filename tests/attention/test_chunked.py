"""Inference by pieces of a map, and full attention by pieces of its queries: the same values, bounded pieces."""
import random

import pytest
import torch
from small_models import perturbed
from timm_ls.streaming import image_groups, may_go_by_pieces, row_pieces

import timm_ls
from timm_ls import attention_implementation
from timm_ls.cvt_ls import ConvGlobalAttention2d

VARIANTS = {
    'vil_ls_tiny': {},
    'vil_ls_tiny_hires': {},
    'vil_ls_tiny_hires keys': dict(global_update='keys', num_global_tokens=(2, 1, 0, 3)),
    'vil_ls_tiny no bias': dict(rel_pos_bias=False, rank=0),
    'cvt_ls_13': dict(num_global_tokens=(1, 0, 2)),
    'cvt_ls_13 full': timm_ls.cvt_ls.PLAIN_CVT,
}


def build(variant: str, dtype=torch.float64, **kwargs):
    return perturbed(variant.split()[0], dtype, **dict(VARIANTS[variant], **kwargs))


def pieces_of(monkeypatch, size: int) -> None:
    monkeypatch.setattr(timm_ls.streaming, 'CPU_PIECE_BYTES', size)


def outputs(model, x):
    features, levels = model.forward_intermediates(x)
    return [model.forward_head(features), features] + levels


@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_the_whole(monkeypatch, variant):
    """By pieces of any size, logits, class tokens and every level are those of the whole map."""
    rng = random.Random(variant)
    model = build(variant)
    for _ in range(6):
        x = torch.randn(rng.choice([1, 2, 5]), 3, rng.randint(32, 150), rng.randint(32, 150), dtype=torch.float64)
        with torch.no_grad():
            with attention_implementation('tiled'):
                expected = outputs(model, x)
            for size in (1, rng.randint(2000, 50000), 200000):
                pieces_of(monkeypatch, size)
                for actual, wanted in zip(outputs(model, x), expected, strict=True):
                    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize('variant', ['vil_ls_tiny', 'cvt_ls_13'])
def test_layers_see_pieces(monkeypatch, variant):
    """No layer sees or makes more of a map than a piece, rounded up to one row of windows; together they see it once.

    Of the MLP, that is its hidden layer, and a row of tokens.
    """
    model = build(variant)
    pieces_of(monkeypatch, 12000)
    block = model.stages[0].blocks[0]
    projected, seen = [], []
    for layer, shapes in ((block.attn.proj, projected), (block.mlp, seen)):
        def forward(x, forward=layer.forward, shapes=shapes):
            shapes.append(tuple(x.shape))
            return forward(x)
        monkeypatch.setattr(layer, 'forward', forward)
    with torch.no_grad():
        model(torch.randn(2, 3, 160, 60, dtype=torch.float64))
    for shapes, channels, step in ((projected, 12, 3), (seen, block.mlp.fc1.out_features, 1)):
        maps = [shape for shape in shapes if len(shape) == 4]
        most = max(1, 12000 // (15 * channels * 8) // step) * step
        assert all(shape[0] == 1 and shape[1] <= most and shape[2:] == (15, 12) for shape in maps)
        assert sum(shape[1] for shape in maps) == 2 * 40
    assert [shape for shape in seen if len(shape) == 3] == [(2, 1, 12)]  # global tokens


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_attention_goes_by_pieces(monkeypatch, variant):
    """But for full attention with projections by convolutions, which only plain CvT has."""
    pieces_of(monkeypatch, 1)
    with torch.no_grad():
        for stage in build(variant).stages:
            for block in stage.blocks:
                x = torch.randn(1, 6, 6, len(block.norm1.weight), dtype=torch.float64)
                assert block.goes_by_pieces(x) == (not isinstance(block.attn, ConvGlobalAttention2d))


def test_who_sees_the_whole(monkeypatch):
    """Pieces are for inference: not where gradients are needed, a layer is hooked, or an implementation is forced."""
    pieces_of(monkeypatch, 1)
    model = build('vil_ls_tiny')
    block, x = model.stages[0].blocks[0], torch.randn(1, 6, 6, 12, dtype=torch.float64)
    assert not block.goes_by_pieces(x)  # grad mode
    with torch.no_grad():
        assert block.goes_by_pieces(x)
        with attention_implementation('tiled'):
            assert not block.goes_by_pieces(x)
        block.train()
        assert not block.goes_by_pieces(x)
        block.eval()
        block.attn.fused_attn = False
        assert not block.goes_by_pieces(x)
        block.attn.fused_attn = True
        handle = block.register_forward_hook(lambda *a: None)  # of the block itself: sees the whole anyway
        assert block.goes_by_pieces(x)
        handle.remove()
        for layer in (block.attn, block.attn.qkv, block.mlp.fc1):
            for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
                shapes = []
                handle = register(lambda module, args, out=None, to=shapes: to.append(args[0].shape))
                assert not may_go_by_pieces(block, x)
                block(x, torch.zeros(1, 1, 12, dtype=torch.float64))
                assert x.shape[:3] in [shape[:3] for shape in shapes]
                handle.remove()
        assert block.goes_by_pieces(x)


def test_small_maps_stay_whole():
    """What fits into a piece is not cut."""
    block = build('vil_ls_tiny', torch.float32).stages[0].blocks[0]
    with torch.no_grad():
        limit = timm_ls.streaming.CPU_PIECE_BYTES // 4 // 12
        assert not block.goes_by_pieces(torch.empty(1, 1, limit, 12))
        assert block.goes_by_pieces(torch.empty(1, 1, limit + 1, 12))


def test_cuts(monkeypatch):
    """Groups and runs of rows cover everything once, keep windows whole, and hold no more than a piece."""
    rng = random.Random(0)
    for _ in range(300):
        B, H, W, C, step = (rng.randint(1, 40) for _ in range(5))
        x = torch.empty(B, H, W, C, device='meta')
        size = rng.choice([1, 1000, 30000, 10 ** 6])
        monkeypatch.setattr(timm_ls.streaming, 'PIECE_BYTES', size)
        groups, rows = image_groups(x), row_pieces(x[:1], step)
        for cuts, total in ((groups, B), (rows, H)):
            assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(total))
        assert all(cut.start % step == 0 for cut in rows)
        for cut in groups:
            assert cut.stop - cut.start == 1 or x[cut].numel() * 4 <= size
        assert groups[0].stop == -(-B // len(groups))  # not full ones and a small rest
        for cut in rows:
            assert cut.stop - cut.start <= step or (cut.stop - cut.start) * W * C * 4 <= size


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('variant', ['vil_ls_tiny', 'cvt_ls_13'])
def test_autocast(monkeypatch, variant, dtype):
    """Types come out as from the whole map, and values as near to float32."""
    model, x = build(variant, torch.float32), torch.randn(2, 3, 90, 60)
    attend_rows, types = timm_ls.attention.attend_rows, set()

    def recorded(q, kv, *args):
        types.add((q.dtype, kv.dtype))
        return attend_rows(q, kv, *args)

    monkeypatch.setattr(timm_ls.attention, 'attend_rows', recorded)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast('cpu', dtype):
            with attention_implementation('tiled'):
                whole = model(x)
            pieces_of(monkeypatch, 4000)
            pieces = model(x)
            stage, C = model.stages[0], model.feature_info[0]['num_chs']
            tokens = None if stage.global_tokens is None else torch.randn(1, stage.global_tokens.shape[1], C)
            stage.blocks[0](torch.randn(1, 20, 20, C), tokens)  # a map of float32, as norms give on other devices
    assert pieces.dtype == whole.dtype and types == {(dtype, dtype)}
    error = (whole.float() - exact).norm()
    assert 0 < (pieces.float() - exact).norm() < 2 * error


@pytest.mark.parametrize('variant', ['vil_ls_tiny', 'cvt_ls_13 full'])
def test_full_attention_by_rows(monkeypatch, variant):
    """Where a full-attention bias would not fit, it exists for some queries at a time: same values and gradients.

    The backward pass makes it anew.
    """
    kwargs = dict(rel_pos_bias=True) if variant.startswith('cvt') else {}
    model = build(variant, **kwargs)
    x = torch.randn(2, 3, 150, 220, dtype=torch.float64)
    original, queries = timm_ls.rel_pos.position_bias, []

    def recorded(table, query_size, key_size):
        if query_size != (3, 3):  # not of windows
            queries.append((query_size[0], key_size[0]))
        return original(table, query_size, key_size)

    monkeypatch.setattr(timm_ls.rel_pos, 'position_bias', recorded)
    attend_grid_rows, calls = timm_ls.attention.attend_grid_rows, []
    monkeypatch.setattr(
        timm_ls.attention, 'attend_grid_rows',
        lambda *args: calls.append(args[7] == args[5][0]) or attend_grid_rows(*args))  # all rows at once?

    def run():
        model.zero_grad()
        queries.clear()
        calls.clear()
        logits = model(x)
        logits.square().sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, expected_grads = run()
    assert queries and all(rows == height for rows, height in queries)
    for size in (1, 40000):
        for module in model.modules():
            if isinstance(module, timm_ls.GlobalAttention2d):
                module.bias_bytes = size
        actual, grads = run()
        assert any(rows < height for rows, height in queries)
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
