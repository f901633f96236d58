"""Long-short attention as others write it: the names, settings and call of the released layer, its sums dense.

From the equations, for any rectangle: all logits of a map, those outside of a window's halo masked. Shares no code with
the package, and stands in for layers of other projects where these are not installed.
"""
import torch
from torch import nn


class AttentionLS(nn.Module):
    """Long-short attention; its global tokens attend to outputs, as released, or to keys, as in Surya."""

    def __init__(
            self, dim, num_heads=8, qkv_bias=False, attn_drop=0., rpe=False, nglo=1, dp_rank=2, w=2, update='keys'):
        super().__init__()
        self.num_heads, self.nglo, self.dp_rank, self.window_size, self.update = num_heads, nglo, dp_rank, w, update
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.)
        if dp_rank > 0:
            self.to_dynamic_projection = nn.Linear(dim, dp_rank * num_heads)
        self.dual_ln_dp = nn.LayerNorm(dim)
        self.dual_ln_full = nn.LayerNorm(dim)
        self.rpe = rpe
        if rpe:
            halo = w + w // 2 * 2
            self.local_relative_position_bias_table = nn.Parameter(
                torch.randn(2 * (w + w // 2 - 1) * (halo + 1) + 1, num_heads))
            offsets = torch.arange(w)[:, None] - torch.arange(-(w // 2), w + w // 2) + w + w // 2 - 1  # [w, halo]
            index = offsets[:, None, :, None] * halo + offsets[None, :, None, :]  # as released, the stride is too short
            self.register_buffer('relative_position_index', index.reshape(w * w, halo * halo))

    def forward(self, x, nx=None, ny=None):
        B, N, C = x.shape
        h, g, w, p = self.num_heads, self.nglo, self.window_size, self.window_size // 2
        nx = int((N - g) ** .5) if nx is None else nx
        ny = nx if ny is None else ny
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        k, v = self.dual_ln_full(k), self.dual_ln_full(v)
        q, k, v = (part.reshape(B, N, h, C // h).transpose(1, 2) for part in (q * self.scale, k, v))  # [B, h, N, d]
        (q_g, q), (k_g, k), (v_g, v) = ((part[:, :, :g], part[:, :, g:]) for part in (q, k, v))

        y, x_ = torch.arange(nx).repeat_interleave(ny), torch.arange(ny).repeat(nx)  # of the map's tokens
        key_y, key_x = (at[None, :] - (at[:, None] // w * w - p) for at in (y, x_))  # in the halo of the query's window
        inside = (key_y >= 0) & (key_y < w + 2 * p) & (key_x >= 0) & (key_x < w + 2 * p)
        logits = q @ k.transpose(-1, -2)
        if self.rpe:
            halo = w + 2 * p
            row = (y % w * w + x_ % w)[:, None].expand_as(inside)
            index = self.relative_position_index[row, (key_y * halo + key_x).clamp(0, halo * halo - 1)]
            logits = logits + self.local_relative_position_bias_table[index].permute(2, 0, 1)
        keys, values = [logits.masked_fill(~inside, -torch.inf)], [v]
        if self.dp_rank > 0:
            scores = self.to_dynamic_projection(x[:, g:]).reshape(B, nx * ny, h, self.dp_rank)
            weights = scores.softmax(dim=1).permute(0, 2, 3, 1)  # [B, h, r, N]
            k_r, v_r = (
                self.dual_ln_dp((weights @ part).transpose(1, 2).flatten(2)).reshape(B, -1, h, C // h).transpose(1, 2)
                for part in (k, v))
            keys.append(q @ k_r.transpose(-1, -2))
            values.append(v_r)
        keys.append(q @ k_g.transpose(-1, -2))
        values.append(v_g)
        out = self.attn_drop(torch.cat(keys, dim=-1).softmax(dim=-1)) @ torch.cat(values, dim=2)
        if g > 0:
            k, v = (out, out) if self.update == 'outputs' else (k, v)
            weights = (q_g @ torch.cat([k_g, k], dim=2).transpose(-1, -2)).softmax(dim=-1)
            out = torch.cat([weights @ torch.cat([v_g, v], dim=2), out], dim=2)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(B, N, C)))
