"""Relative position bias on 2-D grids: one dense table of offsets, its expansion, resizing and conversion."""
from typing import Dict, Optional, Tuple
from weakref import WeakKeyDictionary

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_

from .tracing import ceil_div, is_traced, is_tracing_shapes
from .window import halo_width

__all__ = [
    'RelPosBias2d',
    'dense_table',
    'expand_aliased_table',
    'grid_bias',
    'position_bias',
    'resize_bias_table',
    'resize_tables',
]


def resize_bias_table(table: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
    """Resize a bias table to another number of offsets: bicubic, the zero offset staying in the middle.

    Computed in float32 at least, so that half-precision tables lose nothing more than their own rounding.

    Args:
        table: [num_heads, rows, cols].
        size: New rows and columns.

    Returns:
        [num_heads, *size], of the dtype of `table`; equal to `table` when the size does not change.
    """
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(wide.unsqueeze(0), size=size, mode='bicubic', align_corners=False)
    return resized.squeeze(0).to(table.dtype)


def resize_tables(weights: Dict[str, torch.Tensor], model: nn.Module) -> None:
    """Resize the bias tables among weights to those of a model with other grids or windows, in place."""
    expected = model.state_dict()
    for name, table in weights.items():
        if name.endswith('.rel_pos.table') and name in expected and table.shape[0] == expected[name].shape[0]:
            size = tuple(expected[name].shape[1:])
            if tuple(table.shape[1:]) != size:
                weights[name] = resize_bias_table(table, size)


@torch.fx.wrap
def fit_bias_table(table: torch.Tensor, query_size: Tuple[int, int], key_size: Tuple[int, int]) -> torch.Tensor:
    """The table itself where it has the offsets between these grids, resized (`resize_bias_table`) where not."""
    size = (query_size[0] + key_size[0] - 1, query_size[1] + key_size[1] - 1)
    # a comparison of symbolic sizes would tie the graph to one image size; resizing to the same size is the identity
    if is_tracing_shapes() or table.shape[1] != size[0] or table.shape[2] != size[1]:
        table = resize_bias_table(table, size)
    return table


@torch.fx.wrap
def position_bias(table: torch.Tensor, query_size: Tuple[int, int], key_size: Tuple[int, int]) -> torch.Tensor:
    """Look up the bias of every query for every key.

    The offset of query row `y` to key row `k` is found at table row `y - k + key rows - 1`, likewise for columns:
    the first query sees the last key at the table's first row, the last query the first key at its last row.

    Args:
        table: One value per head and offset, [num_heads, query rows + key rows - 1, query cols + key cols - 1].
        query_size: Rows and columns of the queries.
        key_size: Rows and columns of the keys.

    Returns:
        Bias, [num_heads, query rows, query cols, key rows, key cols].
    """
    qh, qw = query_size
    kh, kw = key_size
    device = table.device
    rows = torch.arange(qh, device=device)[:, None] - torch.arange(kh, device=device) + kh - 1
    cols = torch.arange(qw, device=device)[:, None] - torch.arange(kw, device=device) + kw - 1
    # one gather per axis: dimensions are broadcast, not split, as symbolic sizes are hard to divide
    heads = table.shape[0]
    bias = table[:, None].expand(-1, qh, -1, -1).gather(2, rows[None, :, :, None].expand(heads, -1, -1, qw + kw - 1))
    index = cols[None, None, :, None].expand(heads, qh, -1, kh, -1)
    return bias[:, :, None].expand(-1, -1, qw, -1, -1).gather(4, index)


def copy_position_bias(out: torch.Tensor, table: torch.Tensor, key_stride: int) -> None:
    """Write `position_bias` into memory, without a gradient: in long runs, faster than two gathers.

    Args:
        out: Where to, [num_heads, query rows, query cols, key rows, key cols]; a view.
        table: One value per head and offset, [num_heads, query rows + R - 1, query cols + S - 1], for keys on a grid
            of R rows and S columns.
        key_stride: Rows and columns of that grid from one key to the next.
    """
    qh, qw = out.shape[1], out.shape[2]
    kh, kw = table.shape[1] - qh + 1, table.shape[2] - qw + 1
    # counted from a query to its key, offsets grow with the key: what a query sees of a line of the table is a slice
    lines = table.flip(1, 2).unfold(2, kw, 1).flip(2)  # [num_heads, offsets of rows, query cols, grid cols]
    lines = lines[..., ::key_stride].transpose(1, 2)
    for y in range(qh):
        out[:, y] = lines[:, :, qh - 1 - y:qh - 1 - y + kh:key_stride]


def grid_bias(
        table: torch.Tensor,
        global_bias: Optional[torch.Tensor],
        num_rows: int,
        grid_size: Tuple[int, int],
        key_stride: int,
) -> torch.Tensor:
    """Bias of some rows of a map for global tokens and for the map.

    Args:
        table: One value per head and offset, [num_heads, num_rows + height - 1, 2 * width - 1].
        global_bias: Bias for the global tokens, [num_heads, g]; None without.
        num_rows: Rows of queries.
        grid_size: Rows and columns of the map.
        key_stride: Rows and columns from one key to the next.

    Returns:
        [num_heads, num_rows * width, g + keys].
    """
    height, width = grid_size
    if torch.is_grad_enabled() or is_traced():
        bias = position_bias(table, (num_rows, width), grid_size)[..., ::key_stride, ::key_stride]
        bias = bias.flatten(3).flatten(1, 2)
        if global_bias is not None:
            bias = torch.cat([global_bias.unsqueeze(1).expand(-1, bias.shape[1], -1), bias], dim=-1)
        return bias
    keys = ceil_div(height, key_stride), ceil_div(width, key_stride)
    g = 0 if global_bias is None else global_bias.shape[1]
    bias = table.new_empty([table.shape[0], num_rows, width, g + keys[0] * keys[1]])
    if global_bias is not None:
        bias[..., :g] = global_bias[:, None, None]
    copy_position_bias(bias[..., g:].unflatten(3, keys), table, key_stride)
    return bias.flatten(1, 2)


def expand_aliased_table(table: torch.Tensor) -> torch.Tensor:
    """Turn the released window bias table into a dense one, without loss.

    The released code stores `2 (w + p - 1) (w + 2p + 1) + 1` rows and reads offset `(dy, dx)`, counted from 0, at
    row `dy * (w + 2p) + dx`: the stride is shorter than a row of offsets, so that several offsets share a value.

    Args:
        table: As released, [rows, num_heads].

    Returns:
        Dense table, [num_heads, 2 (w + p) - 1, 2 (w + p) - 1].

    Raises:
        ValueError: No window size has that many rows.
    """
    for window_size in range(1, 65):
        p = halo_width(window_size)
        if table.shape[0] == 2 * (window_size + p - 1) * (window_size + 2 * p + 1) + 1:
            offsets = torch.arange(2 * (window_size + p) - 1, device=table.device)
            return table[offsets[:, None] * (window_size + 2 * p) + offsets[None, :]].permute(2, 0, 1).contiguous()
    raise ValueError(
        f'A released window bias table of shape {tuple(table.shape)} fits no window size: expected'
        ' 2 (w + p - 1) (w + 2p + 1) + 1 rows with p = w // 2, for example 253 for w = 7 or 375 for w = 8.')


def dense_table(table: torch.Tensor, aliased: bool) -> torch.Tensor:
    """A bias table as released, [rows, num_heads], as ours, [num_heads, rows of offsets, columns of offsets].

    Args:
        table: As released; returned as it is if it is ours.
        aliased: It is one of windows (`expand_aliased_table`), not of a whole grid.
    """
    if table.ndim != 2:
        return table
    if aliased:
        return expand_aliased_table(table)
    side = round(table.shape[0] ** 0.5)  # released models are square
    return table.T.reshape(-1, side, side)


class RelPosBias2d(nn.Module):
    """Learned relative position bias for patch tokens and, optionally, global tokens.

    Args:
        num_heads: Attention heads.
        table_size: Offsets along rows and columns: query size + key size - 1 on each axis.
        num_global_tokens: Global tokens, each with a bias for all patches, from all patches, and for each other
            (0 leaves these out).
        device: Where to create parameters.
        dtype: Their type.
    """

    def __init__(
            self,
            num_heads: int,
            table_size: Tuple[int, int],
            num_global_tokens: int = 0,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.table = nn.Parameter(torch.empty(num_heads, table_size[0], table_size[1], **dd))
        if num_global_tokens > 0:
            # [0]: global queries, patch keys; [1]: patch queries, global keys
            self.global_patch = nn.Parameter(torch.empty(2, num_heads, num_global_tokens, **dd))
            self.global_global = nn.Parameter(torch.empty(num_heads, num_global_tokens, num_global_tokens, **dd))
        else:
            self.global_patch = None
            self.global_global = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all biases from a truncated normal of standard deviation 0.02, as released."""
        for parameter in self.parameters():
            trunc_normal_(parameter, std=.02)

    @torch.jit.ignore
    def set_table_size(self, table_size: Tuple[int, int]) -> None:
        """Resize the table in place of the old one, keeping its `requires_grad`."""
        if tuple(self.table.shape[1:]) != tuple(table_size):
            table = resize_bias_table(self.table.detach(), table_size)
            self.table = nn.Parameter(table, requires_grad=self.table.requires_grad)

    def forward(
            self,
            query_size: Tuple[int, int],
            key_size: Tuple[int, int],
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        """What biases are made from. The one way to the parameters: some bring them in when a module is called.

        Returns:
            The table for the offsets between the grids (`position_bias` expands it), resized to fit if need be,
            [num_heads, query + key rows - 1, query + key cols - 1]. For global tokens (None without), the bias of
            their queries for patches and of patches for them, [2, num_heads, g], and among them, [num_heads, g, g].
        """
        if torch.jit.is_scripting():
            table = fit_bias_table(self.table, query_size, key_size)
        else:
            table = self.remembered_table(query_size, key_size)
        return table, self.global_patch, self.global_global

    @torch.jit.unused
    def remembered_table(self, query_size: Tuple[int, int], key_size: Tuple[int, int]) -> torch.Tensor:
        """`fit_bias_table`, from the last call in inference on a CPU if neither weights nor sizes have changed."""
        table = self.table
        if torch.is_grad_enabled() or is_traced() or type(table) is not nn.Parameter or not table.is_cpu:
            return fit_bias_table(table, query_size, key_size)
        size = (table.shape[0], query_size[0] + key_size[0] - 1, query_size[1] + key_size[1] - 1)
        if size == table.shape:
            return table
        source, resized = _last_resized.get(self, (None, None))
        if resized is None or source.dtype != table.dtype or resized.shape != size or not torch.equal(source, table):
            source, resized = table.clone(), fit_bias_table(table, query_size, key_size)
            _last_resized[self] = source, resized
        return resized


# What inference resized last, one table per layer, and what from: values tell that weights have changed, however that
# was done. A resize takes some tenths of a millisecond, a comparison some hundredths.
_last_resized: 'WeakKeyDictionary[RelPosBias2d, Tuple[torch.Tensor, torch.Tensor]]' = WeakKeyDictionary()
