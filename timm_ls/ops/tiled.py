"""Window attention tile by tile: each window with exactly the keys that lie inside the map, so that none is masked.

Windows are grouped by the part of their halo that lies inside the map (`windows.axis_spans`): a handful of groups,
whatever the size of the map. The keys of a tile are gathered by one call, each group is one attention call, and a tile
is of a bounded size. The backward pass keeps nothing but the inputs and recomputes what it needs.

On a CPU, windows of 2 are attended two by two: masked is what belongs to the other three alone.
"""
from contextlib import nullcontext
from functools import reduce
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._compat import softmax_backward
from .chunks import chunk_bytes
from .derivatives import differentiable_gradients
from .indices import on_device
from .masked import plain_attention
from .windows import Tile, halo_width, head_plan, tile_plan, tiles

__all__ = ['joinable_windows', 'tiled_attention', 'tiled_operator']

# masks that do not begin at 16 bytes end in a misaligned address in cuDNN's kernel, and the process then has no GPU
CUDA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def tiled_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
) -> torch.Tensor:
    """Return `window_attention`; `bias` is of the type of `q`."""
    return _TiledAttention.apply(q, kv, additional_kv, bias, window_size, num_heads, first_row)


def forward(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
) -> torch.Tensor:
    """Return `window_attention` without a gradient."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tile_bias = _TileBias(join_bias(bias, q, window_size, joined_windows(q, kv, window_size, first_row)))
    for tile in cut_tiles(q, kv, additional_kv, window_size, first_row):
        out_tile = attend_tile(_queries(q, tile, first_row), kv, additional_kv, tile_bias, tile, window_size, num_heads)
        if out_tile.numel() == q.numel():
            return out_tile
        _queries(out, tile, first_row).copy_(out_tile)
    return out


def cut_tiles(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        window_size: int,
        first_row: int,
) -> Iterator[Tile]:
    """Cut a call's windows into tiles whose gathered keys and values take about twice `chunk_bytes`."""
    B, rows, W, C = q.shape
    joined = joined_windows(q, kv, window_size, first_row)
    num_keys = additional_kv.shape[1] + (joined * window_size + 2 * halo_width(window_size)) ** 2
    windows = 2 * chunk_bytes(q.device) // (num_keys * 2 * C * q.element_size())
    return tiles(B, kv.shape[1], W, window_size, first_row, rows, windows, joined)


def joinable_windows(window_size: int, device: torch.device) -> int:
    """Return how many windows along each axis are best attended as one, with keys that are not a query's own masked.

    A window of 2 gathers 16 keys for 4 queries, two by two of them 36 for 16: fewer bytes on a CPU. For larger windows
    what is masked costs more than that saves. A key that is not finite spoils all queries of the joined windows.
    """
    return 2 if window_size == 2 and device.type == 'cpu' else 1


def joined_windows(q: torch.Tensor, kv: torch.Tensor, window_size: int, first_row: int) -> int:
    """Return how many windows along each axis are attended as one: `joinable_windows`, if the rows are whole ones."""
    joined, rows = joinable_windows(window_size, q.device), q.shape[1]
    step = joined * window_size
    return joined if first_row % step == 0 and (rows % step == 0 or first_row + rows == kv.shape[1]) else 1


def join_bias(bias: Optional[torch.Tensor], q: torch.Tensor, window_size: int, joined: int) -> Optional[torch.Tensor]:
    """Return the bias of joined windows, [heads, side, side, side + 2p, side + 2p], minus infinity for others' keys."""
    if joined == 1:
        return bias
    w, halo = window_size, window_size + 2 * halo_width(window_size)
    if bias is None:
        bias = q.new_zeros(1, w, w, halo, halo)
    size = halo + (joined - 1) * w
    joint = bias.new_full((len(bias), joined * w, joined * w, size, size), -torch.inf)
    for part in own_bias(joint, w, halo, joined):
        part.copy_(bias)
    return joint


def own_bias(joint: torch.Tensor, window_size: int, halo: int, joined: int) -> Iterator[torch.Tensor]:
    """View the parts of a joint bias that are the bias of one of the windows."""
    for y in range(0, joined * window_size, window_size):
        for x in range(0, joined * window_size, window_size):
            yield joint[:, y:y + window_size, x:x + window_size, y:y + halo, x:x + halo]


def attend_tile(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        tile_bias: '_TileBias',
        tile: Tile,
        window_size: int,
        num_heads: int,
) -> torch.Tensor:
    """Return the attention of a tile's queries, [images, rows, cols, C]."""
    C = q.shape[-1]
    plan = on_device(tile_plan, q.device, *tile.geometry, window_size, additional_kv.shape[1], False, tile.joined)
    queries = q.reshape(-1, C).index_select(0, plan.queries).unflatten(1, (num_heads, -1))
    keys = _tokens(kv, additional_kv, tile).index_select(0, plan.keys).unflatten(1, (2, num_heads, -1))
    bias = tile_bias.of(tile, plan)
    outs, query, key, entry = [], 0, 0, 0
    with sdpa_kernel(CUDA_KERNELS) if q.is_cuda else nullcontext():
        for n, L, S, _ in plan.groups:
            q_win = queries[query:query + n * L].unflatten(0, (n, L)).transpose(1, 2)  # [n, heads, L, d]
            k_win, v_win = keys[key:key + n * S].unflatten(0, (n, S)).permute(2, 0, 3, 1, 4)  # [n, heads, S, d]
            mask = None if bias is None else bias[None, :, entry:entry + L * S].unflatten(2, (L, S))
            out = F.scaled_dot_product_attention(q_win, k_win, v_win, attn_mask=mask)
            outs.append(out.transpose(1, 2).reshape(n * L, C))
            query, key, entry = query + n * L, key + n * S, entry + L * S
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.index_select(0, plan.outputs).view(q.shape)


def _queries(x: torch.Tensor, tile: Tile, first_row: int) -> torch.Tensor:
    """View a tile's part of queries [B, rows, W, ...] that start at row `first_row` of the maps."""
    images, rows, cols = tile.queries
    return x[images, rows.start - first_row:rows.stop - first_row, cols]


def _tokens(kv: torch.Tensor, additional_kv: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Join the part of maps that holds a tile's keys and its images' additional keys, [tokens, 2 * C]."""
    maps, additional = kv[tile.keys], additional_kv[tile.images]
    num_tokens, channels = maps[..., 0, 0].numel(), 2 * kv.shape[-1]
    tokens = kv.new_empty(num_tokens + additional[..., 0, 0].numel(), channels)
    tokens[:num_tokens].view(maps.shape).copy_(maps)
    tokens[num_tokens:].view(additional.shape).copy_(additional)
    return tokens


class _TileBias:
    """Bias of tiles' logits, [heads, entries of the plan], zero for additional keys; one for each geometry."""

    def __init__(self, bias: Optional[torch.Tensor]):
        self.table = None if bias is None else F.pad(bias.flatten(1), (0, 1))
        self.gathered: Dict[Tuple[Any, ...], torch.Tensor] = {}

    def of(self, tile: Tile, plan: Any) -> Optional[torch.Tensor]:
        if self.table is None:
            return None
        _, *spans = tile.geometry
        bias = self.gathered.get(tuple(spans))
        if bias is None:
            bias = self.gathered[tuple(spans)] = self.table.gather(1, plan.bias.expand(self.table.shape[0], -1))
        return bias


# Gradients


class _TiledAttention(torch.autograd.Function):
    """`forward` with a backward pass that keeps nothing but the inputs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        _keep_inputs(ctx, inputs, None)
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to have gradients
            return differentiable_gradients(
                plain_attention, (*ctx.saved_tensors, *ctx.sizes), ctx.needs_input_grad, grad_out)
        return _gradients(ctx, grad_out, backward)


def _keep_inputs(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
    """Keep what the backward pass needs."""
    ctx.save_for_backward(*inputs[:4])
    ctx.sizes = inputs[4:]


def _gradients(ctx: Any, grad_out: torch.Tensor, function: Callable[..., Any]) -> Tuple[Optional[torch.Tensor], ...]:
    """Return the gradients of all inputs by `backward`, or by that as an operator."""
    q, kv, additional_kv, bias = ctx.saved_tensors
    *grads, grad_bias = function(grad_out, q, kv, additional_kv, bias, *ctx.sizes)
    return (*grads, None if bias is None else grad_bias, None, None, None)


def backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `q`, `kv`, `additional_kv` and `bias` (empty without one).

    What all windows add to, the last two, is summed in float32 or wider.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    joined = joined_windows(q, kv, window_size, first_row)
    joint_bias = join_bias(bias, q, window_size, joined)
    tile_bias = _TileBias(joint_bias)
    grad_table: Optional[torch.Tensor] = None
    if bias is not None and tile_bias.table is not None:
        grad_table = torch.zeros_like(tile_bias.table, dtype=wide)
    grads: Optional[Tuple[torch.Tensor, ...]] = None
    for tile in cut_tiles(q, kv, additional_kv, window_size, first_row):
        tile_grads = tile_backward(
            _queries(grad_out, tile, first_row), _queries(q, tile, first_row), kv, additional_kv, tile_bias, grad_table,
            tile, window_size, num_heads)
        if all(part.numel() == whole.numel() for part, whole in zip(tile_grads, (q, kv, additional_kv))):
            grads = tile_grads  # of everything: there is but one tile
            break
        if grads is None:
            grads = (
                torch.empty_like(q, memory_format=torch.contiguous_format),
                torch.zeros_like(kv, memory_format=torch.contiguous_format),
                torch.zeros_like(additional_kv, dtype=wide, memory_format=torch.contiguous_format))
        grad_q, grad_kv, grad_additional = grads
        _queries(grad_q, tile, first_row).copy_(tile_grads[0])
        grad_kv[tile.keys] += tile_grads[1]
        grad_additional[tile.images] += tile_grads[2]
    if grads is None:  # there are no images
        grads = torch.zeros_like(q), torch.zeros_like(kv), torch.zeros_like(additional_kv)
    if bias is None or joint_bias is None or grad_table is None:
        grad_bias = q.new_empty(0)
    else:
        parts = own_bias(grad_table[:, :-1].view(joint_bias.shape), window_size, bias.shape[-1], joined)
        grad_bias = reduce(torch.add, parts).to(bias.dtype).contiguous()
    return grads[0], grads[1], grads[2].to(kv.dtype, copy=True), grad_bias  # an operator's outputs share no memory


def tile_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        tile_bias: _TileBias,
        grad_table: Optional[torch.Tensor],
        tile: Tile,
        window_size: int,
        num_heads: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a tile's queries, of the maps that its keys lie in and of its additional keys.

    Those of the bias are added to `grad_table`. A row is one head's d channels of a token from here on.
    """
    h, d = num_heads, q.shape[-1] // num_heads
    wide = torch.promote_types(q.dtype, torch.float32)
    E = additional_kv.shape[1]
    plan = on_device(tile_plan, q.device, *tile.geometry, window_size, E, False, tile.joined)
    rows = on_device(head_plan, q.device, *tile.geometry, window_size, E, num_heads, False, tile.joined)
    tokens = _tokens(kv, additional_kv, tile)
    keys, values = tokens.view(-1, d).index_select(0, rows.keys).unflatten(0, (2, -1))  # [rows, d]
    queries = q.reshape(-1, d).index_select(0, rows.queries).mul_(d ** -0.5)
    grad_outs = grad_out.reshape(-1, d).index_select(0, rows.queries)
    grad_queries, grad_keys = torch.empty_like(queries), keys.new_empty(2, *keys.shape)
    bias = tile_bias.of(tile, plan)
    grad_bias = None if bias is None or grad_table is None else torch.empty_like(bias, dtype=wide)

    query, key, entry = 0, 0, 0
    for n, L, S, _ in plan.groups:
        its_queries = slice(query, query + n * h * L)
        its_keys = slice(key, key + n * h * S)
        q_win, g_win, grad_q_win = (
            x[its_queries].view(n * h, L, d) for x in (queries, grad_outs, grad_queries))
        k_win, v_win, grad_k_win, grad_v_win = (
            x[its_keys].view(n * h, S, d) for x in (keys, values, grad_keys[0], grad_keys[1]))
        logits = torch.bmm(q_win, k_win.transpose(1, 2))
        if bias is not None:
            logits.view(n, h, L * S).add_(bias[:, entry:entry + L * S])
        weights = logits.softmax(dim=-1, dtype=wide)
        grad_logits = softmax_backward(torch.bmm(g_win, v_win.transpose(1, 2)).to(wide), weights)
        if grad_bias is not None:
            torch.sum(grad_logits.view(n, h, L * S), dim=0, out=grad_bias[:, entry:entry + L * S])
        weights, grad_logits = weights.to(q.dtype), grad_logits.to(q.dtype)
        torch.bmm(grad_logits, k_win, out=grad_q_win)
        torch.bmm(grad_logits.transpose(1, 2), q_win, out=grad_k_win)
        torch.bmm(weights.transpose(1, 2), g_win, out=grad_v_win)
        query, key, entry = its_queries.stop, its_keys.stop, entry + L * S

    if grad_table is not None and grad_bias is not None:
        grad_table.index_add_(1, plan.bias, grad_bias)
    grad_q = grad_queries.mul_(d ** -0.5).index_select(0, rows.outputs).view(q.shape)
    # a row's gradient is the sum over the windows that gathered it
    grad_tokens = F.embedding_bag(rows.bags, grad_keys.view(-1, d), rows.offsets, mode='sum').view_as(tokens)
    maps, additional = kv[tile.keys], additional_kv[tile.images]
    num_tokens = maps[..., 0, 0].numel()
    return grad_q, grad_tokens[:num_tokens].view(maps.shape), grad_tokens[num_tokens:].view(additional.shape)


# The same as an operator, for graphs that are compiled for a CPU: their compiler does not look into it, and its own
# code for the masked form is several times slower. Eager mode does without: counters and profilers see what is inside.


@torch.library.custom_op('timm_ls::tiled_attention', mutates_args=())
def tiled_operator(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
) -> torch.Tensor:
    """Return `window_attention` at any size; `bias` is of the type of `q`."""
    return forward(q, kv, additional_kv, bias, window_size, num_heads, first_row)


tiled_operator_backward = torch.library.custom_op('timm_ls::tiled_attention_backward', backward, mutates_args=())


@tiled_operator.register_fake
def _(q, kv, additional_kv, bias, window_size, num_heads, first_row):  # type: ignore[no-untyped-def]
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@tiled_operator_backward.register_fake
def _(grad_out, q, kv, additional_kv, bias, window_size, num_heads, first_row):  # type: ignore[no-untyped-def]
    grad_bias = q.new_empty(0) if bias is None else bias
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, kv, additional_kv, grad_bias))


def _operator_gradients(ctx: Any, grad_out: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
    return _gradients(ctx, grad_out, tiled_operator_backward)


tiled_operator.register_autograd(_operator_gradients, setup_context=_keep_inputs)
