"""Window attention as one gather and one attention call over all windows, keys outside the map masked.

No Python decision depends on a size: it can be scripted, traced, compiled and exported with dynamic sizes. Plain
operations throughout, as `torch.func`, forward-mode and second derivatives need.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from .attend import attend
from .windows import halo_width, key_index, query_index, token_index

__all__ = ['masked_attention', 'plain_attention']


def masked_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """Return `window_attention`."""
    B, num_rows, W, C = q.shape
    H, E = kv.shape[1], additional_kv.shape[1]
    halo = window_size + 2 * halo_width(window_size)
    L, S, d = window_size * window_size, E + halo * halo, C // num_heads
    queries = query_index(B, num_rows, W, window_size, q.device)
    keys, valid = key_index(B, H, W, window_size, E, first_row, num_rows, q.device)

    # of N windows, [N, heads, L or S, d]; engines know attention by a reshape and a transpose in front of each input
    rows = torch.cat([kv.reshape(-1, C), additional_kv.reshape(-1, C)])  # keys and values in turns
    q_win = q.reshape(-1, C).index_select(0, queries).reshape(-1, L, num_heads, d).transpose(1, 2)
    k_win = rows.index_select(0, 2 * keys).reshape(-1, S, num_heads, d).transpose(1, 2)
    v_win = rows.index_select(0, 2 * keys + 1).reshape(-1, S, num_heads, d).transpose(1, 2)

    lowest = -6e4 if q.dtype == torch.float16 else -3e38  # finite: no weight, no NaN
    mask = torch.zeros(1, device=q.device, dtype=q.dtype).masked_fill(~valid, lowest).reshape(-1, 1, 1, S)
    if bias is not None:
        mask = mask + F.pad(bias.to(q.dtype).reshape(1, num_heads, L, S - E), (E, 0))

    out = attend(q_win, k_win, v_win, mask, dropout_p, fused)
    out = out.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # in graphs, its layout may change later
    tokens = token_index(B, num_rows, W, window_size, q.device)
    return out.reshape(-1, C).index_select(0, tokens).reshape(B, num_rows, W, C)


def plain_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
) -> torch.Tensor:
    """Return `window_attention` in plain operations; torch's fused attention has no second derivative."""
    return masked_attention(
        q, kv, additional_kv, bias, window_size, num_heads, first_row, dropout_p=0., fused=False)
