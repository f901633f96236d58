"""What the forward pass has to know of those who capture it: whether they do, and arithmetic that they can follow."""
import torch

__all__ = ['ceil_div', 'is_traced', 'is_tracing_shapes']


def is_tracing_shapes() -> bool:
    """Whether sizes may stand for other sizes: under compile, export or trace, where Python must not branch on them."""
    if torch.jit.is_scripting():
        return False  # a script reads sizes when it runs
    else:
        return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_traced() -> bool:
    """Whether a pass is seen by what knows plain operations only: compile, export, trace, or `torch.func`.

    Then nothing may be written in place, and nothing may have a backward pass of its own.
    """
    if torch.jit.is_scripting():
        return False
    else:
        return is_tracing_shapes() or torch._C._are_functorch_transforms_active()


def ceil_div(size: int, divisor: int) -> int:
    """How many times `divisor` fits into `size`, rounded up, in a form that symbolic sizes simplify."""
    return (size + divisor - 1) // divisor
