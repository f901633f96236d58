"""Full attention layers against the oracle, on their own grid and on others, and their bias in row chunks."""
import itertools
import random

import pytest
import reference
import torch
from layers import draw_inputs, expect, run, worst

import timm_ls
from timm_ls import FullAttention2d
from timm_ls.attention.full import GridBias, grid_bias


@pytest.mark.parametrize('seed', range(24))
def test_full_attention_matches_oracle(seed):
    """Full attention, on its own grid and on others, whose bias table is then resized."""
    rng = random.Random(seed)
    num_heads, g = rng.choice([1, 2, 3]), rng.choice([0, 1, 3])
    size = rng.choice([1, 2, 4, 5]), rng.choice([1, 3, 4, 6])
    grid = size if seed % 3 == 0 else (rng.choice([1, 2, 3, 5]), rng.choice([2, 3, 4, 6]))
    layer = FullAttention2d(num_heads * 4, num_heads, grid, g, rel_pos_bias=seed % 4 != 1, dtype=torch.float64)
    x, tokens = draw_inputs(layer, seed, size, batch=2)
    expected, expected_grads = expect(
        layer, x, tokens, lambda p, a, t: reference.full_attention(p, a, t, num_heads))
    outputs, grads = run(layer, x, tokens)
    assert worst(outputs, expected) < 1e-10
    assert worst(grads, expected_grads) < 1e-10
    layer.fused_attn = False
    assert worst(run(layer, x, tokens)[0], expected) < 1e-10


def test_first_name():
    """`GlobalAttention2d` is the same class, under the name that it had."""
    assert timm_ls.GlobalAttention2d is FullAttention2d


@pytest.mark.parametrize('with_grad', [False, True])
def test_bias_of_rows(with_grad):
    """Every query of some rows finds the bias of its offset to every key, on maps of any size, keys at any stride.

    Global tokens are keys of all, and queries with the first row.
    """
    rng = random.Random(0)
    for _ in range(30):
        height, width, stride, g = rng.randint(1, 7), rng.randint(1, 7), rng.randint(1, 3), rng.randint(0, 2)
        first_row = rng.randrange(height)
        num_rows = rng.randint(1, height - first_row)
        table = torch.randn(2, 2 * height - 1, 2 * width - 1)
        global_patch, global_global = (torch.randn(2, 2, g), torch.randn(2, g, g)) if g > 0 else (None, None)
        with torch.set_grad_enabled(with_grad):
            bias = grid_bias(GridBias(table, global_patch, global_global), (height, width), first_row, num_rows, stride)
        keys = list(itertools.product(range(0, height, stride), range(0, width, stride)))
        queries = list(itertools.product(range(first_row, first_row + num_rows), range(width)))
        queries = [None] * (g if first_row == 0 else 0) + queries
        expected = torch.empty(1, 2, len(queries), g + len(keys))
        for (i, query), (j, key) in itertools.product(enumerate(queries), enumerate([None] * g + keys)):
            if query is None:
                expected[0, :, i, j] = global_global[:, i, j] if key is None else global_patch[0, :, i]
            elif key is None:
                expected[0, :, i, j] = global_patch[1, :, j]
            else:
                expected[0, :, i, j] = table[:, query[0] - key[0] + height - 1, query[1] - key[1] + width - 1]
        assert torch.equal(bias, expected)
