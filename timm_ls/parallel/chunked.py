"""Inference in row chunks inside a band: keys and values of the band and of its neighbors' rows, little else.

As `attention/chunked.py` does it for a whole map, with what all ranks add to summed over them.
"""
from typing import Any, List, NamedTuple, Optional, Tuple

import torch

from ..attention.chunked import finish, row_chunks, token_span
from ..attention.long_short import LongShortAttention
from ..ops.autocast import cast_once
from ..ops.chunks import chunk_bytes, equal_chunks
from ..ops.merge import SoftmaxSum, query_logits, softmax_sum
from ..ops.window_attention import window_attention
from .bands import BandSize, Spans, spans
from .collectives import Bands, exchange_rows
from .layers import WindowHalo, all_reduce_softmax, attend_rows, pad_rows

__all__ = ['forward_band_in_chunks']


def forward_band_in_chunks(block: Any, x: torch.Tensor, size: BandSize) -> torch.Tensor:
    """Return what a block makes of tokens [B, g + rows * W, C] of a band, a few images at a time."""
    most = max(stop - start for start, stop in spans(size.cuts)) * size[1]  # all ranks take as many images at a time
    images = chunk_bytes(x.device) // max(1, most * x.shape[2] * x.element_size())
    run = long_short if isinstance(block.attn, LongShortAttention) else full
    parts = [run(block, x[group], size) for group in equal_chunks(x.shape[0], images)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Projected(NamedTuple):
    """What attention makes of some rows of a band."""

    rows: slice
    tokens: torch.Tensor  # [B, (g +) rows * W, C]: normalized
    parts: Tuple[torch.Tensor, ...]  # as `project` returns them, of the same tokens


class Projections:
    """The projections of a band's tokens, chunk by chunk; those that look at neighbors get them from other ranks."""

    def __init__(self, block: Any, x: torch.Tensor, size: BandSize):
        self.block, self.x, self.size, self.attn = block, x, size, block.attn
        self.bands: Bands = block.bands
        self.margin: int = self.attn.margin
        g, (H, W) = self.attn.num_global_tokens, size
        self.maps = x[:, g:].unflatten(1, (H, W))
        self.above = self.below = x.new_empty(0)
        if self.margin > 0:
            height = size.cuts[-1]
            have = spans(size.cuts)
            above: Spans = tuple((max(0, start - self.margin), start) for start, _ in have)
            below: Spans = tuple((stop, min(height, stop + self.margin)) for _, stop in have)
            self.above = exchange_rows(self.maps, self.bands, 1, have, above)
            self.below = exchange_rows(self.maps, self.bands, 1, have, below)

    def of(self, rows: slice) -> Projected:
        """Return those of some rows, and of the global tokens if the band's first row is among them."""
        (H, W), g, m = self.size, self.attn.num_global_tokens, self.margin
        maps = self.maps[:, max(0, rows.start - m):min(H, rows.stop + m)]
        before = rows.start - max(0, rows.start - m)
        if m > 0 and rows.start < m:
            needed = self.above[:, max(0, self.above.shape[1] - (m - rows.start)):]
            maps, before = torch.cat([needed, maps], dim=1), before + needed.shape[1]
        if m > 0 and rows.stop + m > H:
            maps = torch.cat([maps, self.below[:, :rows.stop + m - H]], dim=1)
        num_global = g if rows.start == 0 else 0
        tokens = maps.flatten(1, 2)
        if num_global > 0:
            tokens = torch.cat([self.x[:, :g], tokens], dim=1)
        tokens = cast_once(self.block.norm1(tokens))
        self.bands.cuts = ()  # convolutions see what they need
        parts = self.attn.project(tokens, (maps.shape[1], W), num_global)
        inner = slice(num_global + before * W, num_global + (before + rows.stop - rows.start) * W)

        def cut(part: torch.Tensor) -> torch.Tensor:
            if num_global == 0 or before == 0:
                return part[:, inner.start - num_global:inner.stop]
            return torch.cat([part[:, :num_global], part[:, inner]], dim=1)

        return Projected(rows, cut(tokens), tuple(cut(part) for part in parts))


def long_short(block: Any, x: torch.Tensor, size: BandSize) -> torch.Tensor:
    """Return `forward_band_in_chunks` of a block with long-short attention."""
    attn, bands = block.attn, block.bands
    g, h, w, (H, W) = attn.num_global_tokens, attn.num_heads, attn.window_size, size
    halo = WindowHalo(size.cuts, bands.rank, w)
    first, last = halo.keys[bands.rank]
    top = halo.top
    chunks = window_chunks(x, size, halo, w)
    projections = Projections(block, x, size)
    out = kv_maps = global_kv = x.new_empty(0)
    sums: Optional[SoftmaxSum] = None
    for rows in chunks:
        _, tokens, (q_rows, kv_rows) = projections.of(rows)
        if rows.start == 0:
            out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, q_rows.dtype))
            kv_maps = kv_rows.new_zeros(x.shape[0], halo.pad + last - first, W, *kv_rows.shape[2:])
            global_kv = kv_rows[:, :g].clone()
        num_global = g if rows.start == 0 else 0
        out[:, token_span(rows, W, g)] = q_rows
        kv_maps[:, top + rows.start:top + rows.stop] = kv_rows[:, num_global:].unflatten(1, (-1, W))
        if attn.rank > 0:
            logits = attn.dynamic_projection(tokens)[:, num_global:]
            part = softmax_sum(logits, kv_rows[:, num_global:], h)
            sums = part if sums is None else sums.merge(part)
        del tokens, q_rows, kv_rows  # before the next chunk has its own
    additional_kv = global_kv
    if sums is not None:
        landmarks = all_reduce_softmax(sums, bands).output().to(global_kv.dtype)
        additional_kv = torch.cat([attn.norm_landmarks(landmarks), additional_kv], dim=1)
    band_kv = kv_maps[:, top:top + H]
    have = spans(size.cuts)
    above: Spans = tuple((need[0], own[0]) for need, own in zip(halo.keys, have))
    below: Spans = tuple((own[1], need[1]) for need, own in zip(halo.keys, have))
    kv_maps[:, halo.pad:top] = exchange_rows(band_kv, bands, 1, have, above)
    kv_maps[:, top + H:] = exchange_rows(band_kv, bands, 1, have, below)

    bias, global_q = attn.window_bias(), out[:, :g].to(kv_maps.dtype)
    sums = None
    if g > 0 and bands.rank == 0:
        sums = softmax_sum(query_logits(global_q, global_kv[:, :, 0], h), global_kv[:, :, 1:], h)
    maps, out_maps = (y[:, g:].unflatten(1, size) for y in (x, out))
    for rows in chunks:
        before = halo.before if rows.start == 0 else 0
        after = halo.after if rows.stop == H else 0
        attended = window_attention(
            pad_rows(out_maps[:, rows].to(kv_maps.dtype), before, after), kv_maps, additional_kv, bias, w, h,
            first_row=top + rows.start - before, fused=attn.fused_attn)[:, before:before + rows.stop - rows.start]
        if g > 0:
            keys, values = (
                (attended, attended) if attn.update_from_outputs else band_kv[:, rows].unbind(3))
            part = softmax_sum(
                query_logits(global_q, keys.flatten(1, 2), h), values.flatten(1, 2)[:, :, None], h)
            sums = part if sums is None else sums.merge(part)
        out_maps[:, rows] = finish(block, maps[:, rows], attended)
    if sums is not None and g > 0:
        attended = all_reduce_softmax(sums, bands).output()[:, :, 0].to(kv_maps.dtype)
        out[:, :g] = finish(block, x[:, :g], attended)
    return out


def window_chunks(x: torch.Tensor, size: BandSize, halo: WindowHalo, window_size: int) -> List[slice]:
    """Cut a band's rows into chunks of whole windows; the first and last window may reach out of the band."""
    padded = (halo.before + size[0] + halo.after, size[1])
    chunks = row_chunks(x, padded, window_size)
    return [slice(max(0, rows.start - halo.before), min(size[0], rows.stop - halo.before)) for rows in chunks]


def full(block: Any, x: torch.Tensor, size: BandSize) -> torch.Tensor:
    """Return `forward_band_in_chunks` of a block with full attention."""
    attn, bands = block.attn, block.bands
    g, (H, W) = attn.num_global_tokens, size
    projections = Projections(block, x, size)
    chunks = row_chunks(x, size)
    out = kv_maps = global_kv = x.new_empty(0)
    for rows in chunks:
        q_rows, k_rows, v_rows = projections.of(rows).parts
        if rows.start == 0:
            out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, q_rows.dtype))
            kv_maps = k_rows.new_empty(x.shape[0], H, W, 2, x.shape[2])
            global_kv = torch.stack([k_rows[:, :g], v_rows[:, :g]], dim=2)
        num_global = g if rows.start == 0 else 0
        out[:, token_span(rows, W, g)] = q_rows
        for i, part in enumerate((k_rows, v_rows)):
            kv_maps[:, rows, :, i] = part[:, num_global:].unflatten(1, (-1, W))
    whole = ((0, size.cuts[-1]),) * bands.ranks
    kv = exchange_rows(kv_maps, bands, 1, spans(size.cuts), whole).flatten(1, 2)
    k, v = (kv if g == 0 else torch.cat([global_kv, kv], dim=1)).unbind(2)
    bias, size_of_all = attn.biases((size.cuts[-1], W)), (size.cuts[-1], W)
    for rows in chunks:
        place = token_span(rows, W, g)
        queries = out[:, place].to(k.dtype)
        attended = attend_rows(
            attn, queries, k, v, bias, size_of_all, size.cuts[bands.rank] + rows.start, g if rows.start == 0 else 0)
        out[:, place] = finish(block, x[:, place], attended)
    return out
