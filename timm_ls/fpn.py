"""Feature pyramids for detectors and segmenters: any timm backbone as the module that torchvision's detectors take.

Levels and FPN: `Feature Pyramid Networks for Object Detection` - https://arxiv.org/abs/1612.03144
P6 and P7: `Focal Loss for Dense Object Detection` - https://arxiv.org/abs/1708.02002
"""
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Optional, Sequence, Tuple, Union, cast

import timm
import torch
import torch.nn as nn
from timm.layers import Format, LayerNorm2d
from timm.models import FeatureInfo
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

__all__ = ['FeaturePyramid', 'timm_fpn_backbone']


class OnTimmBackbone(nn.Module):
    """What all models on a timm backbone can do with it: freeze its first layers, recompute its activations.

    A subclass holds the backbone, made with `features_only=True`, as `body`, and sets `trainable_layers` with it.
    """

    if TYPE_CHECKING:  # a script reads no such annotation
        body: nn.Module
        trainable_layers: int

    @torch.jit.ignore
    def set_trainable_layers(self, trainable_layers: int) -> None:
        """Freeze what comes before the last `trainable_layers` levels of the backbone, and nothing else of it.

        Args:
            trainable_layers: Levels that are trained, counted from the last, as in torchvision. The stem counts as a
                level where it is one, so a ResNet has 5; patch embeddings and global tokens belong to their stage.

        Raises:
            ValueError: There are not as many levels.
        """
        num_layers = count_layers(self.body)
        if not 0 <= trainable_layers <= num_layers:
            raise ValueError(f'trainable_layers={trainable_layers}: the backbone has {num_layers}, expected 0 to that.')
        self.trainable_layers = trainable_layers
        self.body.requires_grad_(True)
        for parameter in frozen_part(self.body, trainable_layers)[0]:
            parameter.requires_grad_(False)
        self.train(self.training)

    @torch.jit.ignore
    def train(self, mode: bool = True) -> 'OnTimmBackbone':
        """Training mode for all but frozen layers: their BatchNorms and dropout stay as in inference."""
        super().train(mode)
        for module in frozen_part(self.body, self.trainable_layers)[1]:
            module.training = False
        return self

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass: block by block in ours, as timm does in others."""
        inner = [m for m in self.body.modules() if m is not self.body and hasattr(m, 'grad_checkpointing')]
        modules: List[Any] = inner or [self.body]
        for module in modules:
            module.grad_checkpointing = enable


class FeaturePyramid(OnTimmBackbone):
    """A timm backbone with an FPN on top: from images to maps of the same channels at growing strides.

    Takes the place of torchvision's `BackboneWithFPN` in its detectors. Scripts if the backbone does, exports to ONNX.

    Args:
        body: A backbone made with `features_only=True` that returns NCHW maps, the finest first.
        out_channels: Channels of every map that is returned.
        extra_blocks: What adds levels beyond the last: 'pool' (one, subsampled from the last, as in Faster R-CNN),
            'p6p7' (two, by strided convolutions, as in RetinaNet and FCOS), any `ExtraFPNBlock`, None, or 'auto': the
            first of these where it reaches stride 64, else the second. So a backbone that ends at stride 16, such as
            CvT-LS, gets its strides 32 and 64 from learned convolutions.
        level_norm: Normalise each level over its channels before the FPN. The levels of a pre-norm transformer are raw
            residual sums, so detectors on Swin and ViL do this; a level that is normalised already needs none.
        norm_layer: Norm after each convolution of the FPN, from channels to a module, such as `nn.BatchNorm2d`.
        min_stride: Levels of a smaller stride are left out; 4 leaves out the stem of a ResNet.
        trainable_layers: Levels of the backbone that are trained, counted from its last; see `set_trainable_layers`.
            None leaves the backbone as it is.

    Attributes:
        out_channels: As given; torchvision's detectors read it.
        names: Keys of the maps: '0', '1', ... for levels of the backbone, then those of the extra blocks.
        strides: Stride of each map with respect to the image.

    Raises:
        ValueError: The backbone has no pyramid of NCHW maps, or an argument is out of range.
    """

    def __init__(
            self,
            body: nn.Module,
            out_channels: int = 256,
            extra_blocks: Union[str, ExtraFPNBlock, None] = 'auto',
            level_norm: bool = True,
            norm_layer: Optional[Callable[[int], nn.Module]] = None,
            min_stride: int = 4,
            trainable_layers: Optional[int] = None,
    ):
        super().__init__()
        output_fmt = Format(getattr(body, 'output_fmt', Format.NCHW))
        if output_fmt != Format.NCHW:
            raise ValueError(f'The backbone returns {output_fmt.value} maps: a pyramid needs NCHW ones.')
        strides, channels = feature_info(body).reduction(), feature_info(body).channels()
        if any(stride >= coarser for stride, coarser in zip(strides, strides[1:])):
            raise ValueError(
                f'The backbone returns levels of strides {strides}: a pyramid needs growing ones. Choose others by'
                ' out_indices, in increasing order, or a backbone that reduces resolution in stages.')
        self.level_indices: List[int] = [i for i, stride in enumerate(strides) if stride >= min_stride]
        if not self.level_indices:
            raise ValueError(f'No level is left with min_stride={min_stride}: the backbone has strides {strides}.')
        strides, channels = [strides[i] for i in self.level_indices], [channels[i] for i in self.level_indices]

        if extra_blocks == 'auto':
            extra_blocks = 'pool' if strides[-1] >= 32 else 'p6p7'
        if extra_blocks == 'pool':
            extra_blocks = LastLevelMaxPool()
        elif extra_blocks == 'p6p7':
            extra_blocks = LastLevelP6P7(out_channels, out_channels)
        if not (extra_blocks is None or isinstance(extra_blocks, ExtraFPNBlock)):
            raise ValueError(
                f"Unknown extra_blocks={extra_blocks!r}: expected 'auto', 'pool', 'p6p7', an ExtraFPNBlock or None.")

        self.body = body
        self.norms = nn.ModuleList(LayerNorm2d(dim) if level_norm else nn.Identity() for dim in channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks, norm_layer)
        self.out_channels = out_channels
        self.names = [str(i) for i in range(len(channels))]
        self.strides = strides
        if extra_blocks is not None:
            side = 16
            with torch.no_grad():  # only the block knows what it adds
                maps, names = extra_blocks(
                    [torch.zeros(1, out_channels, side, side)], [torch.zeros(1, channels[-1], side, side)], ['last'])
            self.names += names[1:]
            self.strides += [strides[-1] * side // x.shape[-1] for x in maps[1:]]

        self.trainable_layers = count_layers(body)
        if trainable_layers is not None:
            self.set_trainable_layers(trainable_layers)

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """From images [B, C, H, W] to maps [B, out_channels, H / stride, W / stride], rounded up, the finest first."""
        levels = self.body(x)
        maps: Dict[str, torch.Tensor] = OrderedDict()
        for i, norm in enumerate(self.norms):
            maps[str(i)] = norm(levels[self.level_indices[i]])
        return self.fpn(maps)


def feature_info(body: nn.Module) -> FeatureInfo:
    """Return what timm knows of a backbone's levels."""
    return cast(FeatureInfo, body.feature_info)


def count_layers(body: nn.Module) -> int:
    """Return the levels of a backbone that are run, whether it returns them or not."""
    info = feature_info(body)
    return 1 + max(range(len(info.info))[i] for i in info.out_indices)


def default_trainable_layers(body: nn.Module, pretrained: bool) -> int:
    """Levels that are trained where nothing is said: as in torchvision up to 3 with weights, else all."""
    return min(3, count_layers(body)) if pretrained else count_layers(body)


def frozen_part(body: nn.Module, trainable_layers: int) -> Tuple[List[nn.Parameter], List[nn.Module]]:
    """Parameters and modules of a backbone that come before its last `trainable_layers` levels.

    Modules are taken to be registered in the order that they are used in, as timm does for features.
    """
    num_frozen = count_layers(body) - trainable_layers
    if num_frozen == 0:
        return [], []
    modules = dict(body.named_modules())
    names = list(modules)  # a module, then what it holds
    if trainable_layers == 0:
        return list(body.parameters()), list(modules.values())
    path = feature_info(body).info[num_frozen - 1]['module']
    level = next(name for name in (path, path.replace('.', '_'), f'model.{path}') if name in modules)
    end = 1 + max(i for i, name in enumerate(names) if name == level or name.startswith(f'{level}.'))
    parameters = [p for name in names[:end] for p in modules[name].parameters(recurse=False)]
    holders = [name for name in names[:end] if f'{names[end]}.'.startswith(f'{name}.') or not name]  # of both parts
    return parameters, [modules[name] for name in names[:end] if name not in holders]


def timm_fpn_backbone(
        model_name: str,
        *,
        pretrained: bool = False,
        trainable_layers: Optional[int] = None,
        out_indices: Optional[Union[int, Sequence[int]]] = None,
        min_stride: int = 4,
        out_channels: int = 256,
        extra_blocks: Union[str, ExtraFPNBlock, None] = 'auto',
        level_norm: bool = True,
        norm_layer: Optional[Callable[[int], nn.Module]] = None,
        grad_checkpointing: bool = False,
        **kwargs: Any,
) -> FeaturePyramid:
    """A timm model by name with an FPN on top, as torchvision's `resnet_fpn_backbone` is for ResNets.

    Args:
        model_name: Any timm model whose features are NCHW maps.
        pretrained: Load the model's weights.
        trainable_layers: Levels of the backbone that are trained, counted from its last, see `FeaturePyramid`. By
            default all without `pretrained` and up to 3 with it, as in torchvision.
        out_indices: Levels to use, by timm's rules: increasing, negative ones from the last, an int for the last n.
            What comes after the last of them is not built.
        min_stride: Without `out_indices`, use levels from this stride on.
        out_channels: Channels of every map that is returned.
        extra_blocks: What adds levels beyond the last, see `FeaturePyramid`.
        level_norm: Normalise each level over its channels before the FPN.
        norm_layer: Norm after each convolution of the FPN.
        grad_checkpointing: Recompute activations of the backbone in the backward pass.
        **kwargs: For `timm.create_model`, such as `drop_path_rate` or `pretrained_cfg_overlay`.

    Raises:
        ValueError: The model has no such pyramid, or an argument is out of range.
    """
    if out_indices is not None:
        kwargs['out_indices'], min_stride = out_indices, 1
    try:
        body = timm.create_model(model_name, pretrained=pretrained, features_only=True, **kwargs)
    except (AssertionError, IndexError) as error:
        if out_indices is None:
            raise
        raise ValueError(f'out_indices={out_indices}: {model_name} has no such levels ({error}).') from error
    if trainable_layers is None:
        trainable_layers = default_trainable_layers(body, pretrained)
    pyramid = FeaturePyramid(
        body,
        out_channels=out_channels,
        extra_blocks=extra_blocks,
        level_norm=level_norm,
        norm_layer=norm_layer,
        min_stride=min_stride,
        trainable_layers=trainable_layers,
    )
    if grad_checkpointing:
        pyramid.set_grad_checkpointing()
    return pyramid
