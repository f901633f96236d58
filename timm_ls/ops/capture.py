"""What the forward pass has to know of those who capture it, and arithmetic that they can follow."""
from contextvars import ContextVar, Token
from typing import Generic, TypeVar

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .._compat import functorch_is_active, is_exporting, is_in_forward_mode

__all__ = ['ContextSetting', 'ceil_div', 'has_fixed_size', 'is_captured', 'is_compiled', 'needs_plain_operations']


T = TypeVar('T')
COMPILES_CONTEXT_VARIABLES = torch.__version__ >= '2.15'


class ContextSetting(Generic[T]):
    """A context variable that compiled code reads too: when it changes, that is compiled again.

    Older compilers know no context variables. With them compiled code reads what was set last, in whichever thread.
    """

    def __init__(self, name: str, default: T):
        self.variable: ContextVar[T] = ContextVar(name, default=default)
        self.latest = default

    def get(self) -> T:
        """Return the value."""
        if torch.compiler.is_dynamo_compiling() and not COMPILES_CONTEXT_VARIABLES:
            return self.latest
        return self.variable.get()

    def set(self, value: T) -> 'Token[T]':
        """Set the value; return what `reset` takes."""
        token = self.variable.set(value)
        self.latest = value
        return token

    def reset(self, token: 'Token[T]') -> None:
        """Undo what `set` did."""
        self.variable.reset(token)
        self.latest = self.variable.get()


def is_captured() -> bool:
    """Whether a graph is being captured: by compile, export, trace or `make_fx`. Its sizes may stand for others.

    Python must not branch on them then. A script is not captured: it reads sizes when it runs.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() or torch.jit.is_tracing() or get_proxy_mode() is not None


def is_compiled() -> bool:
    """Whether the graph that is being captured is compiled for this machine, not exported to another."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.compiler.is_compiling() and not is_exporting()


def has_fixed_size(x: torch.Tensor) -> bool:
    """Whether a graph is being captured in which maps [B, H, W, ...] have one height and width, which are numbers."""
    if torch.jit.is_tracing() or torch.compiler.is_dynamo_compiling() or not is_captured():
        return False  # dynamo does not tell numbers from symbols
    return type(x.shape[1]) is int and type(x.shape[2]) is int


def needs_plain_operations() -> bool:
    """Whether a pass is seen by what knows plain operations only: a graph, `torch.func`, forward-mode derivatives.

    Then nothing may be written in place, and nothing may have a backward pass of its own.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return is_captured() or functorch_is_active() or is_in_forward_mode()


def ceil_div(size: int, divisor: int) -> int:
    """How many times `divisor` fits into `size`, rounded up, in a form that symbolic sizes simplify."""
    return (size + divisor - 1) // divisor
