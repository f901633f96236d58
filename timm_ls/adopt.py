"""Long-short attention of other projects, replaced in place: their weights under their names, our arithmetic."""
import math
from copy import deepcopy
from typing import Any, Dict, Final, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from ._compat import has_hooks
from .attention.chunked import forward_in_chunks, runs_in_chunks
from .attention.layers import LayerNorm, check_tokens
from .attention.long_short import LongShortAttention
from .ops.merge import pool_tokens
from .ops.windows import halo_width

__all__ = ['Adopted', 'AdoptedAttention', 'adopt']

# Our names of what the released layer and its copies have
THEIR_NAMES: Final[Dict[str, str]] = {
    'norm_kv': 'dual_ln_full',
    'norm_landmarks': 'dual_ln_dp',
    'dynamic_projection': 'to_dynamic_projection',
}
MODULES: Final[Tuple[str, ...]] = ('qkv', 'attn_drop', 'proj', 'proj_drop', 'dual_ln_dp', 'dual_ln_full')
SETTINGS: Final[Tuple[str, ...]] = ('num_heads', 'scale', 'window_size', 'dp_rank', 'nglo')
OPTIONAL: Final[Tuple[str, ...]] = (
    'to_dynamic_projection', 'local_relative_position_bias_table', 'relative_position_index')
TOLERANCE: Final[float] = 2e-5  # of values and gradients, relative to the largest
# What resembles long-short attention over a map but is none: the modules that tell it, and the reason
STRANGERS: Final[Tuple[Tuple[Tuple[str, ...], str], ...]] = (
    (('dual_ln_s', 'dual_ln_l', 'dconv_fc'), 'it attends over sequences, adopted are layers over maps'),
    (('dual_ln_win', 'dual_ln_dproj', 'dconv_1'), 'it attends over sequences, causally; adopted are layers over maps'),
    (('query', 'kv', 'proj'), "Vision Longformer's attention is another one: timm_ls.warm_start takes its weights"),
)


class Adopted(NamedTuple):
    """A layer that `adopt` replaced.

    Attributes:
        name: Its name in the model.
        found: What it was.
        made: What it is now.
    """

    name: str
    found: str
    made: str


def adopt(model: nn.Module) -> List[Adopted]:
    """Replace the long-short attention in a model of another project by ours, in place.

    Recognized by structure are the layer released for ImageNet (NVIDIA/transformer-ls) and its copies, such as the one
    in Surya, NASA's and IBM's model of the Sun. Names and shapes in state dicts stay, and so do, as the very same
    objects, all parameters, `qkv` and `proj`: checkpoints, optimizers and LoRA work as before. New are speed, memory,
    and maps of any height and width, `layer(x, rows, columns)`.

    A layer is replaced only if it passes a test: on a small map, with random weights, its values and gradients have to
    be those of its replacement within 2e-5 of the largest. The test also tells what its global tokens attend to:
    outputs, as released, or keys, as in Surya.

    Vision Longformer (ViL) is not adopted: its queries see their own window and the eight around it, a halo of w where
    ours is w // 2, its keys and values have no norm, which no weights of ours make the identity, and global tokens have
    projections and biases of their own. No choice of w, r and g gives the same sums; `warm_start` takes its weights.

    Args:
        model: What holds the layers; before it is sharded, compiled or hooked.

    Returns:
        What was replaced; an empty list if all long-short attention is ours already.

    Raises:
        ValueError: There is no long-short attention, or some that cannot be reproduced: the message says which and why.
            Nothing is replaced then.
    """
    names: Dict[nn.Module, List[str]] = {}  # a layer may be in several places
    refused: Dict[str, List[str]] = {}  # names by reasons
    is_ours = False
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LongShortAttention):
            is_ours = True
        elif hasattr(module, 'dual_ln_full'):
            names.setdefault(module, []).append(name)
        for parts, reason in STRANGERS:
            if all(hasattr(module, part) for part in parts):
                refused.setdefault(f'{type(module).__name__}: {reason}', []).append(name)
    if model in names:
        raise ValueError(f'{type(model).__name__} is the layer itself: give a module that holds it.')
    replacements = {}
    for layer in names:
        try:
            replacements[layer] = find_replacement(layer)
        except ValueError as error:
            refused.setdefault(f'{type(layer).__name__}: {error}', []).extend(names[layer])
    if refused:
        raise ValueError(' '.join([
            'Nothing was replaced.', *(f'{reason} (in {", ".join(places)}).' for reason, places in refused.items())]))
    if not names and not is_ours:
        raise ValueError(
            f'No long-short attention in {type(model).__name__}: expected modules with {", ".join(MODULES)}.')
    adopted = []
    for layer, made in replacements.items():
        for name in names[layer]:
            model.set_submodule(name, made)
            found = f'{type(layer).__module__}.{type(layer).__qualname__}'
            adopted.append(Adopted(name, found, f'{type(made).__name__}({made.extra_repr()})'))
    return adopted


class AdoptedAttention(LongShortAttention):
    """`LongShortAttention` with the modules, parameters and names of the layer that it replaces.

    Args:
        layer: That layer, which `why_not` has nothing against.
        global_update: What its global tokens attend to, 'outputs' or 'keys'.
    """

    def __init__(self, layer: Any, global_update: str):
        super().__init__(
            dim=layer.dual_ln_full.normalized_shape[0],
            num_heads=layer.num_heads,
            window_size=layer.window_size,
            rank=layer.dp_rank,
            num_global_tokens=layer.nglo,
            rel_pos_bias=False,
            global_update=global_update,
            device='meta',
        )
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        for name, module in layer.named_children():  # in their order, which optimizers count parameters by
            self.add_module(name, sharing_norm(module) if isinstance(module, nn.LayerNorm) else module)
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.has_bias = hasattr(layer, 'local_relative_position_bias_table')
        self.training = layer.training

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(THEIR_NAMES.get(name, name))

    def extra_repr(self) -> str:
        """Return the settings as text."""
        update = 'outputs' if self.update_from_outputs else 'keys'
        return (f'dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, rank={self.rank},'
                f' num_global_tokens={self.num_global_tokens}, rel_pos_bias={self.has_bias}, global_update={update!r}')

    def forward(  # type: ignore[override]  # the call of the layer that it replaces
            self,
            x: torch.Tensor,
            nx: Optional[int] = None,
            ny: Optional[int] = None,
    ) -> torch.Tensor:
        """Attend over a sequence of global tokens and a map.

        Args:
            x: Tokens, [B, g + nx * ny, C], the global ones first.
            nx: Rows of the map; by default, those of a square map, or what `ny` leaves.
            ny: Columns of the map, likewise.

        Returns:
            The updated tokens, of the same shape.

        Raises:
            ValueError: There are other tokens than g + nx * ny.
        """
        num_tokens = x.shape[1] - self.num_global_tokens
        if nx is None:
            nx = int(math.sqrt(num_tokens)) if ny is None else num_tokens // ny
        size = nx, num_tokens // nx if ny is None else ny
        if runs_in_chunks(self, x):
            check_tokens(x, size, self.num_global_tokens)
            return forward_in_chunks(self, x, size)
        return self.attend(x, size)

    def landmarks(self, logits: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """Distil keys and values of the map as `LongShortAttention` does, with less memory in the backward pass."""
        return self.norm_landmarks(pool_tokens(logits, kv, self.num_heads, in_chunks=True))

    def window_bias(self) -> Optional[torch.Tensor]:
        """Return the bias of the halo logits, [num_heads, w, w, w + 2p, w + 2p], looked up as theirs is."""
        if not self.has_bias:
            return None
        w, halo = self.window_size, self.window_size + 2 * halo_width(self.window_size)
        bias = self.local_relative_position_bias_table[self.relative_position_index.flatten()]  # [w^2 halo^2, heads]
        return bias.T.reshape(self.num_heads, w, w, halo, halo)


def sharing_norm(norm: nn.LayerNorm) -> LayerNorm:
    """Return our LayerNorm with the parameters of one of torch's."""
    ours = LayerNorm(norm.normalized_shape, eps=norm.eps, keep_type=True, in_chunks=True, device='meta')
    ours.weight, ours.bias = norm.weight, norm.bias
    ours.training = norm.training
    return ours


def find_replacement(layer: Any) -> AdoptedAttention:
    """Return what computes the same as a layer.

    Raises:
        ValueError: There is no such thing; the message says why.
    """
    reason = why_not(layer)
    if reason is not None:
        raise ValueError(reason)
    updates = ('outputs', 'keys') if layer.nglo > 0 else ('outputs',)
    errors = dict(zip(updates, differences(layer, updates)))
    best = min(errors, key=lambda update: errors[update])
    if not errors[best] <= TOLERANCE:
        raise ValueError(
            'it computes something else: with random weights its values or gradients differ from those of our layer by'
            f' {errors[best]:.1e} of the largest')
    return AdoptedAttention(layer, best)


def why_not(layer: Any) -> Optional[str]:
    """Return why a layer cannot be replaced, as far as that can be seen."""
    missing = [name for name in (*MODULES, *SETTINGS) if not hasattr(layer, name)]
    if missing:
        return f'it has no {", ".join(missing)}'
    known = (*MODULES, *OPTIONAL)
    parts = [*layer.named_children(), *layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    more = [name for name, _ in parts if name not in known]
    if more:
        return f'it has {", ".join(more)} beside {", ".join(known)}'
    for name in ('dual_ln_full', 'dual_ln_dp'):
        norm = getattr(layer, name)
        if type(norm) not in (nn.LayerNorm, LayerNorm):
            return f'{name} is a {type(norm).__name__}, expected a LayerNorm of torch'
    if any(has_hooks(module) for module in (layer, layer.dual_ln_full, layer.dual_ln_dp)):
        return 'it has hooks, which would be lost: adopt first, then hook, shard or wrap'
    if any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        return 'it is on the meta device: load its weights first'
    if layer.window_size < 2:
        return f'its window_size is {layer.window_size}, for which the halo is another one than ours'
    head_dim = layer.dual_ln_full.normalized_shape[0] // layer.num_heads
    if not math.isclose(layer.scale, head_dim ** -0.5, rel_tol=1e-6):
        return f'it scales logits by {layer.scale:.6g}, expected 1 / sqrt(channels of a head) = {head_dim ** -0.5:.6g}'
    if layer.attn_drop.p > 0 and layer.nglo > 0:
        return 'it drops attention weights (attn_drop), though none of global tokens as ours does'
    return None


def differences(layer: Any, updates: Tuple[str, ...]) -> List[float]:
    """Return how far replacements are from a layer, in values and gradients, relative to the largest.

    Compared are copies with random weights: freshly initialized ones may hide a difference, zeros all of them.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast('cpu', enabled=False):
        twin = deepcopy(layer).to('cpu', torch.float32).eval()
        for parameter in twin.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device='cpu')
            is_matrix = parameter.ndim > 1 and parameter.shape[-1] > layer.num_heads
            parameter.data = noise * parameter.shape[-1] ** -0.5 if is_matrix else 0.5 + noise
            parameter.requires_grad_()
        side = 3 * layer.window_size  # of windows, one with all of its halo inside
        num_tokens, dim = layer.nglo + side * side, layer.dual_ln_full.normalized_shape[0]
        x = torch.randn(2, num_tokens, dim, generator=generator, dtype=torch.float32, device='cpu')
        try:
            expected = values_and_gradients(twin, x, side)
        except Exception as error:
            raise ValueError(
                f'it fails on maps of {side} x {side} tokens: {type(error).__name__}: {error}') from error
        return [
            max(
                difference(actual, wanted)
                for actual, wanted in zip(values_and_gradients(AdoptedAttention(twin, update), x, side), expected))
            for update in updates
        ]


def values_and_gradients(layer: nn.Module, x: torch.Tensor, side: int) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
    """Return the output of a layer for a square map, and the gradients of input and parameters."""
    inputs = [x.clone().requires_grad_(), *layer.parameters()]
    out = layer(inputs[0], side, side)
    grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True, materialize_grads=True)
    return [out.detach()], list(grads)


def difference(actual: List[torch.Tensor], expected: List[torch.Tensor]) -> float:
    """Return the largest difference of tensors, relative to the largest of all expected values."""
    scale = max(float(tensor.abs().max()) for tensor in expected)
    return max(float((a - e).abs().max()) for a, e in zip(actual, expected)) / scale
