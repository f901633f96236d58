"""Gradients of gradients, for functions whose backward pass is written by hand."""
from typing import Any, Callable, Sequence, Tuple

import torch

__all__ = ['differentiable_gradients']


def differentiable_gradients(
        plain: Callable[..., torch.Tensor],
        inputs: Sequence[Any],
        needed: Sequence[bool],
        grad_out: torch.Tensor,
) -> Tuple[Any, ...]:
    """Return the gradients of a function in a form that has gradients itself.

    Args:
        plain: The function in operations that know their derivatives.
        inputs: What it was called with.
        needed: Which of these need a gradient.
        grad_out: Gradient of its output.

    Returns:
        A gradient for each of the inputs, None where it is not needed.
    """
    # views, for a tensor that is made from another of the inputs must not pass its gradient on to that one
    inputs = [x.view_as(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    wanted = [x for x, is_needed in zip(inputs, needed, strict=True) if is_needed]
    grads = iter(torch.autograd.grad(plain(*inputs), wanted, grad_out, create_graph=True))
    return tuple(next(grads) if is_needed else None for is_needed in needed)
