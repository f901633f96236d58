"""Softmax over parts: sums over tokens that are taken a part at a time, in float32 or wider, on every device.

Matrix products of half-precision types add as the hardware likes, in float16 on some CPUs, and a sum over a million
tokens then loses its digits. So landmarks, and global tokens in row chunks or over several devices, are made from
a `SoftmaxSum` of each part: its largest logit, the sum of its exponentials and the weighted sum of its values.
"""
from typing import Any, List, NamedTuple, Optional, Tuple

import torch

from .attend import attend_heads, attend_heads_at_once, softmax
from .autocast import without_autocast
from .capture import is_captured, is_compiled, needs_plain_operations
from .chunks import chunk_bytes, equal_chunks
from .derivatives import differentiable_gradients
from .window_attention import TRITON_IS_INTERPRETED, forced_implementation

__all__ = ['SoftmaxSum', 'attend_few', 'pool_tokens', 'query_logits', 'softmax_sum', 'wide']


class SoftmaxSum(NamedTuple):
    """Softmax-weighted sums of some tokens' values, before it is known what others weigh. All in float32 or wider.

    For h heads and m rows of weights per head, over values of P parts (such as keys and values) of h * d channels.
    """

    maximum: torch.Tensor  # [B, h, m]: largest logit
    total: torch.Tensor  # [B, h, m]: sum of exp(logit - maximum)
    weighted: torch.Tensor  # [P, B, h, m, d]: sum of exp(logit - maximum) times values

    def merge(self, other: 'SoftmaxSum') -> 'SoftmaxSum':
        """Return the sums over the tokens of both."""
        maximum = torch.maximum(self.maximum, other.maximum)
        mine, theirs = (self.maximum - maximum).exp(), (other.maximum - maximum).exp()
        return SoftmaxSum(
            maximum,
            self.total * mine + other.total * theirs,
            self.weighted * mine[..., None] + other.weighted * theirs[..., None])

    def log_sum_exp(self) -> torch.Tensor:
        """Return the logarithm of what the tokens weigh in a softmax, [B, h, m]."""
        return self.maximum + self.total.log()

    def output(self) -> torch.Tensor:
        """Return the weighted means, [B, m, P, h * d]."""
        return (self.weighted / self.total[..., None]).permute(1, 3, 0, 2, 4).flatten(3)


def by_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """View values [B, N, P, h * d] as [P, B, h, N, d]."""
    return x.unflatten(3, (num_heads, -1)).permute(2, 0, 3, 1, 4)


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax_sum(logits: torch.Tensor, values: torch.Tensor, num_heads: int) -> SoftmaxSum:
    """Return the sums over some tokens.

    Args:
        logits: [B, N, h * m], N >= 1.
        values: [B, N, P, h * d].
        num_heads: Heads h.
    """
    with without_autocast(values):
        logits = wide(logits).transpose(1, 2).unflatten(1, (num_heads, -1))  # [B, h, m, N]
        maximum = logits.amax(dim=3)
        weights = (logits - maximum[..., None]).exp()
        sums = [weights @ part for part in by_head(wide(values), num_heads)]
        return SoftmaxSum(maximum, weights.sum(dim=3), torch.stack(sums))


def query_logits(q: torch.Tensor, keys: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the scaled logits of a few queries for `softmax_sum`.

    Args:
        q: [B, g, C], not yet scaled.
        keys: [B, N, C].
        num_heads: Heads that share the C channels.

    Returns:
        [B, N, num_heads * g].
    """
    with without_autocast(keys):
        q = wide(q).unflatten(2, (num_heads, -1)).transpose(1, 2)  # [B, h, g, d]
        keys = wide(keys).unflatten(2, (num_heads, -1)).transpose(1, 2)  # [B, h, N, d]
        return (keys @ (q * q.shape[-1] ** -0.5).transpose(2, 3)).transpose(1, 2).flatten(2)


def pool_tokens(
        logits: torch.Tensor,
        values: torch.Tensor,
        num_heads: int,
        in_chunks: bool = False,
) -> torch.Tensor:
    """Return means of all tokens of a map, weighted by a softmax over tokens: landmarks (eq. 4).

    Args:
        logits: [B, N, h * m].
        values: [B, N, P, C].
        num_heads: Heads h that share the C channels.
        in_chunks: Take tokens a chunk at a time whatever their type, for the memory of the backward pass; those of half
            precision always are.

    Returns:
        [B, m, P, C], of the type of `values`.
    """
    if torch.jit.is_scripting():
        return pool_plain(logits, values, num_heads)
    else:
        with without_autocast(values):
            if is_pooled_by_kernels(logits, values, num_heads):
                return pool_by_kernels(logits, values, num_heads)
            if needs_plain_operations() or values.element_size() >= 4 and not in_chunks:
                return pool_plain(logits, values, num_heads)
            return _PoolTokens.apply(logits, values, num_heads)


def is_pooled_by_kernels(logits: torch.Tensor, values: torch.Tensor, num_heads: int) -> bool:
    """Whether Triton's kernels compute `pool_tokens`: for keys and values, where those of attention may be chosen."""
    device, forced = values.device, forced_implementation()
    if device.type != 'cuda' and not TRITON_IS_INTERPRETED or is_captured() and not is_compiled():
        return False
    if values.shape[2] != 2 or forced not in ('auto', 'triton'):
        return False
    from .triton.landmarks import why_not
    from .triton.self_check import failure
    rank, head_dim = logits.shape[-1] // num_heads, values.shape[-1] // num_heads
    if why_not(device, values.dtype, rank, head_dim) is not None:
        return False
    needs_grad = torch.is_grad_enabled() and (logits.requires_grad or values.requires_grad)
    return forced == 'triton' or failure('landmarks', device, values.dtype, rank, head_dim, needs_grad) is None


def pool_by_kernels(logits: torch.Tensor, values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return `pool_tokens` by Triton's kernels."""
    from .triton.landmarks import triton_pool_tokens  # here: triton takes time to import
    return triton_pool_tokens(logits, values, num_heads)


def pool_plain(logits: torch.Tensor, values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return `pool_tokens` in plain operations."""
    return pool_wide(logits, values, num_heads).to(values.dtype)


def pool_wide(logits: torch.Tensor, values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return `pool_plain` in float32 or wider."""
    weights = softmax(logits.transpose(1, 2), dim=2)  # torch is slow along other dimensions than the last
    weights = weights.unflatten(1, (num_heads, -1))  # [B, h, m, N]
    parts = by_head(wide(values), num_heads)
    sums = torch.stack([weights @ parts[i] for i in range(values.shape[2])], dim=1)  # [B, P, h, m, d]
    return sums.permute(0, 3, 1, 2, 4).flatten(3)


def attend_few(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        num_heads: int,
        dropout_p: float,
        fused: bool,
) -> torch.Tensor:
    """Return `attend_heads` of a few queries, without a bias: their gradients are sums over all keys.

    torch's fused kernels have no gradients of gradients, and on a CPU they add up half-precision ones as they are.
    """
    if not torch.jit.is_scripting():
        if dropout_p == 0. and is_captured():
            return attend_heads_at_once(q, k, v, num_heads)
        is_exact = q.element_size() >= 4 or q.device.type == 'cpu'
        if torch.is_grad_enabled() and dropout_p == 0. and is_exact:
            return pool_tokens(query_logits(q, k, num_heads), v[:, :, None], num_heads)[:, :, 0]
    return attend_heads(q, k, v, None, num_heads, dropout_p, fused)


class _PoolTokens(torch.autograd.Function):
    """`pool_tokens` a chunk of tokens at a time: no float32 copy of half-precision values, one gradient of all values.

    Autograd would make one of keys and one of values, each filled up with zeros to the size of both.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, values: torch.Tensor, num_heads: int) -> torch.Tensor:
        sums: Optional[SoftmaxSum] = None
        for tokens in token_chunks(values):
            part = softmax_sum(logits[:, tokens], values[:, tokens], num_heads)
            sums = part if sums is None else sums.merge(part)
        assert sums is not None
        out = sums.output()
        ctx.save_for_backward(logits, values, sums.log_sum_exp(), out)
        ctx.num_heads = num_heads
        return out.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        logits, values, log_sum_exp, out = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to have gradients
            return differentiable_gradients(
                pool_plain, (logits, values, ctx.num_heads), ctx.needs_input_grad, grad_out)
        h = ctx.num_heads
        grad_logits, grad_values = torch.empty_like(logits), torch.empty_like(values)
        grad_out = wide(grad_out)
        grad_sums = by_head(grad_out, h)  # [P, B, h, m, d]
        row_sum = (grad_out * out).unflatten(3, (h, -1)).sum(dim=(2, 4)).transpose(1, 2)  # [B, h, m]
        for tokens in token_chunks(values):
            weights = wide(logits[:, tokens]).transpose(1, 2).unflatten(1, (h, -1))  # [B, h, m, N]
            weights = (weights - log_sum_exp[..., None]).exp()
            parts = by_head(wide(values[:, tokens]), h)  # [P, B, h, N, d]
            grad_weights = (grad_sums @ parts.transpose(3, 4)).sum(dim=0)
            grad_weights = weights * (grad_weights - row_sum[..., None])
            grad_logits[:, tokens] = grad_weights.flatten(1, 2).transpose(1, 2)
            by_head(grad_values[:, tokens], h).copy_(weights.transpose(2, 3) @ grad_sums)
        return grad_logits, grad_values, None


def token_chunks(values: torch.Tensor) -> List[slice]:
    """Cut the tokens of values [B, N, P, C] into chunks whose float32 copies are small."""
    token_bytes = 4 * values[:, :1].numel()
    return equal_chunks(values.shape[1], chunk_bytes(values.device) // max(1, token_bytes))
