"""Tables of relative position bias: released ones expanded, resizing, look-up."""
import pytest
import reference
import torch

from timm_ls.attention import rel_pos
from timm_ls.attention.rel_pos import (
    RelPosBias2d,
    expand_aliased_table,
    fit_bias_table,
    position_bias,
    resize_bias_table,
)


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


def test_table_is_replaced_only_for_another_size():
    """An optimizer holds the parameter: a table that fits stays the same object, a frozen one stays frozen."""
    bias = RelPosBias2d(2, (5, 7))
    table = bias.table.requires_grad_(False)
    bias.set_table_size((5, 7))
    assert bias.table is table
    bias.set_table_size((9, 7))
    assert bias.table.shape == (2, 9, 7) and not bias.table.requires_grad
    assert torch.equal(bias.table, resize_bias_table(table, (9, 7)))


def test_table_that_fits_is_not_copied():
    """At its own grid the parameter itself is used; at another, a resized one that hands its gradient back."""
    table = torch.randn(2, 5, 7, requires_grad=True)
    assert fit_bias_table(table, (3, 4)) is table
    resized = fit_bias_table(table, (5, 3))
    assert torch.equal(resized, resize_bias_table(table, (9, 5)))
    resized.sum().backward()
    assert table.grad.sum().item() == pytest.approx(2 * 9 * 5, rel=1e-5)


@pytest.mark.parametrize('key_stride', [1, 2, 3])
@pytest.mark.parametrize('by_axis', [False, True])
def test_position_bias(monkeypatch, by_axis, key_stride):
    """Query minus key, counted from the last key; by one index, or by one per axis where that would be large."""
    if by_axis:
        monkeypatch.setattr(rel_pos, 'MAX_INDEX', 0)
    for query, key in (((3, 3), (5, 5)), ((2, 5), (4, 3)), ((1, 1), (1, 1))):
        table = torch.randn(2, query[0] + key[0] - 1, query[1] + key[1] - 1, dtype=torch.float64, requires_grad=True)
        bias = position_bias(table, query, key, key_stride)
        grad = torch.zeros_like(table)
        rows, cols = range(0, key[0], key_stride), range(0, key[1], key_stride)
        assert bias.shape == (2, *query, len(rows), len(cols))
        for y in range(query[0]):
            for x in range(query[1]):
                for i, key_y in enumerate(rows):
                    for j, key_x in enumerate(cols):
                        offset = y - key_y + key[0] - 1, x - key_x + key[1] - 1
                        assert torch.equal(bias[:, y, x, i, j], table[:, offset[0], offset[1]])
                        grad[:, offset[0], offset[1]] += 1
        assert torch.equal(torch.autograd.grad(bias.sum(), table)[0], grad)
