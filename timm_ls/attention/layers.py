"""What the attention layers share: a LayerNorm for half precision, maps instead of sequences, checks of arguments."""
from typing import TYPE_CHECKING, Any, Final, List, Optional, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from .._compat import layer_norm_backward
from ..ops.autocast import is_autocast, without_autocast
from ..ops.capture import has_fixed_size, is_captured, needs_plain_operations
from ..ops.chunks import chunk_bytes, equal_chunks
from ..ops.derivatives import differentiable_gradients
from ..ops.merge import wide

__all__ = [
    'LayerNorm', 'MapInterface', 'check_global_tokens', 'check_heads', 'check_map', 'check_tokens', 'split_tokens']

# torch.fx knows neither sizes nor types
torch.fx.wrap('check_global_tokens')
torch.fx.wrap('check_map')
torch.fx.wrap('layer_norm')


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` for half precision: the same values, gradients of weight and bias summed in float32 everywhere.

    On a CPU torch sums these over all tokens in the type of the input, in which they stop growing after some hundred.

    Args:
        *args: Of `nn.LayerNorm`.
        keep_type: Return the type of the input under autocast, where torch returns float32, for those who would cast
            that back: rounded once, in fewer passes.
        in_chunks: Compute float32 on a CPU as half precision is, a chunk at a time, where a gradient is asked for:
            inputs that are parts of something, such as keys and values beside queries, are not copied.
        **kwargs: Of `nn.LayerNorm`.
    """
    keep_type: Final[bool]
    in_chunks: Final[bool]

    def __init__(self, *args: Any, keep_type: bool = False, in_chunks: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.keep_type = keep_type
        self.in_chunks = in_chunks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize over the last dimension."""
        return layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps,  # type: ignore[arg-type]
            self.keep_type, self.in_chunks)


def layer_norm(
        x: torch.Tensor,
        shape: Tuple[int],
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        eps: float,
        keep_type: bool,
        in_chunks: bool,
) -> torch.Tensor:
    """Compute `LayerNorm`."""
    if torch.jit.is_scripting():
        return F.layer_norm(x, shape, weight, bias, eps)
    else:
        if is_autocast(x):
            if not keep_type and (x.device.type != 'cpu' or x.element_size() >= 4):  # a CPU's keeps half precision
                return F.layer_norm(x, shape, weight, bias, eps)
            with without_autocast(x):
                return layer_norm(x, shape, weight, bias, eps, keep_type, in_chunks)
        is_half, is_cpu = x.element_size() < 4, x.device.type == 'cpu'
        if weight is None or not is_half and not (in_chunks and is_cpu):
            return F.layer_norm(x, shape, weight, bias, eps)
        if not is_cpu:  # kernels for one type only
            return F.layer_norm(x, shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)
        if torch.is_grad_enabled() and not is_captured():
            return (layer_norm_plain if needs_plain_operations() else _LayerNorm.apply)(x, weight, bias, eps)
        return F.layer_norm(x, shape, weight, bias, eps)


def layer_norm_plain(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        eps: float,
) -> torch.Tensor:
    """Compute `LayerNorm` in plain operations."""
    normalized = F.layer_norm(x, x.shape[-1:], None, None, eps)
    normalized = normalized * weight if bias is None else torch.addcmul(bias, normalized, weight)
    return normalized.to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    """`LayerNorm` in chunks, so that nothing of the whole is copied, and of half precision nothing is in float32.

    Statistics, and sums over all tokens in the backward pass, are in float32.
    """

    @staticmethod
    def forward(
            ctx: Any,
            x: torch.Tensor,
            weight: torch.Tensor,
            bias: Optional[torch.Tensor],
            eps: float,
    ) -> torch.Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, (out_rows,) = as_rows(x, out)
        mean, scale = weight.new_empty((2, *rows.shape[:2], 1), dtype=wide(weight).dtype)
        for chunk in row_chunks(rows):
            out_rows[chunk], mean[chunk], scale[chunk] = torch.native_layer_norm(
                rows[chunk], x.shape[-1:], wide(weight), None if bias is None else wide(bias), eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to have gradients
            return differentiable_gradients(
                layer_norm_plain, (x, weight, bias, ctx.eps), ctx.needs_input_grad, grad_out)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, (grad_x_rows, grad_out_rows) = as_rows(x, grad_x, grad_out)
        grad_weight, grad_bias = wide(weight).new_zeros(2, *weight.shape)
        for chunk in row_chunks(rows):
            grad_x_rows[chunk], weight_part, bias_part = layer_norm_backward(
                wide(grad_out_rows[chunk]), wide(rows[chunk]), mean[chunk], scale[chunk], wide(weight))
            grad_weight += weight_part
            grad_bias += bias_part
        return grad_x, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None


def as_rows(x: torch.Tensor, *others: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
    """View tensors of one shape [..., C] as rows of P vectors, [rows, P, C].

    P is 1 unless `x` is a part of something: keys and values, for example, lie two by two behind each token's query.
    """
    P = x.shape[-2] if x.ndim > 1 and not x.is_contiguous() else 1
    return x.reshape(-1, P, x.shape[-1]), [other.reshape(-1, P, x.shape[-1]) for other in others]


def row_chunks(rows: torch.Tensor) -> List[slice]:
    """Cut rows [rows, P, C] into chunks whose float32 copies are small."""
    return equal_chunks(len(rows), chunk_bytes(rows.device) // max(1, 4 * rows[:1].numel()))


def split_tokens(x: torch.Tensor, num_global_tokens: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return global tokens and map of a sequence [B, g + N, ...], as views whose backward fills no zeros."""
    if not torch.jit.is_scripting():
        if is_captured() and not has_fixed_size(x):  # the number of tokens may be a symbol
            return x[:, :num_global_tokens], x[:, num_global_tokens:]
    if num_global_tokens == 0:
        return x.new_empty(x[:, :0].shape), x
    global_tokens, tokens = x.split([num_global_tokens, x.shape[1] - num_global_tokens], dim=1)
    return global_tokens, tokens


def check_heads(dim: int, num_heads: int) -> None:
    """Raise a ValueError unless `dim` channels split evenly over `num_heads` heads."""
    if num_heads < 1 or dim % num_heads != 0:
        raise ValueError(
            f'dim={dim} is not divisible by num_heads={num_heads}: every head needs dim / num_heads channels.')


def check_tokens(x: torch.Tensor, size: Tuple[int, int], num_global_tokens: int) -> None:
    """Raise a ValueError unless `x` is [B, num_global_tokens + H * W, C] of a map of `size` (H, W)."""
    if not is_captured():
        if x.ndim != 3 or x.shape[1] != num_global_tokens + size[0] * size[1]:
            raise ValueError(
                f'Expected tokens [batch, {num_global_tokens} + {size[0]} * {size[1]}, C]: global tokens'
                f' (num_global_tokens), then a map of {size[0]} rows and {size[1]} columns; got {list(x.shape)}.')


def check_map(x: torch.Tensor, dim: int) -> None:
    """Raise a ValueError unless `x` is a map [B, H, W, dim] with H and W >= 1."""
    if not is_captured():
        if x.ndim != 4 or x.shape[3] != dim or x.shape[1] == 0 or x.shape[2] == 0:
            raise ValueError(f'Expected a map [batch, rows, columns, {dim}], channels last; got {list(x.shape)}.')


def check_global_tokens(global_tokens: Optional[torch.Tensor], number: int) -> None:
    """Raise a ValueError unless there are that many global tokens, [B, number, C]; none for 0."""
    if not is_captured():
        given = 0 if global_tokens is None else global_tokens.shape[1]
        if given != number:
            raise ValueError(f'Expected {number} global tokens (num_global_tokens), [batch, {number}, C]; got {given}.')


class MapInterface(nn.Module):
    """An attention layer called with a map and its global tokens apart, in place of one sequence."""

    if TYPE_CHECKING:  # the layer brings these
        dim: int
        num_global_tokens: int

        def attend(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
            """Attend over a sequence."""

    def forward(
            self,
            x: torch.Tensor,
            global_tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Attend over a map.

        Args:
            x: Patch tokens, [B, H, W, C], H and W >= 1.
            global_tokens: [B, num_global_tokens, C]; None if there are none.

        Returns:
            The updated map and global tokens, of the same shapes.

        Raises:
            ValueError: There are other global tokens than `num_global_tokens`, or `x` is no such map.
        """
        check_map(x, self.dim)
        check_global_tokens(global_tokens, self.num_global_tokens)
        B, H, W, C = x.shape
        tokens = x.reshape(B, H * W, C)
        if global_tokens is not None:
            tokens = torch.cat([global_tokens, tokens], dim=1)
        tokens = self.attend(tokens, (H, W))
        if global_tokens is None:
            return tokens.reshape(B, H, W, C), None
        g = self.num_global_tokens
        return tokens[:, g:].reshape(B, H, W, C), tokens[:, :g]
