"""Long-short attention over a map of tokens: linear in their number.

Zhu et al., "Long-Short Transformer: Efficient Transformers for Language and Vision", NeurIPS 2021, arXiv 2107.02192.
"""
from typing import Any, Final, Optional, Tuple

import torch
import torch.fx
import torch.nn as nn
from timm.layers import use_fused_attn

from ..ops.autocast import cast_once
from ..ops.capture import is_captured, is_compiled
from ..ops.merge import attend_few, pool_tokens
from ..ops.window_attention import window_attention
from ..ops.windows import halo_width
from .layers import LayerNorm, MapInterface, check_heads, check_tokens, split_tokens
from .rel_pos import RelPosBias2d, position_bias

__all__ = ['LongShortAttention', 'LongShortAttention2d']

# torch.fx knows neither sizes nor devices
torch.fx.wrap('attend_few')
torch.fx.wrap('cast_once')
torch.fx.wrap('check_tokens')
torch.fx.wrap('pool_tokens')
torch.fx.wrap('position_bias')
torch.fx.wrap('split_tokens')
torch.fx.wrap('window_attention')


class LongShortAttention(nn.Module):
    r"""Long-short attention: one softmax over a window and a few landmarks.

    With the symbols of the paper (sections 3.1 to 3.3): segment or window `w`, projection rank `r`, heads `h` of
    `d = C / h` channels, `X` the patch tokens of an image and `g` global tokens (class tokens):

        Q, K, V  =  X W_Q, X W_K, X W_V                        qkv
        K, V     <- LN_full(K), LN_full(V)                     norm_kv; DualLN, eq. 8; global tokens included
        P        =  softmax_tokens(X W_P),  N x r per head     dynamic_projection, eq. 4
        K', V'   =  LN_dp(P^T K), LN_dp(P^T V)                 norm_landmarks; r landmarks per head
        O_t      =  softmax(Q_t [K'; K_g; K_halo(t)]^T / sqrt(d) + bias_halo) [V'; V_g; V_halo(t)]
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
        num_global_tokens: Global tokens g, which come before the map's.
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
        dd: Any = {'device': device, 'dtype': dtype}
        check_heads(dim, num_heads)
        if window_size < 1 or rank < 0 or num_global_tokens < 0:
            raise ValueError(
                f'window_size={window_size}, rank={rank}, num_global_tokens={num_global_tokens}:'
                ' expected window_size >= 1, rank >= 0 and num_global_tokens >= 0.')
        if global_update not in ('outputs', 'keys'):
            raise ValueError(f"Unknown global_update={global_update!r}: expected 'outputs' or 'keys'.")
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.rank = rank
        self.num_global_tokens = num_global_tokens
        self.update_from_outputs = global_update == 'outputs'
        self.margin = 0  # rows of neighbors that `project` looks at
        self.fused_attn = use_fused_attn()

        self.make_projections(qkv_bias, dd)
        self.norm_kv = LayerNorm(dim, keep_type=True, **dd)
        self.dynamic_projection: nn.Module = nn.Identity()
        self.norm_landmarks: nn.Module = nn.Identity()
        if rank > 0:
            self.dynamic_projection = nn.Linear(dim, num_heads * rank, **dd)
            self.norm_landmarks = LayerNorm(dim, keep_type=True, **dd)
        self.rel_pos: Optional[RelPosBias2d] = None
        if rel_pos_bias:
            offsets = 2 * (window_size + halo_width(window_size)) - 1
            self.rel_pos = RelPosBias2d(num_heads, (offsets, offsets), **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def make_projections(self, qkv_bias: bool, dd: Any) -> None:
        """Create the layers of `project`."""
        self.qkv = nn.Linear(self.dim, self.dim * 3, bias=qkv_bias, **dd)

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        """Attend over a sequence of global tokens and a map.

        Args:
            x: Tokens, [B, g + H * W, C], the global ones first, H and W >= 1.
            size: Rows H and columns W of the map.

        Returns:
            The updated tokens, of the same shape.

        Raises:
            ValueError: There are other tokens than g + H * W.
        """
        return self.attend(x, size)

    def attend(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        """See `forward`."""
        check_tokens(x, size, self.num_global_tokens)
        B, (H, W), C, g = x.shape[0], size, self.dim, self.num_global_tokens
        x = cast_once(x)
        q, kv = self.project(x, size, g)  # [B, g + N, C], [B, g + N, 2, C]
        global_q, map_q = split_tokens(q, g)
        global_kv, map_kv = split_tokens(kv, g)
        additional_kv = global_kv
        if self.rank > 0:
            landmarks = self.landmarks(split_tokens(self.dynamic_projection(x), g)[1], map_kv)
            additional_kv = torch.cat([landmarks, global_kv], dim=1)  # [B, r + g, 2, C]
        out = window_attention(
            map_q.reshape(B, H, W, C),
            map_kv.reshape(B, H, W, 2, C),
            additional_kv,
            self.window_bias(),
            self.window_size,
            self.num_heads,
            dropout_p=self.attn_drop.p if self.training else 0.,
            fused=self.fused_attn,
        ).reshape(B, H * W, C)
        if g > 0:
            out = torch.cat([self.attend_global(global_q, global_kv, map_kv, out), out], dim=1)
        return self.proj_drop(self.proj(out))

    def project(
            self,
            x: torch.Tensor,
            size: Tuple[int, int],
            num_global_tokens: int,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return queries, [B, g + N, C], and normalized keys and values, [B, g + N, 2, C], of all tokens."""
        B, N, C = x.shape[0], x.shape[1], self.dim
        q, kv = self.qkv(x).split([C, 2 * C], dim=-1)
        if is_captured() and not is_compiled():
            # engines fuse a norm of three dimensions; inductor would write what it gives transposed
            return q, self.norm_kv(kv.reshape(B, 2 * N, C)).reshape(B, N, 2, C)
        return q, self.norm_kv(kv.reshape(B, N, 2, C))

    def landmarks(self, logits: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Distil keys and values of the map, [B, N, 2, C], by logits [B, N, num_heads * rank] into [B, rank, 2, C]."""
        return self.norm_landmarks(pool_tokens(logits, kv, self.num_heads))

    def window_bias(self) -> Optional[torch.Tensor]:
        """Return the bias of the halo logits, [num_heads, w, w, w + 2p, w + 2p]."""
        if self.rel_pos is None:
            return None
        w, halo = self.window_size, self.window_size + 2 * halo_width(self.window_size)
        return position_bias(self.rel_pos()[0], (w, w), (halo, halo))

    def attend_global(
            self,
            q: torch.Tensor,
            global_kv: torch.Tensor,
            map_kv: torch.Tensor,
            out: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the global tokens attend to, [B, g, C].

        Args:
            q: Their queries, [B, g, C].
            global_kv: Their keys and values, [B, g, 2, C].
            map_kv: Keys and values of the map's tokens, [B, N, 2, C].
            out: Outputs of the map's tokens, [B, N, C].
        """
        others_k, others_v = (out, out) if self.update_from_outputs else (map_kv[:, :, 0], map_kv[:, :, 1])
        k = torch.cat([global_kv[:, :, 0], others_k], dim=1)
        v = torch.cat([global_kv[:, :, 1], others_v], dim=1)
        dropout_p = self.attn_drop.p if self.training else 0.
        return attend_few(q, k, v, self.num_heads, dropout_p, self.fused_attn)


class LongShortAttention2d(MapInterface, LongShortAttention):  # type: ignore[misc]  # another call by intention
    """`LongShortAttention` of a map [B, H, W, C] whose global tokens, [B, g, C], are apart."""
