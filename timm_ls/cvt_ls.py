"""CvT-LS: long-short attention in the Convolutional vision Transformer.

Paper: `Long-Short Transformer: Efficient Transformers for Language and Vision` - https://arxiv.org/abs/2107.02192
CvT: `Introducing Convolutions to Vision Transformers` - https://arxiv.org/abs/2103.15808

No code or weights of CvT-LS were ever released. Sizes follow the table of the paper's ImageNet results; what the paper
leaves open follows CvT, and each entrypoint says how far that goes.
"""
import re
from functools import partial
from typing import Any, Callable, Dict, Final, Mapping, Optional, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer
from timm.models import generate_default_cfgs, register_model, reparameterize_model
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .attention.full import FullAttention
from .attention.long_short import LongShortAttention
from .attention.rel_pos import resize_tables
from .ops.capture import is_captured
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

__all__ = ['PLAIN_CVT', 'CvtLs', 'fuse_conv_bn']

torch.fx.wrap('pad_to_multiple')  # branches on sizes that torch.fx does not know


class ConvEmbed(nn.Module):
    """Overlapping patches, normalised: [B, C_in, H, W] to [B, ceil(H / s), ceil(W / s), C] (CvT, section 3.2).

    Sides that the stride does not divide are padded with zeros at the right and the bottom, so that every pixel is
    covered.

    Args:
        in_chans: Channels C_in.
        dim: Channels C.
        kernel_size: Side k of a patch.
        stride: Distance s of neighbouring patches.
        padding: Zeros p added on each side.
        norm_layer: From channels to a norm over the last dimension.
        device: Where to create parameters.
        dtype: Their type.

    Raises:
        ValueError: `k - 2p` lies outside 1..s: sides of other lengths than ceil(n / s) would result.
    """

    def __init__(
            self,
            in_chans: int,
            dim: int,
            kernel_size: int,
            stride: int,
            padding: int,
            norm_layer: Callable[..., nn.Module],
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        if not 0 < kernel_size - 2 * padding <= stride:
            raise ValueError(
                f'Patch size {kernel_size}, stride {stride}, padding {padding}: expected'
                ' 0 < size - 2 * padding <= stride, so that n pixels give ceil(n / stride) tokens.')
        self.stride = stride
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=kernel_size, stride=stride, padding=padding, **dd)
        self.norm = norm_layer(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj(pad_to_multiple(x, self.stride))
        B, C, H, W = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
        return self.norm(x.flatten(2).transpose(1, 2)).reshape(B, H, W, C)


class DepthwiseConvNorm(nn.Module):
    """Several depthwise 3 x 3 convolutions of one map, each followed by BatchNorm, as one grouped convolution.

    Every channel of the input gives `parts` channels of the output, which lie next to each other: no copy of the
    input is made, and BatchNorm, which knows no other channel, is exact.

    Args:
        dim: Channels C.
        parts: Convolutions.
        stride: Stride s of the convolutions.
        device: Where to create parameters.
        dtype: Their type.
    """

    def __init__(
            self,
            dim: int,
            parts: int,
            stride: int = 1,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        self.dim = dim
        self.parts = parts
        self.conv = nn.Conv2d(dim, parts * dim, 3, stride=stride, padding=1, groups=dim, bias=False, **dd)
        self.norm: nn.Module = nn.BatchNorm2d(parts * dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From a map [B, H, W, C] to tokens [B, ceil(H / s) * ceil(W / s), C, parts]."""
        x = x.permute(0, 3, 1, 2)
        if is_captured():
            x = x.contiguous()  # BatchNorm over a channels-last map of unknown size is not exported
        x = self.norm(self.conv(x))
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[2] * x.shape[3], self.dim, self.parts)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """The same module for inference, BatchNorm folded into the convolution; timm's `reparameterize_model` calls it.

        Raises:
            ValueError: The module is in training mode, where BatchNorm depends on the batch.
        """
        if self.training:
            raise ValueError('BatchNorm can only be folded for inference: call eval() on the model first.')
        if isinstance(self.norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()
        return self


class ConvQkv(nn.Module):
    """Convolutional projection of a map to queries, keys and values (CvT, section 3.3).

    A depthwise convolution with BatchNorm and then a linear layer for each of the three. Where keys and values keep
    the resolution of the map, the three convolutions run as one.

    Args:
        dim: Channels C.
        bias: Learn a bias in the linear layers.
        kv_stride: Stride s of the convolutions of keys and values; 2 in CvT.
        query_scale: Factor on the queries.
        device: Where to create parameters.
        dtype: Their type.
    """
    query_scale: Final[float]

    def __init__(
            self,
            dim: int,
            bias: bool = True,
            kv_stride: int = 1,
            query_scale: float = 1.,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        self.query_scale = query_scale
        if kv_stride == 1:
            self.depthwise = DepthwiseConvNorm(dim, 3, **dd)
            self.depthwise_kv = None
        else:
            self.depthwise = DepthwiseConvNorm(dim, 1, **dd)
            self.depthwise_kv = DepthwiseConvNorm(dim, 2, stride=kv_stride, **dd)
        # apart, not one layer over 3 * C channels: each has an input of its own
        self.q = nn.Linear(dim, dim, bias=bias, **dd)
        self.k = nn.Linear(dim, dim, bias=bias, **dd)
        self.v = nn.Linear(dim, dim, bias=bias, **dd)

    def forward(
            self,
            x: torch.Tensor,
            size: Tuple[int, int],
            num_global_tokens: int,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project a sequence of g global tokens, which have no neighbors to convolve, and a map.

        Args:
            x: Tokens, [B, g + H * W, C].
            size: Rows H and columns W of the map.
            num_global_tokens: g.

        Returns:
            Queries [B, g + H * W, C], keys and values [B, g + ceil(H / s) * ceil(W / s), C].
        """
        B, C = x.shape[0], x.shape[2]
        global_tokens = x[:, :num_global_tokens]
        maps = x[:, num_global_tokens:].reshape(B, size[0], size[1], C)
        queries = self.depthwise(maps)  # [B, N, C, 1 or 3]
        if self.depthwise_kv is not None:
            keys = self.depthwise_kv(maps)
            q, k, v = queries[..., 0], keys[..., 0], keys[..., 1]
        else:
            q, k, v = queries[..., 0], queries[..., 1], queries[..., 2]
        if num_global_tokens > 0:
            q = torch.cat([global_tokens, q], dim=1)
            k = torch.cat([global_tokens, k], dim=1)
            v = torch.cat([global_tokens, v], dim=1)
        q = self.q(q)
        if self.query_scale != 1.:
            q = q * self.query_scale
        return q, self.k(k), self.v(v)


def query_scale(attn_scale: str, num_heads: int) -> float:
    """Factor on the queries of attention that itself divides logits by sqrt(channels per head).

    Args:
        attn_scale: 'head' to leave it at that, 'dim' to divide by sqrt(channels) as released CvT does.
        num_heads: Attention heads.

    Raises:
        ValueError: `attn_scale` is neither.
    """
    if attn_scale not in ('head', 'dim'):
        raise ValueError(f"Unknown attn_scale={attn_scale!r}: expected 'head' or 'dim'.")
    return 1. if attn_scale == 'head' else num_heads ** -0.5


class ConvLongShortAttention(LongShortAttention):
    """Long-short attention with convolutional projections.

    Everything but the projections, the dynamic projection included, is `LongShortAttention`. Global tokens pass
    through the linear layers only.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        attn_scale: Logits are divided by the square root of channels per 'head' or of 'dim' (all channels).
        **kwargs: See `LongShortAttention`.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(self, dim: int, num_heads: int = 8, *, attn_scale: str = 'head', **kwargs: Any):
        self.query_scale = query_scale(attn_scale, num_heads)
        super().__init__(dim, num_heads=num_heads, **kwargs)
        self.margin = 1

    def make_projections(self, qkv_bias: bool, dd: Any) -> None:
        """Create the layers of `project`."""
        self.conv_qkv = ConvQkv(self.dim, qkv_bias, query_scale=self.query_scale, **dd)

    def project(
            self,
            x: torch.Tensor,
            size: Tuple[int, int],
            num_global_tokens: int,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """See `LongShortAttention.project`."""
        q, k, v = self.conv_qkv(x, size, num_global_tokens)
        return q, self.norm_kv(torch.stack([k, v], dim=2))


class ConvFullAttention(FullAttention):
    """Full attention with convolutional projections: that of CvT, given `kv_stride=2` and `attn_scale='dim'`.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        kv_stride: Stride of the convolutions of keys and values. The bias table keeps offsets in steps of the map.
        attn_scale: Logits are divided by the square root of channels per 'head' or of 'dim' (all channels).
        **kwargs: See `FullAttention`.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            *,
            kv_stride: int = 1,
            attn_scale: str = 'head',
            **kwargs: Any,
    ):
        if kv_stride < 1:
            raise ValueError(f'kv_stride={kv_stride}: expected a stride of at least 1.')
        self.query_scale = query_scale(attn_scale, num_heads)
        super().__init__(dim, num_heads=num_heads, kv_stride=kv_stride, **kwargs)
        self.margin = 1

    def make_projections(self, qkv_bias: bool, dd: Any) -> None:
        """Create the layers of `project`."""
        self.conv_qkv = ConvQkv(self.dim, qkv_bias, self.kv_stride, self.query_scale, **dd)

    def project(
            self,
            x: torch.Tensor,
            size: Tuple[int, int],
            num_global_tokens: int,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `FullAttention.project`."""
        return self.conv_qkv(x, size, num_global_tokens)


class CvtLs(PyramidTransformer):
    """CvT-LS: three stages of long-short ('ls') or full ('full') attention, any image size from 32 x 32.

    With `**PLAIN_CVT` it is CvT itself, as released by Microsoft, whose weights then load.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: 'avg', 'max', 'avgmax', 'catavgmax' or ''; with a global token in the last stage 'token', 'avg'
            or ''.
        img_size: Image size that the bias tables of full-attention stages are made for, where `rel_pos_bias` is on.
            Other sizes run as well.
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        patch_sizes: Kernel size of the token embedding per stage, as in CvT.
        patch_strides: Its stride, as in CvT.
        patch_paddings: Its padding, as in CvT.
        attn_types: 'ls' or 'full' per stage.
        window_size: Window side in tokens.
        rank: Landmarks per head.
        num_global_tokens: Class tokens per stage. Those of the last stage are kept for pooling.
        mlp_ratio: MLP width over channels.
        qkv_bias: Learn a bias in the linear layers for queries, keys and values.
        kv_stride: Stride of the key and value projections, for all stages or per stage; above 1 with full attention
            only.
        attn_scale: Logits are divided by the square root of channels per 'head' or of 'dim' (all channels), as in
            released CvT.
        rel_pos_bias: Learn relative position biases; off as in CvT, whose convolutions tell positions apart.
        global_update: What class tokens of long-short stages attend to: 'outputs' or 'keys'.
        drop_rate: Dropout probability before the classifier.
        pos_drop_rate: Dropout probability after each token embedding.
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
            embed_dims: Tuple[int, ...] = (64, 192, 384),
            depths: Tuple[int, ...] = (1, 2, 10),
            num_heads: Tuple[int, ...] = (1, 3, 6),
            patch_sizes: Tuple[int, ...] = (7, 3, 3),
            patch_strides: Tuple[int, ...] = (4, 2, 2),
            patch_paddings: Tuple[int, ...] = (2, 1, 1),
            attn_types: Tuple[str, ...] = ('ls', 'ls', 'ls'),
            window_size: int = 7,
            rank: int = 8,
            num_global_tokens: Tuple[int, ...] = (0, 0, 0),
            mlp_ratio: float = 4.,
            qkv_bias: bool = True,
            kv_stride: Union[int, Tuple[int, ...]] = 1,
            attn_scale: str = 'head',
            rel_pos_bias: bool = False,
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
        norm = norm_layer_with_eps(norm_layer, eps=1e-5)
        kv_strides = (kv_stride,) * len(embed_dims) if isinstance(kv_stride, int) else kv_stride
        check_stages(
            len(embed_dims), patch_sizes=patch_sizes, patch_strides=patch_strides, patch_paddings=patch_paddings,
            attn_types=attn_types, kv_stride=kv_strides)
        for i, stride in enumerate(kv_strides):
            if attn_types[i] == 'ls' and stride != 1:
                raise ValueError(
                    f"kv_stride={stride} in stage {i}, whose attention is 'ls': windows need a key at every token,"
                    " kv_stride=1; strided keys and values need 'full' in attn_types.")
        attn_args: Any = dict(
            qkv_bias=qkv_bias, attn_scale=attn_scale, rel_pos_bias=rel_pos_bias, attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate, **dd)
        long_short = partial(
            ConvLongShortAttention, window_size=window_size, rank=rank, global_update=global_update, **attn_args)
        super().__init__(
            embed_layer=[
                partial(ConvEmbed, kernel_size=size, stride=stride, padding=padding, norm_layer=norm, **dd)
                for size, stride, padding in zip(patch_sizes, patch_strides, patch_paddings)],
            attn_layers=dict(
                ls=[long_short for _ in embed_dims],
                full=[partial(ConvFullAttention, kv_stride=stride, **attn_args) for stride in kv_strides],
            ),
            strides=patch_strides,
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
        """Return whether these are weights of plain CvT, Microsoft's or Hugging Face's."""
        return any(without_wrappers(name).startswith(CVT_PREFIXES) for name in state_dict)

    @torch.jit.ignore
    def convert_state_dict(self, state_dict: Dict[str, Any]) -> Dict[str, torch.Tensor]:
        """See `checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


def fuse_conv_bn(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Fold every BatchNorm of a CvT-LS into the convolution before it, for inference.

    The same as timm's `reparameterize_model` (its scripts' `--reparam`); outputs stay equal up to rounding. Save
    weights before: those of a folded model fit folded models only.

    Args:
        model: A model in eval mode.
        inplace: Change `model` instead of a copy.

    Returns:
        The folded model.

    Raises:
        ValueError: The model is in training mode.
    """
    return reparameterize_model(model, inplace=inplace)


CVT_PREFIXES = ('stage0.', 'cvt.encoder.', 'encoder.stages.')  # of names in CvT's checkpoints
# Names in CvT's checkpoints and ours: Microsoft's first, then Hugging Face's. Within stage i and `stages.{i}`, ...
CVT_STAGE_NAMES = {
    'cls_token': 'global_tokens',
    'patch_embed.proj': 'embed.proj',
    'patch_embed.norm': 'embed.norm',
    'embedding.convolution_embeddings.projection': 'embed.proj',
    'embedding.convolution_embeddings.normalization': 'embed.norm',
}
# ... within block j of it and `stages.{i}.blocks.{j}`, where `conv_q`, `conv_k` and `conv_v` are still apart, ...
CVT_BLOCK_NAMES = {
    'norm1': 'norm1',
    'attn.conv_proj_q.conv': 'attn.conv_q.conv',
    'attn.conv_proj_q.bn': 'attn.conv_q.norm',
    'attn.conv_proj_k.conv': 'attn.conv_k.conv',
    'attn.conv_proj_k.bn': 'attn.conv_k.norm',
    'attn.conv_proj_v.conv': 'attn.conv_v.conv',
    'attn.conv_proj_v.bn': 'attn.conv_v.norm',
    'attn.proj_q': 'attn.conv_qkv.q',
    'attn.proj_k': 'attn.conv_qkv.k',
    'attn.proj_v': 'attn.conv_qkv.v',
    'attn.proj': 'attn.proj',
    'norm2': 'norm2',
    'mlp.fc1': 'mlp.fc1',
    'mlp.fc2': 'mlp.fc2',
    'layernorm_before': 'norm1',
    'attention.attention.convolution_projection_query.convolution_projection.convolution': 'attn.conv_q.conv',
    'attention.attention.convolution_projection_query.convolution_projection.normalization': 'attn.conv_q.norm',
    'attention.attention.convolution_projection_key.convolution_projection.convolution': 'attn.conv_k.conv',
    'attention.attention.convolution_projection_key.convolution_projection.normalization': 'attn.conv_k.norm',
    'attention.attention.convolution_projection_value.convolution_projection.convolution': 'attn.conv_v.conv',
    'attention.attention.convolution_projection_value.convolution_projection.normalization': 'attn.conv_v.norm',
    'attention.attention.projection_query': 'attn.conv_qkv.q',
    'attention.attention.projection_key': 'attn.conv_qkv.k',
    'attention.attention.projection_value': 'attn.conv_qkv.v',
    'attention.output.dense': 'attn.proj',
    'layernorm_after': 'norm2',
    'intermediate.dense': 'mlp.fc1',
    'output.dense': 'mlp.fc2',
}
# ... and outside the stages, where Microsoft's are ours
CVT_HEAD_NAMES = {
    'layernorm': 'norm',
    'classifier': 'head',
}


def rename_cvt(name: str) -> str:
    """Our name of a parameter of CvT's checkpoints (Microsoft's or Hugging Face's), the name itself if there is none.

    Convolutions get names of their own, `attn.conv_q`, `attn.conv_k` and `attn.conv_v`, for `merge_convolutions`.
    """
    middle, leaf = name, ''
    match = re.fullmatch(r'(.+)(\.(?:weight|bias|running_mean|running_var|num_batches_tracked))', name)
    if match is not None:
        middle, leaf = match[1], match[2]
    match = re.fullmatch(r'(?:stage|(?:cvt\.)?encoder\.stages\.)(\d+)\.(?:(?:blocks|layers)\.(\d+)\.)?(.+)', middle)
    if match is None:
        return CVT_HEAD_NAMES.get(middle, middle) + leaf
    stage, block, middle = match[1], match[2], match[3]
    names = CVT_STAGE_NAMES if block is None else CVT_BLOCK_NAMES
    if middle not in names:
        return name
    prefix = f'stages.{stage}' if block is None else f'stages.{stage}.blocks.{block}'
    return f'{prefix}.{names[middle]}{leaf}'


def merge_convolutions(weights: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Join the convolutions and BatchNorms for queries, keys and values, apart in CvT, as `model` runs them.

    Args:
        weights: By the names that `rename_cvt` gives.
        model: The model that they are for.

    Returns:
        By the names of `model`. A group of which a part is missing stays as it is.
    """
    expected = model.state_dict()
    merged, used = {}, set()
    for name in expected:
        match = re.fullmatch(r'(.+\.attn)\.conv_qkv\.(depthwise|depthwise_kv)\.(.+)', name)
        if match is None:
            continue
        attn, module, leaf = match[1], match[2], match[3]
        parts = 'kv' if module == 'depthwise_kv' else 'qkv'
        if module == 'depthwise' and f'{attn}.conv_qkv.depthwise_kv.{leaf}' in expected:
            parts = 'q'
        names = [f'{attn}.conv_{part}.{leaf}' for part in parts]
        if all(part in weights for part in names):
            values = [weights[part] for part in names]
            merged[name] = torch.stack(values, dim=1).flatten(0, 1) if values[0].ndim > 0 else values[0]
            used.update(names)
        elif leaf == 'norm.num_batches_tracked':  # a count that plays no part in the statistics
            merged[name] = torch.zeros((), dtype=torch.long)
    return {**{name: value for name, value in weights.items() if name not in used}, **merged}


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint to the names, layouts and sizes of `model`.

    Takes our own weights and those of plain CvT: Microsoft's files, with or without `module.`, and the layout of
    Hugging Face's `microsoft/cvt-13`. Those of CvT fit a model built with `PLAIN_CVT`; see `warm_start` for others.
    Bias tables of other image or window sizes are resized.

    Args:
        state_dict: What the file holds.
        model: The model to load it into.

    Returns:
        Weights by our names.
    """
    weights = unwrap_state_dict(state_dict)
    if any(name.startswith(CVT_PREFIXES) for name in weights):
        return merge_convolutions({rename_cvt(name): value for name, value in weights.items()}, model)

    return dict(resize_tables(weights, model))


def _create_cvt_ls(variant: str, pretrained: bool = False, **kwargs: Any) -> CvtLs:
    return build_model(
        CvtLs,
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
        'pool_size': (14, 14),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'min_input_size': (3, 32, 32),
        'first_conv': 'stages.0.embed.proj',
        'classifier': 'head',
        'paper_ids': 'arXiv:2107.02192',
        'paper_name': 'Long-Short Transformer: Efficient Transformers for Language and Vision',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'cvt_ls_13': _cfg(),
    'cvt_ls_17': _cfg(),
    'cvt_ls_21': _cfg(),
    'cvt_ls_21s': _cfg(),
    'test_cvt_ls.digits': _cfg(
        num_classes=10,
        input_size=(3, 96, 96),
        pool_size=(6, 6),
        crop_pct=1.0,
        license='mit',
        **published_sources('test_cvt_ls.digits'),
    ),
})

CVT_13 = dict(embed_dims=(64, 192, 384), depths=(1, 2, 10), num_heads=(1, 3, 6))
CVT_21 = dict(embed_dims=(64, 192, 384), depths=(1, 4, 16), num_heads=(1, 3, 6))
WIDE_17 = dict(embed_dims=(128, 256, 384), depths=(3, 4, 10), num_heads=(2, 4, 6))
WIDE_21S = dict(embed_dims=(128, 256, 384), depths=(3, 4, 14), num_heads=(2, 4, 6))
TEST = dict(embed_dims=(32, 64, 128), depths=(1, 1, 2), num_heads=(1, 2, 4), img_size=96)

# Arguments that make `cvt_ls_13` and `cvt_ls_21` the CvT-13 and CvT-21 that Microsoft released
PLAIN_CVT = dict(
    attn_types=('full', 'full', 'full'),
    kv_stride=2,
    attn_scale='dim',
    num_global_tokens=(0, 0, 1),
    global_pool='token',
    act_layer='quick_gelu',
)


@register_model
def cvt_ls_13(pretrained: bool = False, **kwargs: Any) -> CvtLs:
    """CvT-LS-13: the stages of CvT-13, long-short attention throughout. No weights exist."""
    return _create_cvt_ls('cvt_ls_13', pretrained, **dict(CVT_13, **kwargs))


@register_model
def cvt_ls_17(pretrained: bool = False, **kwargs: Any) -> CvtLs:
    """CvT-LS-17, reconstructed: the paper gives its parameters and cost only, which these stages come close to."""
    return _create_cvt_ls('cvt_ls_17', pretrained, **dict(WIDE_17, **kwargs))


@register_model
def cvt_ls_21(pretrained: bool = False, **kwargs: Any) -> CvtLs:
    """CvT-LS-21: the stages of CvT-21, long-short attention throughout. No weights exist."""
    return _create_cvt_ls('cvt_ls_21', pretrained, **dict(CVT_21, **kwargs))


@register_model
def cvt_ls_21s(pretrained: bool = False, **kwargs: Any) -> CvtLs:
    """CvT-LS-21S, reconstructed: the paper gives its parameters and cost only, which these stages come close to."""
    return _create_cvt_ls('cvt_ls_21s', pretrained, **dict(WIDE_21S, **kwargs))


@register_model
def test_cvt_ls(pretrained: bool = False, **kwargs: Any) -> CvtLs:
    """A CvT-LS small enough for tests and examples, for 96 pixels; its weights tell handwritten digits apart."""
    return _create_cvt_ls('test_cvt_ls', pretrained, **dict(TEST, **kwargs))
