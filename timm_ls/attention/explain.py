"""Which implementation of window attention a model takes for an input, and why not another."""
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .._compat import fake_mode
from ..ops.window_attention import recorded_choices
from .long_short import LongShortAttention

__all__ = ['AttentionChoice', 'AttentionChoices', 'explain_attention']


@dataclass(frozen=True)
class AttentionChoice:
    """What one long-short layer takes.

    Attributes:
        layer: Its name.
        implementation: The name of what computes its window attention.
        num_calls: How often that is called: once, or once for each row chunk.
        why_not: Why the other implementations are not taken, by their names.
    """

    layer: str
    implementation: str
    num_calls: int
    why_not: Dict[str, str]


class AttentionChoices(List[AttentionChoice]):
    """The choices of all layers; `print` them for a table."""

    def __str__(self) -> str:
        lines = []
        for choice in self:
            chunks = f' in {choice.num_calls} row chunks' if choice.num_calls > 1 else ''
            lines.append(f'{choice.layer}: {choice.implementation}{chunks}')
            lines += [f'    not {name}: {reason}' for name, reason in choice.why_not.items()]
        return '\n'.join(lines)


def explain_attention(model: nn.Module, x: torch.Tensor) -> AttentionChoices:
    """Return what computes the window attention of each layer for an input, and why not the others.

    Nothing is computed: the forward pass runs on tensors without values. It depends on what it would in a real one: the
    input's size, type and device, training mode, gradients, autocast, and what is forced.

    Args:
        model: A model with long-short layers.
        x: What it would be called with.

    Raises:
        TypeError: `x` is not a tensor.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f'Expected a tensor that the model would be called with, got {type(x).__name__}.')
    layers: Dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, LongShortAttention)
    }
    # in row chunks, a layer is not called itself, but its block is
    names = {parent: layers[child] for parent in model.modules() for child in parent.children() if child in layers}
    names.update(layers)
    starts: List[Tuple[int, str]] = []  # which calls came when a layer had been entered

    def remember(module: nn.Module, args: Any) -> None:
        if module in names:
            starts.append((len(choices), names[module]))

    with fake_mode() as mode, recorded_choices() as choices:
        handle = register_module_forward_pre_hook(remember)
        try:
            tensors: Dict[str, torch.Tensor] = {  # buffers too: what a forward pass counts must not count this one
                name: mode.from_tensor(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
            torch.func.functional_call(model, tensors, (mode.from_tensor(x),))
        finally:
            handle.remove()
    explained = AttentionChoices()
    for (start, layer), (stop, _) in zip(starts, [*starts[1:], (len(choices), '')]):
        if start < stop:
            first = choices[start]
            explained.append(AttentionChoice(layer, first.name, stop - start, first.why_not))
    return explained
