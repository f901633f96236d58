"""Window attention by the kernels of `kernels.py`: one launch forward, four backward.

Beside these, small ones: the table of the bias, and sums of partial gradients of the bias and of the additional keys.
In eager mode it is an autograd function. Graphs hold the operator `timm_ls::triton_window_attention` whole, at any size
of the map.
"""
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch

from ..._compat import functorch_is_active, is_in_forward_mode
from ..capture import ceil_div, is_captured
from ..derivatives import differentiable_gradients
from ..masked import plain_attention
from ..window_attention import FUSED_IS_OFF, PLAIN_IS_NEEDED, WindowCall
from ..windows import halo_width

try:
    import triton

    from . import kernels
except ImportError:  # not on every platform
    triton = None

__all__ = ['triton_attention', 'why_not']

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128
MAX_WINDOW = 16  # tables of the bias grow with its fourth power
# Rows and columns of windows in a tile, where it is not one window: 27 to 64 queries for the rows of a tensor core, and
# two keys or so to load for each.
TILES = {1: (4, 8), 2: (2, 4), 3: (1, 3), 4: (2, 2)}
TABLE_BLOCK = 64  # tables have a multiple of it in rows and columns, so that blocks of up to as many need no mask
PROGRAMS = 1024  # to split sums of gradients over, on any device: results depend on sizes only


class Blocks(NamedTuple):
    """Queries and keys that a program takes at a time, its warps and the stages of its pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# For each kernel: in half precision; in float32, up to 64 channels per head; in float32, beyond.
BLOCKS = {
    'forward': (Blocks(64, 32, 4, 2), Blocks(64, 16, 4, 2), Blocks(64, 16, 4, 2)),
    'query_grad': (Blocks(64, 32, 4, 2), Blocks(64, 16, 4, 2), Blocks(32, 16, 2, 2)),
    'key_grad': (Blocks(32, 64, 4, 2), Blocks(16, 64, 4, 2), Blocks(16, 32, 2, 2)),
    'bias_grad': (Blocks(64, 32, 4, 2), Blocks(64, 16, 4, 2), Blocks(64, 16, 4, 2)),
    'additional_grad': (Blocks(64, 16, 4, 2), Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2)),
}


def kernel_blocks(kernel: str, dtype: torch.dtype, head_dim: int) -> Blocks:
    """Return the largest blocks with which a kernel keeps its values in registers."""
    if is_interpreted():  # its time goes by operations, not by their size
        return Blocks(64, 16 if kernel == 'additional_grad' else 64, 4, 1)
    half, single, wide_single = BLOCKS[kernel]
    return half if dtype != torch.float32 else single if head_dim <= 64 else wide_single


@lru_cache(maxsize=64)
def channel_blocks(head_dim: int, least: int = 16) -> Dict[str, int]:
    """Return the width of a head as kernels take it: one or two blocks of `least` to 64 channels, a power of two."""
    first = min(64, max(least, 2 ** (head_dim.bit_length() - 1)))
    rest = head_dim - first
    return dict(D=head_dim, D0=first, D1=max(least, 2 ** (rest - 1).bit_length()) if rest > 0 else 0)


@lru_cache(maxsize=256)
def fit_blocks(kernel: str, blocks: Blocks, window_size: int) -> Blocks:
    """Return blocks no larger than a tile needs."""
    if kernel == 'additional_grad':
        return blocks
    tile_y, tile_x = TILES.get(window_size, (1, 1))
    side = 'keys' if kernel == 'key_grad' else 'queries'
    largest = getattr(blocks, side)
    size = min(largest, max(16, 2 ** (tile_y * tile_x * window_size ** 2 - 1).bit_length()))
    # as many rows for a warp as there are in the largest blocks: more warps would compute the same rows twice
    return blocks._replace(**{side: size}, warps=max(1, blocks.warps * size // largest))


@lru_cache(maxsize=256)
def block_constants(kernel: str, blocks: Blocks, head_dim: int) -> Dict[str, int]:
    """Return the sizes of a kernel's blocks as it takes them."""
    # four warps share 16 rows of additional keys by 8 columns each: fewer than 32 they would compute several times
    channels = channel_blocks(head_dim, least=32 if kernel == 'additional_grad' else 16)
    return dict(channels, BLOCK_Q=blocks.queries, BLOCK_K=blocks.keys)


# What is taken


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device (TRITON_INTERPRET=1)."""
    return not isinstance(kernels.forward_kernel, triton.runtime.JITFunction)


@torch.compiler.assume_constant_result
def device_why_not(device: torch.device) -> Optional[str]:
    """Return why kernels do not run on a device, or None if they do."""
    if triton is None:
        return 'it needs triton, which torch brings along on Linux'
    if is_interpreted():
        return None
    if device.type != 'cuda':
        return f"it is for CUDA devices, not for {device}; Triton's interpreter takes any (TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return "it is for NVIDIA's devices: it was not tried on others"
    if not torch.cuda.is_available():
        return 'there is no CUDA device here'
    if torch.cuda.get_device_capability(device) < (8, 0):
        return 'it needs a device of compute capability 8.0 (Ampere) or above'
    return None


def type_why_not(dtype: torch.dtype, head_dim: int) -> Optional[str]:
    """Return why kernels do not take tensors of a type and heads of so many channels, or None if they do."""
    if dtype not in DTYPES:
        return f'it takes {", ".join(map(str, DTYPES))}, not {dtype}'
    if head_dim > MAX_HEAD_DIM:
        return f'it takes heads of up to {MAX_HEAD_DIM} channels, not {head_dim}'
    return None


def transform_why_not() -> Optional[str]:
    """Return why kernels do not take part in what happens to a call, or None if they do."""
    if functorch_is_active() or is_in_forward_mode():
        return PLAIN_IS_NEEDED
    return None


def why_not(call: WindowCall) -> Optional[str]:
    """Return why `triton_attention` does not take a call, or None if it does."""
    reason = device_why_not(call.device) or type_why_not(call.dtype, call.head_dim) or transform_why_not()
    if reason is not None:
        return reason
    if call.window_size > MAX_WINDOW:
        w = call.window_size
        return f'it takes windows of up to {MAX_WINDOW} x {MAX_WINDOW}, not {w} x {w}'
    if call.dropout_p > 0:
        return 'attention dropout is active'
    if not call.fused:
        return FUSED_IS_OFF
    return None


def allows_tf32() -> bool:
    """Whether the user lets torch's own products of float32 matrices be of TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):  # torch 2.9; the older name fails beside it
        return matmul.fp32_precision == 'tf32'
    return matmul.allow_tf32


# Calls


def triton_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int = 0,
) -> torch.Tensor:
    """Return `window_attention` of a call that `why_not` says nothing against; all inputs are of one type.

    Raises:
        RuntimeError: A tile of windows spans more elements than offsets of 32 bits can tell apart.
    """
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, kv, additional_kv, bias))
    # an autograd function takes a fraction of an operator's time, which is the time of a small layer
    run = triton_operator if is_graph_or_subclass(q) else _TritonAttention.apply
    return run(q, kv, additional_kv, bias, window_size, num_heads, first_row, needs_grad)[0]


def is_graph_or_subclass(x: torch.Tensor) -> bool:
    """Whether a graph is captured, or tensors may hold no values: somebody looks at operators."""
    return is_captured() or type(x) is not torch.Tensor


def addressable(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return `x`, [B, H, W, ...], or a copy of it, such as the kernels assume.

    Rows follow each other, the channels of a head lie together, and heads begin at multiples of 16 bytes, if a head has
    a multiple of 8 channels.
    """
    *strides, channel = x.stride()
    in_heads = channel == 1 and strides[1] == x.shape[2] * strides[2] and all(n % head_dim == 0 for n in strides)
    if in_heads and (x.data_ptr() % 16 == 0 or head_dim % 8 != 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def launch(kernel: Any, grid: Tuple[int, ...], known: Dict[str, Any], blocks: Blocks) -> None:
    """Launch a kernel with those of the arguments that it has, on the device of `kv`."""
    kv = known['kv']
    is_elsewhere = kv.is_cuda and kv.get_device() != torch.cuda.current_device()
    with torch.cuda.device(kv.device) if is_elsewhere else nullcontext():
        kernel[grid](
            *[known[argument] for argument in kernel.arg_names], num_warps=blocks.warps, num_stages=blocks.stages,
            enable_fp_fusion=True)


class _Call:
    """What the kernels of one call share, and how to launch one of them."""

    def __init__(
            self,
            q: torch.Tensor,
            kv: torch.Tensor,
            additional_kv: torch.Tensor,
            bias: Optional[torch.Tensor],
            window_size: int,
            num_heads: int,
            first_row: int,
    ):
        self.batch, rows, W, C = q.shape
        self.heads, self.window, self.halo = num_heads, window_size, window_size + 2 * halo_width(window_size)
        self.tile_y, self.tile_x = TILES.get(window_size, (1, 1))
        self.dtype, self.head_dim = q.dtype, C // num_heads
        self.bias = None if bias is None else bias.contiguous()
        q, kv = addressable(q, self.head_dim), addressable(kv, self.head_dim)
        elements = (self.tile_y + 1) * window_size * max(q.stride(1), kv.stride(1), W * 2 * C)
        if elements >= 2 ** 31:
            raise RuntimeError(
                f'Triton kernels take maps whose tiles span fewer than 2 ** 31 elements, but {W} tokens of {C} channels'
                f" side by side span {elements}: force attention_implementation('tiled').")
        q_strides, kv_strides = ([stride // self.head_dim for stride in x.stride()[:-1]] for x in (q, kv))
        self.arguments: Dict[str, Any] = dict(
            q=q,
            kv=kv,
            additional=addressable(additional_kv.contiguous(), self.head_dim),
            H=kv.shape[1],
            W=W,
            E=additional_kv.shape[1],
            rows=rows,
            first_row=first_row,
            scale=self.head_dim ** -0.5,
            WINDOW=window_size,
            TILE_Y=self.tile_y,
            TILE_X=self.tile_x,
            TF32=q.dtype == torch.float32 and allows_tf32(),
            **dict(zip(('q_image', 'q_row', 'q_col'), q_strides)),
            q_token=q_strides[2],
            **dict(zip(('kv_image', 'kv_row', 'kv_col', 'kv_part'), kv_strides)),
        )

    def run(self, name: str, grid: Tuple[int, ...], **arguments: Any) -> None:
        """Launch a kernel with those of the arguments that it has."""
        blocks = self.blocks(name)
        known = {**self.arguments, **block_constants(name, blocks, self.head_dim), **arguments}
        launch(getattr(kernels, f'{name}_kernel'), grid, known, blocks)

    def blocks(self, name: str) -> Blocks:
        """Return `kernel_blocks` of this call, no larger than a tile needs."""
        if name == 'table':
            return Blocks(TABLE_BLOCK, TABLE_BLOCK, 4, 1)
        return fit_blocks(name, kernel_blocks(name, self.dtype, self.head_dim), self.window)

    def programs(self, rows: int, cols: int, block: int) -> int:
        """Return how many blocks of tokens the tiles of maps of some size have."""
        tile_rows, tile_cols = self.tile_y * self.window, self.tile_x * self.window
        tiles = self.batch * ceil_div(rows, tile_rows) * ceil_div(cols, tile_cols)
        return tiles * ceil_div(tile_rows * tile_cols, block)

    def table(self, by_key: bool = False) -> Dict[str, Any]:
        """Make the table of a tile of queries and its region, or of a tile of keys and those that see it."""
        tile_rows, tile_cols = self.tile_y * self.window, self.tile_x * self.window
        if not by_key and self.bias is None and (self.tile_y, self.tile_x) == (1, 1):
            return dict(table=self.arguments['q'], table_stride=0, HAS_TABLE=False)
        border = 0 if self.window == 1 else self.window  # of queries around a tile of keys, on two sides
        beyond = self.halo - self.window
        if by_key:
            queries, keys = (tile_rows + border, tile_cols + border), (tile_rows, tile_cols)
        else:
            queries, keys = (tile_rows, tile_cols), (tile_rows + beyond, tile_cols + beyond)
        num_queries, num_keys, E = queries[0] * queries[1], keys[0] * keys[1], 0 if by_key else self.arguments['E']
        blocks = ceil_div(num_queries, TABLE_BLOCK), ceil_div(num_keys + E, TABLE_BLOCK)
        shape = [TABLE_BLOCK * number for number in (blocks[::-1] if by_key else blocks)]
        table = torch.empty(self.heads, *shape, dtype=self.dtype, device=self.arguments['q'].device)
        row = table.stride(1)
        self.run(
            'table', (*blocks, self.heads), table=table, bias=table if self.bias is None else self.bias, E=E,
            head_stride=table.stride(0), query_stride=1 if by_key else row, key_stride=row if by_key else 1,
            QUERIES=num_queries, QUERY_COLS=queries[1], KEYS=num_keys, KEY_COLS=keys[1], LEAD=border if by_key else 0,
            HAS_BIAS=self.bias is not None)
        return dict(table=table, table_stride=row // 16, HAS_TABLE=True)


def _forward(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
        save_lse: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return outputs, and the log-sum-exp of their logits for the backward pass; if not to be saved, empty."""
    out, lse = _empty_outputs(q, kv, additional_kv, bias, window_size, num_heads, first_row, save_lse)
    if out.numel() > 0:
        call = _Call(q, kv, additional_kv, bias, window_size, num_heads, first_row)
        programs = call.programs(q.shape[1], q.shape[2], call.blocks('forward').queries)
        call.run('forward', (programs, num_heads), out=out, lse=lse, SAVE_LSE=save_lse, **call.table())
    return out, lse


def _backward(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        out: torch.Tensor,
        lse: torch.Tensor,
        window_size: int,
        num_heads: int,
        first_row: int,
        needs_bias: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of `q`, `kv`, `additional_kv` and `bias`; the last empty if not needed."""
    grads = _empty_grads(grad_out, q, kv, additional_kv, bias, out, lse, window_size, num_heads, first_row, needs_bias)
    grad_q, grad_kv, grad_additional, grad_bias = grads
    if out.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    B, rows, W, C = q.shape
    H, E = kv.shape[1], additional_kv.shape[1]
    call = _Call(q, kv, additional_kv, bias, window_size, num_heads, first_row)
    grad_out = addressable(grad_out.contiguous(), call.head_dim)
    row_sums = torch.empty_like(lse)
    shared = dict(grad_out=grad_out, lse=lse, row_sums=row_sums)
    table = call.table()

    programs = call.programs(rows, W, call.blocks('query_grad').queries)
    call.run('query_grad', (programs, num_heads), out=out, grad_q=grad_q, **shared, **table)  # first: makes `row_sums`

    p = halo_width(window_size)
    programs = call.programs(H + p, W + p, call.blocks('key_grad').keys)
    call.run('key_grad', (programs, num_heads), grad_kv=grad_kv, **shared, **call.table(by_key=True))

    if E > 0:
        blocks = call.blocks('additional_grad')
        key_blocks = ceil_div(E, blocks.keys)
        run = blocks.queries * ceil_div(rows * W, blocks.queries * max(1, PROGRAMS // (B * num_heads * key_blocks)))
        splits = ceil_div(rows * W, run)
        partial = torch.empty(B, splits, E, 2, C, dtype=torch.float32, device=q.device)
        call.run(
            'additional_grad', (B * splits, num_heads, key_blocks),
            partial=partial, tokens=rows * W, splits=splits, tokens_per_split=run, **shared)
        grad_additional = partial.sum(dim=1).to(additional_kv.dtype)

    if needs_bias:
        grad_bias = _bias_grad(call, table, shared).to(grad_bias.dtype)
    return grad_q, grad_kv, grad_additional, grad_bias


def _bias_grad(call: _Call, table: Dict[str, Any], shared: Dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the gradient of the bias in float32, [num_heads, w, w, w + 2p, w + 2p]."""
    blocks = call.blocks('bias_grad')
    w, halo, heads = call.window, call.halo, call.heads
    tile_cols, region_cols = call.tile_x * w, (call.tile_x - 1) * w + halo
    queries, keys = call.tile_y * w * tile_cols, ((call.tile_y - 1) * w + halo) * region_cols
    pairs = ceil_div(queries, blocks.queries) * ceil_div(keys, blocks.keys)
    tiles = call.programs(call.arguments['rows'], call.arguments['W'], queries)
    run = ceil_div(tiles, max(1, PROGRAMS // (pairs * heads)))
    splits = ceil_div(tiles, run)
    partial = shared['lse'].new_empty(splits, *table['table'].shape)
    call.run(
        'bias_grad', (pairs, heads, splits), partial=partial, tiles=tiles, tiles_per_split=run, **shared, **table)
    # of each window of a tile the part of the region that is its halo: [splits, heads, windows, windows, *bias]
    split, head, row, _ = partial.stride()
    parts = partial.as_strided(
        (splits, heads, call.tile_y, call.tile_x, w, w, halo, halo),
        (split, head, w * (tile_cols * row + region_cols), w * (row + 1), tile_cols * row, row, region_cols, 1))
    return parts.sum(dim=(0, 2, 3))


def _empty_outputs(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int,
        save_lse: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return what `_forward` does, without values."""
    shape = (q.shape[0], num_heads, *q.shape[1:3]) if save_lse else (0,)
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _empty_grads(
        grad_out: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        out: torch.Tensor,
        lse: torch.Tensor,
        window_size: int,
        num_heads: int,
        first_row: int,
        needs_bias: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `_backward` does, without values."""
    like_bias = bias if needs_bias and bias is not None else q.new_empty(0)
    grad_q, grad_kv, grad_additional, grad_bias = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, kv, additional_kv, like_bias))
    return grad_q, grad_kv, grad_additional, grad_bias


# Gradients


def _keep(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keep what the backward pass needs."""
    *tensors, window_size, num_heads, first_row, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.sizes = window_size, num_heads, first_row


def _gradients(ctx: Any, grad_out: torch.Tensor, backward: Callable[..., Any]) -> Tuple[Optional[torch.Tensor], ...]:
    """Return gradients of all inputs by `backward`: `_backward`, or that as an operator."""
    tensors = ctx.saved_tensors  # read once: checkpointing recomputes them for that, and allows no second time
    needs_bias = ctx.needs_input_grad[3]
    *grads, grad_bias = backward(grad_out, *tensors, *ctx.sizes, needs_bias)
    return (*grads, grad_bias if needs_bias else None, None, None, None, None)


class _TritonAttention(torch.autograd.Function):
    """`_forward` with a backward pass; keeps inputs, outputs and the log-sum-exp of the logits for it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        outputs = _forward(*inputs)
        _keep(ctx, inputs, outputs)
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, _: Any) -> Tuple[Optional[torch.Tensor], ...]:
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to have gradients
            inputs = (*ctx.saved_tensors[:4], *ctx.sizes)
            return (*differentiable_gradients(plain_attention, inputs, ctx.needs_input_grad[:7], grad_out), None)
        return _gradients(ctx, grad_out, _backward)


# The same as an operator, for graphs


triton_operator = torch.library.custom_op('timm_ls::triton_window_attention', _forward, mutates_args=())
triton_operator.register_fake(_empty_outputs)
triton_operator_backward = torch.library.custom_op(
    'timm_ls::triton_window_attention_backward', _backward, mutates_args=())
triton_operator_backward.register_fake(_empty_grads)


def _operator_gradients(ctx: Any, grad_out: torch.Tensor, _: Any) -> Tuple[Optional[torch.Tensor], ...]:
    return _gradients(ctx, grad_out, triton_operator_backward)


triton_operator.register_autograd(_operator_gradients, setup_context=_keep)
