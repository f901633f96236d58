"""Index arithmetic for attention windows and their halos: pure functions, no parameters.

A map of `H x W` tokens is cut into windows of `w x w` queries. The keys of a window are its halo, the
`(w + 2p) x (w + 2p)` square around it with `p = w // 2`, as far as it lies inside the map. Windows are
counted so that they cover the map (`ceil(H / w)` rows of them); the last ones may be ragged.
"""
from functools import lru_cache
from typing import List, NamedTuple, Tuple

import torch

__all__ = [
    'AxisSpan',
    'axis_spans',
    'gather_windows',
    'halo_width',
    'is_tracing_shapes',
    'merge_windows',
    'window_index',
    'window_view',
]


def is_tracing_shapes() -> bool:
    """Whether sizes may stand for other sizes: under compile, export or trace, where Python must not branch on them."""
    if torch.jit.is_scripting():
        return False  # a script reads sizes when it runs
    else:
        return torch.compiler.is_compiling() or torch.jit.is_tracing()


def halo_width(window_size: int) -> int:
    """Rows and columns of keys that a window sees beyond its own edge: `p = w // 2`."""
    return window_size // 2


class AxisSpan(NamedTuple):
    """A run of neighbouring windows, along one axis, that all see the same part of their halo."""

    count: int  # windows in the run
    query_start: int  # first query of the first window
    query_size: int  # queries per window: `w`, or what is left for the ragged last one
    key_start: int  # first key of the first window
    key_size: int  # keys per window
    halo_offset: int  # where those keys start within the full halo of `w + 2p`


@lru_cache(maxsize=1024)
def axis_spans(size: int, window_size: int) -> Tuple[AxisSpan, ...]:
    """Group the windows along an axis of `size` tokens by the part of the halo that lies inside the map.

    The windows in the middle share one span, so that there are at most five spans however long the axis: the
    first window, the inner ones, and up to three at the end. Within a span every key is valid: no masks.
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
        row_start: int,
        row_size: int,
        row_count: int,
        col_start: int,
        col_size: int,
        col_count: int,
        stride: int,
) -> torch.Tensor:
    """View equally sized, equally spaced (possibly overlapping) windows of a map, without a copy.

    Args:
        x: Map, [B, H, W, C].
        row_start: First row of the first window.
        row_size: Rows per window.
        row_count: Windows along the rows.
        col_start: First column of the first window.
        col_size: Columns per window.
        col_count: Windows along the columns.
        stride: Rows or columns from one window to the next.

    Returns:
        A view of `x`, [B, row_count, col_count, row_size, col_size, C].
    """
    rows = x.narrow(1, row_start, (row_count - 1) * stride + row_size).unfold(1, row_size, stride)
    return rows.narrow(2, col_start, (col_count - 1) * stride + col_size).unfold(2, col_size, stride).permute(
        0, 1, 2, 4, 5, 3)


def window_index(size: int, window_size: int, halo: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Positions along one axis that each window covers, halo included, for a map of any (also symbolic) size.

    Args:
        size: Tokens along the axis.
        window_size: Tokens per window, without the halo.
        halo: Tokens added on each side.
        device: Where to build the result.

    Returns:
        Positions clamped to the axis and whether they lay inside before clamping, both
        [ceil(size / window_size), window_size + 2 * halo]. Clamping means that what is gathered for a position
        outside the map is a copy of a token inside it: always finite, and masked by the caller.
    """
    count = (size + window_size - 1) // window_size
    starts = torch.arange(count, device=device) * window_size
    index = starts[:, None] + torch.arange(-halo, window_size + halo, device=device)[None, :]
    return index.clamp(min=0, max=size - 1), (index >= 0) & (index < size)


def gather_windows(x: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
    """Gather windows of a map by their row and column positions.

    Args:
        x: Map, [B, H, W, C].
        rows: Row positions, [window rows, rows per window].
        cols: Column positions, [window columns, columns per window].

    Returns:
        Windows as token sequences, [B, window rows, window columns, rows * columns per window, C].
    """
    B, C = x.shape[0], x.shape[-1]
    x = x.index_select(1, rows.flatten()).index_select(2, cols.flatten())
    x = x.reshape(B, rows.shape[0], rows.shape[1], cols.shape[0], cols.shape[1], C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(B, rows.shape[0], cols.shape[0], rows.shape[1] * cols.shape[1], C)


def merge_windows(x: torch.Tensor, window_size: int, height: int, width: int) -> torch.Tensor:
    """Put windows without halo back together and crop to the map.

    Args:
        x: Windows, [B, window rows, window columns, window_size ** 2, C].
        window_size: Tokens per window side.
        height: Rows of the map.
        width: Columns of the map.

    Returns:
        Map, [B, height, width, C].
    """
    B, rows, cols, _, C = x.shape
    x = x.reshape(B, rows, cols, window_size, window_size, C).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(B, rows * window_size, cols * window_size, C)[:, :height, :width]
