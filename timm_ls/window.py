"""Index arithmetic for attention windows and their halos: pure functions, no parameters.

A map of `H x W` tokens is cut into windows of `w x w` queries. The keys of a window are its halo, the
`(w + 2p) x (w + 2p)` square around it with `p = w // 2`, as far as it lies inside the map. Windows are
counted so that they cover the map (`ceil(H / w)` rows of them); the last ones may be ragged.
"""
from functools import lru_cache
from typing import List, NamedTuple, Tuple

import torch

from .tracing import ceil_div

__all__ = [
    'AxisSpan',
    'axis_spans',
    'halo_width',
    'token_index',
    'window_index',
    'window_view',
]


def halo_width(window_size: int) -> int:
    """Rows and columns of keys that a window sees beyond its own edge: `p = w // 2`."""
    return window_size // 2


class AxisSpan(NamedTuple):
    """A run of neighbouring windows, along one axis, that all see the same part of their halo."""

    count: int  # type: ignore[assignment]  # windows in the run; hides tuple.count
    query_start: int  # first query of the first window
    query_size: int  # queries per window: `w`, or what is left for the ragged last one
    key_start: int  # first key of the first window
    key_size: int  # keys per window
    halo_offset: int  # where those keys start within the full halo of `w + 2p`

    def windows(self, first: int, count: int, window_size: int) -> 'AxisSpan':
        """`count` of its windows, from the given one on."""
        skipped = first * window_size
        return self._replace(
            count=count, query_start=self.query_start + skipped, key_start=self.key_start + skipped)


@lru_cache(maxsize=1024)
def axis_spans(size: int, window_size: int) -> Tuple[AxisSpan, ...]:
    """Group the windows along an axis of `size` tokens by the part of the halo that lies inside the map.

    The windows in the middle share one span, so that there are at most four spans however long the axis: the
    first window, the inner ones, and up to two at the end. Within a span every key is valid: no masks.
    """
    p = halo_width(window_size)
    spans: List[AxisSpan] = []
    for start in range(0, size, window_size):
        key_start, key_stop = max(0, start - p), min(size, start + window_size + p)
        span = AxisSpan(
            count=1,
            query_start=start,
            query_size=min(window_size, size - start),
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


def window_view(
        x: torch.Tensor,
        images: slice,
        rows: Tuple[int, int, int],
        cols: Tuple[int, int, int],
        stride: int,
        num_heads: int,
) -> torch.Tensor:
    """View equally sized, equally spaced (possibly overlapping) windows of maps, by head, without a copy.

    One operation: a chain of slices and permutations would take longer than attention within a few windows.

    Args:
        x: Maps, [B, H, W, ..., C].
        images: Which of the maps, from start to stop.
        rows: First row of the first window, rows per window (h), windows along the rows (n); all inside the maps.
        cols: Likewise of columns, w and m.
        stride: Rows or columns from one window to the next.
        num_heads: Heads that share the C channels.

    Returns:
        A view of `x`, [..., images, n, m, num_heads, h, w, C / num_heads].
    """
    (top, h, n), (left, w, m) = rows, cols
    head_dim = x.shape[-1] // num_heads
    image, row, col, *parts, channel = x.stride()
    return x.as_strided(
        (*x.shape[3:-1], images.stop - images.start, n, m, num_heads, h, w, head_dim),
        (*parts, image, stride * row, stride * col, head_dim * channel, row, col, channel),
        x.storage_offset() + images.start * image + top * row + left * col)


def window_index(
        batch: int,
        height: int,
        width: int,
        window_size: int,
        halo: int,
        device: torch.device,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Where the tokens of each window, halo included, lie in a batch of maps.

    All of it is arithmetic on one flat range: no dimension is a count of windows, rows or columns alone. Those may be
    one, which a graph of dynamic size has to treat like any other number.

    Args:
        batch: Maps.
        height: Rows of a map.
        width: Columns of a map.
        window_size: Rows or columns of a window, without its halo.
        halo: Rows or columns added on each side.
        device: Where to build the result.

    Returns:
        Positions in the flattened batch of maps, [windows * (window_size + 2 * halo) ** 2], windows in the order of
        (image, row, column), and whether they lie inside the map. Those that do not are the nearest ones that do, so
        that what is gathered there is always finite, and are for the caller to mask.
    """
    rows, cols, side = ceil_div(height, window_size), ceil_div(width, window_size), window_size + 2 * halo
    position = torch.arange(batch * rows * cols * side * side, device=device)
    window = position // (side * side)
    line = window // cols  # of windows, through all maps
    image = line // rows
    y = (line - image * rows) * window_size + position // side % side - halo
    x = (window - line * cols) * window_size + position % side - halo
    valid = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    return (image * height + y) * width + x, valid


def token_index(batch: int, height: int, width: int, window_size: int, device: torch.device) -> torch.Tensor:
    """Where each token of a batch of maps lies in its windows without halo, the inverse of `window_index`.

    Returns:
        Positions in the flattened windows, [batch * height * width].
    """
    rows, cols = ceil_div(height, window_size), ceil_div(width, window_size)
    position = torch.arange(batch * height * width, device=device)
    line = position // width  # of tokens, through all maps
    image = line // height
    y, x = line - image * height, position - line * width
    window = (image * rows + y // window_size) * cols + x // window_size
    return (window * window_size + y % window_size) * window_size + x % window_size
