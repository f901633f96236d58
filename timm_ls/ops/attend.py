"""Scaled dot-product attention over keys that are all there."""
from typing import Optional

import torch
import torch.nn.functional as F

from .capture import is_captured, needs_plain_operations

__all__ = ['attend', 'attend_heads', 'attend_heads_at_once', 'softmax']


def softmax(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the softmax in float32 or wider."""
    return logits.softmax(dim=dim, dtype=torch.promote_types(logits.dtype, torch.float32))


def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: Optional[torch.Tensor],
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """Return scaled dot-product attention with an additive bias, fused or plain (softmax in float32 or wider).

    Args:
        q: Queries, [..., heads, L, d].
        k: Keys, [..., heads, S, d].
        v: Values, [..., heads, S, d].
        bias: Added to the scaled logits, broadcastable to [..., heads, L, S]; with four dimensions, as torch's fused
            kernels take no fewer.
        dropout_p: Probability of dropping an attention weight.
        fused: Use torch's `scaled_dot_product_attention`, but where it has no kernel: for a bias that learns, on a CPU,
            and under `torch.func` and forward-mode derivatives.

    Returns:
        [..., heads, L, d].
    """
    if not is_captured():
        if bias is not None and bias.requires_grad and bias.device.type == 'cpu':
            fused = False  # torch would take a plain form of its own, slower as it looks for masked rows
        if needs_plain_operations():
            fused = False  # torch's kernels have no forward derivative, and a transform hides what requires a gradient
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return F.dropout(softmax(logits, dim=-1).to(q.dtype), dropout_p) @ v


def attend_heads(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: Optional[torch.Tensor],
        num_heads: int,
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """Return `attend` of queries [B, L, C] to keys and values [B, S, C], bias [1, heads, L, S], as [B, L, C]."""
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    k = k.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    v = v.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    out = attend(q, k, v, bias, dropout_p, fused).transpose(1, 2)
    if is_captured():
        out = out.clone(memory_format=torch.contiguous_format)  # in graphs, its layout may change later
    return out.flatten(2)


def attend_heads_at_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return `attend_heads` of a few queries, without a bias, by products over all channels at once.

    The keys stay as they lie in memory, where engines that run graphs would transpose those of every head.
    """
    C = q.shape[2]
    head = torch.arange(C, device=q.device) // (C // num_heads)  # of a channel
    own = (head == torch.arange(num_heads, device=q.device)[:, None]).to(q.dtype)[:, None]  # [heads, 1, C]
    q = (q * (C // num_heads) ** -0.5).unsqueeze(1) * own  # [B, heads, L, C]: block-diagonal
    logits = q.flatten(1, 2) @ k.transpose(1, 2)  # [B, heads * L, S]
    out = softmax(logits, dim=2).to(v.dtype) @ v
    return (out.unflatten(1, (num_heads, -1)) * own).sum(dim=1)
