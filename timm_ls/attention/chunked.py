"""Inference in row chunks: a block over a large map, holding keys and values of the whole map and little else.

Norms, projections, attention and the MLP with its hidden layer exist for one chunk at a time, queries wait in the
memory of the result, and what all tokens add to (landmarks, global tokens) is summed up on the way. Nothing has to be
switched on, and the result is that of the block's own `forward`. A long-short layer that is called alone, as in models
of other projects, is a block without norm, residual and MLP here.
"""
from typing import Any, List, Optional, Tuple

import torch
import torch.fx
import torch.nn as nn

from .._compat import has_hooks
from ..ops.autocast import cast_once
from ..ops.capture import needs_plain_operations
from ..ops.chunks import chunk_bytes, equal_chunks
from ..ops.merge import SoftmaxSum, query_logits, softmax_sum
from ..ops.tiled import joinable_windows
from ..ops.window_attention import window_attention
from .full import FullAttention, attend_grid_rows
from .long_short import LongShortAttention

__all__ = ['forward_in_chunks', 'runs_in_chunks']


def runs_in_chunks(block: nn.Module, x: torch.Tensor) -> bool:
    """Return whether a block, or a layer alone, goes through tokens [B, N, C] in row chunks.

    It does in inference, for more than a chunk, unless somebody wants to see all of it at once: who needs a gradient,
    captures a graph, trains, or has put hooks on one of the block's layers.
    """
    if torch.is_grad_enabled() or isinstance(x, torch.fx.Proxy) or needs_plain_operations() or block.training:
        return False
    if x.numel() * x.element_size() <= chunk_bytes(x.device):
        return False
    attn = attention_of(block)
    if not isinstance(attn, (LongShortAttention, FullAttention)) or getattr(attn, 'kv_stride', 1) > 1:
        return False  # strided keys belong to no run of rows
    return not any(has_hooks(layer) for child in block.children() for layer in child.modules())


def forward_in_chunks(block: Any, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Return what a block, or a layer alone, makes of tokens [B, g + H * W, C] of maps of a size (H, W).

    A few images at a time.
    """
    images = chunk_bytes(x.device) // max(1, x[:1].numel() * x.element_size())
    run = _long_short if isinstance(attention_of(block), LongShortAttention) else _full
    groups = equal_chunks(x.shape[0], images)
    if len(groups) == 1:
        return run(block, x, size)
    out: Optional[torch.Tensor] = None
    for group in groups:
        part = run(block, x[group], size)
        if out is None:
            out = part.new_empty(x.shape)
        out[group] = part
    return x if out is None else out


def attention_of(block: Any) -> Any:
    """Return the attention of a block; of a layer alone, itself."""
    return block if isinstance(block, LongShortAttention) else block.attn


def _long_short(block: Any, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Return `forward_in_chunks` of a block with long-short attention, or of that alone."""
    attn: LongShortAttention = attention_of(block)
    g, h, (_, W) = attn.num_global_tokens, attn.num_heads, size
    chunks = row_chunks(x, size, attn.window_size * joinable_windows(attn.window_size, x.device))
    out = kv = x.new_empty(0)
    landmarks: Optional[SoftmaxSum] = None
    for rows in chunks:
        tokens, inner, chunk_size, num_global = block_input(block, x, size, rows, attn.margin)
        q_rows, kv_rows = attn.project(tokens, chunk_size, num_global)
        span = token_span(rows, W, g)
        if rows.start == 0:
            kv = kv_rows.new_empty(x.shape[:2] + kv_rows.shape[2:])
            dtype = q_rows.dtype if block is attn else torch.promote_types(x.dtype, q_rows.dtype)  # of x + ...
            out = x.new_empty(x.shape, dtype=dtype)
        out[:, span], kv[:, span] = q_rows[:, inner], kv_rows[:, inner]
        if attn.rank > 0:
            logits = attn.dynamic_projection(tokens)[:, inner][:, num_global:]
            part = softmax_sum(logits, kv[:, span][:, num_global:], h)
            landmarks = part if landmarks is None else landmarks.merge(part)
        del tokens, q_rows, kv_rows  # before the next chunk has its own
    additional_kv = kv[:, :g]
    if landmarks is not None:
        additional_kv = torch.cat([attn.norm_landmarks(landmarks.output().to(kv.dtype)), additional_kv], dim=1)
    bias = attn.window_bias()
    global_q, global_kv = out[:, :g].to(kv.dtype), kv[:, :g]
    global_sum = None if g == 0 else softmax_sum(
        query_logits(global_q, global_kv[:, :, 0], h), global_kv[:, :, 1:], h)
    maps, kv_maps, out_maps = (y[:, g:].unflatten(1, size) for y in (x, kv, out))
    for rows in chunks:
        attended = window_attention(
            out_maps[:, rows].to(kv.dtype), kv_maps, additional_kv, bias, attn.window_size, h, first_row=rows.start,
            fused=attn.fused_attn)
        if global_sum is not None:
            keys, values = (attended, attended) if attn.update_from_outputs else kv_maps[:, rows].unbind(3)
            global_sum = global_sum.merge(softmax_sum(
                query_logits(global_q, keys.flatten(1, 2), h), values.flatten(1, 2)[:, :, None], h))
        out_maps[:, rows] = finish(block, maps[:, rows], attended)
    if global_sum is not None:
        out[:, :g] = finish(block, x[:, :g], global_sum.output()[:, :, 0].to(kv.dtype))
    return out


def _full(block: Any, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Return `forward_in_chunks` of a block with full attention."""
    attn: FullAttention = block.attn
    g, W = attn.num_global_tokens, size[1]
    out = k = v = x.new_empty(0)
    for rows in row_chunks(x, size):
        tokens, inner, chunk_size, num_global = block_input(block, x, size, rows, attn.margin)
        parts = attn.project(tokens, chunk_size, num_global)
        if rows.start == 0:
            k, v = (part.new_empty(x.shape) for part in parts[1:])
            out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, parts[0].dtype))
        for whole, part in zip((out, k, v), parts):
            whole[:, token_span(rows, W, g)] = part[:, inner]
        del tokens, parts
    bias = attn.biases(size)
    bias_bytes = attn.num_heads * W * k.shape[1] * k.element_size()  # of a row
    for rows in row_chunks(x, size, row_bytes=bias_bytes):
        span = token_span(rows, W, g)
        attended = attend_grid_rows(
            out[:, span].to(k.dtype), k, v, bias, size, rows.start, rows.stop - rows.start, 1, attn.num_heads, 0.,
            attn.fused_attn)
        out[:, span] = finish(block, x[:, span], attended)
    return out


def row_chunks(x: torch.Tensor, size: Tuple[int, int], step: int = 1, row_bytes: int = 0) -> List[slice]:
    """Cut maps of tokens [B, g + H * W, C] into chunks of rows, all but the last of a multiple of `step` rows.

    Args:
        x: The tokens.
        size: Rows H and columns W of a map.
        step: Rows that stay together.
        row_bytes: Bytes that a row takes elsewhere, if more than its tokens.
    """
    row_bytes = max(row_bytes, x[:, :1].numel() * x.element_size() * size[1])
    return equal_chunks(size[0], chunk_bytes(x.device) // max(1, row_bytes), step)


def token_span(rows: slice, width: int, num_global_tokens: int) -> slice:
    """Return where rows of a map lie in the sequence; global tokens go with the first ones."""
    start = num_global_tokens + rows.start * width if rows.start > 0 else 0
    return slice(start, num_global_tokens + rows.stop * width)


def block_input(
        block: Any,
        x: torch.Tensor,
        size: Tuple[int, int],
        rows: slice,
        margin: int,
) -> Tuple[torch.Tensor, slice, Tuple[int, int], int]:
    """Return what a block's attention sees of some rows.

    Args:
        block: The block.
        x: Its tokens, [B, g + H * W, C].
        size: Rows H and columns W of the map.
        rows: Some of its rows.
        margin: Rows of neighbors that the projections look at.

    Returns:
        Normalized tokens of the rows and their neighbors; which of them are those of the rows, and of the global tokens
        with the first row; the size of this part of the map; how many global tokens there are in it.
    """
    (H, W), g = size, attention_of(block).num_global_tokens
    outer = slice(max(0, rows.start - margin), min(H, rows.stop + margin))
    start = 0 if rows.start == 0 else g + outer.start * W
    tokens = x[:, start:g + outer.stop * W]
    tokens = cast_once(tokens if attention_of(block) is block else block.norm1(tokens))
    span = token_span(rows, W, g)
    inner = slice(span.start - start, span.stop - start)
    return tokens, inner, (outer.stop - outer.start, W), g if rows.start == 0 else 0


def finish(block: Any, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Return what a block makes of some tokens [B, ..., C] after attention, its MLP's hidden layer in chunks."""
    attn = attention_of(block)
    attended = attn.proj_drop(attn.proj(attended))
    if attn is block:
        return attended
    x = x + attended
    tokens = x.view(x.shape[0], -1, x.shape[-1])
    hidden_bytes = tokens[:, :1, 0].numel() * block.mlp.fc1.out_features * x.element_size()  # of a token
    for chunk in equal_chunks(tokens.shape[1], chunk_bytes(x.device) // max(1, hidden_bytes)):
        part = tokens[:, chunk]
        part += block.mlp(block.norm2(part))
    return x
