"""Index arithmetic for attention windows and their halos: pure functions of sizes.

A map of `H x W` tokens is cut into windows of `w x w` queries. The keys of a window are its halo, the
`(w + 2p) x (w + 2p)` square around it with `p = w // 2`, as far as it lies inside the map. Windows are
counted so that they cover the map (`ceil(H / w)` rows of them); the last ones may be ragged.
"""
from functools import lru_cache
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch

from .capture import ceil_div

__all__ = [
    'AxisSpan',
    'Group',
    'GroupPlan',
    'HeadPlan',
    'Tile',
    'TilePlan',
    'axis_spans',
    'group_plans',
    'halo_width',
    'head_plan',
    'key_index',
    'query_index',
    'tile_plan',
    'tiles',
    'token_index',
]


def halo_width(window_size: int) -> int:
    """Return the rows and columns of keys that a window sees beyond its own edge: `p = w // 2`."""
    return window_size // 2


# Tiles: rectangles of windows, whose windows are grouped so that every gathered key is valid. Sizes are numbers.


class AxisSpan(NamedTuple):
    """A run of neighboring windows, along one axis, that all see the same part of their halo."""

    count: int  # type: ignore[assignment]  # windows in the run; hides tuple.count
    query_start: int  # first query of the first window
    query_size: int  # queries per window: `w`, or what is left for the ragged last one
    key_start: int  # first key of the first window
    key_size: int  # keys per window
    halo_offset: int  # where those keys start within the full halo of `w + 2p`

    def windows(self, first: int, count: int) -> 'AxisSpan':
        """Return the span of `count` of its windows, from the given one on."""
        shift = first * self.query_size
        return self._replace(count=count, query_start=self.query_start + shift, key_start=self.key_start + shift)


Spans = Tuple[AxisSpan, ...]  # of neighboring windows along an axis, in order


@lru_cache(maxsize=1024)
def axis_spans(size: int, window_size: int, joined: int = 1) -> Spans:
    """Group the windows along an axis of `size` tokens by the part of the halo that lies inside the map.

    The windows in the middle share one span, so that there are at most four spans however long the axis: the
    first window, the inner ones, and up to two at the end. Within a span every key is valid: no masks.

    With `joined`, so many neighboring windows count as one, whose halo is theirs together.
    """
    p, step = halo_width(window_size), joined * window_size
    spans: List[AxisSpan] = []
    for start in range(0, size, step):
        key_start, key_stop = max(0, start - p), min(size, start + step + p)
        span = AxisSpan(
            count=1,
            query_start=start,
            query_size=min(step, size - start),
            key_start=key_start,
            key_size=key_stop - key_start,
            halo_offset=key_start - (start - p),
        )
        last = spans[-1] if spans else None
        if last is not None and (last.query_size, last.key_size, last.halo_offset) == (
                span.query_size, span.key_size, span.halo_offset):
            spans[-1] = last._replace(count=last.count + 1)
        else:
            spans.append(span)
    return tuple(spans)


def _cut(spans: Spans, first: int, count: int) -> Spans:
    """Return the spans of `count` of the windows, from the given one on."""
    cut = []
    for span in spans:
        start, stop = max(0, first), min(span.count, first + count)
        if start < stop:
            cut.append(span.windows(start, stop - start))
        first -= span.count
    return tuple(cut)


def _queries(spans: Spans) -> slice:
    """Return the tokens that are queries of some windows."""
    start, last = spans[0].query_start, spans[-1]
    return slice(start, last.query_start + last.count * last.query_size)


def _keys(spans: Spans) -> slice:
    """Return the tokens that are keys of some windows."""
    start, last = spans[0].key_start, spans[-1]
    return slice(start, last.key_start + (last.count - 1) * last.query_size + last.key_size)


def _shifted(spans: Spans) -> Spans:
    """Return the spans with queries and keys counted from the first one."""
    query_start, key_start = spans[0].query_start, spans[0].key_start
    return tuple(
        span._replace(query_start=span.query_start - query_start, key_start=span.key_start - key_start)
        for span in spans)


class Tile(NamedTuple):
    """A rectangle of windows of some images: what is gathered and attended at a time."""

    images: slice
    row_spans: Spans
    col_spans: Spans
    joined: int = 1  # windows along each axis that count as one

    @property
    def queries(self) -> Tuple[slice, slice, slice]:
        """Images, rows and columns of its queries in maps [B, H, W, ...]."""
        return self.images, _queries(self.row_spans), _queries(self.col_spans)

    @property
    def keys(self) -> Tuple[slice, slice, slice]:
        """Images, rows and columns of the rectangle that holds all its keys."""
        return self.images, _keys(self.row_spans), _keys(self.col_spans)

    @property
    def geometry(self) -> Tuple[int, Spans, Spans]:
        """What its plan depends on: equal for tiles that differ in their place only."""
        return self.images.stop - self.images.start, _shifted(self.row_spans), _shifted(self.col_spans)


def tiles(
        batch: int,
        height: int,
        width: int,
        window_size: int,
        first_row: int,
        num_rows: int,
        windows_per_tile: int,
        joined: int = 1,
) -> Iterator[Tile]:
    """Cut the windows of some rows of maps into tiles of at most so many windows, about equal in size.

    Args:
        batch: Maps.
        height: Rows of a map.
        width: Columns of a map.
        window_size: Rows or columns of a window.
        first_row: First row of the queries, a multiple of `window_size`.
        num_rows: Rows of queries; whole windows, or up to the end of the map.
        windows_per_tile: At least 1. Whole images, else whole rows of windows, else parts of a row.
        joined: Windows along each axis that count as one here, in all of the above.
    """
    step = joined * window_size
    rows, cols = ceil_div(num_rows, step), ceil_div(width, step)
    row_spans = _cut(axis_spans(height, window_size, joined), first_row // step, rows)
    col_spans = axis_spans(width, window_size, joined)
    images_at_once = _equal(batch, windows_per_tile // (rows * cols))
    rows_at_once = _equal(rows, windows_per_tile // cols)
    cols_at_once = _equal(cols, windows_per_tile)
    for image in range(0, batch, images_at_once):
        images = slice(image, min(batch, image + images_at_once))
        for row in range(0, rows, rows_at_once):
            for col in range(0, cols, cols_at_once):
                yield Tile(images, _cut(row_spans, row, rows_at_once), _cut(col_spans, col, cols_at_once), joined)


def _equal(total: int, most: int) -> int:
    """Return the size, at most `most` but at least 1, of parts of `total` that are as equal as can be."""
    return ceil_div(total, ceil_div(total, max(1, most))) if total > 0 else 1


class Group(NamedTuple):
    """Windows that are attended by one call."""

    windows: int  # n
    queries: int  # L, of a window
    keys: int  # S, of a window, the additional ones included
    biases: int  # 1 if all windows have the same, else n


class TilePlan(NamedTuple):
    """Where the queries, keys and biases of a tile lie, one group after another."""

    groups: Tuple[Group, ...]
    queries: np.ndarray  # [sum n L]: in the flattened queries of the tile
    outputs: np.ndarray  # its inverse
    keys: np.ndarray  # [sum n S]: in the flattened keys of the tile, followed by the additional ones
    bias: np.ndarray  # [sum biases L S]: in a flattened bias [w, w, w + 2p, w + 2p], or at its end for additional keys


@lru_cache(maxsize=64)
def tile_plan(
        images: int,
        row_spans: Spans,
        col_spans: Spans,
        window_size: int,
        num_additional: int,
        join_shapes: bool = False,
        joined: int = 1,
) -> TilePlan:
    """Make the indices of a tile of such a geometry. Each window sees its image's additional keys first.

    Args:
        images: Images of the tile.
        row_spans: Its windows along the rows, counted from its own first query and key.
        col_spans: Likewise along the columns.
        window_size: Rows or columns of a window.
        num_additional: Additional keys of an image.
        join_shapes: Make one group of all windows of the same shape, though their biases differ: fewer calls. Else a
            group is windows with the same part of the halo.
        joined: Windows along each axis that count as one.
    """
    step = joined * window_size
    halo = step + 2 * halo_width(window_size)
    height, width = _keys(row_spans).stop, _keys(col_spans).stop
    query_height, query_width = _queries(row_spans).stop, _queries(col_spans).stop
    image = np.arange(images)[:, None, None, None, None]
    additional = images * height * width + image[..., 0] * num_additional + np.arange(num_additional)
    parts: Dict[Any, List[Tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}  # queries [n, L], keys [n, S], biases [L, S]
    for row in row_spans:
        for col in col_spans:
            # [images, rows of windows, columns of windows, rows, columns]
            y = row.query_start + _overlapping(row.count, row.query_size, row.query_size)[:, None, :, None]
            x = col.query_start + _overlapping(col.count, col.query_size, col.query_size)[:, None, :]
            query = (image * query_height + y) * query_width + x
            y = row.key_start + _overlapping(row.count, row.query_size, row.key_size)[:, None, :, None]
            x = col.key_start + _overlapping(col.count, col.query_size, col.key_size)[:, None, :]
            key = (image * height + y) * width + x
            n, L, K = images * row.count * col.count, row.query_size * col.query_size, row.key_size * col.key_size
            key = np.concatenate([
                np.broadcast_to(additional, key.shape[:3] + (num_additional,)).reshape(n, num_additional),
                key.reshape(n, K)], axis=1)

            place = (row.halo_offset + np.arange(row.key_size)[:, None]) * halo
            place = (place + col.halo_offset + np.arange(col.key_size)).reshape(-1)  # in the halo
            query_place = (np.arange(row.query_size)[:, None] * step + np.arange(col.query_size)).reshape(-1, 1)
            bias = np.pad(
                query_place * halo ** 2 + place, ((0, 0), (num_additional, 0)),
                constant_values=step ** 2 * halo ** 2)
            shape = (L, K) if join_shapes else (row, col)
            parts.setdefault(shape, []).append((query.reshape(n, L), key, bias))

    groups, queries, keys, biases = [], [], [], []
    for same in parts.values():
        query, key = (np.concatenate([part[i] for part in same]) for i in range(2))
        bias = same[0][2] if len(same) == 1 else np.concatenate([
            np.broadcast_to(part[2], (len(part[0]), *part[2].shape)) for part in same])
        groups.append(Group(len(query), query.shape[1], key.shape[1], 1 if len(same) == 1 else len(query)))
        queries.append(query.reshape(-1))
        keys.append(key.reshape(-1))
        biases.append(bias.reshape(-1))
    order = np.concatenate(queries)
    return TilePlan(tuple(groups), order, _inverse(order), np.concatenate(keys), np.concatenate(biases))


def _overlapping(count: int, step: int, size: int) -> np.ndarray:
    """Return the positions of `count` runs of `size`, each `step` after the one before, [count, size]."""
    return np.arange(count)[:, None] * step + np.arange(size)


def _inverse(order: np.ndarray) -> np.ndarray:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


class HeadPlan(NamedTuple):
    """A tile's plan for products over heads, a row for each head's channels of a token, and sums over windows.

    Each group of the tile's plan is [n, heads, L] queries and [n, heads, S] keys, one after another.
    """

    queries: np.ndarray  # [sum n heads L]: in the flattened queries [..., heads] of the tile
    outputs: np.ndarray  # its inverse
    keys: np.ndarray  # [2 sum n heads S]: all keys, then all values, in the flattened tokens [..., 2, heads]
    bags: np.ndarray  # [2 sum n heads S]: for each of these tokens in turn, who gathered it
    offsets: np.ndarray  # [tokens 2 heads]: where each token's part of `bags` starts


@lru_cache(maxsize=64)
def head_plan(
        images: int,
        row_spans: Spans,
        col_spans: Spans,
        window_size: int,
        num_additional: int,
        num_heads: int,
        join_shapes: bool = False,
        joined: int = 1,
) -> HeadPlan:
    """Make the indices of `tile_plan` for rows of one head's channels."""
    plan = tile_plan(images, row_spans, col_spans, window_size, num_additional, join_shapes, joined)
    num_tokens = images * (_keys(row_spans).stop * _keys(col_spans).stop + num_additional)
    heads = np.arange(num_heads)[:, None]
    queries, keys, query, key = [], [], 0, 0
    for n, L, S, _ in plan.groups:
        queries.append(plan.queries[query:query + n * L].reshape(n, 1, L) * num_heads + heads)
        keys.append(plan.keys[key:key + n * S].reshape(n, 1, S) * (2 * num_heads) + heads)
        query, key = query + n * L, key + n * S
    order = np.concatenate([part.reshape(-1) for part in queries])
    source = np.concatenate([part.reshape(-1) for part in keys])
    source = np.concatenate([source, source + num_heads])  # values lie behind keys
    counts = np.bincount(source, minlength=num_tokens * 2 * num_heads)
    return HeadPlan(order, _inverse(order), source, np.argsort(source, kind='stable'), np.cumsum(counts) - counts)


class GroupPlan(NamedTuple):
    """A group of a tile's windows with indices of its own: in graphs these are constants, a part of one is not."""

    windows: int  # n
    num_queries: int  # L, of a window
    num_keys: int  # S, of a window, the additional ones included
    num_biases: int  # 1 if all windows have the same, else n
    queries: np.ndarray  # [n L]: in the flattened queries of the tile
    keys: np.ndarray  # [n heads S]: in the flattened tokens [..., 2, heads]
    values: np.ndarray  # [n S]: in the flattened tokens [..., 2]
    bias: np.ndarray  # [biases L S]: as in `TilePlan`


@lru_cache(maxsize=64)
def group_plans(
        images: int,
        row_spans: Spans,
        col_spans: Spans,
        window_size: int,
        num_additional: int,
        num_heads: int,
) -> Tuple[GroupPlan, ...]:
    """Make the indices of each group of `tile_plan` with joined shapes."""
    plan = tile_plan(images, row_spans, col_spans, window_size, num_additional, True)
    by_head = head_plan(images, row_spans, col_spans, window_size, num_additional, num_heads, True)
    plans, query, key, entry = [], 0, 0, 0
    for n, L, S, num_biases in plan.groups:
        keys = slice(key, key + n * S)
        plans.append(GroupPlan(
            n, L, S, num_biases,
            plan.queries[query:query + n * L].copy(),  # torch saves no constants that share memory
            by_head.keys[keys.start * num_heads:keys.stop * num_heads].copy(),
            2 * plan.keys[keys] + 1,
            plan.bias[entry:entry + num_biases * L * S].copy()))
        query, key, entry = query + n * L, keys.stop, entry + num_biases * L * S
    return tuple(plans)


# Flat ranges, for graphs: no dimension is a count of windows, rows or columns alone. Those may be one, which a graph of
# dynamic size has to treat like any other number.


def query_index(batch: int, height: int, width: int, window_size: int, device: torch.device) -> torch.Tensor:
    """Return where the queries of each window lie in a flattened batch of maps, [windows * w * w].

    Windows come in the order of (image, row, column). Queries outside the map are the nearest ones inside.
    """
    rows, cols, side = ceil_div(height, window_size), ceil_div(width, window_size), window_size
    position = torch.arange(batch * rows * cols * side * side, device=device)
    window = position // (side * side)
    line = window // cols  # of windows, through all maps
    image = line // rows
    y = ((line - image * rows) * side + position // side % side).clamp(max=height - 1)
    x = ((window - line * cols) * side + position % side).clamp(max=width - 1)
    return (image * height + y) * width + x


def key_index(
        batch: int,
        height: int,
        width: int,
        window_size: int,
        num_additional: int,
        first_row: int,
        num_rows: int,
        device: torch.device,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return where the keys of each window lie, and which of them the window attends to.

    Args:
        batch: Maps.
        height: Rows of a map.
        width: Columns of a map.
        window_size: Rows or columns of a window, without its halo.
        num_additional: Additional keys of an image, which come first in each of its windows.
        first_row: First row of the windows.
        num_rows: Rows of queries, whose windows these are.
        device: Where to build the result.

    Returns:
        Positions in the flattened batch of maps followed by all additional keys, [windows * (E + (w + 2p) ** 2)], and
        whether there is such a key. Those outside the map are the nearest ones inside, which lie in the same halo:
        what is gathered there is as finite as what is attended.
    """
    p = halo_width(window_size)
    rows, cols, side = ceil_div(num_rows, window_size), ceil_div(width, window_size), window_size + 2 * p
    size = num_additional + side * side
    position = torch.arange(batch * rows * cols * size, device=device)
    window = position // size
    place = position - window * size - num_additional  # in the halo; negative for additional keys
    line = window // cols  # of windows, through all maps
    image = line // rows
    y = first_row + (line - image * rows) * window_size + place // side - p
    x = (window - line * cols) * window_size + place % side - p
    is_additional = place < 0
    valid = is_additional | ((y >= 0) & (y < height) & (x >= 0) & (x < width))
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    additional = batch * height * width + (image + 1) * num_additional + place
    return torch.where(is_additional, additional, (image * height + y) * width + x), valid


def token_index(batch: int, height: int, width: int, window_size: int, device: torch.device) -> torch.Tensor:
    """Return where each token of a batch of maps lies in its windows, [batch * H * W]: the inverse of `query_index`."""
    rows, cols = ceil_div(height, window_size), ceil_div(width, window_size)
    position = torch.arange(batch * height * width, device=device)
    line = position // width  # of tokens, through all maps
    image = line // height
    y, x = line - image * height, position - line * width
    window = (image * rows + y // window_size) * cols + x // window_size
    return (window * window_size + y % window_size) * window_size + x % window_size
