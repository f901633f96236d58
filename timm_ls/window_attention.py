"""Attention of every token to its window's halo and to a few extra keys: one mathematics, several implementations.

`window_attention` is the one place that chooses between them:

- 'tiled': windows grouped by the part of their halo that lies inside the map, so that all keys are valid and no mask
  exists; a bounded number of windows at a time; the backward pass recomputes what it needs. Eager mode. In inference,
  blocks call it for a few rows of queries at a time (`attend_rows`).
- 'masked': one gather and one attention call over all windows, with a mask. No Python decision depends on a size, so
  that it can be scripted, traced, compiled and exported with dynamic sizes; plain autograd, which `torch.func` and
  second derivatives need.

A third, 'triton', is a kernel for CUDA devices (`triton_attention`), which only those who ask for it get.

Graphs hold the masked one; but what `torch.compile` makes for a CPU holds the tiled one, as an operator of its own.
"""
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Callable, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from .streaming import piece_bytes
from .tracing import ceil_div, is_traced, is_tracing_shapes
from .window import AxisSpan, axis_spans, halo_width, token_index, window_index, window_view

__all__ = ['attend', 'attend_rows', 'attention_implementation', 'is_automatic', 'softmax', 'window_attention']

IMPLEMENTATIONS = ('auto', 'tiled', 'masked', 'triton')
_implementation: ContextVar[str] = ContextVar('timm_ls_attention_implementation', default='auto')


@contextmanager
def attention_implementation(name: str) -> Iterator[None]:
    """Force how window attention is computed, for debugging and comparison.

    All ways give the same values and gradients up to rounding. Scripted and exported models always hold the masked
    one, and so do compiled ones on other devices than a CPU; on a CPU, what is in force when they are compiled.

    Args:
        name: 'tiled' or 'masked', for a map as a whole, or 'auto' (the default: tiled in eager mode, by pieces of the
            map in inference, and compiled for a CPU; masked where other graphs are captured and where attention
            dropout is active). 'triton' is a kernel for CUDA devices; see `triton_attention` for what is known of it.

    Raises:
        ValueError: The name is unknown.
        ImportError: It is 'triton', which is not installed. Tensors that it does not take are a RuntimeError later.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f'Unknown attention implementation {name!r}: expected one of {", ".join(IMPLEMENTATIONS)}.')
    if name == 'triton':
        _import_triton()  # an error now, not in the middle of a model
    token = _implementation.set(name)
    try:
        yield
    finally:
        _implementation.reset(token)


def softmax(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """Softmax in float32 or better."""
    return logits.softmax(dim=dim, dtype=torch.promote_types(logits.dtype, torch.float32))


def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: Optional[torch.Tensor],
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """Scaled dot-product attention with an additive bias, fused or plain (softmax in float32 at least).

    Args:
        q: Queries, [..., heads, L, d].
        k: Keys, [..., heads, S, d].
        v: Values, [..., heads, S, d].
        bias: Added to the scaled logits, broadcastable to [..., heads, L, S].
        dropout_p: Probability of dropping an attention weight.
        fused: Use torch's `scaled_dot_product_attention`, but where it has no kernel: for a bias that learns, on a CPU.

    Returns:
        [..., heads, L, d].
    """
    if bias is not None and bias.requires_grad and bias.device.type == 'cpu' and not is_tracing_shapes():
        fused = False  # torch would take a plain form of its own, slower as it looks for masked rows
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return F.dropout(softmax(logits, dim=-1).to(q.dtype), dropout_p) @ v


def window_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        extra_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        dropout_p: float = 0.,
        fused: bool = True,
) -> torch.Tensor:
    """Attend, in one softmax, from every token to the halo of its window and to extra keys common to the image.

    Args:
        q: Queries, [B, H, W, C], not yet scaled.
        kv: Keys and values, [B, H, W, 2, C].
        extra_kv: Keys and values that all queries of an image see, [B, E, 2, C]; E may be 0.
        bias: Bias of the halo logits, [num_heads, w, w, w + 2p, w + 2p] with p = w // 2.
        window_size: w.
        num_heads: Heads that share the C channels.
        dropout_p: Probability of dropping an attention weight.
        fused: Use torch's `scaled_dot_product_attention`.

    Returns:
        [B, H, W, C].
    """
    kv, extra_kv = kv.to(q.dtype), extra_kv.to(q.dtype)  # autocast gives norms in float32 on some devices
    if torch.jit.is_scripting():
        return _masked(q, kv, extra_kv, bias, window_size, num_heads, dropout_p, fused)
    else:
        in_graph = is_traced()
        name = 'masked' if dropout_p > 0 or in_graph and not _takes_operator(q) else _implementation.get()
        if name == 'masked' or not fused and name == 'auto':
            return _masked(q, kv, extra_kv, bias, window_size, num_heads, dropout_p, fused)
        if bias is not None:
            bias = bias.to(q.dtype)
        if in_graph:
            return tiled_attention(q, kv, extra_kv, bias, window_size, num_heads)
        if name == 'triton':
            return _import_triton()(q, kv, extra_kv, bias, window_size, num_heads)
        return _TiledAttention.apply(q, kv, extra_kv, bias, window_size, num_heads)


def _import_triton() -> Callable[..., torch.Tensor]:
    """The kernel, with what it needs: an optional package."""
    from .triton_attention import triton_attention
    return triton_attention


def is_automatic() -> bool:
    """Whether no implementation is forced."""
    return _implementation.get() == 'auto'


def _masked(
        q: torch.Tensor,
        kv: torch.Tensor,
        extra_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """`window_attention` over all windows at once, positions outside the map masked."""
    B, H, W, C = q.shape
    E = extra_kv.shape[1]
    L, halo = window_size * window_size, window_size + 2 * halo_width(window_size)
    K = halo * halo
    d = C // num_heads
    # zeros, so that nothing gathered for a position outside the map reaches a value or a gradient, not even as 0 * inf
    index, valid = window_index(B, H, W, window_size, 0, q.device)
    q_win = q.reshape(-1, C).index_select(0, index).masked_fill(~valid[:, None], 0.)
    q_win = q_win.reshape(-1, L, num_heads, d).transpose(1, 2)

    index, valid = window_index(B, H, W, window_size, halo_width(window_size), q.device)
    kv_win = kv.reshape(-1, 2 * C).index_select(0, index).masked_fill(~valid[:, None], 0.).reshape(-1, K, 2 * C)
    N = kv_win.shape[0]
    image = torch.arange(N, device=q.device) * B // N
    extra = extra_kv.flatten(2).index_select(0, image)
    kv_win = torch.cat([extra, kv_win], dim=1).reshape(N, E + K, 2, num_heads, d).permute(2, 0, 3, 1, 4)

    mask = torch.zeros(N, 1, 1, K, device=q.device, dtype=q.dtype)
    lowest = -6e4 if q.dtype == torch.float16 else -3e38  # finite: no weight, no NaN
    mask = mask.masked_fill(~valid.reshape(N, 1, 1, K), lowest)
    if bias is not None:
        mask = mask + bias.to(q.dtype).reshape(1, num_heads, L, K)
    mask = F.pad(mask, (E, 0))

    out = attend(q_win, kv_win[0], kv_win[1], mask, dropout_p, fused)
    out = out.transpose(1, 2).clone(memory_format=torch.contiguous_format)  # in graphs, its layout may change later
    index = token_index(B, H, W, window_size, q.device)
    return out.reshape(-1, C).index_select(0, index).reshape(B, H, W, C)


class _Tile(NamedTuple):
    """A block of windows with the same valid part of the halo, of a few images.

    Its views of maps go by head, so that products over heads need no further copy.
    """

    images: slice
    row: AxisSpan
    col: AxisSpan

    def queries(self, x: torch.Tensor, window_size: int, num_heads: int, first_row: int = 0) -> torch.Tensor:
        """View of the tile's queries in maps [B, rows, W, C] from row `first_row` on, [b, n, m, heads, qh, qw, d]."""
        row, col = self.row, self.col
        return window_view(
            x,
            self.images,
            (row.query_start - first_row, row.query_size, row.count),
            (col.query_start, col.query_size, col.count),
            window_size,
            num_heads,
        )

    def keys(self, x: torch.Tensor, window_size: int, num_heads: int, step: int = 1) -> torch.Tensor:
        """View of the tile's overlapping halos in maps [B, H, W, 2, C], [2, b, n, m, heads, kh, kw, d].

        Args:
            x: The maps.
            window_size: Rows and columns of a window.
            num_heads: Heads that share the C channels.
            step: Windows from one of the tile's to its next.
        """
        row, col = self.row, self.col
        return window_view(
            x,
            self.images,
            (row.key_start, row.key_size, row.count),
            (col.key_start, col.key_size, col.count),
            step * window_size,
            num_heads,
        )

    def every_other(self, i: int, j: int, window_size: int) -> '_Tile':
        """Every second window along both axes, from the given ones on; for `keys` with a `step` of two."""

        rows, cols = (len(range(first, span.count, 2)) for first, span in ((i, self.row), (j, self.col)))
        return self._replace(
            row=self.row.windows(i, rows, window_size), col=self.col.windows(j, cols, window_size))

    def halo(self) -> Tuple[int, ...]:
        """What a tile's logits' bias depends on."""
        row, col = self.row, self.col
        return row.query_size, row.halo_offset, row.key_size, col.query_size, col.halo_offset, col.key_size

    def bias(self, x: torch.Tensor) -> torch.Tensor:
        """View of the tile's part of a full-halo bias, [heads, query rows, query cols, key rows, key cols]."""
        qh, top, kh, qw, left, kw = self.halo()
        return x[:, :qh, :qw, top:top + kh, left:left + kw]


def _tiles(height: int, q: torch.Tensor, window_size: int, first_row: int = 0) -> Iterator[_Tile]:
    """Cut the windows of queries [B, rows, W, C] into tiles of about `piece_bytes` of gathered keys.

    Args:
        height: Rows of the maps.
        q: Queries of some of these rows, whole windows.
        window_size: Rows and columns of a window.
        first_row: Where in the maps the queries start.
    """
    B, rows, W, C = q.shape
    for row in axis_spans(height, window_size):
        skipped = max(0, (first_row - row.query_start) // window_size)  # windows before the first
        stop = min(row.count, ceil_div(first_row + rows - row.query_start, window_size))
        for col in axis_spans(W, window_size):
            windows = max(1, piece_bytes(q) // (row.key_size * col.key_size * 2 * C * q.element_size()))
            num_cols = ceil_div(col.count, ceil_div(col.count, windows))  # as equal as can be
            num_rows = min(row.count, max(1, windows // num_cols))
            images = max(1, min(B, windows // (num_rows * num_cols)))
            for i in range(skipped, stop, num_rows):
                row_part = row.windows(i, min(num_rows, stop - i), window_size)
                for j in range(0, col.count, num_cols):
                    col_part = col.windows(j, min(num_cols, col.count - j), window_size)
                    for image in range(0, B, images):
                        yield _Tile(slice(image, min(B, image + images)), row_part, col_part)


def _extra_by_head(extra_kv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """View of extra keys and values [B, E, 2, C] to be copied into windows, [2, B, 1, 1, heads, E, d]."""
    return extra_kv.unflatten(3, (num_heads, -1)).permute(2, 0, 3, 1, 4)[:, :, None, None]


def _gather_keys(tile: _Tile, kv: torch.Tensor, extra: torch.Tensor, window_size: int) -> torch.Tensor:
    """Extra keys (`_extra_by_head`), then the halo, of each window of a tile, and their values.

    Returns:
        [2, windows, heads, E + K, d].
    """
    num_heads, E, d = extra.shape[4:]
    halo = tile.keys(kv, window_size, num_heads)
    kh, kw = halo.shape[5:7]
    keys = kv.new_empty(halo.shape[:5] + (E + kh * kw, d))
    keys[..., :E, :] = extra[:, tile.images]
    keys[..., E:, :].unflatten(5, (kh, kw)).copy_(halo)
    return keys.flatten(1, 3)


class _TileBias:
    """Bias of tiles' logits, zero for the extra keys; neighbours mostly share one."""

    def __init__(self, bias: Optional[torch.Tensor], num_extra: int):
        self.bias = bias
        self.num_extra = num_extra
        self.halo: Tuple[int, ...] = ()
        self.logits_bias: Optional[torch.Tensor] = None

    def of(self, tile: _Tile) -> Optional[torch.Tensor]:
        """[1, heads, L, E + K]."""
        if self.bias is not None and self.halo != tile.halo():
            self.halo = tile.halo()
            part = tile.bias(self.bias)
            heads, qh, qw, kh, kw = part.shape
            padded = part.new_empty(heads, qh, qw, self.num_extra + kh * kw)
            padded[..., :self.num_extra] = 0.
            padded[..., self.num_extra:].unflatten(3, (kh, kw)).copy_(part)
            self.logits_bias = padded.flatten(1, 2)[None]
        return self.logits_bias


def attend_rows(
        q: torch.Tensor,
        kv: torch.Tensor,
        extra_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int = 0,
) -> torch.Tensor:
    """`window_attention` tile by tile, for some rows of queries; without a gradient.

    Args:
        q: Queries of whole windows: rows `first_row`, a multiple of `window_size`, and on of the maps,
            [B, rows, W, C], not yet scaled.
        kv: Keys and values of the maps, [B, H, W, 2, C].
        extra_kv: As in `window_attention`.
        bias: As in `window_attention`, of the dtype of `q`.
        window_size: As in `window_attention`.
        num_heads: As in `window_attention`.
        first_row: Where the queries start.

    Returns:
        [B, rows, W, C].
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    extra, tile_bias = _extra_by_head(extra_kv, num_heads), _TileBias(bias, extra_kv.shape[1])
    for tile in _tiles(kv.shape[1], q, window_size, first_row):
        q_tile = tile.queries(q, window_size, num_heads, first_row)
        k, v = _gather_keys(tile, kv, extra, window_size)
        q_win = q_tile.reshape(k.shape[:2] + (-1, k.shape[3]))
        out_tile = F.scaled_dot_product_attention(q_win, k, v, attn_mask=tile_bias.of(tile))
        tile.queries(out, window_size, num_heads, first_row).copy_(out_tile.reshape(q_tile.shape))
    return out


class _TiledAttention(torch.autograd.Function):
    """`window_attention` tile by tile, keeping only its inputs and its output for the backward pass."""

    @staticmethod
    def forward(ctx, q, kv, extra_kv, bias, window_size: int, num_heads: int):
        out = attend_rows(q, kv, extra_kv, bias, window_size, num_heads)
        _keep(ctx, (q, kv, extra_kv, bias, window_size, num_heads), out)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to have gradients
            return _differentiable_gradients(ctx, grad_out)
        return _gradients(ctx, grad_out, _tiled_backward)


def _keep(ctx, inputs, output):
    """Keep what the backward pass needs."""
    *tensors, window_size, num_heads = inputs
    ctx.save_for_backward(*tensors, output)
    ctx.sizes = window_size, num_heads


def _gradients(ctx, grad_out, backward):
    """Gradients of all inputs by `backward`: `_tiled_backward`, or that as an operator."""
    # read once: checkpointing recomputes them when they are read, and allows no second time
    q, kv, extra_kv, bias, out = ctx.saved_tensors
    grad_q, grad_kv, grad_extra, grad_bias = backward(grad_out, q, kv, extra_kv, bias, out, *ctx.sizes)
    return grad_q, grad_kv, grad_extra, None if bias is None else grad_bias, None, None


def _differentiable_gradients(ctx, grad_out):
    """`_gradients` by autograd, from the masked form: torch's fused attention has no second derivative."""
    *inputs, _ = ctx.saved_tensors
    inputs = [None if x is None else x.view_as(x) for x in inputs]  # landmarks were made from keys: not by that way
    needed = ctx.needs_input_grad
    out = _masked(*inputs, *ctx.sizes, dropout_p=0., fused=False)
    wanted = [x for x, is_needed in zip(inputs, needed) if is_needed]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
    return tuple(next(grads) if is_needed else None for is_needed in needed)


def _tiled_backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        extra_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        out: torch.Tensor,
        window_size: int,
        num_heads: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `q`, `kv`, `extra_kv` and `bias` (without one, empty), all but the first summed over tiles."""
    B, H, W, C = q.shape
    E, d = extra_kv.shape[1], C // num_heads
    scale = d ** -0.5
    # summed over all windows: in float32 also for half-precision inputs
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_kv = torch.zeros_like(kv, memory_format=torch.contiguous_format)
    grad_extra = torch.zeros_like(extra_kv, dtype=wide, memory_format=torch.contiguous_format)
    grad_bias = q.new_empty(0) if bias is None else torch.zeros_like(bias, dtype=wide)
    # of weights times their gradients, per query and head, [B, H, W, heads]
    row_sum = (grad_out * out).unflatten(3, (num_heads, d)).sum(dim=-1, dtype=wide)

    extra, tile_bias = _extra_by_head(extra_kv, num_heads), _TileBias(bias, E)
    for tile in _tiles(H, q, window_size):
        shape = tile.queries(q, window_size, num_heads).shape
        L = shape[4] * shape[5]
        # [windows * heads, L or E + K, d or 1]
        q_win, g_win, s_win = (
            tile.queries(x, window_size, num_heads).reshape(-1, L, x.shape[3] // num_heads)
            for x in (q, grad_out, row_sum))
        q_win = q_win * scale
        k_win, v_win = _gather_keys(tile, kv, extra, window_size).flatten(1, 2)

        logits = torch.bmm(q_win, k_win.transpose(1, 2)).unflatten(0, (-1, num_heads))
        if bias is not None:
            logits += tile_bias.of(tile)
        weights = logits.softmax(dim=-1, dtype=wide).flatten(0, 1)
        del logits
        grad_logits = torch.bmm(g_win, v_win.transpose(1, 2)).to(wide)
        grad_logits -= s_win
        grad_logits *= weights
        if bias is not None:
            part = tile.bias(grad_bias)
            part += grad_logits.unflatten(0, (-1, num_heads)).sum(dim=0)[..., E:].reshape(part.shape)
        weights, grad_logits = weights.to(q.dtype), grad_logits.to(q.dtype)

        grad_q_win = torch.bmm(grad_logits, k_win).mul_(scale)
        tile.queries(grad_q, window_size, num_heads).copy_(grad_q_win.reshape(shape))
        grad_keys = torch.empty((2,) + k_win.shape, dtype=q.dtype, device=q.device)
        torch.bmm(grad_logits.transpose(1, 2), q_win, out=grad_keys[0])
        torch.bmm(weights.transpose(1, 2), g_win, out=grad_keys[1])
        grad_keys = grad_keys.unflatten(1, shape[:4])  # [2, b, n, m, heads, E + K, d]
        extra_sum = grad_keys[..., :E, :].sum(dim=(2, 3), dtype=wide)
        grad_extra[tile.images] += extra_sum.permute(1, 3, 0, 2, 4).flatten(3)
        _scatter_keys(tile, grad_kv, grad_keys[..., E:, :], window_size, num_heads)
    if bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_q, grad_kv, grad_extra.to(kv.dtype), grad_bias


def _scatter_keys(
        tile: _Tile,
        grad_kv: torch.Tensor,
        grad_keys: torch.Tensor,
        window_size: int,
        num_heads: int,
) -> None:
    """Add the gradients of a tile's overlapping halos, [2, b, n, m, heads, K, d], to those of maps, [B, H, W, 2, C].

    A halo is at most two windows wide, so that every other one does not overlap: four additions, one per parity.
    """
    for i in range(min(2, tile.row.count)):
        for j in range(min(2, tile.col.count)):
            part = tile.every_other(i, j, window_size).keys(grad_kv, window_size, num_heads, step=2)
            part += grad_keys[:, :, i::2, j::2].unflatten(5, part.shape[5:7])


# older than 2.7, torch does not tell compiling from exporting
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


def _takes_operator(x: torch.Tensor) -> bool:
    """Whether a graph may hold `tiled_attention`: it is compiled to run here, not exported, and on a CPU."""
    return torch.compiler.is_compiling() and not _is_exporting() and x.device.type == 'cpu'


@torch.library.custom_op('timm_ls::tiled_attention', mutates_args=())
def tiled_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        extra_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
) -> torch.Tensor:
    """`_TiledAttention` for compiled graphs, whose compiler does not look into it, at any size.

    Inductor's code for the masked form is several times slower than eager mode on a CPU.
    Eager mode does without the operator: counters and profilers see what is inside.
    """
    return attend_rows(q, kv, extra_kv, bias, window_size, num_heads)


tiled_attention_backward = torch.library.custom_op(
    'timm_ls::tiled_attention_backward', _tiled_backward, mutates_args=())


@tiled_attention.register_fake
def _(q, kv, extra_kv, bias, window_size, num_heads):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@tiled_attention_backward.register_fake
def _(grad_out, q, kv, extra_kv, bias, out, window_size, num_heads):
    grad_bias = q.new_empty(0) if bias is None else bias
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, kv, extra_kv, grad_bias))


tiled_attention.register_autograd(partial(_gradients, backward=tiled_attention_backward), setup_context=_keep)
