"""What a model looks at: landmarks over the image, the attention of one token, attention rolled out over all layers.

Everything is read off an ordinary forward pass with hooks that are gone when a function returns; a model that is not
being looked at pays nothing. Functions take one image and return tensors; `plot_*` draw them with matplotlib
(`pip install "timm-ls[demo]"`).
"""
from contextlib import contextmanager
from itertools import accumulate
from operator import mul
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .attention.full import FullAttention, attend_grid
from .attention.layers import MapInterface
from .attention.long_short import LongShortAttention
from .ops.attend import softmax
from .ops.merge import pool_tokens
from .ops.window_attention import window_attention
from .ops.windows import halo_width
from .pyramid_transformer import Stage

__all__ = [
    'QueryAttention',
    'attention_rollout',
    'landmark_maps',
    'plot_landmarks',
    'plot_query',
    'plot_rollout',
    'query_attention',
]


class QueryAttention(NamedTuple):
    """Where one token looks; for every head, all weights together add up to one."""

    window: torch.Tensor  # [heads, H, W]: keys of the map, zero outside of the window's halo
    landmarks: torch.Tensor  # [heads, rank]
    global_tokens: torch.Tensor  # [heads, g]

    def over_map(self, maps: torch.Tensor) -> torch.Tensor:
        """Weights on tokens of the map, [heads, H, W], landmarks spread to what they were distilled from.

        Args:
            maps: Of the same layer, from `landmark_maps`, [heads, rank, H, W].
        """
        return self.window + (self.landmarks[:, :, None, None] * maps).sum(dim=1)


class _Call(NamedTuple):
    """What an attention layer was called with."""

    name: str
    layer: Any
    x: torch.Tensor  # [1, g + H * W, C]
    size: Tuple[int, int]


@contextmanager
def _looking_at(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a while, without gradients, and without inference mode, which forbids them."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _record(model: nn.Module, image: torch.Tensor) -> List[_Call]:
    """The calls of all attention layers, in order, for an image [C, H, W] or [1, C, H, W]; within `_looking_at`."""
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f'Expected one image, [channels, height, width], got {list(image.shape)}.')
    calls: List[_Call] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (LongShortAttention, FullAttention)):
            def hook(layer: nn.Module, args: Tuple[Any, ...], name: str = name) -> None:
                if isinstance(layer, MapInterface):
                    x, global_tokens = args[0], [tokens for tokens in args[1:] if tokens is not None]
                    x, size = torch.cat([*global_tokens, x.flatten(1, 2)], dim=1), x.shape[1:3]
                else:
                    x, size = args
                calls.append(_Call(name, layer, x, (size[0], size[1])))
            handles.append(module.register_forward_pre_hook(hook))
    if not handles:
        raise ValueError(f'{type(model).__name__} has no attention of timm_ls: expected one of its models.')
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _find(calls: Sequence[_Call], layer: str) -> _Call:
    """The call of a long-short layer by its name."""
    names = [call.name for call in calls if isinstance(call.layer, LongShortAttention)]
    for call in calls:
        if call.name == layer and layer in names:
            return call
    raise ValueError(f'No long-short attention named {layer!r}: this model has {", ".join(names) or "none"}.')


def _projection_logits(call: _Call) -> torch.Tensor:
    """Return the logits of the dynamic projection, [1, N, heads * rank]."""
    return call.layer.dynamic_projection(call.x)[:, call.layer.num_global_tokens:]


def _landmark_map(call: _Call) -> torch.Tensor:
    """Landmarks over the map, [heads, rank, H, W]; rank 0 for a layer without."""
    layer, (H, W) = call.layer, call.size
    if layer.rank == 0:
        return call.x.new_zeros(layer.num_heads, 0, H, W)
    weights = softmax(_projection_logits(call).transpose(1, 2), dim=2)  # over tokens
    return weights.reshape(layer.num_heads, layer.rank, H, W)


def landmark_maps(model: nn.Module, image: torch.Tensor) -> Dict[str, torch.Tensor]:
    """What each landmark is distilled from: the dynamic projection, a softmax over the tokens of the map (eq. 4).

    Args:
        model: A model of this package, or one that holds its attention layers.
        image: Normalised as for the model, [C, H, W].

    Returns:
        For every long-short layer by name, [heads, rank, rows, columns]; each map adds up to one.

    Raises:
        ValueError: There is more than one image, or no such layer.
    """
    with _looking_at(model):
        calls = _record(model, image)
        return {call.name: _landmark_map(call) for call in calls if isinstance(call.layer, LongShortAttention)}


def query_attention(model: nn.Module, image: torch.Tensor, layer: str, position: Tuple[int, int]) -> QueryAttention:
    """Where one token looks, in one layer: its window, the landmarks and the global tokens, in one softmax.

    Args:
        model: A model of this package, or one that holds its attention layers.
        image: Normalised as for the model, [C, H, W].
        layer: Name of a long-short layer, such as 'stages.1.blocks.0.attn'.
        position: Row and column of the token in that layer's map.

    Returns:
        Weights over the map, the landmarks and the global tokens.

    Raises:
        ValueError: There is no such layer or position, or more than one image.
    """
    with _looking_at(model):
        return _query_attention(_find(_record(model, image), layer), position)


def _query_attention(call: _Call, position: Tuple[int, int]) -> QueryAttention:
    """`query_attention` in the call of a layer."""
    attn, (H, W) = call.layer, call.size
    row, col = position
    if not (0 <= row < H and 0 <= col < W):
        raise ValueError(f'position={tuple(position)}: {call.name} has a map of {H} rows and {W} columns.')
    q, kv, additional_kv = _queries_and_keys(call)
    h, w, p = attn.num_heads, attn.window_size, halo_width(attn.window_size)
    top, left = row // w * w, col // w * w
    rows = slice(max(0, top - p), min(H, top + w + p))
    cols = slice(max(0, left - p), min(W, left + w + p))
    keys = kv[0, rows, cols, 0]
    shape = keys.shape[:2]

    query = q[0, row, col].unflatten(-1, (h, -1))  # [heads, d]
    query = query * query.shape[1] ** -0.5
    logits = torch.einsum('hd,nhd->hn', query, keys.flatten(0, 1).unflatten(-1, (h, -1)))
    bias = attn.window_bias()
    if bias is not None:
        halo_rows = slice(rows.start - top + p, rows.stop - top + p)
        halo_cols = slice(cols.start - left + p, cols.stop - left + p)
        logits = logits + bias[:, row - top, col - left, halo_rows, halo_cols].flatten(1)
    additional = torch.einsum('hd,nhd->hn', query, additional_kv[0, :, 0].unflatten(-1, (h, -1)))
    weights = softmax(torch.cat([additional, logits], dim=1), dim=1)
    window = weights.new_zeros(h, H, W)
    window[:, rows, cols] = weights[:, additional.shape[1]:].unflatten(1, shape)
    return QueryAttention(window, weights[:, :attn.rank], weights[:, attn.rank:additional.shape[1]])


def _queries_and_keys(call: _Call) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values of a long-short layer's map, and those of its landmarks and global tokens."""
    layer, g = call.layer, call.layer.num_global_tokens
    q, kv = layer.project(call.x, call.size, g)
    additional_kv = kv[:, :g]
    if layer.rank > 0:
        additional_kv = torch.cat([layer.landmarks(_projection_logits(call), kv[:, g:]), additional_kv], dim=1)
    return q[:, g:].unflatten(1, call.size), kv[:, g:].unflatten(1, call.size), additional_kv


def attention_rollout(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """How much each place of the image is attended from the last layer, through all layers and stages.

    Attention rollout (Abnar and Zuidema, 2020, arXiv 2005.00928) for a pyramid: starting from the same relevance
    everywhere on the last map, each layer hands half of a token's relevance to what it attends to, averaged over
    heads, and keeps the other half (the residual). A landmark hands it on to what it was distilled from, a patch
    embedding to the tokens of its patch. What goes to global tokens is left out. Like every rollout it ignores MLPs and
    values: it shows where information can come from, not what decides.

    Args:
        model: A model of this package.
        image: Normalised as for the model, [C, H, W].

    Returns:
        Relevance of the tokens of the first stage, [rows, columns], adding up to one.

    Raises:
        ValueError: There is more than one image, or no such layer.
    """
    embeds: Dict[str, Any] = {name: module.embed for name, module in model.named_modules() if isinstance(module, Stage)}
    strides = {name: embed.proj.stride[0] for name, embed in embeds.items()}
    reductions = dict(zip(strides, accumulate(strides.values(), mul)))
    with _looking_at(model):
        calls = _record(model, image)
        relevance = calls[-1].x.new_ones(1, *calls[-1].size)
        stage = _stage(calls[-1])
        for call in reversed(calls):
            if _stage(call) != stage:  # a stage in between may have no blocks
                relevance = _spread(relevance, reductions[stage] // reductions[_stage(call)], call.size)
                stage = _stage(call)
            relevance = (relevance + _hand_back(call, relevance)) / 2
            relevance = relevance / relevance.sum()
        return relevance[0]


def _stage(call: _Call) -> str:
    """Name of the stage that a layer belongs to."""
    return call.name.rsplit('.blocks.', 1)[0]


def _spread(relevance: torch.Tensor, stride: int, size: Tuple[int, int]) -> torch.Tensor:
    """Give the tokens of a finer map what the patch has that they lie in: relevance up to a factor."""
    fine = relevance.repeat_interleave(stride, dim=1).repeat_interleave(stride, dim=2)
    return fine[:, :size[0], :size[1]]


@torch.enable_grad()
def _hand_back(call: _Call, relevance: torch.Tensor) -> torch.Tensor:
    """Relevance [1, H, W] of a layer's outputs, handed to what they attend to: its product with the attention matrix.

    Attention is linear in its values. With one number per token as its value, this product is a gradient.
    """
    layer, (H, W), C = call.layer, call.size, call.x.shape[-1]
    number = torch.ones_like(relevance, requires_grad=True)
    values = number[..., None].expand(-1, -1, -1, C)
    if isinstance(layer, LongShortAttention):
        with torch.no_grad():
            q, kv, additional_kv = _queries_and_keys(call)
            bias, logits = layer.window_bias(), _projection_logits(call) if layer.rank > 0 else None
        additional_values = torch.zeros_like(additional_kv[:, :, 1])
        if logits is not None:
            means = pool_tokens(logits, values.flatten(1, 2)[:, :, None], layer.num_heads)[:, :, 0]
            additional_values = torch.cat([means, additional_values[:, layer.rank:]], dim=1)
        out = window_attention(
            q, torch.stack([kv[..., 0, :], values], dim=3),
            torch.stack([additional_kv[:, :, 0], additional_values], dim=2), bias, layer.window_size, layer.num_heads)
    else:
        g = layer.num_global_tokens
        with torch.no_grad():
            q, k, _ = layer.project(call.x, call.size, g)
            bias = layer.biases(call.size)
        strided = values[:, ::layer.kv_stride, ::layer.kv_stride].flatten(1, 2)
        v = F.pad(strided, (0, 0, g, 0))
        out = attend_grid(
            q, k, v, bias, call.size, layer.kv_stride, layer.num_heads, 0., layer.fused_attn, layer.bias_bytes)
        out = out[:, g:].unflatten(1, (H, W))
    return torch.autograd.grad(out.mean(dim=-1), number, relevance)[0]


# Figures

def _overlay(axis: Any, photo: torch.Tensor, weights: torch.Tensor, title: str) -> None:
    """Draw weights [rows, columns] over a photo [3, H, W] in 0..1."""
    H, W = photo.shape[-2:]
    axis.imshow(photo.permute(1, 2, 0).mean(dim=-1).cpu().numpy(), cmap='gray', vmin=0, vmax=1, extent=(0, W, H, 0))
    axis.imshow(weights.cpu().numpy(), cmap='inferno', alpha=.6, extent=(0, W, H, 0), interpolation='nearest')
    axis.set(title=title, xticks=[], yticks=[])


def _figure(rows: int, cols: int) -> Any:
    """An empty figure with square panels."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('Figures need matplotlib: pip install "timm-ls[demo]"') from error
    return plt.subplots(rows, cols, figsize=(2.4 * cols, 2.6 * rows), squeeze=False, layout='constrained')


def plot_landmarks(photo: torch.Tensor, maps: torch.Tensor, title: str = '') -> Any:
    """Draw a layer's landmarks over the photo, a row per head, a column per landmark.

    Args:
        photo: The image as a person sees it, [3, H, W] in 0..1.
        maps: Of one layer, from `landmark_maps`, [heads, rank, rows, columns].
        title: Above the figure.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: The layer has no landmarks.
    """
    if maps.shape[1] == 0:
        raise ValueError('The layer has no landmarks: rank=0.')
    figure, axes = _figure(maps.shape[0], maps.shape[1])
    for head, row in enumerate(axes):
        for landmark, axis in enumerate(row):
            _overlay(axis, photo, maps[head, landmark], f'head {head}, landmark {landmark}')
    figure.suptitle(title or 'What each landmark is distilled from')
    return figure


def plot_query(photo: torch.Tensor, attention: QueryAttention, maps: torch.Tensor, position: Tuple[int, int]) -> Any:
    """Draw where one token looks, a row per head: its window, all tokens through landmarks, and the sums.

    Args:
        photo: The image as a person sees it, [3, H, W] in 0..1.
        attention: From `query_attention`.
        maps: Of the same layer, from `landmark_maps`.
        position: Row and column of the token, as given to `query_attention`.

    Returns:
        The matplotlib figure.
    """
    heads, rows, cols = attention.window.shape
    H, W = photo.shape[-2:]
    figure, axes = _figure(heads, 3)
    everything = attention.over_map(maps)
    for head, (window, landmarks, sums) in enumerate(axes):
        near, far, tokens = (part[head].sum().item() for part in attention)
        _overlay(window, photo, attention.window[head], f'head {head}: window, {near:.0%}')
        _overlay(landmarks, photo, everything[head] - attention.window[head], f'through landmarks, {far:.0%}')
        sums.bar(['window', 'landmarks', 'global'], [near, far, tokens], color=['C1', 'C0', 'C2'])
        sums.set(ylim=(0, 1), title='share of attention')
        for axis in (window, landmarks):
            axis.plot((position[1] + .5) * W / cols, (position[0] + .5) * H / rows, 'c+', markersize=10)
    figure.suptitle(f'Where the token at row {position[0]}, column {position[1]} looks')
    return figure


def plot_rollout(photo: torch.Tensor, relevance: torch.Tensor) -> Any:
    """Draw the photo beside its attention rollout.

    Args:
        photo: The image as a person sees it, [3, H, W] in 0..1.
        relevance: From `attention_rollout`, [rows, columns].

    Returns:
        The matplotlib figure.
    """
    figure, axes = _figure(1, 2)
    axes[0, 0].imshow(photo.permute(1, 2, 0).cpu().numpy().clip(0, 1))
    axes[0, 0].set(title='image', xticks=[], yticks=[])
    _overlay(axes[0, 1], photo, relevance, 'attention rollout')
    return figure
