"""torchvision's detectors on any timm backbone with an FPN: by name, with anchors that fit its levels.

They take and return what torchvision's own constructors do: lists of images [3, H, W] in 0..1 of any sizes, targets as
dictionaries of `boxes`, `labels` and `masks`; losses in training mode, detections in eval mode.
"""
import math
from typing import Any, Dict, List, Optional, Sequence

from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from .fpn import FeaturePyramid, timm_fpn_backbone

__all__ = ['fasterrcnn_fpn', 'fcos_fpn', 'maskrcnn_fpn', 'retinanet_fpn']


def fasterrcnn_fpn(
        backbone_name: str,
        *,
        num_classes: Optional[int] = 91,
        pretrained_backbone: bool = False,
        trainable_backbone_layers: Optional[int] = None,
        anchor_scale: float = 8.,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> FasterRCNN:
    """Faster R-CNN (https://arxiv.org/abs/1506.01497) on a timm backbone with an FPN.

    Args:
        backbone_name: Any timm model whose features are NCHW maps.
        num_classes: Classes, background included; None with a `box_predictor` of one's own.
        pretrained_backbone: Load the backbone's weights.
        trainable_backbone_layers: Levels of the backbone that are trained, counted from its last; by default all
            without weights and up to 3 with them.
        anchor_scale: Side of the square anchor over the stride of its level. 8 gives sides of 32 to 512 at strides of 4
            to 64, for images of about 800 x 1333; smaller images with smaller objects want less. The level that a box
            is pooled from scales with it.
        backbone_kwargs: More arguments of `timm_fpn_backbone`. Its extra block is 'pool' by default, and 'p6p7' for a
            backbone that ends at stride 16: the last stride is 64 for both.
        **kwargs: Arguments of torchvision's `FasterRCNN`, among them `min_size` and `max_size`. The mean and deviation
            of images default to those that the backbone was trained with.

    Raises:
        ValueError: The backbone has no pyramid of NCHW maps, or an argument is out of range.
    """
    backbone = rcnn_backbone(backbone_name, pretrained_backbone, trainable_backbone_layers, backbone_kwargs)
    kwargs = with_normalisation(kwargs, backbone, backbone_kwargs)
    return FasterRCNN(backbone, num_classes, **dict(rcnn_defaults(backbone, anchor_scale), **kwargs))


def maskrcnn_fpn(
        backbone_name: str,
        *,
        num_classes: Optional[int] = 91,
        pretrained_backbone: bool = False,
        trainable_backbone_layers: Optional[int] = None,
        anchor_scale: float = 8.,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> MaskRCNN:
    """Mask R-CNN (https://arxiv.org/abs/1703.06870) on a timm backbone with an FPN.

    Arguments and errors are those of `fasterrcnn_fpn`; `**kwargs` are for torchvision's `MaskRCNN`.
    """
    backbone = rcnn_backbone(backbone_name, pretrained_backbone, trainable_backbone_layers, backbone_kwargs)
    defaults = dict(rcnn_defaults(backbone, anchor_scale), mask_roi_pool=roi_pool(backbone, 14, anchor_scale))
    kwargs = with_normalisation(kwargs, backbone, backbone_kwargs)
    return MaskRCNN(backbone, num_classes, **dict(defaults, **kwargs))


def retinanet_fpn(
        backbone_name: str,
        *,
        num_classes: int = 91,
        pretrained_backbone: bool = False,
        trainable_backbone_layers: Optional[int] = None,
        anchor_scale: float = 4.,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> RetinaNet:
    """RetinaNet (https://arxiv.org/abs/1708.02002) on a timm backbone with an FPN.

    Args:
        backbone_name: Any timm model whose features are NCHW maps.
        num_classes: Classes, background included.
        pretrained_backbone: Load the backbone's weights.
        trainable_backbone_layers: Levels of the backbone that are trained, counted from its last; by default all
            without weights and up to 3 with them.
        anchor_scale: Side of a level's smallest square anchor over its stride; two more are a third and two thirds of
            an octave larger. 4 gives sides of 32 to 813 at strides of 8 to 128. Where the pyramid ends at stride 64, as
            on CvT-LS, the anchors of its last level are spread up to the same 813.
        backbone_kwargs: More arguments of `timm_fpn_backbone`: levels start at stride 8 and end with P6 and P7 by
            default, as in torchvision.
        **kwargs: Arguments of torchvision's `RetinaNet`, among them `min_size` and `max_size`. The mean and deviation
            of images default to those that the backbone was trained with.

    Raises:
        ValueError: The backbone has no pyramid of NCHW maps, or an argument is out of range.
    """
    backbone = one_stage_backbone(backbone_name, pretrained_backbone, trainable_backbone_layers, backbone_kwargs)
    sizes = retinanet_sizes(backbone.strides, anchor_scale)
    defaults = dict(anchor_generator=anchor_generator(sizes))
    kwargs = with_normalisation(kwargs, backbone, backbone_kwargs)
    return RetinaNet(backbone, num_classes, **dict(defaults, **kwargs))


def fcos_fpn(
        backbone_name: str,
        *,
        num_classes: int = 91,
        pretrained_backbone: bool = False,
        trainable_backbone_layers: Optional[int] = None,
        anchor_scale: float = 1.,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> FCOS:
    """FCOS (https://arxiv.org/abs/1904.01355) on a timm backbone with an FPN.

    Arguments and errors are those of `retinanet_fpn`, but for these: `**kwargs` are for torchvision's `FCOS`, and a
    position has one square anchor. With `anchor_scale` 1 it is as large as the stride, and a level finds objects of 4
    to 8 strides, the first level smaller ones and the last one larger ones too.
    """
    backbone = one_stage_backbone(backbone_name, pretrained_backbone, trainable_backbone_layers, backbone_kwargs)
    sizes = [[anchor_scale * stride] for stride in backbone.strides]
    defaults = dict(anchor_generator=anchor_generator(sizes, aspect_ratios=(1.,)))
    kwargs = with_normalisation(kwargs, backbone, backbone_kwargs)
    return FCOS(backbone, num_classes, **dict(defaults, **kwargs))


def rcnn_backbone(
        name: str,
        pretrained: bool,
        trainable_layers: Optional[int],
        kwargs: Optional[Dict[str, Any]],
) -> FeaturePyramid:
    """The pyramid of a two-stage detector, from stride 4 on."""
    return timm_fpn_backbone(name, pretrained=pretrained, trainable_layers=trainable_layers, **(kwargs or {}))


def one_stage_backbone(
        name: str,
        pretrained: bool,
        trainable_layers: Optional[int],
        kwargs: Optional[Dict[str, Any]],
) -> FeaturePyramid:
    """The pyramid of a one-stage detector: from stride 8 on, as finer levels have most of all anchors, and P6, P7."""
    return rcnn_backbone(
        name, pretrained, trainable_layers, dict(dict(min_stride=8, extra_blocks='p6p7'), **(kwargs or {})))


def rcnn_defaults(backbone: FeaturePyramid, anchor_scale: float) -> Dict[str, Any]:
    """Arguments of torchvision's two-stage detectors that depend on the pyramid."""
    sizes = [[anchor_scale * stride] for stride in backbone.strides]
    return dict(
        rpn_anchor_generator=anchor_generator(sizes),
        box_roi_pool=roi_pool(backbone, 7, anchor_scale),
    )


def roi_pool(backbone: FeaturePyramid, output_size: int, anchor_scale: float) -> MultiScaleRoIAlign:
    """Pooling of boxes from the levels up to stride 32; coarser ones only propose boxes, as in torchvision.

    A box of 224 pixels is pooled from stride 16 where the anchors of that level have 128, as in the FPN's paper.
    """
    names = [name for name, stride in zip(backbone.names, backbone.strides) if stride <= 32]
    return MultiScaleRoIAlign(
        names, output_size=output_size, sampling_ratio=2, canonical_scale=max(1, round(28 * anchor_scale)))


def retinanet_sizes(strides: Sequence[int], anchor_scale: float) -> List[List[float]]:
    """Three sides per level, a third of an octave apart; those of the last level reach what stride 128 would have."""
    thirds = [[i / 3 for i in range(3)] for _ in strides]
    missing_octaves = max(0., math.log2(128 / strides[-1]))
    thirds[-1] = [octaves * (1 + 1.5 * missing_octaves) for octaves in thirds[-1]]
    return [[anchor_scale * stride * 2 ** x for x in octaves] for stride, octaves in zip(strides, thirds)]


def anchor_generator(
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float] = (0.5, 1., 2.),
) -> AnchorGenerator:
    """Anchors of these sides and ratios, height over width, for each level."""
    return AnchorGenerator(tuple(tuple(side) for side in sizes), (tuple(aspect_ratios),) * len(sizes))


def with_normalisation(
        kwargs: Dict[str, Any],
        backbone: FeaturePyramid,
        backbone_kwargs: Optional[Dict[str, Any]],
) -> Dict[str, Any]:
    """A detector's arguments, with the mean and deviation of images that the backbone was trained with by default.

    Raises:
        ValueError: The backbone takes images of other channels, and they are not given.
    """
    cfg: Any = backbone.body.pretrained_cfg
    in_chans = (backbone_kwargs or {}).get('in_chans', cfg['input_size'][0])
    result = dict(kwargs)
    for name, value in (('image_mean', cfg['mean']), ('image_std', cfg['std'])):
        if name not in kwargs and len(value) != in_chans:
            raise ValueError(f'in_chans={in_chans}: pass image_mean and image_std, {in_chans} numbers each.')
        result.setdefault(name, list(value))
    return result
