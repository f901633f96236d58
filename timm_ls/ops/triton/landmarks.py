"""Landmarks by Triton kernels: a softmax over all tokens and the sums it weighs, in float32, reading each token once.

A program takes a run of an image's tokens for one head, with a running maximum, and a second kernel merges the runs by
their shares. The backward pass is one launch. No sum is atomic.
"""
from functools import lru_cache
from typing import Any, Dict, Optional, Tuple

import torch

from ..capture import ceil_div
from ..derivatives import differentiable_gradients
from ..merge import pool_wide
from . import attention

if attention.triton is not None:
    from . import landmark_kernels

__all__ = ['triton_pool_tokens', 'why_not']

MAX_RANK = 64
PROGRAMS = 512  # to split an image's tokens over, on any device: results depend on sizes only


def why_not(device: torch.device, dtype: torch.dtype, rank: int, head_dim: int) -> Optional[str]:
    """Return why `triton_pool_tokens` does not take a call, or None if it does."""
    if rank > MAX_RANK:
        return f'it takes up to {MAX_RANK} landmarks, not {rank}'
    return (
        attention.device_why_not(device) or attention.type_why_not(dtype, head_dim) or attention.transform_why_not())


def triton_pool_tokens(logits: torch.Tensor, kv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return `pool_tokens` of keys and values, [B, N, 2, C], of a call that `why_not` says nothing against."""
    run = pool_operator if attention.is_graph_or_subclass(kv) else _PoolTokens.apply
    return run(logits, kv, num_heads)[0].to(kv.dtype)


def _launch(
        name: str,
        grid: Tuple[int, ...],
        logits: torch.Tensor,
        kv: torch.Tensor,
        heads: int,
        **others: Any,
) -> None:
    """Launch a kernel with those of the arguments that it has."""
    kernel, head_dim, rank = getattr(landmark_kernels, name), kv.shape[-1] // heads, logits.shape[-1] // heads
    # as maps of one row
    logits = attention.addressable(logits.unsqueeze(1), 1)
    kv = attention.addressable(kv.unsqueeze(1), head_dim)
    kv_image, _, kv_token, kv_part, _ = (stride // head_dim for stride in kv.stride())
    known: Dict[str, Any] = dict(
        logits=logits,
        kv=kv,
        tokens=kv.shape[2],
        weight_image=logits.stride(0),
        weight_token=logits.stride(2),
        kv_image=kv_image,
        kv_token=kv_token,
        kv_part=kv_part,
        **constants(head_dim, rank),
        **others,
    )
    attention.launch(kernel, grid, known, attention.Blocks(known['BLOCK_Q'], known['BLOCK_K'], 4, 2))


def block_size(head_dim: int) -> int:
    """Return how many tokens a program takes at a time; twice as many spill registers (`test_triton_registers.py`)."""
    return 32 if head_dim <= 64 else 16


@lru_cache(maxsize=64)
def constants(head_dim: int, rank: int) -> Dict[str, int]:
    """Return the sizes of the kernels' blocks."""
    # as for additional keys, of which there are as few
    return dict(
        attention.channel_blocks(head_dim, least=32), RANK=rank, BLOCK_Q=block_size(head_dim),
        BLOCK_K=max(16, 2 ** (rank - 1).bit_length()))


def _forward(logits: torch.Tensor, kv: torch.Tensor, num_heads: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return landmarks, [B, rank, 2, C], and the log-sum-exp of their logits to base 2, [B, heads, rank]."""
    out, lse = _empty_outputs(logits, kv, num_heads)
    if out.numel() > 0:
        B, tokens = kv.shape[:2]
        block = block_size(kv.shape[-1] // num_heads)
        run = block * ceil_div(tokens, block * max(1, PROGRAMS // (B * num_heads)))
        splits = ceil_div(tokens, run)
        partial, partial_lse = out.new_empty(B, splits, *out.shape[1:]), lse.new_empty(B, splits, *lse.shape[1:])
        _launch('landmark_kernel', (B * splits, num_heads), logits, kv, num_heads,
                partial=partial, lse=partial_lse, splits=splits, tokens_per_split=run)
        _launch('merge_kernel', (2 * B * out.shape[1], num_heads), logits, kv, num_heads,
                partial=partial, partial_lse=partial_lse, out=out, lse=lse, splits=splits)
    return out, lse


def _backward(
        grad_out: torch.Tensor,
        logits: torch.Tensor,
        kv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        num_heads: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return gradients of the logits and of keys and values."""
    grad_logits, grad_kv = _empty_grads(grad_out, logits, kv, out, lse, num_heads)
    if out.numel() == 0:
        return grad_logits.zero_(), grad_kv.zero_()
    blocks = kv.shape[0] * ceil_div(kv.shape[1], block_size(kv.shape[-1] // num_heads))
    _launch('landmark_grad_kernel', (blocks, num_heads), logits, kv, num_heads,
            out=out, lse=lse, grad_out=grad_out.contiguous(), grad_logits=grad_logits, grad_kv=grad_kv)
    return grad_logits, grad_kv


def _empty_outputs(logits: torch.Tensor, kv: torch.Tensor, num_heads: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return what `_forward` does, without values."""
    B, C, rank = kv.shape[0], kv.shape[-1], logits.shape[-1] // num_heads
    out = torch.empty(B, rank, 2, C, dtype=torch.float32, device=kv.device)
    return out, out.new_empty(B, num_heads, rank)


def _empty_grads(
        grad_out: torch.Tensor,
        logits: torch.Tensor,
        kv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        num_heads: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return what `_backward` does, without values."""
    grad_logits, grad_kv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (logits, kv))
    return grad_logits, grad_kv


def _keep(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[torch.Tensor, torch.Tensor]) -> None:
    """Keep what the backward pass needs."""
    logits, kv, ctx.num_heads = inputs
    ctx.save_for_backward(logits, kv, *output)


class _PoolTokens(torch.autograd.Function):
    """`_forward` with a backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        outputs = _forward(*inputs)
        _keep(ctx, inputs, outputs)
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, _: Any) -> Tuple[Optional[torch.Tensor], ...]:
        logits, kv, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to have gradients
            return differentiable_gradients(pool_wide, (logits, kv, ctx.num_heads), ctx.needs_input_grad, grad_out)
        return (*_backward(grad_out, logits, kv, out, lse, ctx.num_heads), None)


# The same as an operator, for graphs


pool_operator = torch.library.custom_op('timm_ls::triton_pool_tokens', _forward, mutates_args=())
pool_operator.register_fake(_empty_outputs)
pool_operator_backward = torch.library.custom_op('timm_ls::triton_pool_tokens_backward', _backward, mutates_args=())
pool_operator_backward.register_fake(_empty_grads)


def _operator_gradients(ctx: Any, grad_out: torch.Tensor, _: Any) -> Tuple[Optional[torch.Tensor], ...]:
    return (*pool_operator_backward(grad_out, *ctx.saved_tensors, ctx.num_heads), None)


pool_operator.register_autograd(_operator_gradients, setup_context=_keep)
