"""Sequences in blocks of queries that each attend to keys of their own: gathering, and some blocks at a time.

Shapes are such that graphs of any length can be captured from the same operations.
"""
from functools import partial
from typing import Any, Callable, List, Tuple

import torch
import torch.nn.functional as F
from timm.models import checkpoint

from .capture import ceil_div, is_captured, is_compiled, needs_plain_operations
from .chunks import chunk_bytes, equal_chunks

__all__ = ['first_tokens', 'gather_windows', 'in_chunks', 'join_blocks', 'num_blocks', 'skew', 'split_blocks']


def num_blocks(length: int, size: int) -> int:
    """Return how many blocks a sequence fills, and in exported graphs one more.

    There are two or more then at any length, as torch has to prove: it exports no size that may be one.
    """
    is_exported = is_captured() and not is_compiled()
    return ceil_div(length + size if is_exported else length, size)  # one quotient, so that torch proves divisibility


def gather_windows(x: torch.Tensor, size: int, step: int, count: int) -> torch.Tensor:
    """Gather `count` windows along dimension 1 that start every `step`: [B, N, ...] to [B * count, size, ...]."""
    index = torch.arange(count, device=x.device)[:, None] * step + torch.arange(size, device=x.device)
    return split_blocks(x.index_select(1, index.flatten()), size)


def split_blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Split dimension 1 into blocks: [B, n * size, ...] to [B * n, size, ...]."""
    return x.flatten(0, 1).unflatten(0, (-1, size))


def join_blocks(x: torch.Tensor, batch: int) -> torch.Tensor:
    """Join blocks again: [B * n, size, ...] to [B, n * size, ...]."""
    return x.flatten(0, 1).unflatten(0, (batch, -1))


def first_tokens(x: torch.Tensor, count: int) -> torch.Tensor:
    """Return the first tokens of [B, N, ...], in graphs by a way that asks nothing about sizes."""
    return x.index_select(1, torch.arange(count, device=x.device)) if is_captured() else x[:, :count]


def skew(x: torch.Tensor, step: int) -> torch.Tensor:
    """Shift row i of [..., n, m] to the right by `i * step`, minus infinity around: [..., n, m + (n - 1) * step]."""
    n, m = x.shape[-2:]
    width = m + (n - 1) * step
    # rows too long by one step, cut at multiples of the width: each starts a step later than the one before
    rows = F.pad(x, (0, n * step), value=float('-inf')).flatten(-2)
    return rows[..., :n * width].unflatten(-1, (n, width))


class _Slices(torch.autograd.Function):
    """Overlapping slices along dimension 1, whose gradients are added up in one buffer.

    Plain slices would each have a gradient as large as what they were cut from: their sum is quadratic in its length.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slices: List[slice]) -> Tuple[torch.Tensor, ...]:
        ctx.slices, ctx.shape = slices, x.shape
        return tuple(x[:, each] for each in slices)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Tuple[torch.Tensor, None]:
        total = grads[0].new_zeros(ctx.shape)
        for each, grad in zip(ctx.slices, grads):
            total[:, each] += grad
        return total, None


def in_chunks(
        attend_blocks: Callable[..., torch.Tensor],
        count: int,
        block_bytes: int,
        *tensors: Tuple[torch.Tensor, int, int],
) -> torch.Tensor:
    """Join what `attend_blocks` returns for some blocks at a time, as many as fit into `chunk_bytes`.

    The backward pass makes the temporaries of a chunk anew. Captured graphs hold a single call.

    Args:
        attend_blocks: Called with a number of blocks and their part of each tensor; returns [B, tokens, ...].
        count: Number of all blocks.
        block_bytes: Temporaries of one block.
        tensors: Each [B, N, ...], with how many of the N belong to a block and how many after them it needs as well.

    Returns:
        [B, all tokens, ...].
    """
    chunks = [slice(0, count)]
    if not needs_plain_operations():
        chunks = equal_chunks(count, chunk_bytes(tensors[0][0].device) // max(1, block_bytes))
    if len(chunks) == 1:
        return attend_blocks(count, *[x for x, _, _ in tensors])
    parts = [
        _Slices.apply(x, [slice(chunk.start * size, chunk.stop * size + more) for chunk in chunks])
        for x, size, more in tensors]
    run = partial(checkpoint, attend_blocks) if torch.is_grad_enabled() else attend_blocks
    return torch.cat([run(chunk.stop - chunk.start, *part) for chunk, *part in zip(chunks, *parts)], dim=1)
