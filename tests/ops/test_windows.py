"""Index arithmetic of windows: every query once, with the keys of its halo that there are, whatever the sizes."""
import itertools
import math
import random

import pytest
import torch
from reference import window_keys

from timm_ls.ops.indices import on_device
from timm_ls.ops.windows import axis_spans, head_plan, key_index, query_index, tile_plan, tiles, token_index

CPU = torch.device('cpu')


def test_axis_spans():
    """Spans hold each window's queries and valid keys once, in order, and are few however long the axis."""
    for window, joined in itertools.product(range(1, 10), (1, 2, 3)):
        step = joined * window
        for size in range(1, 60):
            spans = axis_spans(size, window, joined)
            assert len(spans) <= 4
            queries = []
            for span in spans:
                for n in range(span.count):
                    start = span.query_start + n * step
                    queries += range(start, start + span.query_size)
                    keys = range(span.key_start + n * step, span.key_start + n * step + span.key_size)
                    valid = [k for k in range(start - window // 2, start + step + window // 2) if 0 <= k < size]
                    assert list(keys) == valid
                    assert keys[0] - (start - window // 2) == span.halo_offset
            assert queries == list(range(size))


def random_tiles(seed):
    """Sizes of maps, a run of their rows, and its tiles of at most so many windows."""
    rng = random.Random(seed)
    batch, height, width, window = rng.randint(1, 4), rng.randint(1, 30), rng.randint(1, 30), rng.randint(1, 7)
    joined = 1 + seed % 3 % 2  # windows along each axis that count as one
    first = rng.randrange(0, height, joined * window)
    rows = min(height - first, joined * window * rng.randint(1, 9))
    most = rng.choice([1, 2, 5, 17, 1000])
    return batch, height, width, window, first, rows, most, list(
        tiles(batch, height, width, window, first, rows, most, joined))


def test_tiles():
    """Together they hold each query of the rows once, and none is larger than asked for, but for a single window."""
    for seed in range(200):
        batch, height, width, window, first, rows, most, cut = random_tiles(seed)
        seen = torch.zeros(batch, height, width)
        for tile in cut:
            seen[tile.queries] += 1
            images, row_spans, col_spans, _ = tile
            windows = sum(span.count for span in row_spans) * sum(span.count for span in col_spans)
            assert windows * (images.stop - images.start) <= most
        assert (seen[:, first:first + rows] == 1).all() and seen.sum() == batch * rows * width


def test_plans():
    """What a tile gathers is what its queries see, biases included; what each head sums is where it was gathered from.

    One group for each part of the halo, or for each shape. Written out in numbers: of every token of the map its own,
    of every entry of the bias its own.
    """
    for seed in range(60):
        batch, height, width, window, first, rows, _, cut = random_tiles(seed)
        joined, halo, E, heads = cut[0].joined, window // 2, seed % 4, 1 + seed % 2
        step = joined * window
        side = step + 2 * halo
        numbers = torch.arange(batch * height * width).view(batch, height, width)
        for tile in random.Random(seed).sample(cut, min(3, len(cut))):
            join_shapes = seed % 4 == 0
            plan = on_device(tile_plan, CPU, *tile.geometry, window, E, join_shapes, joined)
            images = range(batch)[tile.images]
            additional = -1 - torch.arange(batch * E).view(batch, E)[tile.images]
            tokens = torch.cat([numbers[tile.keys].flatten(), additional.flatten()])
            queries, keys = numbers[tile.queries].flatten()[plan.queries], tokens[plan.keys]
            assert torch.equal(numbers[tile.queries].flatten(), queries[plan.outputs])
            query = key = entry = 0
            for n, L, S, num_biases in plan.groups:
                assert num_biases == 1 or join_shapes
                for w in range(n):
                    its_queries = queries[query + w * L:query + (w + 1) * L].tolist()
                    its_keys = keys[key + w * S:key + (w + 1) * S].tolist()
                    for i, number in enumerate(its_queries):
                        image, (y, x) = number // (height * width), divmod(number % (height * width), width)
                        top, left = y // step * step - halo, x // step * step - halo
                        seen = [(a, b) for a in range(top, top + side) for b in range(left, left + side)
                                if 0 <= a < height and 0 <= b < width]
                        assert joined > 1 or seen == window_keys(y, x, height, width, window)
                        wanted = [-1 - (image * E + e) for e in range(E)]
                        assert its_keys == wanted + [(image * height + a) * width + b for a, b in seen]
                        assert image in images
                        row = (y % step * step + x % step) * side
                        bias = [(row + a - top) * side + b - left for a, b in seen]
                        start = entry + (w * L if num_biases > 1 else 0) * S + i * S
                        assert plan.bias[start:start + S].tolist() == (
                            [step ** 2 * side ** 2] * E + bias)
                query, key, entry = query + n * L, key + n * S, entry + num_biases * L * S
            assert (query, key, entry) == (len(plan.queries), len(plan.keys), len(plan.bias))
            assert not join_shapes or len({group[1:3] for group in plan.groups}) == len(plan.groups)
            check_head_plan(tile, plan, len(tokens), window, E, heads, join_shapes)


def check_head_plan(tile, plan, num_tokens, window, E, heads, join_shapes):
    """Rows of single heads in the order of the tile's plan; bags hold each of them once, with its token's others."""
    rows = on_device(head_plan, CPU, *tile.geometry, window, E, heads, join_shapes, tile.joined)
    query = key = 0
    halves = rows.keys.view(2, -1)
    for n, L, S, _ in plan.groups:
        for w, h in itertools.product(range(n), range(heads)):
            at = w * heads + h
            its = rows.queries[query * heads + at * L:query * heads + (at + 1) * L]
            assert torch.equal(its, plan.queries[query + w * L:query + (w + 1) * L] * heads + h)
            its = halves[:, key * heads + at * S:key * heads + (at + 1) * S]
            wanted = plan.keys[key + w * S:key + (w + 1) * S] * 2 * heads + h
            assert torch.equal(its, torch.stack([wanted, wanted + heads]))
        query, key = query + n * L, key + n * S
    assert torch.equal(rows.queries[rows.outputs], torch.arange(len(rows.queries)))
    assert len(rows.offsets) == num_tokens * 2 * heads
    assert torch.equal(rows.bags.sort()[0], torch.arange(len(rows.keys)))
    ends = [*rows.offsets.tolist()[1:], len(rows.keys)]
    for token, (start, stop) in enumerate(zip(rows.offsets.tolist(), ends)):
        assert (rows.keys[rows.bags[start:stop]] == token).all()


@pytest.mark.parametrize('window_size', range(1, 9))
def test_every_query_has_a_key(window_size):
    """No window of any map is without a key; what stands for no key lies in the same halo; tokens have one place."""
    for height in range(1, 41):
        for width in range(1, 41):
            side = window_size + 2 * (window_size // 2)
            index, valid = key_index(1, height, width, window_size, 0, 0, height, CPU)
            windows = math.ceil(height / window_size) * math.ceil(width / window_size)
            index, valid = index.view(windows, side * side), valid.view(windows, side * side)
            assert valid.any(1).all(), (height, width)
            assert index.min() >= 0 and index.max() < height * width
            if not {height, width} <= {1, 2, window_size, 23, 40}:
                continue
            for its_index, its_valid in zip(index, valid):
                assert its_valid.sum() == len(set(its_index[its_valid].tolist()))
                assert set(its_index.tolist()) == set(its_index[its_valid].tolist()), (height, width)
            queries = query_index(1, height, width, window_size, CPU)
            place = token_index(1, height, width, window_size, CPU)
            assert torch.equal(queries[place], torch.arange(height * width)), (height, width)


def test_key_index():
    """Positions of the additional keys, then of the halo in the map, of some rows of windows in each image."""
    for batch, height, width, window, E, first, rows in (
            (2, 5, 7, 3, 2, 0, 5), (3, 8, 4, 3, 1, 3, 5), (1, 9, 9, 4, 0, 4, 4), (2, 3, 3, 7, 3, 0, 3)):
        index, valid = key_index(batch, height, width, window, E, first, rows, CPU)
        halo = window // 2
        side = window + 2 * halo
        index, valid = (x.view(batch, math.ceil(rows / window), math.ceil(width / window), E + side * side)
                        for x in (index, valid))
        for b, i, j in itertools.product(*map(range, index.shape[:3])):
            top, left = first + i * window, j * window
            wanted = [batch * height * width + b * E + e for e in range(E)]
            wanted += [(b * height + y) * width + x for y, x in window_keys(top, left, height, width, window)]
            assert index[b, i, j][valid[b, i, j]].tolist() == wanted
