"""One image over several devices: bands of its rows, forward and backward, exact.

    mesh = init_device_mesh('cuda', (2, 4), mesh_dim_names=('data', 'rows'))
    model = spatial_parallel(timm.create_model('vil_ls_medium_hires').cuda(), mesh['rows'])
    rows = band_rows(model, height)              # which rows of the image this rank reads
    logits = model(image[:, :, rows])            # equal on all ranks of the mesh
    F.cross_entropy(logits, labels).backward()
    average_gradients(model, mesh['rows'])

Every level of the pyramid is divided over the ranks by rows, at the edges of windows where it has enough of them. A
layer of long-short attention gets the keys and values of `p = window_size // 2` rows from its neighbors; landmarks,
global tokens and means are sums over all ranks; convolutions get a row. Full attention gathers all keys and values and
is quadratic, as ever. Global tokens, logits and whatever is computed from them are equal on all ranks.

**Gradients are those of the mean of the ranks' losses, once they are averaged over the ranks**, as with
`DistributedDataParallel`, which does both where it wraps the model over all ranks, those of the mesh and of all others.
A loss of the logits is the same on all ranks, and so is its mean. A loss of bands is their mean only if bands are
equal: `band_mean(losses, mesh)` is the mean over the pixels of all of them. All ranks have to run the backward pass,
each from a loss that depends on its band.
"""
import zlib
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Tuple, Type, Union

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import DropPath
from torch.distributed.tensor import DTensor
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from ..attention.full import FullAttention
from ..attention.long_short import LongShortAttention
from ..attention.rel_pos import RelPosBias2d
from ..cvt_ls import ConvEmbed
from ..fpn import FeaturePyramid
from ..pyramid_transformer import Block, PyramidTransformer, Stage
from ..vil_ls import PatchEmbed
from .bands import even_cuts, spans
from .collectives import Bands, Mesh, exchange_rows, group_of
from .layers import (
    BandBatchNorm,
    BandConv2d,
    BandDropout,
    BandDropPath,
    BandEmbed,
    BandFullAttention,
    BandLongShortAttention,
    BandSubsample,
)
from .layers import band_mean as mean_over_bands
from .pyramid import BandBlock, BandFeaturePyramid, BandFpn, BandPyramidTransformer, BandStage, row_unit

__all__ = [
    'average_gradients',
    'band_mean',
    'band_rows',
    'check_weights',
    'gather_levels',
    'gather_rows',
    'level_rows',
    'recorded_traffic',
    'shard_image',
    'spatial_parallel',
]

MIXINS: Tuple[Tuple[Type[nn.Module], type], ...] = (
    (PyramidTransformer, BandPyramidTransformer),
    (FeaturePyramid, BandFeaturePyramid),
    (FeaturePyramidNetwork, BandFpn),
    (LastLevelMaxPool, BandSubsample),
    (Stage, BandStage),
    (Block, BandBlock),
    (PatchEmbed, BandEmbed),
    (ConvEmbed, BandEmbed),
    (LongShortAttention, BandLongShortAttention),
    (FullAttention, BandFullAttention),
    (nn.Conv2d, BandConv2d),
    (nn.BatchNorm2d, BandBatchNorm),
    (DropPath, BandDropPath),
    (nn.Dropout, BandDropout),
)
# Layers without layers in them that look at one token at a time, or have nothing to do with maps
OF_ONE_TOKEN = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.SyncBatchNorm, RelPosBias2d)
OF_ONE_TOKEN_MODULES = ('torch.nn.modules.activation', 'timm.layers.activations')
_classes: Dict[Tuple[type, type], type] = {}


def spatial_parallel(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Make a model run on bands of rows, one on each rank of a mesh; in place, its weights and their names stay.

    Called on every rank, before `DistributedDataParallel` or `fully_shard`.

    Args:
        model: A ViL-LS or CvT-LS, their `features_only` backbones, or a `FeaturePyramid` of those.
        mesh: One dimension of a device mesh, or a process group.

    Returns:
        The model. It takes a band [B, C, rows, W] on each rank, in the order of ranks, any rows that all ranks have one
        of at every level. Logits are equal on all ranks, maps are bands, see `level_rows`.

    Raises:
        TypeError: The model has layers that are not known to be the same on bands.
        ValueError: A setting cannot be the same on bands, the mesh has several dimensions, or ranks differ in weights.
    """
    bands = Bands(group_of(mesh))
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    if not stages:
        raise TypeError(f'{type(model).__name__} is no ViL-LS or CvT-LS model and holds none.')
    if any(isinstance(module, BandStage) for module in stages):
        raise ValueError('The model runs on bands already.')
    for name, module in model.named_modules():
        check_module(name, module)
    check_weights(model, mesh)
    reduction = 1
    for level, stage in enumerate(stages):
        proj: Any = stage.embed.proj
        reduction *= proj.stride[0]
        settings: Any = dict(level=level, stride=proj.stride[0], reduction=reduction, unit=row_unit(stage))
        vars(stage).update(settings)
        for module in stage.modules():
            if isinstance(module, nn.Dropout):
                vars(module)['num_shared'] = stage.num_global_tokens
    for module in list(model.modules()):
        for base, mixin in MIXINS:
            if isinstance(module, base):
                cls = type(module)
                if (mixin, cls) not in _classes:
                    _classes[mixin, cls] = type(f'Band{cls.__name__}', (mixin, cls), {'__module__': __name__})
                module.__class__ = _classes[mixin, cls]
                vars(module)['bands'] = bands
                if isinstance(module, nn.Dropout):
                    vars(module).setdefault('num_shared', None)
                break
    vars(model)['bands'] = bands
    return model


def check_module(name: str, module: nn.Module) -> None:
    """Raise an error unless a module is the same on bands, or has a mixin that makes it so."""
    kind = f'{name} ({type(module).__name__})'
    if isinstance(module, nn.Conv2d):
        k, s, p = module.kernel_size[0], module.stride[0], module.padding[0]
        if isinstance(p, str) or module.dilation != (1, 1) or module.padding_mode != 'zeros' or not 0 < k - 2 * p <= s:
            raise ValueError(f'{kind}: on bands, a convolution has to make ceil(n / stride) rows of n: {module}.')
    if isinstance(module, (LongShortAttention, FullAttention)):
        if module.attn_drop.p > 0. and module.num_global_tokens > 0:
            raise ValueError(
                f'{kind}: attn_drop={module.attn_drop.p} would drop other weights of the global tokens on each rank:'
                ' use attn_drop_rate=0 or no global tokens.')
    if any(True for _ in module.children()) or isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return
    known = (*(base for base, _ in MIXINS), *OF_ONE_TOKEN)
    if not isinstance(module, known) and type(module).__module__ not in OF_ONE_TOKEN_MODULES:
        if not name.rpartition('.')[0].endswith('pool') and '.pool' not in f'.{name}':  # of the head: never called
            raise TypeError(f'{kind} may look beyond a band: on bands, it is not known to be what it is on the image.')


def bands_of(model: nn.Module) -> Bands:
    """Return what a model's layers share."""
    for module in model.modules():
        if isinstance(module, BandStage):
            return module.bands
    raise ValueError(f'{type(model).__name__} does not run on bands: call spatial_parallel(model, mesh) first.')


def band_rows(model: nn.Module, height: int) -> slice:
    """Return the rows of an image that this rank had better read: as many as the others, in whole windows.

    Args:
        model: After `spatial_parallel`.
        height: Rows of the image.
    """
    bands = bands_of(model)
    stage = next(module for module in model.modules() if isinstance(module, BandStage))
    return slice(*spans(even_cuts(height, bands.ranks, stage.reduction * stage.unit))[bands.rank])


def shard_image(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return this rank's band of images [B, C, H, W] that every rank has whole."""
    return x[:, :, band_rows(model, x.shape[2])]


def level_rows(model: nn.Module) -> List[slice]:
    """Return the rows of each level that are on this rank, since the last forward pass."""
    bands = bands_of(model)
    return [slice(*spans(cuts)[bands.rank]) for cuts in bands.levels]


def gather_rows(x: torch.Tensor, mesh: Mesh, dim: int = 2) -> torch.Tensor:
    """Return the whole of a map on every rank, of the bands that they have; differentiable."""
    bands = Bands(group_of(mesh))
    cuts = [0]
    for rows, in bands.gather_numbers([x.shape[dim]], x.device):
        cuts.append(cuts[-1] + rows)
    return exchange_rows(x, bands, dim, spans(tuple(cuts)), ((0, cuts[-1]),) * bands.ranks)


Levels = Union[List[torch.Tensor], Dict[str, torch.Tensor]]


def gather_levels(levels: Levels, mesh: Mesh) -> Any:
    """Return whole maps on every rank, of a list or dictionary of bands [B, C, rows, W]."""
    if isinstance(levels, dict):
        return type(levels)((name, gather_rows(x, mesh)) for name, x in levels.items())
    return [gather_rows(x, mesh) for x in levels]


def band_mean(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the mean of all values of all ranks, such as losses of pixels; equal on all ranks, differentiable.

    Args:
        x: This rank's, of any shape, as many as it has.
        mesh: The ranks.
    """
    return mean_over_bands(x.flatten(), Bands(group_of(mesh)), (0,))


def average_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Average the gradients of all parameters over a mesh; those of shards (FSDP2) over theirs.

    `DistributedDataParallel` over all ranks has done so already: then this changes nothing but the time.

    Args:
        model: After `backward`. Where a parameter has a gradient, it has one on all ranks.
        mesh: The ranks.
    """
    group = group_of(mesh)
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    by_type: Dict[Tuple[torch.device, torch.dtype], List[torch.Tensor]] = {}
    for grad in local:
        by_type.setdefault((grad.device, grad.dtype), []).append(grad)
    for same in by_type.values():
        flat = torch.cat([grad.flatten() for grad in same])
        flat = Bands(group).all_reduce(flat) / dist.get_world_size(group)
        for grad, mean in zip(same, flat.split([grad.numel() for grad in same])):
            grad.copy_(mean.view_as(grad))


def check_weights(model: nn.Module, mesh: Mesh) -> None:
    """Raise a ValueError, on all ranks, unless they have the same weights; it does not look at shards."""
    group = group_of(mesh)
    mine = {
        name: (tuple(value.shape), None if value.is_meta or isinstance(value, DTensor) else checksum(value))
        for name, value in model.state_dict().items()}
    everyone: List[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    for rank, weights in zip(ranks, everyone):
        others = [name for name in {**everyone[0], **weights} if everyone[0].get(name) != weights.get(name)]
        if others:
            raise ValueError(
                f'Rank {rank} has other weights than rank {ranks[0]}: {len(others)} differ, {others[0]!r} first. Load'
                ' the same on all, or make them from the same seed.')


def checksum(x: torch.Tensor) -> int:
    """Return a number that tells tensors of other values apart."""
    return zlib.crc32(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


@contextmanager
def recorded_traffic(model: nn.Module) -> Iterator[List[Tuple[str, int]]]:
    """Collect what this rank sends within, (kind, bytes): 'exchange_rows', 'all_reduce', 'all_gather', 'broadcast'.

    Bytes are those of the message: an all-reduce of `n` bytes over `R` ranks sends `2 n (R - 1) / R` in a ring.
    """
    with bands_of(model).recorded_traffic() as traffic:
        yield traffic
