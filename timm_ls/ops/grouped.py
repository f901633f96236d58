"""Window attention of maps of a fixed size in plain operations, for graphs: groups of windows, indices as constants.

Engines fuse each group's attention, read no key outside the map and fold all that depends on sizes and weights alone.
The batch may be of any size.
"""
from typing import Optional

import torch
import torch.nn.functional as F

from .indices import on_device
from .windows import group_plans, tile_plan, tiles

__all__ = ['grouped_attention']


def grouped_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
) -> torch.Tensor:
    """Return `window_attention`; all sizes but the batch's are numbers."""
    B, H, W, C = q.shape
    E, h, d = additional_kv.shape[1], num_heads, C // num_heads
    tile, = tiles(1, kv.shape[1], W, window_size, first_row, H, windows_per_tile=H * W)
    plans = on_device(group_plans, q.device, *tile.geometry, window_size, E, h)
    outputs = on_device(tile_plan, q.device, *tile.geometry, window_size, E, True).outputs
    kv = kv[:, tile.keys[1]]
    q = q.reshape(B, H * W, C)
    # scaled here, where there are fewest: OpenVINO would scale gathered keys, and ignores a `scale` without a mask
    scale: Optional[float] = None
    table: Optional[torch.Tensor] = None
    if bias is not None:
        q, scale = q * d ** -0.5, 1.
        table = F.pad(bias.flatten(1), (0, 1))
    rows = torch.cat([  # keys and values in turns
        kv.reshape(B, 2 * kv.shape[1] * W, C), additional_kv.reshape(B, 2 * E, C)], dim=1)
    head_rows = rows.reshape(B, rows.shape[1] * h, d)
    outs = []
    for n, L, S, num_biases, queries, keys, values, entries in plans:
        q_win = q.index_select(1, queries).reshape(B * n, L, h, d).transpose(1, 2)
        # engines fuse the transpose of queries and values, but not of keys
        k_win = head_rows.index_select(1, keys).reshape(B * n, h, S, d)
        v_win = rows.index_select(1, values).reshape(B * n, S, h, d).transpose(1, 2)
        mask: Optional[torch.Tensor] = None
        if table is not None:
            mask = table.index_select(1, entries).reshape(h, num_biases, L, S).transpose(0, 1)
            if num_biases > 1:
                mask = mask.repeat(B, 1, 1, 1)
        out = F.scaled_dot_product_attention(q_win, k_win, v_win, attn_mask=mask, scale=scale)
        outs.append(out.transpose(1, 2).reshape(B, n * L, C))
    return torch.cat(outs, dim=1).index_select(1, outputs).reshape(B, H, W, C)
