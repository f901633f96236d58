"""ViL-LS: the long-short vision transformer built on the multi-scale Vision Longformer.

Paper: `Long-Short Transformer: Efficient Transformers for Language and Vision` - https://arxiv.org/abs/2107.02192
Multi-scale design: `Multi-Scale Vision Longformer` - https://arxiv.org/abs/2103.15358
Released weights: https://github.com/NVIDIA/transformer-ls (MIT)
"""
import re
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer
from timm.models import generate_default_cfgs, register_model

from .attention.full import FullAttention
from .attention.long_short import LongShortAttention
from .attention.rel_pos import dense_table, resize_tables
from .pretrained.checkpoint import unwrap_state_dict, without_wrappers
from .pretrained.sources import build_model, published_sources
from .pyramid_transformer import (
    ImageSize,
    PyramidTransformer,
    check_stages,
    feature_config,
    norm_layer_with_eps,
    pad_to_multiple,
)

__all__ = ['VilLs']

torch.fx.wrap('pad_to_multiple')  # branches on sizes that torch.fx does not know


class PatchEmbed(nn.Module):
    """Non-overlapping patches, normalised: [B, C_in, H, W] to [B, ceil(H / p), ceil(W / p), C].

    Sides that the patch size does not divide are padded with zeros at the right and the bottom.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            patch_size: int,
            norm_layer: Callable[..., nn.Module],
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(pad_to_multiple(x, self.patch_size))
        B, C, H, W = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
        return self.norm(x.flatten(2).transpose(1, 2)).reshape(B, H, W, C)


class VilLs(PyramidTransformer):
    """ViL-LS: four stages of long-short ('ls') or full ('full') attention, any image size from 32 x 32.

    The last two stages of the released models use full attention, whose cost grows with the square of the pixels;
    `attn_types=('ls',) * 4` (the `_hires` variants) is linear throughout.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: 'avg', 'max', 'avgmax', 'catavgmax' or ''; with a global token in the last stage 'token', 'avg'
            or ''.
        img_size: Image size that the bias tables of full-attention stages are made for. Other sizes run as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        patch_sizes: Patch size, which is also the stride, per stage.
        attn_types: 'ls' or 'full' per stage.
        window_size: Window side in tokens; 7 at 224 pixels and 8 at 384, as released.
        rank: Landmarks per head.
        num_global_tokens: Class tokens per stage. Those of the last stage are kept for pooling.
        mlp_ratio: MLP width over channels.
        qkv_bias: Learn a bias for queries, keys and values.
        rel_pos_bias: Learn relative position biases.
        global_update: What class tokens of long-short stages attend to: 'outputs' (as released) or 'keys'.
        drop_rate: Dropout probability before the classifier.
        pos_drop_rate: Dropout probability after each patch embedding.
        proj_drop_rate: Dropout probability after attention and in MLPs.
        attn_drop_rate: Dropout probability of attention weights.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.
        norm_layer: Norm over the last dimension.
        act_layer: Activation of the MLPs.
        device: Where to create parameters.
        dtype: Their type.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            img_size: ImageSize = 224,
            embed_dims: Tuple[int, ...] = (96, 192, 384, 768),
            depths: Tuple[int, ...] = (1, 4, 16, 1),
            num_heads: Tuple[int, ...] = (3, 3, 6, 12),
            patch_sizes: Tuple[int, ...] = (4, 2, 2, 2),
            attn_types: Tuple[str, ...] = ('ls', 'ls', 'full', 'full'),
            window_size: int = 7,
            rank: int = 8,
            num_global_tokens: Tuple[int, ...] = (1, 1, 1, 0),
            mlp_ratio: float = 4.,
            qkv_bias: bool = True,
            rel_pos_bias: bool = True,
            global_update: str = 'outputs',
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            norm_layer: Union[str, Callable[..., nn.Module]] = 'layernorm',
            act_layer: Union[str, Callable[..., nn.Module]] = 'gelu',
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        dd: Any = {'device': device, 'dtype': dtype}
        norm = norm_layer_with_eps(norm_layer, eps=1e-6)
        check_stages(len(embed_dims), patch_sizes=patch_sizes)
        attn_args: Any = dict(
            qkv_bias=qkv_bias, rel_pos_bias=rel_pos_bias, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, **dd)
        long_short = partial(
            LongShortAttention, window_size=window_size, rank=rank, global_update=global_update, **attn_args)
        super().__init__(
            embed_layer=[partial(PatchEmbed, patch_size=size, norm_layer=norm, **dd) for size in patch_sizes],
            attn_layers=dict(
                ls=[long_short for _ in embed_dims],
                full=[partial(FullAttention, **attn_args) for _ in embed_dims],
            ),
            strides=patch_sizes,
            norm_layer=norm,
            act_layer=get_act_layer(act_layer),
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            num_global_tokens=num_global_tokens,
            attn_types=attn_types,
            img_size=img_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
            **dd,
        )

    @torch.jit.ignore
    def is_foreign(self, state_dict: Mapping[str, Any]) -> bool:
        """Return whether these are the authors' weights, as released or bare."""
        return 'net' in state_dict or any(rename_released(without_wrappers(name)) != name for name in state_dict)

    @torch.jit.ignore
    def convert_state_dict(self, state_dict: Dict[str, Any]) -> Dict[str, torch.Tensor]:
        """See `checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


# Names in the authors' checkpoints and ours: within `layer{i}.0` and `stages.{i - 1}`, ...
RELEASED_STAGE_NAMES = {
    'cls_token': 'global_tokens',
    'proj': 'embed.proj',
    'norm_embed': 'embed.norm',
}
# ... within `layer{i}.{2 j + 1}` and `stages.{i - 1}.blocks.{j}`, ...
RELEASED_ATTENTION_NAMES = {
    'norm': 'norm1',
    'attn.qkv': 'attn.qkv',
    'attn.dual_ln_full': 'attn.norm_kv',
    'attn.to_dynamic_projection': 'attn.dynamic_projection',
    'attn.dual_ln_dp': 'attn.norm_landmarks',
    'attn.local_relative_position_bias_table': 'attn.rel_pos.table',
    'attn.g2l_relative_position_bias': 'attn.rel_pos.global_patch',
    'attn.g2g_relative_position_bias': 'attn.rel_pos.global_global',
    'attn.proj': 'attn.proj',
}
# ... and within `layer{i}.{2 j + 2}` and `stages.{i - 1}.blocks.{j}`
RELEASED_MLP_NAMES = {
    'norm': 'norm2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.fc2': 'mlp.fc2',
}


def rename_released(name: str) -> str:
    """Our name of a parameter of the authors' checkpoints; the name itself where there is no other."""
    match = re.fullmatch(r'layer(\d+)\.(\d+)\.(.+?)(\.weight|\.bias)?', name)
    if match is None:
        return name
    stage, index, middle, leaf = int(match[1]) - 1, int(match[2]), match[3], match[4] or ''
    if index == 0:
        prefix, names = f'stages.{stage}', RELEASED_STAGE_NAMES
    else:
        prefix = f'stages.{stage}.blocks.{(index - 1) // 2}'
        names = RELEASED_ATTENTION_NAMES if index % 2 == 1 else RELEASED_MLP_NAMES
    return f'{prefix}.{names[middle]}{leaf}' if middle in names else name


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint to the names, layouts and sizes of `model`.

    Takes the authors' files as released (`{'net': ...}`, with or without `module.`), bare weights, and our own.
    Aliased window bias tables are expanded without loss; bias tables of other grids or windows are resized.

    Args:
        state_dict: What the file holds.
        model: The model to load it into.

    Returns:
        Weights by our names.
    """
    weights = {}
    for name, value in unwrap_state_dict(state_dict).items():
        if name.endswith('.relative_position_index'):
            continue
        weights[rename_released(name)] = value

    for name, table in weights.items():
        if name.endswith('.rel_pos.table'):
            weights[name] = dense_table(table, aliased=name.replace('rel_pos.table', 'norm_kv.weight') in weights)
    return dict(resize_tables(weights, model))


def _create_vil_ls(variant: str, pretrained: bool = False, **kwargs: Any) -> VilLs:
    return build_model(
        VilLs,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_config(**kwargs),
        **kwargs,
    )


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'min_input_size': (3, 32, 32),
        'first_conv': 'stages.0.embed.proj',
        'classifier': 'head',
        'license': 'mit',
        'paper_ids': 'arXiv:2107.02192',
        'paper_name': 'Long-Short Transformer: Efficient Transformers for Language and Vision',
        'origin_url': 'https://github.com/NVIDIA/transformer-ls',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'vil_ls_tiny': _cfg(),
    'vil_ls_small': _cfg(),
    'vil_ls_medium.ls_in1k': _cfg(**published_sources('vil_ls_medium.ls_in1k')),
    'vil_ls_base.ls_in1k': _cfg(**published_sources('vil_ls_base.ls_in1k')),
    'vil_ls_medium_384.ls_in1k': _cfg(
        input_size=(3, 384, 384), pool_size=(12, 12), **published_sources('vil_ls_medium_384.ls_in1k')),
    'vil_ls_tiny_hires': _cfg(),
    'vil_ls_small_hires': _cfg(),
    'vil_ls_medium_hires': _cfg(),
    'vil_ls_base_hires': _cfg(),
    'test_vil_ls.digits': _cfg(
        num_classes=10,
        input_size=(3, 96, 96),
        pool_size=(3, 3),
        crop_pct=1.0,
        origin_url=None,
        **published_sources('test_vil_ls.digits'),
    ),
})

TINY = dict(embed_dims=(48, 96, 192, 384), depths=(1, 1, 9, 1), num_heads=(1, 3, 3, 6))
SMALL = dict(embed_dims=(96, 192, 384, 768), depths=(1, 2, 8, 1), num_heads=(3, 3, 6, 12))
MEDIUM = dict(embed_dims=(96, 192, 384, 768), depths=(1, 4, 16, 1), num_heads=(3, 3, 6, 12))
BASE = dict(embed_dims=(96, 192, 384, 768), depths=(1, 8, 24, 1), num_heads=(3, 3, 6, 12))
TEST = dict(embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), img_size=96)
HIRES = dict(attn_types=('ls', 'ls', 'ls', 'ls'))  # linear in the number of pixels throughout


@register_model
def vil_ls_tiny(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Tiny: full attention in the last two stages."""
    return _create_vil_ls('vil_ls_tiny', pretrained, **dict(TINY, **kwargs))


@register_model
def vil_ls_small(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Small: full attention in the last two stages."""
    return _create_vil_ls('vil_ls_small', pretrained, **dict(SMALL, **kwargs))


@register_model
def vil_ls_medium(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Medium: full attention in the last two stages."""
    return _create_vil_ls('vil_ls_medium', pretrained, **dict(MEDIUM, **kwargs))


@register_model
def vil_ls_base(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Base: full attention in the last two stages."""
    return _create_vil_ls('vil_ls_base', pretrained, **dict(BASE, **kwargs))


@register_model
def vil_ls_medium_384(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Medium at 384 pixels: windows of 8, bias tables for grids of 24 and 12."""
    model_args = dict(MEDIUM, img_size=384, window_size=8)
    return _create_vil_ls('vil_ls_medium_384', pretrained, **dict(model_args, **kwargs))


@register_model
def vil_ls_tiny_hires(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Tiny with long-short attention in all stages."""
    model_args = dict(TINY, **HIRES)
    return _create_vil_ls('vil_ls_tiny_hires', pretrained, **dict(model_args, **kwargs))


@register_model
def vil_ls_small_hires(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Small with long-short attention in all stages."""
    model_args = dict(SMALL, **HIRES)
    return _create_vil_ls('vil_ls_small_hires', pretrained, **dict(model_args, **kwargs))


@register_model
def vil_ls_medium_hires(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Medium with long-short attention in all stages."""
    model_args = dict(MEDIUM, **HIRES)
    return _create_vil_ls('vil_ls_medium_hires', pretrained, **dict(model_args, **kwargs))


@register_model
def vil_ls_base_hires(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """ViL-LS-Base with long-short attention in all stages."""
    model_args = dict(BASE, **HIRES)
    return _create_vil_ls('vil_ls_base_hires', pretrained, **dict(model_args, **kwargs))


@register_model
def test_vil_ls(pretrained: bool = False, **kwargs: Any) -> VilLs:
    """A ViL-LS small enough for tests and examples, for 96 pixels; its weights tell handwritten digits apart."""
    return _create_vil_ls('test_vil_ls', pretrained, **dict(TEST, **kwargs))
