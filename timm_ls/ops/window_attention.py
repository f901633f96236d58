"""Attention of every token to its window's halo and to a few additional keys: one contract, several implementations.

`window_attention` is the contract and the only place that chooses. Implementations of the same mathematics are
registered with what they do not take; the first that takes a call computes it:

- 'triton': kernels for CUDA devices (`triton/`), where they have passed their self-check,
- 'tiled': windows grouped by the part of their halo that lies inside the map, bounded memory (`tiled.py`),
- 'grouped': the same groups in plain operations, for graphs of maps of a fixed size (`grouped.py`),
- 'masked': one gather and one attention call in plain operations, for graphs and everything else (`masked.py`).

What is chosen follows from the call alone: tensors, graph, device and what the user forces, never from a timing. What
was measured on a kind of GPU is in a table (`overrides.py`): the fastest there is asked first.
"""
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

import torch

from .capture import ContextSetting, has_fixed_size, is_captured, is_compiled, needs_plain_operations
from .grouped import grouped_attention
from .masked import masked_attention
from .overrides import override
from .tiled import tiled_attention, tiled_operator

__all__ = [
    'Choice',
    'Implementation',
    'WindowCall',
    'attention_implementation',
    'forced_implementation',
    'implementations',
    'recorded_choices',
    'register_implementation',
    'window_attention',
]


@dataclass(frozen=True)
class WindowCall:
    """What a call is apart from its tensors' values: all that the choice of an implementation depends on.

    Attributes:
        window_size: Rows and columns of a window.
        num_heads: Heads that share the channels.
        head_dim: Channels of a head.
        first_row: Row of the map that the queries start with.
        dropout_p: Probability of dropping an attention weight.
        fused: Whether torch's fused attention may be used, by timm's `use_fused_attn`.
        device: Of the tensors.
        dtype: Of the queries, which attention is computed in.
        needs_grad: Whether a gradient is going to be asked for.
        captured: Whether the call becomes part of a graph, whose sizes may stand for others.
        compiled: Whether that graph is compiled for this machine.
        fixed_size: Whether it is for maps of one size, taken as a whole.
        plain: Whether only plain operations will do: in graphs, under `torch.func` and forward-mode derivatives.
    """

    window_size: int
    num_heads: int
    head_dim: int
    first_row: int
    dropout_p: float
    fused: bool
    device: torch.device
    dtype: torch.dtype
    needs_grad: bool
    captured: bool
    compiled: bool
    fixed_size: bool
    plain: bool


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor], WindowCall], torch.Tensor]


@dataclass(frozen=True)
class Implementation:
    """A way to compute window attention.

    Attributes:
        name: For `attention_implementation`.
        attend: From queries, keys and values, additional ones, the bias and the call to the output; keys and values
            are of the type of the queries.
        why_not: Why it does not take a call, or None if it does.
        rank: The highest that takes a call computes it.
        tolerance: Largest error of values and gradients in float32, relative to the largest value.
        device: Type of device that its tests need; any other if None.
    """

    name: str
    attend: Attend
    why_not: Callable[[WindowCall], Optional[str]]
    rank: int
    tolerance: float = 1e-5
    device: Optional[str] = None


class Choice(NamedTuple):
    """What computes a call, and why the others do not."""

    call: WindowCall
    name: str
    why_not: Dict[str, str]


FUSED_IS_OFF = "timm's fused attention is off (exportable=True, TIMM_FUSED_ATTN=0)"
PLAIN_IS_NEEDED = 'torch.func or forward-mode derivatives need plain operations'
TRITON_IS_INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # then its kernels run on any device
_implementations: List[Implementation] = []
_forced: ContextSetting[str] = ContextSetting('timm_ls_attention_implementation', 'auto')
_recorded: ContextSetting[Optional[List[Choice]]] = ContextSetting('timm_ls_recorded_choices', None)


def register_implementation(implementation: Implementation) -> None:
    """Add an implementation, in the place of one of the same name."""
    others = [other for other in _implementations if other.name != implementation.name]
    _implementations[:] = sorted([*others, implementation], key=lambda each: -each.rank)


def implementations() -> Dict[str, Implementation]:
    """Return the registered implementations by name, the first to be asked first."""
    return {each.name: each for each in _implementations}


@contextmanager
def attention_implementation(name: str) -> Iterator[None]:
    """Force how window attention is computed in this thread, for debugging and comparison.

    All ways give the same values and gradients up to rounding. Scripts always hold the masked one.

    Args:
        name: 'tiled', 'masked', 'grouped' (for exported graphs of one size), 'triton' (kernels for CUDA devices:
            `timm_ls.ops.triton` says what is known of them), or 'auto', the default: the first that takes a call.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: Later, in a call that the implementation does not take; the message says why.
    """
    if name != 'auto' and name not in implementations():
        raise ValueError(
            f'Unknown attention implementation {name!r}: expected one of auto, {", ".join(implementations())}.')
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_implementation() -> str:
    """Return the name that `attention_implementation` forces, or 'auto'."""
    return _forced.get()


@contextmanager
def recorded_choices() -> Iterator[List[Choice]]:
    """Collect what is chosen for every call within."""
    choices: List[Choice] = []
    token = _recorded.set(choices)
    try:
        yield choices
    finally:
        _recorded.reset(token)


def choose(call: WindowCall) -> Implementation:
    """Return the implementation that computes a call.

    Raises:
        RuntimeError: The one that is forced does not take it.
    """
    forced, recorded = _forced.get(), _recorded.get()
    why_not: Dict[str, str] = {}
    chosen: Optional[Implementation] = None
    fastest = override(call)
    for each in sorted(_implementations, key=lambda each: each.name != fastest):
        if chosen is not None and recorded is None:
            break
        reason = each.why_not(call) if forced in ('auto', each.name) else f'{forced!r} is forced'
        if reason is not None:
            why_not[each.name] = reason
        elif chosen is None:
            chosen = each
        else:
            why_not[each.name] = f'comes after {chosen.name!r}'
    if chosen is None:
        raise RuntimeError(
            f'attention_implementation({forced!r}) does not take this call: {why_not[forced]}.'
            " With 'auto', one that does is chosen.")
    if recorded is not None:
        recorded.append(Choice(call, chosen.name, why_not))
    return chosen


def window_attention(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        window_size: int,
        num_heads: int,
        first_row: int = 0,
        dropout_p: float = 0.,
        fused: bool = True,
) -> torch.Tensor:
    """Attend, in one softmax, from tokens to the halo of their window and to additional keys common to the image.

    The queries may be those of some rows of the maps only: whole windows, of which the last may be cut by the map's
    end.

    Args:
        q: Queries of rows `first_row` and on, [B, rows, W, C], not yet scaled.
        kv: Keys and values of the maps, [B, H, W, 2, C].
        additional_kv: Keys and values that all queries of an image see, [B, E, 2, C]; E may be 0.
        bias: Bias of the halo logits, [num_heads, w, w, w + 2p, w + 2p] with p = w // 2.
        window_size: w.
        num_heads: Heads that share the C channels.
        first_row: Where the queries start, a multiple of w.
        dropout_p: Probability of dropping an attention weight.
        fused: Use torch's `scaled_dot_product_attention`.

    Returns:
        [B, rows, W, C].

    Raises:
        RuntimeError: The implementation that is forced does not take the call.
    """
    kv, additional_kv = kv.to(q.dtype), additional_kv.to(q.dtype)
    if torch.jit.is_scripting():
        return masked_attention(
            q, kv, additional_kv, bias, window_size, num_heads, first_row, dropout_p, fused)
    else:
        if bias is not None:
            bias = bias.to(q.dtype)
        needs_grad = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, kv, additional_kv, bias))
        call = WindowCall(
            window_size, num_heads, q.shape[-1] // num_heads, first_row, dropout_p, fused, q.device, q.dtype,
            needs_grad, is_captured(), is_compiled(), has_fixed_size(q) and has_fixed_size(kv),
            needs_plain_operations())
        return choose(call).attend(q, kv, additional_kv, bias, call)


# What is registered


def _attend_masked(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        call: WindowCall,
) -> torch.Tensor:
    return masked_attention(
        q, kv, additional_kv, bias, call.window_size, call.num_heads, call.first_row, call.dropout_p, call.fused)


def _attend_tiled(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        call: WindowCall,
) -> torch.Tensor:
    attend = tiled_operator if call.captured else tiled_attention
    return attend(q, kv, additional_kv, bias, call.window_size, call.num_heads, call.first_row)


def _attend_grouped(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        call: WindowCall,
) -> torch.Tensor:
    return grouped_attention(q, kv, additional_kv, bias, call.window_size, call.num_heads, call.first_row)


def _grouped_why_not(call: WindowCall) -> Optional[str]:
    if call.dropout_p > 0:
        return 'attention dropout is active'
    if not call.fused:
        return FUSED_IS_OFF
    if call.captured and not call.fixed_size:
        return 'a graph is captured whose sizes may vary'
    if not call.captured and _forced.get() != 'grouped':
        return 'it is for graphs'
    if not call.captured and call.plain:
        return PLAIN_IS_NEEDED
    return None


def _tiled_why_not(call: WindowCall) -> Optional[str]:
    if call.dropout_p > 0:
        return 'attention dropout is active'
    if not call.fused:
        return FUSED_IS_OFF
    if call.captured and not (call.compiled and call.device.type == 'cpu'):
        return 'a graph is captured, other than to compile it for a CPU'
    if call.plain and not call.captured:
        return PLAIN_IS_NEEDED
    if call.needs_grad and call.device.type not in ('cpu', 'cuda', 'meta'):
        return f'its backward pass was written for CPU and CUDA, not for {call.device.type}'
    return None


def _attend_triton(
        q: torch.Tensor,
        kv: torch.Tensor,
        additional_kv: torch.Tensor,
        bias: Optional[torch.Tensor],
        call: WindowCall,
) -> torch.Tensor:
    from .triton.attention import triton_attention  # here: triton takes time to import
    return triton_attention(q, kv, additional_kv, bias, call.window_size, call.num_heads, call.first_row)


def _triton_why_not(call: WindowCall) -> Optional[str]:
    is_forced = _forced.get() == 'triton'
    if call.device.type != 'cuda' and not is_forced and not TRITON_IS_INTERPRETED:
        return f'it is for CUDA devices, not for {call.device.type}'
    from .triton.attention import why_not
    reason = why_not(call)
    if reason is not None or is_forced:
        return reason
    if call.captured and not call.compiled:
        return 'a graph is captured, other than to compile it for this machine'
    from .triton.self_check import failure
    return failure('window attention', call.device, call.dtype, call.window_size, call.head_dim, call.needs_grad)


# On CUDA without Triton, 'tiled' before 'masked': it launches less at 224 pixels, where launches are what takes time.
# Counted for maps of 56, 28 and 14 tokens a side, in bfloat16: forward 26, 26 and 16 operators to 96, with the backward
# pass 158, 158 and 83 to 108. On larger maps its backward pass has more, but keeps no gathered keys.
register_implementation(Implementation('masked', _attend_masked, lambda call: None, rank=0))
register_implementation(Implementation('grouped', _attend_grouped, _grouped_why_not, rank=5))
register_implementation(Implementation('tiled', _attend_tiled, _tiled_why_not, rank=10))
register_implementation(Implementation('triton', _attend_triton, _triton_why_not, rank=20, device='cuda'))
