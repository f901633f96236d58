"""Window attention as a Triton kernel, for CUDA devices: nothing is gathered, masked in memory or copied.

Each program takes up to 64 queries of a window, for one head. It reads them, the keys and values of their halo and the
extra ones where they lie, by their addresses, tells by the bounds of the map which keys there are, and keeps one online
softmax. The backward pass recomputes the weights from the log-sum-exp of the logits, and adds to the gradients of keys,
values and bias, which windows share, atomically in float32.

`attention_implementation('triton')` chooses it, and nothing else does: its results were tested under Triton's
interpreter (`TRITON_INTERPRET=1`) and it was compiled for a GPU, but it has not run on one yet.
"""
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .capture import ceil_div
from .windows import halo_width

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("attention_implementation('triton') needs triton, which torch brings along on Linux.") from error

__all__ = ['triton_attention']

BLOCK_K = 32  # keys at a time
MAX_BLOCK_Q = 64  # queries at a time: the 49 of a window of 7 x 7, the 64 of 8 x 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def load_queries(q, H, W, q_image, q_row, q_col, D, WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of this program: its image, its window's first row and column, its queries' places within the window and in the
    map, which there are, its head's channels, and the queries, zeros where there are none, [BLOCK_Q, BLOCK_D]."""
    rows, cols = tl.cdiv(H, WINDOW), tl.cdiv(W, WINDOW)
    tiles: tl.constexpr = (WINDOW * WINDOW + BLOCK_Q - 1) // BLOCK_Q
    window = tl.program_id(0) // tiles
    image = (window // (rows * cols)).to(tl.int64)  # offsets of large batches and maps exceed 32 bits
    top, left = (window // cols % rows * WINDOW).to(tl.int64), window % cols * WINDOW
    query = tl.program_id(0) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    y, x = top + query // WINDOW, left + query % WINDOW
    valid = (query < WINDOW * WINDOW) & (y < H) & (x < W)
    in_head = tl.arange(0, BLOCK_D) < D
    channel = tl.program_id(1) * D + tl.arange(0, BLOCK_D)
    at = image * q_image + y * q_row + x * q_col
    queries = tl.load(q + at[:, None] + channel[None, :], mask=valid[:, None] & in_head[None, :], other=0.)
    return image, top, left, query, (image * H + y) * W + x, valid, in_head, channel, queries


@triton.jit
def locate_keys(start, image, top, left, H, W, kv_image, kv_row, kv_col, C, E, HALO: tl.constexpr, P: tl.constexpr,
                BLOCK_K: tl.constexpr):
    """Of keys `start` and on, the extra ones first: where they lie among the map's and the extra ones, and if so."""
    key = start + tl.arange(0, BLOCK_K)
    place = key - E  # in the halo
    y, x = top - P + place // HALO, left - P + place % HALO
    in_map = (key >= E) & (place < HALO * HALO) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return image * kv_image + y * kv_row + x * kv_col, in_map, (image * E + key) * 2 * C, key < E, place


@triton.jit
def load_keys(kv, extra_kv, at, in_map, extra_at, is_extra, channel, in_head):
    """Keys or values, zeros where there are none, [BLOCK_K, BLOCK_D]."""
    channel, in_head = channel[None, :], in_head[None, :]
    keys = tl.load(kv + at[:, None] + channel, mask=in_map[:, None] & in_head, other=0.)
    return keys + tl.load(extra_kv + extra_at[:, None] + channel, mask=is_extra[:, None] & in_head, other=0.)


@triton.jit
def attention_logits(q, k, bias, head, query, place, in_map, is_extra, scale, WINDOW: tl.constexpr, HALO: tl.constexpr,
                     HAS_BIAS: tl.constexpr):
    """Logits in float32, minus infinity where there is no key, and where those with a bias have it."""
    logits = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
    bias_at = (head * WINDOW * WINDOW + query[:, None]) * HALO * HALO + place[None, :]
    has_bias = (query < WINDOW * WINDOW)[:, None] & in_map[None, :]
    if HAS_BIAS:
        logits += tl.load(bias + bias_at, mask=has_bias, other=0.).to(tl.float32)
    return tl.where((in_map | is_extra)[None, :], logits, float('-inf')), bias_at, has_bias


@triton.jit
def forward_kernel(
        q, kv, extra_kv, bias, out, lse,
        H, W, C, E, D, scale, q_image, q_row, q_col, kv_image, kv_row, kv_col, kv_part,
        WINDOW: tl.constexpr, P: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Outputs [B, H, W, C] and the log-sum-exp of their logits [B, H, W, heads]."""
    HALO: tl.constexpr = WINDOW + 2 * P
    head = tl.program_id(1)
    image, top, left, query, pixel, valid, in_head, channel, queries = load_queries(
        q, H, W, q_image, q_row, q_col, D, WINDOW, BLOCK_Q, BLOCK_D)
    mask = valid[:, None] & in_head[None, :]

    highest = tl.full([BLOCK_Q], -1e30, tl.float32)  # finite: a block may hold no key at all
    total = tl.zeros([BLOCK_Q], tl.float32)
    sums = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, E + HALO * HALO, BLOCK_K):
        at, in_map, extra_at, is_extra, place = locate_keys(
            start, image, top, left, H, W, kv_image, kv_row, kv_col, C, E, HALO, P, BLOCK_K)
        k = load_keys(kv, extra_kv, at, in_map, extra_at, is_extra, channel, in_head)
        v = load_keys(kv, extra_kv, at + kv_part, in_map, extra_at + C, is_extra, channel, in_head)
        logits, _, _ = attention_logits(
            queries, k, bias, head, query, place, in_map, is_extra, scale, WINDOW, HALO, HAS_BIAS)
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - new_highest[:, None])
        shrink = tl.exp(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision='ieee')
        highest = new_highest

    tl.store(out + pixel[:, None] * C + channel[None, :], (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(lse + pixel * tl.num_programs(1) + head, highest + tl.log(total), mask=valid)


@triton.jit
def backward_kernel(
        q, kv, extra_kv, bias, out, lse, grad_out, grad_q, grad_kv, grad_extra, grad_bias,
        H, W, C, E, D, scale, q_image, q_row, q_col, kv_image, kv_row, kv_col, kv_part,
        WINDOW: tl.constexpr, P: tl.constexpr, HAS_BIAS: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Gradients: of queries stored, of the rest added in float32. Outputs and gradients are contiguous."""
    HALO: tl.constexpr = WINDOW + 2 * P
    head = tl.program_id(1)
    image, top, left, query, pixel, valid, in_head, channel, queries = load_queries(
        q, H, W, q_image, q_row, q_col, D, WINDOW, BLOCK_Q, BLOCK_D)
    mask = valid[:, None] & in_head[None, :]
    out_at = pixel[:, None] * C + channel[None, :]
    grads = tl.load(grad_out + out_at, mask=mask, other=0.)
    outs = tl.load(out + out_at, mask=mask, other=0.)
    row_sum = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    log_total = tl.load(lse + pixel * tl.num_programs(1) + head, mask=valid, other=0.)

    grad_queries = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, E + HALO * HALO, BLOCK_K):
        at, in_map, extra_at, is_extra, place = locate_keys(
            start, image, top, left, H, W, kv_image, kv_row, kv_col, C, E, HALO, P, BLOCK_K)
        k = load_keys(kv, extra_kv, at, in_map, extra_at, is_extra, channel, in_head)
        v = load_keys(kv, extra_kv, at + kv_part, in_map, extra_at + C, is_extra, channel, in_head)
        logits, bias_at, has_bias = attention_logits(
            queries, k, bias, head, query, place, in_map, is_extra, scale, WINDOW, HALO, HAS_BIAS)
        weights = tl.where(valid[:, None], tl.exp(logits - log_total[:, None]), 0.)
        grad_weights = tl.dot(grads, tl.trans(v), input_precision='ieee')
        grad_logits = weights * (grad_weights - row_sum[:, None])
        if HAS_BIAS:
            tl.atomic_add(grad_bias + bias_at, grad_logits, mask=has_bias & valid[:, None])
        grad_logits = grad_logits.to(k.dtype)
        grad_queries += tl.dot(grad_logits, k, input_precision='ieee')
        grad_k = tl.dot(tl.trans(grad_logits), queries, input_precision='ieee') * scale
        grad_v = tl.dot(tl.trans(weights.to(grads.dtype)), grads, input_precision='ieee')

        grad_at, _, _, _, _ = locate_keys(
            start, image, top, left, H, W, H * W * 2 * C, W * 2 * C, 2 * C, C, E, HALO, P, BLOCK_K)
        grad_at = grad_at[:, None] + channel[None, :]
        map_mask = in_map[:, None] & in_head[None, :]
        tl.atomic_add(grad_kv + grad_at, grad_k, mask=map_mask)
        tl.atomic_add(grad_kv + grad_at + C, grad_v, mask=map_mask)
        grad_at = extra_at[:, None] + channel[None, :]
        extra_mask = is_extra[:, None] & in_head[None, :]
        tl.atomic_add(grad_extra + grad_at, grad_k, mask=extra_mask)
        tl.atomic_add(grad_extra + grad_at + C, grad_v, mask=extra_mask)
    tl.store(grad_q + out_at, (grad_queries * scale).to(grad_q.dtype.element_ty), mask=mask)


def is_interpreted() -> bool:
    """Whether this module's kernels run under Triton's interpreter, on any device."""
    return not isinstance(forward_kernel, triton.runtime.JITFunction)


def launch(
        kernel: Any,
        q: torch.Tensor,
        kv: torch.Tensor,
        extra_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        tensors: Tuple[torch.Tensor, ...],
        window_size: int,
        num_heads: int,
) -> None:
    """Run a kernel for all windows and heads; `tensors` are the arguments that it has besides the inputs."""
    B, H, W, C = q.shape
    D = C // num_heads
    block_q = min(MAX_BLOCK_Q, max(16, triton.next_power_of_2(window_size ** 2)))
    tiles = ceil_div(window_size ** 2, block_q)
    kernel[B * ceil_div(H, window_size) * ceil_div(W, window_size) * tiles, num_heads](
        q, kv, extra_kv, q if bias is None else bias, *tensors,
        H, W, C, extra_kv.shape[1], D, D ** -0.5, *q.stride()[:3], *kv.stride()[:4],
        WINDOW=window_size, P=halo_width(window_size), HAS_BIAS=bias is not None,
        BLOCK_Q=block_q, BLOCK_K=BLOCK_K, BLOCK_D=max(16, triton.next_power_of_2(D)))


def why_not(call: Any) -> Optional[str]:
    """Return why the kernel does not take a call, or None if it does."""
    if call.device.type != 'cuda' and not is_interpreted():
        return f"it is for CUDA devices, not for {call.device}; Triton's interpreter takes any (TRITON_INTERPRET=1)"
    if call.dtype not in DTYPES:
        return f'it takes {", ".join(map(str, DTYPES))}, not {call.dtype}'
    if call.dropout_p > 0:
        return 'attention dropout is active'
    if call.plain:
        return 'graphs, torch.func and forward-mode derivatives need plain operations'
    return None


def triton_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        extra_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int = 0,
) -> torch.Tensor:
    """Return `window_attention`; all inputs are of the type of `q`."""
    rows, below = q.shape[1], kv.shape[1] - first_row - q.shape[1]
    if first_row > 0 or below > 0:  # the kernels know whole maps only
        q = F.pad(q, (0, 0, 0, 0, first_row, below))
    return _TritonAttention.apply(q, kv, extra_kv, bias, window_size, num_heads)[:, first_row:first_row + rows]


class _TritonAttention(torch.autograd.Function):
    """Keeps inputs, outputs and the log-sum-exp of the logits for the backward pass."""

    @staticmethod
    def forward(
            ctx: Any,
            q: torch.Tensor,
            kv: torch.Tensor,
            extra_kv: torch.Tensor,
            bias: Optional[torch.Tensor],
            window_size: int,
            num_heads: int,
    ) -> torch.Tensor:
        q, kv = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, kv))
        extra_kv, bias = extra_kv.contiguous(), None if bias is None else bias.contiguous()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(*q.shape[:3], num_heads, dtype=torch.float32, device=q.device)
        launch(forward_kernel, q, kv, extra_kv, bias, (out, lse), window_size, num_heads)
        ctx.save_for_backward(q, kv, extra_kv, bias, out, lse)
        ctx.window_size, ctx.num_heads = window_size, num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        q, kv, extra_kv, bias, out, lse = ctx.saved_tensors
        grad_q = torch.empty_like(out)
        grad_kv, grad_extra, grad_bias = (
            torch.zeros(() if x is None else x.shape, dtype=torch.float32, device=q.device)
            for x in (kv, extra_kv, bias))
        tensors = (out, lse, grad_out.contiguous(), grad_q, grad_kv, grad_extra, grad_bias)
        launch(backward_kernel, q, kv, extra_kv, bias, tensors, ctx.window_size, ctx.num_heads)
        return (
            grad_q, grad_kv.to(kv.dtype), grad_extra.to(kv.dtype), None if bias is None else grad_bias.to(bias.dtype),
            None, None)
