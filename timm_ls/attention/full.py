"""Full attention over a map of tokens, for the low-resolution stages of a pyramid: its time grows with their square."""
from typing import Any, Final, List, NamedTuple, Optional, Tuple

import torch
import torch.fx
import torch.nn as nn
from timm.layers import use_fused_attn
from timm.models import checkpoint

from ..ops.attend import attend_heads
from ..ops.capture import needs_plain_operations
from .layers import MapInterface, check_heads, check_tokens
from .rel_pos import RelPosBias2d, fit_bias_table, position_bias

__all__ = ['FullAttention', 'FullAttention2d', 'GlobalAttention2d', 'attend_grid', 'attend_grid_rows']

# torch.fx knows neither sizes nor devices
torch.fx.wrap('attend_grid')
torch.fx.wrap('check_tokens')
torch.fx.wrap('fit_bias_table')


class FullAttention(nn.Module):
    """Full attention over a map and global tokens, with a resizable relative position bias.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        grid_size: Rows and columns of the map that the bias table is made for; any other map is served by resizing
            the table (bicubic over offsets) on the way.
        num_global_tokens: Global tokens, which come before the map's.
        qkv_bias: Learn a bias for queries, keys and values.
        rel_pos_bias: Learn a bias per head and offset, and for the global tokens.
        attn_drop: Dropout probability of attention weights.
        proj_drop: Dropout probability of the output.
        kv_stride: Rows and columns from one key to the next that a subclass's `project` makes; 1 here.
        device: Where to create parameters.
        dtype: Their type.

    Raises:
        ValueError: `dim` is not divisible by `num_heads`, or `num_global_tokens` is negative.
    """

    fused_attn: Final[bool]
    num_heads: Final[int]
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
            kv_stride: int = 1,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        check_heads(dim, num_heads)
        if num_global_tokens < 0:
            raise ValueError(f'num_global_tokens={num_global_tokens}: expected 0 or more.')
        self.dim = dim
        self.num_heads = num_heads
        self.num_global_tokens = num_global_tokens
        self.kv_stride = kv_stride
        self.margin = 0  # rows of neighbors that `project` looks at
        self.fused_attn = use_fused_attn()
        self.bias_bytes = 64 * 2 ** 20  # of the bias to hold at a time

        self.make_projections(qkv_bias, dd)
        self.rel_pos: Optional[RelPosBias2d] = None
        if rel_pos_bias:
            self.rel_pos = RelPosBias2d(num_heads, _num_offsets(grid_size), num_global_tokens, **dd)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def make_projections(self, qkv_bias: bool, dd: Any) -> None:
        """Create the layers of `project`."""
        self.qkv = nn.Linear(self.dim, self.dim * 3, bias=qkv_bias, **dd)

    @torch.jit.ignore
    def set_grid_size(self, grid_size: Tuple[int, int]) -> None:
        """Make the bias table for another map, resizing what was learned."""
        if self.rel_pos is not None:
            self.rel_pos.set_table_size(_num_offsets(grid_size))

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        """Attend over a sequence of global tokens and a map.

        Args:
            x: Tokens, [B, g + H * W, C], the global ones first.
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
        q, k, v = self.project(x, size, self.num_global_tokens)
        dropout_p = self.attn_drop.p if self.training else 0.
        out = attend_grid(
            q, k, v, self.biases(size), size, self.kv_stride, self.num_heads, dropout_p, self.fused_attn,
            self.bias_bytes)
        return self.proj_drop(self.proj(out))

    def project(
            self,
            x: torch.Tensor,
            size: Tuple[int, int],
            num_global_tokens: int,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, [B, g + N, C], and keys and values, [B, g + N / kv_stride ** 2, C], of all tokens."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return q, k, v

    def biases(self, size: Tuple[int, int]) -> Optional['GridBias']:
        """Return what the bias for a map of this size is made from, None without one."""
        if self.rel_pos is None:
            return None
        table, global_patch, global_global = self.rel_pos()
        return GridBias(fit_bias_table(table, size), global_patch, global_global)


class GridBias(NamedTuple):
    """What the position bias of a map and its global tokens is made from."""

    table: torch.Tensor  # [heads, 2 H - 1, 2 W - 1]: of offsets within the map
    global_patch: Optional[torch.Tensor]  # [2, heads, g]: of global queries for patches, of patches for global keys
    global_global: Optional[torch.Tensor]  # [heads, g, g]: of global queries for global keys


def grid_bias(
        parts: GridBias,
        size: Tuple[int, int],
        first_row: int,
        num_rows: int,
        kv_stride: int,
) -> torch.Tensor:
    """Return the bias of some rows of a map, and of the global tokens if the first row is among them, for all keys.

    Args:
        parts: What it is made from.
        size: Rows H and columns W of the map.
        first_row: First row of queries.
        num_rows: Rows of queries.
        kv_stride: Rows and columns from one key to the next.

    Returns:
        [1, heads, (g +) num_rows * W, g + keys].
    """
    table = parts.table.narrow(1, first_row, num_rows + size[0] - 1)  # the offset to the last key comes first
    bias = position_bias(table, (num_rows, size[1]), size, kv_stride).flatten(3).flatten(1, 2)  # [heads, queries, keys]
    global_patch, global_global = parts.global_patch, parts.global_global
    if global_patch is not None and global_global is not None:
        num_queries, num_keys = bias.shape[1], bias.shape[2]
        bias = torch.cat([global_patch[1].unsqueeze(1).expand(-1, num_queries, -1), bias], dim=2)
        if first_row == 0:
            of_global = torch.cat([global_global, global_patch[0].unsqueeze(2).expand(-1, -1, num_keys)], dim=2)
            bias = torch.cat([of_global, bias], dim=1)
    return bias.unsqueeze(0)


def attend_grid_rows(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parts: Optional[GridBias],
        size: Tuple[int, int],
        first_row: int,
        num_rows: int,
        kv_stride: int,
        num_heads: int,
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """Return `attend_grid` of some rows of a map, and of the global tokens if the first row is among them."""
    bias: Optional[torch.Tensor] = None
    if parts is not None:
        bias = grid_bias(parts, size, first_row, num_rows, kv_stride).to(q.dtype)
    return attend_heads(q, k, v, bias, num_heads, dropout_p, fused)


def attend_grid(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parts: Optional[GridBias],
        size: Tuple[int, int],
        kv_stride: int,
        num_heads: int,
        dropout_p: float,
        fused: bool,
        bias_bytes: int,
) -> torch.Tensor:
    """Return full attention of global tokens and a map, in row chunks where its bias exceeds `bias_bytes`.

    Args:
        q: Queries, [B, g + H * W, C], global tokens first.
        k: Keys of global tokens and of every `kv_stride`-th row and column, the first included, [B, g + N, C].
        v: Values of the same tokens, [B, g + N, C].
        parts: What the bias is made from; None for no bias.
        size: Rows H and columns W of the map.
        kv_stride: Rows and columns from one key to the next.
        num_heads: Heads that share the C channels.
        dropout_p: Probability of dropping an attention weight.
        fused: Use torch's `scaled_dot_product_attention`.
        bias_bytes: Of the bias to hold at a time; in training, the backward pass makes it anew.

    Returns:
        [B, g + H * W, C].
    """
    height, width = size
    if parts is not None and not needs_plain_operations():
        row_bytes = num_heads * width * k.shape[1] * k.element_size()
        rows = max(1, bias_bytes // max(1, row_bytes))
        if rows < height:
            outs: List[torch.Tensor] = []
            start = 0
            while start < height:
                num_rows = min(rows, height - start)
                stop = q.shape[1] - (height - start - num_rows) * width
                first = 0 if start == 0 else stop - num_rows * width
                if torch.is_grad_enabled() and not torch.jit.is_scripting():
                    outs.append(checkpoint(
                        attend_grid_rows, q[:, first:stop], k, v, parts, size, start, num_rows, kv_stride, num_heads,
                        dropout_p, fused))
                else:
                    outs.append(attend_grid_rows(
                        q[:, first:stop], k, v, parts, size, start, num_rows, kv_stride, num_heads, dropout_p, fused))
                start += num_rows
            return torch.cat(outs, dim=1)
    return attend_grid_rows(
        q, k, v, parts, size, 0, height, kv_stride, num_heads, dropout_p, fused)


def _num_offsets(grid_size: Tuple[int, int]) -> Tuple[int, int]:
    """Return the offsets between two tokens of a grid, per axis."""
    return 2 * grid_size[0] - 1, 2 * grid_size[1] - 1


class FullAttention2d(MapInterface, FullAttention):  # type: ignore[misc]  # another call by intention
    """`FullAttention` of a map [B, H, W, C] whose global tokens, [B, g, C], are apart."""


GlobalAttention2d = FullAttention2d  # its first name, though it has nothing to do with global tokens
