"""Attention layers for maps of tokens: long-short (linear in the number of tokens) and full.

Zhu et al., "Long-Short Transformer: Efficient Transformers for Language and Vision", NeurIPS 2021, arXiv 2107.02192.
"""
from typing import Final, List, Optional, Tuple

import torch
import torch.fx
import torch.nn as nn
from timm.layers import use_fused_attn
from timm.models import checkpoint

from .rel_pos import RelPosBias2d, grid_bias, position_bias
from .streaming import Finish, Tokenwise, image_groups, row_pieces
from .tracing import is_traced, is_tracing_shapes
from .window import halo_width
from .window_attention import attend, attend_rows, softmax, window_attention

__all__ = ['GlobalAttention2d', 'LongShortAttention2d', 'sum_per_head']

# called with sizes and devices that torch.fx does not know
torch.fx.wrap('attend')
torch.fx.wrap('position_bias')
torch.fx.wrap('softmax')
torch.fx.wrap('window_attention')


def check_heads(dim: int, num_heads: int) -> None:
    """Raise a ValueError unless `dim` channels split evenly over `num_heads` heads."""
    if num_heads < 1 or dim % num_heads != 0:
        raise ValueError(
            f'dim={dim} is not divisible by num_heads={num_heads}: every head needs dim / num_heads channels.')


@torch.fx.wrap
def check_global_tokens(global_tokens: Optional[torch.Tensor], number: int) -> None:
    """Raise a ValueError unless there are that many global tokens, [B, number, C]; none for 0."""
    if not is_tracing_shapes():
        given = 0 if global_tokens is None else global_tokens.shape[1]
        if given != number:
            raise ValueError(f'Expected {number} global tokens (num_global_tokens), [batch, {number}, C]; got {given}.')


@torch.fx.wrap
def sum_per_head(weights: torch.Tensor, values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Weighted sums of tokens with weights of their own for each head.

    One product over all channels, of which each head keeps its own: a few percent more arithmetic than a product per
    head, but a single large one that reads `values` as it lies in memory.

    Args:
        weights: [B, num_heads * r, N].
        values: [B, N, ..., C].
        num_heads: Heads that share the C channels.

    Returns:
        [B, r, ..., C].
    """
    B, C = values.shape[0], values.shape[-1]
    r = weights.shape[1] // num_heads
    shape = [B, r] + list(values.shape[2:])
    values = values.flatten(2)
    parts = values.shape[2] // C
    # weights that add up to one over a million tokens, times this, are still normal numbers in float16; a power of two
    # changes no digit of any other type
    scale = 256.
    sums = (weights * scale).to(values.dtype) @ values
    sums = (sums / scale).reshape(B, num_heads, r, parts, num_heads, C // num_heads)
    return sums.diagonal(dim1=1, dim2=4).permute(0, 1, 2, 4, 3).reshape(shape)  # from [B, r, parts, heads, C / heads]


@torch.fx.wrap
def attend_part(
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        num_heads: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention of a few queries to a part of their keys.

    Args:
        q: [B, g, C], not yet scaled.
        keys: [B, N, C].
        values: [B, N, C].
        num_heads: Heads that share the C channels.

    Returns:
        The output as if there were no other keys, [B, g, C], and the logarithm of the part's share in a softmax over
        all keys, the log-sum-exp of its logits, [B, g, num_heads].
    """
    B, g, C = q.shape
    d = C // num_heads
    # block-diagonal queries: the logits of all heads in one product over the keys as they lie in memory
    q = (q * d ** -0.5).unflatten(-1, (num_heads, d)).permute(0, 1, 3, 2)
    q = q.diag_embed().permute(0, 4, 1, 3, 2).flatten(3).flatten(1, 2)  # [B, num_heads * g, C]
    logits = q @ keys.to(q.dtype).transpose(1, 2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    share = logits.logsumexp(dim=2, keepdim=True)
    out = sum_per_head((logits - share).exp(), values, num_heads)
    return out, share.reshape(B, num_heads, g).transpose(1, 2)


class LongShortAttention2d(nn.Module):
    r"""Long-short attention over a map of tokens: one softmax over a window and a few landmarks.

    With the symbols of the paper (sections 3.1 to 3.3): segment or window `w`, projection rank `r`, heads `h` of
    `d = C / h` channels, `X` the patch tokens of an image and `g` global tokens (class tokens):

        Q, K, V  =  X W_Q, X W_K, X W_V                        qkv
        K, V     <- LN_full(K), LN_full(V)                     norm_kv; DualLN, eq. 8; global tokens included
        P        =  softmax_tokens(X W_P),  N x r per head     dynamic_projection, eq. 4
        K', V'   =  LN_dp(P^T K), LN_dp(P^T V)                 norm_landmarks; r landmarks per head
        O_t      =  softmax(Q_t [K'; K_halo(t); K_g]^T / sqrt(d) + bias_halo) [V'; V_halo(t); V_g]
        O_g      =  softmax(Q_g [K_g; O]^T / sqrt(d)) [V_g; O]
        Y        =  [O_g; O] W_O                               proj

    `halo(t)` are the keys in the `(w + 2p) x (w + 2p)` square around the window of token `t`, `p = w // 2`, as far as
    they lie inside the map. Maps that `w` does not divide have smaller windows at their end; nothing outside the map
    is ever attended. Time and memory grow linearly with the number of tokens.

    The global tokens are updated from the patches' outputs `O`, as in the released code; `global_update='keys'` lets
    them attend to `[K_g; K]` and `[V_g; V]` instead, as Surya does.

    Args:
        dim: Channels C.
        num_heads: Attention heads h.
        window_size: Window side w, in tokens; 7 for the models released at 224 pixels, 8 at 384.
        rank: Landmarks per head r; 0 leaves long-range attention out.
        num_global_tokens: Global tokens g that each call brings.
        qkv_bias: Learn a bias for queries, keys and values.
        rel_pos_bias: Learn a bias per head and offset for the keys in the window's halo.
        global_update: What global tokens attend to: 'outputs' (as released) or 'keys'.
        attn_drop: Dropout probability of attention weights.
        proj_drop: Dropout probability of the output.
        device: Where to create parameters.
        dtype: Their type.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """
    has_pieces: Final[bool] = True  # has `forward_by_pieces`

    fused_attn: Final[bool]
    num_heads: Final[int]
    window_size: Final[int]
    rank: Final[int]
    num_global_tokens: Final[int]
    update_from_outputs: Final[bool]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            window_size: int = 7,
            rank: int = 8,
            num_global_tokens: int = 0,
            qkv_bias: bool = True,
            rel_pos_bias: bool = True,
            global_update: str = 'outputs',
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_heads(dim, num_heads)
        if window_size < 1 or rank < 0 or num_global_tokens < 0:
            raise ValueError(
                f'window_size={window_size}, rank={rank}, num_global_tokens={num_global_tokens}:'
                ' expected window_size >= 1, rank >= 0 and num_global_tokens >= 0.')
        if global_update not in ('outputs', 'keys'):
            raise ValueError(f"Unknown global_update={global_update!r}: expected 'outputs' or 'keys'.")
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.window_size = window_size
        self.rank = rank
        self.num_global_tokens = num_global_tokens
        self.update_from_outputs = global_update == 'outputs'
        self.margin = 0  # rows of neighbours that `project` looks at
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.norm_kv = nn.LayerNorm(dim, **dd)
        if rank > 0:
            self.dynamic_projection = nn.Linear(dim, num_heads * rank, **dd)
            self.norm_landmarks = nn.LayerNorm(dim, **dd)
        else:
            self.dynamic_projection = nn.Identity()
            self.norm_landmarks = nn.Identity()
        if rel_pos_bias:
            offsets = 2 * (window_size + halo_width(window_size)) - 1
            self.rel_pos = RelPosBias2d(num_heads, (offsets, offsets), **dd)
        else:
            self.rel_pos = None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
            self,
            x: torch.Tensor,
            global_tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Attend over a map.

        Args:
            x: Patch tokens, [B, H, W, C], H and W >= 1.
            global_tokens: [B, num_global_tokens, C]; None if there are none.

        Returns:
            The updated map and global tokens, of the same shapes.

        Raises:
            ValueError: There are other global tokens than `num_global_tokens`.
        """
        check_global_tokens(global_tokens, self.num_global_tokens)
        global_q: Optional[torch.Tensor] = None
        global_kv: Optional[torch.Tensor] = None
        if global_tokens is not None:
            global_q, global_kv = self.split(self.project_global(global_tokens))
        q, kv = self.split(self.project(x))
        weights: Optional[torch.Tensor] = None
        if self.rank > 0:
            weights = self.dynamic_projection(x)
        extra_kv = self.extra_keys(weights, kv, global_kv)
        dropout_p = self.attn_drop.p if self.training else 0.
        out = window_attention(
            q, kv, extra_kv, self.window_bias(), self.window_size, self.num_heads, dropout_p, self.fused_attn)
        x = self.proj_drop(self.proj(out))
        if global_q is None or global_kv is None:
            return x, None
        parts = [self.attend_among_global(global_q, global_kv), self.attend_global(global_q, out, kv)]
        return x, self.proj_drop(self.proj(self.merge_global(parts)))

    @torch.jit.unused
    def forward_by_pieces(
            self,
            x: torch.Tensor,
            global_tokens: Optional[torch.Tensor],
            before: Tokenwise,
            after: Finish,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """`after(x, forward(before(x), global_tokens))` without a gradient, by pieces of the map.

        Besides its result, only keys, values and logits of the dynamic projection are held for a whole map.

        Args:
            x: Map, [B, H, W, C].
            global_tokens: As in `forward`.
            before: Applied to `x`.
            after: Applied to `x` and the updated map.

        Returns:
            The result of `after` and the updated global tokens.
        """
        check_global_tokens(global_tokens, self.num_global_tokens)
        out = x.new_empty(0)
        global_outs = []
        for images in image_groups(x):
            maps = x[images]
            pieces = row_pieces(maps, self.window_size)
            global_q = global_kv = None
            if global_tokens is not None:
                global_q, global_kv = self.split(self.project_global(global_tokens[images]))
            kv = weights = maps.new_empty(0)
            for rows in pieces:
                start = max(0, rows.start - self.margin)
                tokens = before(maps[:, start:rows.stop + self.margin])
                inner = slice(rows.start - start, rows.stop - start)
                q_rows, kv_rows = self.split(self.project(tokens)[:, inner])
                if rows.start == 0:
                    kv = q_rows.new_empty(maps.shape[:3] + (2, self.dim))
                    if images.start == 0:
                        out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, q_rows.dtype))
                out[images, rows], kv[:, rows] = q_rows, kv_rows  # queries wait where the output is to go
                if self.rank > 0:
                    logits = self.dynamic_projection(tokens[:, inner])
                    if rows.start == 0:
                        weights = logits.new_empty(maps.shape[:3] + logits.shape[3:])
                    weights[:, rows] = logits
                del tokens, q_rows, kv_rows  # before the next piece has its own
            extra_kv = self.extra_keys(weights if self.rank > 0 else None, kv, global_kv)
            parts = [] if global_q is None else [self.attend_among_global(global_q, global_kv)]
            del weights
            extra_kv, bias = extra_kv.to(kv.dtype), self.window_bias()
            bias = None if bias is None else bias.to(kv.dtype)
            for rows in pieces:
                q_rows = out[images, rows].to(kv.dtype)
                attended = attend_rows(q_rows, kv, extra_kv, bias, self.window_size, self.num_heads, rows.start)
                if global_q is not None:
                    parts.append(self.attend_global(global_q, attended, kv[:, rows]))
                out[images, rows] = after(maps[:, rows], self.proj_drop(self.proj(attended)))
            if global_q is not None:
                global_outs.append(self.proj_drop(self.proj(self.merge_global(parts))))
        return out, torch.cat(global_outs) if global_outs else None

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of a map [B, H, W, C], side by side, [B, H, W, 3 * C]."""
        return self.qkv(x)

    def project_global(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values of global tokens [B, g, C], side by side, [B, g, 3 * C]."""
        return self.qkv(x)

    def split(self, qkv: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """From [..., 3 * C] to queries [..., C] and normalised keys and values [..., 2, C]."""
        q, kv = qkv.split([self.dim, 2 * self.dim], dim=-1)  # not two slices, whose gradients would be padded and added
        return q, self.norm_kv(kv.unflatten(-1, (2, self.dim)))

    def extra_keys(
            self,
            weights: Optional[torch.Tensor],
            kv: torch.Tensor,
            global_kv: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Keys and values that all queries of an image see besides their windows: landmarks, then global tokens.

        Args:
            weights: Logits of the dynamic projection, [B, H, W, num_heads * rank]; None without landmarks.
            kv: Keys and values of the map, [B, H, W, 2, C].
            global_kv: Keys and values of the global tokens, [B, g, 2, C]; None without.

        Returns:
            [B, rank + g, 2, C].
        """
        extra_kv = kv[:, :0, 0] if weights is None else self.landmarks(weights, kv)
        if global_kv is not None:
            extra_kv = torch.cat([extra_kv, global_kv], dim=1)
        return extra_kv

    def window_bias(self) -> Optional[torch.Tensor]:
        """Bias of the halo logits, [num_heads, w, w, w + 2p, w + 2p]."""
        if self.rel_pos is None:
            return None
        w, halo = self.window_size, self.window_size + 2 * halo_width(self.window_size)
        return position_bias(self.rel_pos((w, w), (halo, halo))[0], (w, w), (halo, halo))

    def landmarks(self, weights: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Distil keys and values [B, H, W, 2, C] into [B, rank, 2, C] by the dynamic projection's logits."""
        weights = softmax(weights.flatten(1, 2).transpose(1, 2), dim=2)  # torch is slow along other dimensions
        return self.norm_landmarks(sum_per_head(weights, kv.flatten(1, 2), self.num_heads))

    def attend_among_global(
            self,
            global_q: torch.Tensor,
            global_kv: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """A part for `merge_global`: what global tokens, [B, g, C] and [B, g, 2, C], get from each other."""
        return attend_part(global_q, global_kv[:, :, 0], global_kv[:, :, 1], self.num_heads)

    def attend_global(
            self,
            global_q: torch.Tensor,
            out: torch.Tensor,
            kv: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """A part for `merge_global`: what global tokens get from a map, or from some of its rows.

        Args:
            global_q: Queries of the global tokens, [B, g, C].
            out: Outputs of the map's tokens, [B, H, W, C].
            kv: Keys and values of the map's tokens, [B, H, W, 2, C].
        """
        keys = out if self.update_from_outputs else kv[..., 0, :]
        values = out if self.update_from_outputs else kv[..., 1, :]
        return attend_part(global_q, keys.flatten(1, 2), values.flatten(1, 2), self.num_heads)

    def merge_global(self, parts: List[Tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """One attention of global tokens, [B, g, C], from its parts (`attend_part`)."""
        outs = torch.stack([part[0] for part in parts])
        weights = torch.stack([part[1] for part in parts]).softmax(dim=0).to(outs.dtype)
        return (outs.unflatten(-1, (self.num_heads, self.head_dim)) * weights[..., None]).sum(dim=0).flatten(2)


class GlobalAttention2d(nn.Module):
    """Full attention over a map of tokens and global tokens, with a resizable relative position bias.

    Time grows with the square of the number of tokens: for the low-resolution stages of a pyramid.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        grid_size: Rows and columns of the map that the bias table is made for; any other map is served by resizing
            the table (bicubic over offsets) on the way.
        num_global_tokens: Global tokens that each call brings.
        qkv_bias: Learn a bias for queries, keys and values.
        rel_pos_bias: Learn a bias per head and offset, and for the global tokens.
        attn_drop: Dropout probability of attention weights.
        proj_drop: Dropout probability of the output.
        device: Where to create parameters.
        dtype: Their type.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`, or `num_global_tokens` is negative.
    """
    has_pieces: Final[bool] = True  # has `forward_by_pieces`

    fused_attn: Final[bool]
    num_global_tokens: Final[int]

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            grid_size: Tuple[int, int] = (14, 14),
            num_global_tokens: int = 0,
            qkv_bias: bool = True,
            rel_pos_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_heads(dim, num_heads)
        if num_global_tokens < 0:
            raise ValueError(f'num_global_tokens={num_global_tokens}: expected 0 or more.')
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.num_global_tokens = num_global_tokens
        self.kv_stride = 1  # rows and columns from one key to the next
        self.fused_attn = use_fused_attn()
        self.bias_bytes = 64 * 2 ** 20  # of the bias to hold at a time, where the map is not taken by pieces

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        if rel_pos_bias:
            self.rel_pos = RelPosBias2d(num_heads, _num_offsets(grid_size), num_global_tokens, **dd)
        else:
            self.rel_pos = None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Tuple[int, int]) -> None:
        """Make the bias table for another map, resizing what was learned."""
        if self.rel_pos is not None:
            self.rel_pos.set_table_size(_num_offsets(grid_size))

    def forward(
            self,
            x: torch.Tensor,
            global_tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Attend over a map.

        Args:
            x: Patch tokens, [B, H, W, C].
            global_tokens: [B, num_global_tokens, C]; None if there are none.

        Returns:
            The updated map and global tokens, of the same shapes.

        Raises:
            ValueError: There are other global tokens than `num_global_tokens`.
        """
        check_global_tokens(global_tokens, self.num_global_tokens)
        H, W = x.shape[1], x.shape[2]
        g = self.num_global_tokens
        q, k, v = self.project(x, global_tokens)
        out = self.proj_drop(self.proj(self.attend(q, k, v, H, W)))
        x = out[:, g:].unflatten(1, (H, W))
        return x, out[:, :g] if g > 0 else None

    def project(
            self,
            x: torch.Tensor,
            global_tokens: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values for `attend`, of a map [B, H, W, C] and global tokens [B, g, C] or None."""
        tokens = x.flatten(1, 2)
        if global_tokens is not None:
            tokens = torch.cat([global_tokens, tokens], dim=1)
        qkv = self.qkv(tokens).chunk(3, dim=-1)
        return qkv[0], qkv[1], qkv[2]

    @torch.jit.unused
    def forward_by_pieces(
            self,
            x: torch.Tensor,
            global_tokens: Optional[torch.Tensor],
            before: Tokenwise,
            after: Finish,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """See `LongShortAttention2d.forward_by_pieces`."""
        check_global_tokens(global_tokens, self.num_global_tokens)
        _, H, W, C = x.shape
        g = self.num_global_tokens
        out = x.new_empty(0)
        global_outs = []
        for images in image_groups(x):
            maps = x[images]
            qkv = x.new_empty(0)
            for rows in row_pieces(maps):
                qkv_rows = self.qkv(before(maps[:, rows]).flatten(1, 2))
                if rows.start == 0:
                    qkv = qkv_rows.new_empty(maps.shape[0], g + H * W, 3 * C)
                qkv[:, g + rows.start * W:g + rows.stop * W] = qkv_rows
            if global_tokens is not None:
                qkv[:, :g] = self.qkv(global_tokens[images])
            q, k, v = qkv.chunk(3, dim=-1)
            table, to_global, from_global = self.biases(H, W, k.shape[1])
            if images.start == 0:
                out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, q.dtype))
            row_bytes = max(maps[:, :1].numel() * maps.element_size(), bias_row_bytes(k, self.num_heads, W))
            for rows in row_pieces(maps, row_bytes=row_bytes):
                num_rows = rows.stop - rows.start
                attended = attend_grid_rows(
                    q[:, g + rows.start * W:g + rows.stop * W], k, v, table, to_global, (H, W), rows.start, num_rows,
                    1, self.num_heads, 0., self.fused_attn)
                dx = self.proj_drop(self.proj(attended.unflatten(1, (num_rows, W))))
                out[images, rows] = after(maps[:, rows], dx)
            if g > 0:
                global_outs.append(self.proj_drop(self.proj(self.attend_from_global(q[:, :g], k, v, from_global))))
        return out, torch.cat(global_outs) if global_outs else None

    def attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            height: int,
            width: int,
    ) -> torch.Tensor:
        """Everything between the projections.

        Args:
            q: Queries, [B, g + height * width, C], global tokens first.
            k: Keys of the global tokens and of every `kv_stride`-th row and column, the first included, [B, g + N, C].
            v: Values of the same tokens, [B, g + N, C].
            height: Rows of the map.
            width: Columns of the map.

        Returns:
            [B, g + height * width, C].
        """
        g = self.num_global_tokens
        dropout_p = self.attn_drop.p if self.training else 0.
        table, to_global, from_global = self.biases(height, width, k.shape[1])
        out = attend_grid(
            q[:, g:], k, v, table, to_global, (height, width), self.kv_stride, self.num_heads, dropout_p,
            self.fused_attn, self.bias_bytes)
        if g == 0:
            return out
        return torch.cat([self.attend_from_global(q[:, :g], k, v, from_global), out], dim=1)

    def attend_from_global(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            bias: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Attention of the global tokens, [B, g, C], to all keys and values as in `attend`."""
        dropout_p = self.attn_drop.p if self.training else 0.
        return attend_heads(q, k, v, bias, self.num_heads, dropout_p, self.fused_attn)

    def biases(
            self,
            height: int,
            width: int,
            num_keys: int,
    ) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
        """Position biases for a map of this size, None where there are none.

        Returns:
            The table of offsets within the map, [num_heads, 2 * height - 1, 2 * width - 1]; the bias of all patches
            for the global tokens, [num_heads, g]; that of global tokens for all keys, [num_heads, g, num_keys].
        """
        if self.rel_pos is None:
            return None, None, None
        table, global_patch, global_global = self.rel_pos((height, width), (height, width))
        if global_patch is None or global_global is None:
            return table, None, None
        to_patches = global_patch[0].unsqueeze(-1).expand(-1, -1, num_keys - self.num_global_tokens)
        return table, global_patch[1], torch.cat([global_global, to_patches], dim=-1)


def attend_heads(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: Optional[torch.Tensor],
        num_heads: int,
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """`attend` for queries [B, L, C], keys and values [B, S, C] with a bias [num_heads, L, S]; gives [B, L, C]."""
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = k.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    v = v.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    if bias is not None:
        bias = bias.to(q.dtype).unsqueeze(0)  # with fewer than four dimensions torch's fused kernels do not take it
    out = attend(q, k, v, bias, dropout_p, fused).transpose(1, 2)
    if is_tracing_shapes():
        out = out.clone(memory_format=torch.contiguous_format)  # in graphs, its layout may change later
    return out.flatten(2)


def attend_grid_rows(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        table: Optional[torch.Tensor],
        global_bias: Optional[torch.Tensor],
        grid_size: Tuple[int, int],
        first_row: int,
        num_rows: int,
        kv_stride: int,
        num_heads: int,
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """Full attention of some rows of a map, whose bias exists for these rows only.

    Args:
        q: Queries of rows `first_row` and on, [B, num_rows * width, C].
        k: Keys of global tokens and of every `kv_stride`-th row and column, the first included, [B, g + N, C].
        v: Values of the same tokens, [B, g + N, C].
        table: Bias of the offsets within the map, [num_heads, 2 * height - 1, 2 * width - 1].
        global_bias: Bias for the global tokens, [num_heads, g].
        grid_size: Rows and columns of the map.
        first_row: Row of the first query.
        num_rows: Rows of queries.
        kv_stride: Rows and columns from one key to the next.
        num_heads: Heads that share the C channels.
        dropout_p: Probability of dropping an attention weight.
        fused: Use torch's `scaled_dot_product_attention`.

    Returns:
        [B, num_rows * width, C].
    """
    bias: Optional[torch.Tensor] = None
    if table is not None:
        table = table.narrow(1, first_row, num_rows + grid_size[0] - 1)  # the offset to the last key comes first
        bias = grid_bias(table, global_bias, num_rows, grid_size, kv_stride)
    return attend_heads(q, k, v, bias, num_heads, dropout_p, fused)


@torch.fx.wrap
def attend_grid(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        table: Optional[torch.Tensor],
        global_bias: Optional[torch.Tensor],
        grid_size: Tuple[int, int],
        kv_stride: int,
        num_heads: int,
        dropout_p: float,
        fused: bool,
        bias_bytes: int,
) -> torch.Tensor:
    """Full attention of a map; see `attend_grid_rows`. Where its bias exceeds `bias_bytes`, some rows at a time."""
    height, width = grid_size
    if not is_traced():
        rows = max(1, bias_bytes // max(1, bias_row_bytes(k, num_heads, width)))
        if rows < height:
            outs: List[torch.Tensor] = []
            for start in range(0, height, rows):
                num_rows = min(rows, height - start)
                part = q[:, start * width:(start + num_rows) * width]
                if torch.is_grad_enabled() and not torch.jit.is_scripting():  # the backward pass makes the bias anew
                    outs.append(checkpoint(
                        attend_grid_rows, part, k, v, table, global_bias, grid_size, start, num_rows, kv_stride,
                        num_heads, dropout_p, fused))
                else:
                    outs.append(attend_grid_rows(
                        part, k, v, table, global_bias, grid_size, start, num_rows, kv_stride, num_heads, dropout_p,
                        fused))
            return torch.cat(outs, dim=1)
    return attend_grid_rows(
        q, k, v, table, global_bias, grid_size, 0, height, kv_stride, num_heads, dropout_p, fused)


def bias_row_bytes(k: torch.Tensor, num_heads: int, width: int) -> int:
    """Bytes of the bias of a row of `width` queries for keys [B, S, C]."""
    return num_heads * width * k.shape[1] * k.element_size()


def _num_offsets(grid_size: Tuple[int, int]) -> Tuple[int, int]:
    """Offsets between two tokens of a grid, per axis."""
    return 2 * grid_size[0] - 1, 2 * grid_size[1] - 1
