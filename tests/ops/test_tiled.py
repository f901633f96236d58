"""Tiles: how work is cut changes nothing, sums over tiles are exact, the operator of compiled graphs is sound."""
import pytest
import torch

from timm_ls import attention_implementation
from timm_ls.ops import chunks, tiled
from timm_ls.ops.window_attention import window_attention


def draw(dtype=torch.float64, requires_grad=True):
    """Arguments for windows of 3 on maps of 13 x 22, two heads, five additional keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 13, 22, 8), (3, 13, 22, 2, 8), (3, 5, 2, 8), (2, 3, 3, 5, 5)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def run(tensors):
    with attention_implementation('tiled'):
        out = window_attention(*tensors, window_size=3, num_heads=2)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), tensors)]


@pytest.mark.parametrize('tile_bytes', [1, 2000, 50000, 10 ** 9])
def test_tile_size_changes_nothing(monkeypatch, tile_bytes):
    """Cutting the work differently gives the same values and gradients, and gathers no more than it was allowed."""
    expected = run(draw())
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', tile_bytes // 2)
    gathered, attend_tile = [], tiled.attend_tile

    def recorded(q, *args):
        gathered.append(q[..., 0].numel())
        return attend_tile(q, *args)

    monkeypatch.setattr(tiled, 'attend_tile', recorded)
    for actual, wanted in zip(run(draw()), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
    window_bytes = (5 + 5 * 5) * 2 * 8 * 8  # keys and values of one window
    most = max(1, tile_bytes // 2 * 2 // window_bytes) * 9  # queries
    assert sum(gathered) == 3 * 13 * 22 and max(gathered) <= most
    assert len(gathered) >= 3 * 40 * window_bytes / max(tile_bytes, window_bytes)


@pytest.mark.parametrize('with_bias', [False, True])
@pytest.mark.parametrize(
    'first_row, rows, joined', [(0, 9, 2), (0, 4, 2), (4, 5, 2), (8, 1, 2), (0, 6, 1), (2, 7, 1)])
def test_small_windows_are_joined(monkeypatch, first_row, rows, joined, with_bias):
    """Windows of 2, two by two where the rows are theirs alone, give the values and gradients of plain operations."""
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 5000)
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, rows, 11, 8), (2, 9, 11, 2, 8), (2, 3, 2, 8), (2, 2, 2, 4, 4)][:4 if with_bias else 3]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert tiled.joined_windows(tensors[0], tensors[1], 2, first_row) == joined
    results = []
    for implementation in ('tiled', 'masked'):
        with attention_implementation(implementation):
            out = window_attention(*tensors, *[None] * (not with_bias), 2, 2, first_row)
        results.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_nan_stays_in_joined_windows():
    """A key that is not a number spoils the joined windows in whose halo it lies, and no other."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 9, 12, 8), (1, 9, 12, 2, 8), (1, 3, 2, 8)
    q, kv, additional = (torch.randn(shape, generator=generator) for shape in shapes)
    kv[0, 3, 6] = float('nan')
    with attention_implementation('tiled'), torch.no_grad():
        out = window_attention(q, kv, additional, None, 2, 2)
    spoiled = torch.zeros(9, 12, dtype=torch.bool)
    spoiled[0:8, 4:8] = True  # row 3 is the edge of windows 0 to 3 and in the halo of 4 to 7; column 6 lies in 4 to 7
    assert torch.equal(out[0].isnan().all(-1), spoiled) and torch.equal(out[0].isnan().any(-1), spoiled)


def test_gradients_of_many_tiles(monkeypatch):
    """Sums over all windows are as exact as one tile's: those of additional keys and of the bias."""
    torch.manual_seed(0)
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 1)  # a tile for each window
    shapes = (1, 60, 60, 8), (1, 60, 60, 2, 8), (1, 2, 2, 8), (2, 3, 3, 5, 5)
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        with attention_implementation('tiled'):
            out = window_attention(*inputs, window_size=3, num_heads=2)
        grads.append(torch.autograd.grad(out, inputs[2:], torch.ones_like(out)))
    for exact, half in zip(*grads, strict=True):
        assert (half.float() - exact).norm() < .02 * exact.norm()


@pytest.mark.parametrize('with_bias', [False, True])
@pytest.mark.parametrize('dtype, num_additional, first_row', [(torch.float32, 3, 0), (torch.bfloat16, 0, 3)])
def test_operator(with_bias, dtype, num_additional, first_row):
    """The operator of compiled graphs: what torch asks of one (aliases, types, layouts, varying sizes) and values."""
    shapes = (5 - first_row, 9), (5, 9, 2), (num_additional, 2)
    q, kv, additional = (torch.randn(2, *shape, 8, dtype=dtype) for shape in shapes)
    inputs = [q.transpose(1, 2).contiguous().transpose(1, 2), kv, additional]
    inputs += [torch.randn(2, 3, 3, 5, 5, dtype=dtype)] if with_bias else []
    inputs = [t.requires_grad_() for t in inputs]
    args = (*inputs, *[None] * (not with_bias), 3, 2, first_row)
    torch.library.opcheck(tiled.tiled_operator, args)
    plain = [None if t is None else t.detach() for t in args[:4]]
    torch.library.opcheck(tiled.tiled_operator_backward, (plain[0].cos(), *plain, 3, 2, first_row))
    with attention_implementation('tiled'):
        expected = window_attention(*args)
    out = tiled.tiled_operator(*args)
    assert torch.equal(out, expected)
    for grad, wanted in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (out, expected)), strict=True):
        assert torch.equal(grad, wanted)


def test_frozen_inputs():
    """Gradients are for those who ask: any of the inputs alone has the one that it has among all."""
    tensors = draw()
    expected = run(tensors)[1:]
    for i, wanted in enumerate(expected):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        with attention_implementation('tiled'):
            out = window_attention(*some, window_size=3, num_heads=2)
        assert torch.equal(torch.autograd.grad(out.sin().sum(), some[i])[0], wanted)
