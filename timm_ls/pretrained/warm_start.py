"""Warm start: weights of models that are close to ours, for what both have in common.

No weights of CvT-LS, of ViL-LS tiny and small, and of the `_hires` variants were ever released, but those of CvT, of
Vision Longformer, and of ViL-LS with full attention in its last stages were. Their token embeddings, projections and
MLPs have the same shapes and the same part; long-short attention that the source lacks starts fresh.
"""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Final, Tuple, Union

import torch

from ..attention.rel_pos import dense_table
from ..cvt_ls import CvtLs, rename_cvt
from ..cvt_ls import checkpoint_filter_fn as convert_cvt
from ..vil_ls import VilLs, rename_released
from ..vil_ls import checkpoint_filter_fn as convert_vil
from .checkpoint import check_state_dict, read_checkpoint, unwrap_state_dict

__all__ = ['WarmStart', 'warm_start']

# What the source models do not have; everything else of ours has to come from the checkpoint
FRESH: Final[str] = (
    r'.+\.attn\.(?:norm_kv|dynamic_projection|norm_landmarks|rel_pos)\..+|stages\.\d+\.global_tokens|head\..+')
# What ours do not have: global tokens and their own projections and biases, absolute positions, other classes, and
# long-short attention where ours is full or has another rank
UNUSED: Final[str] = (
    r'.+_global\.(?:weight|bias)|.+relative_position_(?:bias|index|bias_table)|.+_pos_embed|.*cls_token|' + FRESH)


@dataclass(frozen=True)
class WarmStart:
    """What a warm start did; `print` it for a summary.

    Attributes:
        source: The source model's family, 'CvT', 'ViL' or 'ViL-LS'.
        taken: Our parameters and buffers that now hold the source's values, possibly joined from several.
        adapted: Those that hold them changed, each with what was done.
        fresh: Those that were left as they were initialized.
        unused: Tensors of the source that went nowhere, by its own names.
        num_taken: Values in `taken` and `adapted` together.
        num_fresh: Values in `fresh`.
    """

    source: str
    taken: Tuple[str, ...]
    adapted: Dict[str, str]
    fresh: Tuple[str, ...]
    unused: Tuple[str, ...]
    num_taken: int
    num_fresh: int

    def __str__(self) -> str:
        share = self.num_taken / max(1, self.num_taken + self.num_fresh)
        lines = [
            f'Warm start from {self.source}: {self.num_taken:,} of {self.num_taken + self.num_fresh:,} values'
            f' ({share:.1%}) come from the source.',
            f'  taken as they are ({len(self.taken)}): {_summary(self.taken)}',
        ]
        for how in sorted(set(self.adapted.values())):
            names = tuple(name for name, value in self.adapted.items() if value == how)
            lines.append(f'  {how} ({len(names)}): {_summary(names)}')
        lines.append(f'  fresh ({len(self.fresh)}): {_summary(self.fresh)}')
        lines.append(f'  unused ({len(self.unused)}): {_summary(self.unused)}')
        return '\n'.join(lines)


def _summary(names: Tuple[str, ...]) -> str:
    """Names without numbers and leaves, each pattern once."""
    patterns = dict.fromkeys(
        re.sub(r'\.(?:weight|bias|running_\w+|num_batches_tracked)$', '', re.sub(r'\d+', '*', name)) for name in names)
    return ', '.join(patterns) or 'none'


def warm_start(
        model: Union[CvtLs, VilLs],
        checkpoint: Union[str, Path, Dict[str, Any]],
) -> WarmStart:
    """Initialize a model from weights of one that is close to it, and say what was taken.

    - `cvt_ls_13` and `cvt_ls_21` from CvT-13 and CvT-21: Microsoft's `.pth` files or Hugging Face's `microsoft/cvt-13`
      and `microsoft/cvt-21`. CvT was trained with `act_layer='quick_gelu'`: build the model with it to keep that too.
      CvT divides logits by sqrt(channels), which the queries' weights take over.
    - `vil_ls_tiny` to `vil_ls_base` from Vision Longformer (ViL) of the same size with one class token per stage and
      relative position biases. Where ViL has projections of their own for the class token, these are left out. Its
      window bias spans 4w - 1 offsets per axis and ours 2(w + p) - 1: offsets in common keep their value.
    - ViL-LS from ViL-LS of the same size with other `attn_types`, windows or ranks, the authors' files or ours: so
      `vil_ls_medium_hires` from the released `vil_ls_medium`. Where a stage had full attention and has windows now,
      offsets in common keep their value.

    The landmarks, DualLN and biases that the source lacks stay as initialized: fine-tuning is needed.

    Args:
        model: The model to change.
        checkpoint: Path of a `.pth`, `.bin` or `.safetensors` file, or what it holds.

    Returns:
        What was taken, changed, left fresh and not used, by name.

    Raises:
        TypeError: The model is of another family.
        RuntimeError: The checkpoint is of another family or size; the message names the first differences.
    """
    if not isinstance(model, (CvtLs, VilLs)):
        raise TypeError(f'Expected a CvtLs or VilLs model, got {type(model).__name__}.')
    state_dict = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint)
    given = unwrap_state_dict(state_dict)
    adapted: Dict[str, str] = {}
    if isinstance(model, CvtLs):
        source, rename = 'CvT', rename_cvt
        weights = convert_cvt(given, model)
        _rescale_queries(weights, model, adapted)
    else:
        source = 'ViL-LS' if any(rename_released(name).endswith('.norm_kv.weight') for name in given) else 'ViL'
        rename = rename_released
        weights = convert_vil(_join_vil(given, model, adapted), model)

    expected = model.state_dict()
    used, unused = {}, set()
    for name, value in weights.items():
        fits = name in expected and expected[name].shape == value.shape
        if fits or not re.fullmatch(UNUSED, name):
            used[name] = value
        else:
            unused.add(name)
    fresh = [name for name in expected if name not in used and re.fullmatch(FRESH, name)]
    check_state_dict({**used, **{name: expected[name] for name in fresh}}, model)
    model.load_state_dict(used, strict=False)
    return WarmStart(
        source=source,
        taken=tuple(name for name in used if name not in adapted),
        adapted=adapted,
        fresh=tuple(fresh),
        unused=tuple(name for name in given if rename(name) in unused),
        num_taken=sum(value.numel() for value in used.values()),
        num_fresh=sum(expected[name].numel() for name in fresh),
    )


def _rescale_queries(weights: Dict[str, torch.Tensor], model: CvtLs, adapted: Dict[str, str]) -> None:
    """Bring the queries of CvT, made for logits over sqrt(channels), to the scale of each of our attention layers."""
    for prefix, module in model.named_modules():
        if not hasattr(module, 'conv_qkv') or module.num_heads == 1:
            continue
        factor = module.num_heads ** -0.5 / module.conv_qkv.query_scale
        for name in (f'{prefix}.conv_qkv.q.weight', f'{prefix}.conv_qkv.q.bias'):
            if name in weights and factor != 1.:
                weights[name] = weights[name] * factor
                adapted[name] = 'times 1 / sqrt(heads), for the other scale of logits'


def _join_vil(
        weights: Dict[str, torch.Tensor],
        model: VilLs,
        adapted: Dict[str, str],
) -> Dict[str, torch.Tensor]:
    """Give ViL's weights the layout of the released ViL-LS: one layer for queries, keys, values; its window offsets."""
    expected = model.state_dict()
    long_short = {name for name in map(rename_released, weights) if name.endswith('.norm_kv.weight')}
    joined = {}
    for name, value in weights.items():
        match = re.fullmatch(r'(.+\.attn)\.(query|kv)\.(weight|bias)', name)
        ours = rename_released(name)
        if match is not None:
            attn, leaf = match[1], match[3]
            query, kv = weights.get(f'{attn}.query.{leaf}'), weights.get(f'{attn}.kv.{leaf}')
            if query is None or kv is None:
                joined[name] = value
            else:
                joined[f'{attn}.qkv.{leaf}'] = torch.cat([query, kv])
        elif ours.endswith('.rel_pos.table'):
            norm_kv = ours.replace('rel_pos.table', 'norm_kv.weight')
            table = dense_table(value, aliased=norm_kv in long_short)
            fresh = expected.get(ours, table)
            if table.shape[0] == fresh.shape[0] and table.shape != fresh.shape:
                if norm_kv in long_short or norm_kv in expected:
                    table, adapted[ours] = _common_offsets(table, fresh), 'offsets in common'
                else:
                    adapted[ours] = 'resized'
            joined[ours] = table
        else:
            joined[name] = value
    return joined


def _common_offsets(table: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Values of `table` for the offsets that `fresh` has as well, those of `fresh` for the rest.

    Both are [num_heads, offsets, offsets] with the zero offset in the middle.
    """
    result = fresh.clone()
    rows = min(table.shape[1], fresh.shape[1])
    cols = min(table.shape[2], fresh.shape[2])
    top, left = (table.shape[1] - rows) // 2, (table.shape[2] - cols) // 2
    into = result[
        :, (fresh.shape[1] - rows) // 2:(fresh.shape[1] + rows) // 2,
        (fresh.shape[2] - cols) // 2:(fresh.shape[2] + cols) // 2]
    into.copy_(table[:, top:top + rows, left:left + cols])
    return result
