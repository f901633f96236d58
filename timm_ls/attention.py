"""Attention layers for maps of tokens: long-short (linear in the number of tokens) and full.

Zhu et al., "Long-Short Transformer: Efficient Transformers for Language and Vision", NeurIPS 2021, arXiv 2107.02192.
"""
from typing import Final, Optional, Tuple

import torch
import torch.fx
import torch.nn as nn
from timm.layers import use_fused_attn

from .rel_pos import RelPosBias2d
from .window import halo_width
from .window_attention import attend, softmax, window_attention

__all__ = ['GlobalAttention2d', 'LongShortAttention2d']

# called with sizes that torch.fx does not know
torch.fx.wrap('attend')
torch.fx.wrap('softmax')
torch.fx.wrap('window_attention')


def check_heads(dim: int, num_heads: int) -> None:
    """Raise a ValueError unless `dim` channels split evenly over `num_heads` heads."""
    if num_heads < 1 or dim % num_heads != 0:
        raise ValueError(
            f'dim={dim} is not divisible by num_heads={num_heads}: every head needs dim / num_heads channels.')


@torch.fx.wrap
def sum_per_head(weights: torch.Tensor, values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Weighted sums of tokens with weights of their own for each head.

    One product over all channels, of which each head keeps its own: a few percent more arithmetic than a product per
    head, but a single large one that reads `values` as it lies in memory.

    Args:
        weights: [B, N, num_heads * r].
        values: [B, N, ..., C].
        num_heads: Heads that share the C channels.

    Returns:
        [B, r, ..., C].
    """
    B, C = values.shape[0], values.shape[-1]
    r = weights.shape[-1] // num_heads
    shape = [B, r] + list(values.shape[2:])
    values = values.flatten(2)
    parts = values.shape[2] // C
    # weights that add up to one over a million tokens, times this, are still normal numbers in float16; a power of two
    # changes no digit of any other type
    scale = 256.
    sums = (weights * scale).to(values.dtype).transpose(1, 2) @ values
    sums = (sums / scale).reshape(B, num_heads, r, parts, num_heads, C // num_heads)
    return sums.diagonal(dim1=1, dim2=4).permute(0, 1, 2, 4, 3).reshape(shape)  # from [B, r, parts, heads, C / heads]


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

    Raises:
        ValueError: An argument is out of range; the message names it.
    """
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
        self.scale = self.head_dim ** -0.5
        self.window_size = window_size
        self.rank = rank
        self.num_global_tokens = num_global_tokens
        self.update_from_outputs = global_update == 'outputs'
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
        """
        global_qkv: Optional[torch.Tensor] = None
        if self.num_global_tokens > 0:
            assert global_tokens is not None, 'num_global_tokens > 0: pass global_tokens, [B, num_global_tokens, C]'
            global_qkv = self.qkv(global_tokens)
        x, global_tokens = self.attend(x, self.qkv(x), global_qkv)
        x = self.proj_drop(self.proj(x))
        if global_tokens is not None:
            global_tokens = self.proj_drop(self.proj(global_tokens))
        return x, global_tokens

    def attend(
            self,
            x: torch.Tensor,
            qkv: torch.Tensor,
            global_qkv: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Everything between the projections: from tokens [B, H, W, C] and their [B, H, W, 3 * C] to [B, H, W, C]."""
        C = self.dim
        q, kv = qkv[..., :C], self.norm_kv(qkv[..., C:].unflatten(-1, (2, C)))
        extra_kv = kv[:, :0, 0]  # [B, 0, 2, C]
        if self.rank > 0:
            extra_kv = self.landmarks(x, kv)
        global_q, global_kv = q, kv
        if global_qkv is not None:
            global_q, global_kv = global_qkv[..., :C], self.norm_kv(global_qkv[..., C:].unflatten(-1, (2, C)))
            extra_kv = torch.cat([extra_kv, global_kv], dim=1)

        bias: Optional[torch.Tensor] = None
        if self.rel_pos is not None:
            w, halo = self.window_size, self.window_size + 2 * halo_width(self.window_size)
            bias = self.rel_pos((w, w), (halo, halo))
        dropout_p = self.attn_drop.p if self.training else 0.
        out = window_attention(q, kv, extra_kv, bias, self.window_size, self.num_heads, dropout_p, self.fused_attn)

        global_out: Optional[torch.Tensor] = None
        if global_qkv is not None:
            keys = out if self.update_from_outputs else kv[..., 0, :]
            values = out if self.update_from_outputs else kv[..., 1, :]
            global_out = self.update_global_tokens(global_q, global_kv, keys.flatten(1, 2), values.flatten(1, 2))
        return out, global_out

    def landmarks(self, x: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Distil keys and values [B, H, W, 2, C] into [B, rank, 2, C] by the dynamic projection of x [B, H, W, C]."""
        weights = softmax(self.dynamic_projection(x).flatten(1, 2), dim=1)
        return self.norm_landmarks(sum_per_head(weights, kv.flatten(1, 2), self.num_heads))

    def update_global_tokens(
            self,
            q: torch.Tensor,
            own_kv: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
    ) -> torch.Tensor:
        """Let global tokens attend to each other and to the patches.

        Args:
            q: Queries of the global tokens, [B, g, C], not yet scaled.
            own_kv: Keys and values of the global tokens, [B, g, 2, C].
            keys: Keys of the patches, [B, N, C].
            values: Values of the patches, [B, N, C].

        Returns:
            [B, g, C].
        """
        g, h = self.num_global_tokens, self.num_heads
        # block-diagonal queries: the logits of all heads in one product over the keys as they lie in memory
        q = (q * self.scale).unflatten(-1, (h, self.head_dim)).permute(0, 1, 3, 2)
        q = q.diag_embed().permute(0, 3, 2, 4, 1).flatten(1, 2).flatten(2)  # [B, C, h * g]
        weights = softmax(torch.cat([own_kv[:, :, 0] @ q, keys @ q], dim=1), dim=1)
        return sum_per_head(weights[:, :g], own_kv[:, :, 1], h) + sum_per_head(weights[:, g:], values, h)


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

    Raises:
        ValueError: `dim` is not divisible by `num_heads`.
    """
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
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.num_global_tokens = num_global_tokens
        self.fused_attn = use_fused_attn()

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
        """
        H, W = x.shape[1], x.shape[2]
        g = self.num_global_tokens
        tokens = x.flatten(1, 2)
        if g > 0:
            assert global_tokens is not None, 'num_global_tokens > 0: pass global_tokens, [B, num_global_tokens, C]'
            tokens = torch.cat([global_tokens, tokens], dim=1)
        qkv = self.qkv(tokens).chunk(3, dim=-1)
        out = self.proj_drop(self.proj(self.attend(qkv[0], qkv[1], qkv[2], H, W)))
        x = out[:, g:].unflatten(1, (H, W))
        return x, out[:, :g] if g > 0 else None

    def attend(
            self,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            height: int,
            width: int,
            kv_stride: int = 1,
    ) -> torch.Tensor:
        """Everything between the projections.

        Args:
            q: Queries, [B, g + height * width, C], global tokens first.
            k: Keys of the global tokens and of every `kv_stride`-th row and column, the first included, [B, g + N, C].
            v: Values of the same tokens, [B, g + N, C].
            height: Rows of the map.
            width: Columns of the map.
            kv_stride: Rows and columns from one key to the next.

        Returns:
            [B, g + height * width, C].
        """
        h, d = self.num_heads, self.head_dim
        q = q.unflatten(-1, (h, d)).transpose(1, 2)
        k = k.unflatten(-1, (h, d)).transpose(1, 2)
        v = v.unflatten(-1, (h, d)).transpose(1, 2)
        bias: Optional[torch.Tensor] = None
        if self.rel_pos is not None:
            bias = self.rel_pos((height, width), (height, width))
            if kv_stride > 1:
                bias = bias[..., ::kv_stride, ::kv_stride]
            bias = bias.flatten(3).flatten(1, 2)
            if self.num_global_tokens > 0:
                bias = self.rel_pos.forward_global(bias)
            bias = bias.to(q.dtype)
        dropout_p = self.attn_drop.p if self.training else 0.
        return attend(q, k, v, bias, dropout_p, self.fused_attn).transpose(1, 2).flatten(2)


def _num_offsets(grid_size: Tuple[int, int]) -> Tuple[int, int]:
    """Offsets between two tokens of a grid, per axis."""
    return 2 * grid_size[0] - 1, 2 * grid_size[1] - 1
