"""Blocks, stages, models and feature pyramids on bands of rows: mixins, as those of the layers."""
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import checkpoint
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork

from .._compat import feature_take_indices
from ..attention.chunked import runs_in_chunks
from ..attention.long_short import LongShortAttention
from ..fpn import FeaturePyramid, feature_info
from ..ops.autocast import is_autocast
from ..ops.capture import ceil_div
from ..pyramid_transformer import MIN_IMAGE_SIZE, Block, PyramidTransformer, Stage, in_this_context
from .bands import BandSize, Cuts, level_cuts, spans
from .chunked import forward_band_in_chunks
from .collectives import Bands, exchange_rows
from .layers import band_max, band_mean

__all__ = ['BandBlock', 'BandFeaturePyramid', 'BandFpn', 'BandPyramidTransformer', 'BandStage', 'row_unit']


def row_unit(stage: nn.Module) -> int:
    """Return the rows of a level that stay together where they can: those of a window, or one."""
    return max([m.window_size for m in stage.modules() if isinstance(m, LongShortAttention)], default=1)


def enter(bands: Bands, x: torch.Tensor, training: bool) -> Cuts:
    """Find out how an image is divided over the ranks, and that they all do the same with it.

    Args:
        bands: The ranks.
        x: This rank's band, [B, C, rows, W].
        training: Whether the model is in training mode.

    Raises:
        ValueError: Ranks differ in more than rows, or the image is too small. All ranks raise it.
    """
    autocast = torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype
    shape = [*x.shape, *[0] * 4][:4]
    names = ('dimensions', 'batch', 'channels', 'rows', 'width', 'type', 'autocast', 'training mode', 'gradients')
    mine = [
        x.ndim, *shape, TYPES.index(x.dtype) if x.dtype in TYPES else -1,
        TYPES.index(autocast) if autocast in TYPES else -1, int(training), int(torch.is_grad_enabled())]
    everyone = bands.gather_numbers(mine, x.device)
    if any(numbers[0] != 4 for numbers in everyone):
        raise ValueError(
            'Expected a band [batch, channels, rows, width] on every rank, got tensors of'
            f' {[numbers[0] for numbers in everyone]} dimensions.')
    for i, name in enumerate(names):
        values = [numbers[i] for numbers in everyone]
        if name != 'rows' and len(set(values)) > 1:
            raise ValueError(
                f'Ranks {bands.watch.ranks} share an image, but differ in its {name}: {values}. Bands differ in their'
                ' rows only, and all ranks run the same pass.')
    rows = [numbers[3] for numbers in everyone]
    if min(rows) < 1 or sum(rows) < MIN_IMAGE_SIZE or x.shape[3] < MIN_IMAGE_SIZE:
        raise ValueError(
            f'Expected images of at least {MIN_IMAGE_SIZE} x {MIN_IMAGE_SIZE} pixels, a row on each rank; got rows'
            f' {rows} and {x.shape[3]} columns.')
    cuts = [0]
    for number in rows:
        cuts.append(cuts[-1] + number)
    return tuple(cuts)


TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class BandBlock(Block):
    """A block; in inference, a large band passes in row chunks."""

    bands: Bands

    def forward(self, x: torch.Tensor, size: BandSize) -> torch.Tensor:  # type: ignore[override]
        """Update tokens [B, g + rows * W, C] of global tokens and a band."""
        most = max(stop - start for start, stop in spans(size.cuts))  # all ranks decide alike
        attn: Any = self.attn
        tokens = x[:1, :1].expand(x.shape[0], attn.num_global_tokens + most * size[1], -1)
        if runs_in_chunks(self, tokens):
            return forward_band_in_chunks(self, x, size)
        x = x + self.drop_path1(self.attn(self.norm1(x), size))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class BandStage(Stage):
    """A stage. The first one finds out how the image is divided.

    Attributes:
        level: Its number.
        stride: In the level before.
        reduction: In the image.
        unit: Rows of windows.
    """

    bands: Bands
    level: int
    stride: int
    reduction: int
    unit: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From a band [B, C_in, rows, W] of the level before to one of this level; see `Stage.forward`."""
        shared = self.bands
        if self.level == 0:
            shared.image = enter(shared, x, self.training)
        have = shared.levels[self.level - 1] if self.level > 0 else shared.image
        cuts = level_cuts(shared.image, self.reduction, ceil_div(have[-1], self.stride), self.unit)
        shared.levels[self.level:] = [cuts]
        shared.cuts = have
        x = self.embed(x, cuts)
        B, H, W, C = x.shape
        size = BandSize.of(cuts, shared.rank, W)
        x = x.reshape(B, H * W, C)
        if self.global_tokens is not None:
            x = torch.cat([self.global_tokens.expand(B, -1, -1).to(x.dtype), x], dim=1)
        x = self.pos_drop(x)
        for block in self.blocks:
            x = checkpoint(in_this_context(block), x, size) if self.grad_checkpointing else block(x, size)
        if self.return_global_tokens:
            return x
        return x[:, self.num_global_tokens:].reshape(B, H, W, C).permute(0, 3, 1, 2)


class BandPyramidTransformer(PyramidTransformer):
    """A model of either family: logits are equal on all ranks, maps are bands."""

    bands: Bands

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """See `PyramidTransformer.forward_features`: a band of the last level."""
        return self.forward_norm(self.stages(x))

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """See `PyramidTransformer.forward_intermediates`: bands of the levels."""
        if output_fmt != 'NCHW':
            raise ValueError(f"Unknown output_fmt='{output_fmt}': maps are returned as 'NCHW' only.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        stages = list(self.stages)[:max_index + 1 if stop_early else None]
        intermediates: List[torch.Tensor] = []
        for i, stage in enumerate(stages):
            x = stage(x)
            is_last = i == len(self.stages) - 1
            if i in take_indices:
                level = self.forward_norm(x) if norm and is_last else x
                if level.ndim == 3:  # global tokens in front
                    cuts = self.bands.levels[i]
                    rows = cuts[self.bands.rank + 1] - cuts[self.bands.rank]
                    level = level[:, self.num_global_tokens:].transpose(1, 2).unflatten(2, (rows, -1))
                intermediates.append(level)
            if is_last:
                x = self.forward_norm(x)
        return intermediates if intermediates_only else (x, intermediates)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """See `PyramidTransformer.forward_head`: means and maxima are those of the whole map."""
        if self.global_pool in ('', 'token'):
            return super().forward_head(x, pre_logits)
        if self.num_global_tokens > 0:
            x = band_mean(x[:, self.num_global_tokens:], self.bands, (1,))
        else:
            pooled: Dict[str, torch.Tensor] = {}
            if 'avg' in self.global_pool:
                pooled['avg'] = band_mean(x, self.bands, (2, 3))
            if 'max' in self.global_pool:
                pooled['max'] = band_max(x, self.bands, (2, 3))
            parts = list(pooled.values())
            x = torch.cat(parts, dim=1) if self.global_pool == 'catavgmax' else torch.stack(parts).mean(dim=0)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)


class BandFeaturePyramid(FeaturePyramid):
    """A feature pyramid: the FPN is told how its maps are divided."""

    bands: Bands

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """See `FeaturePyramid.forward`: bands of maps."""
        levels = self.body(x)
        out_indices = feature_info(self.body).out_indices
        maps: Dict[str, torch.Tensor] = OrderedDict()
        for i, norm in enumerate(self.norms):
            maps[str(i)] = norm(levels[self.level_indices[i]])
        self.fpn.cuts = [self.bands.levels[out_indices[index]] for index in self.level_indices]
        return self.fpn(maps)


class BandFpn(FeaturePyramidNetwork):
    """torchvision's `FeaturePyramidNetwork`, of maps that are divided by `cuts`."""

    bands: Bands
    cuts: List[Cuts]

    def forward(self, x: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        """From bands of levels to bands of a pyramid."""
        names, maps, shared = list(x), list(x.values()), self.bands
        results: List[torch.Tensor] = []
        inner: Any = None
        for i in reversed(range(len(maps))):
            shared.cuts = self.cuts[i]
            lateral = self.inner_blocks[i](maps[i])
            inner = lateral if inner is None else lateral + upsample_rows(
                inner, shared, self.cuts[i + 1], self.cuts[i], lateral.shape[3])
            results.insert(0, self.layer_blocks[i](inner))
        if self.extra_blocks is not None:
            shared.cuts = self.cuts[-1]
            results, names = self.extra_blocks(results, maps, names)
        return OrderedDict(zip(names, results))


def upsample_rows(x: torch.Tensor, bands: Bands, have: Cuts, cuts: Cuts, width: int) -> torch.Tensor:
    """Enlarge a map [B, C, H, W], nearest neighbors, of which this rank has a band and gets another."""
    rows = F.interpolate(
        torch.arange(have[-1], dtype=torch.float32)[None, None, :, None], size=(cuts[-1], 1), mode='nearest')
    sources = rows.flatten().long()  # of each row, just as torch rounds them
    need = tuple((int(sources[start]), int(sources[stop - 1]) + 1) for start, stop in spans(cuts))
    x = exchange_rows(x, bands, 2, spans(have), need)
    mine = sources[cuts[bands.rank]:cuts[bands.rank + 1]] - need[bands.rank][0]
    x = x.index_select(2, mine.to(x.device))
    return F.interpolate(x, size=(x.shape[2], width), mode='nearest')
