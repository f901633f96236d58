"""Semantic segmentation on any timm backbone: UPerNet of segmentation_models_pytorch, in torchvision's shape."""
from collections import OrderedDict
from typing import Any, Dict, Optional

import timm
import torch
import torch.nn as nn

from .fpn import OnTimmBackbone, count_layers, default_trainable_layers, feature_info
from .pyramid_transformer import pad_to_multiple

__all__ = ['Segmenter', 'upernet']


class Segmenter(OnTimmBackbone):
    """A model of segmentation_models_pytorch on a timm encoder, for images of any size and in torchvision's shape.

    Those models take multiples of their stride only: images are padded with zeros at the right and the bottom, and the
    logits cut to the image.

    Args:
        model: A segmentation model whose encoder is a timm backbone ('tu-...').
        trainable_layers: Levels of the backbone that are trained, counted from its last; see `set_trainable_layers`.
            None leaves the backbone as it is.
    """

    __jit_unused_properties__ = ['body']

    def __init__(self, model: nn.Module, trainable_layers: Optional[int] = None):
        super().__init__()
        self.model = model
        encoder: Any = model.encoder
        self.output_stride = int(encoder.output_stride)
        self.trainable_layers = count_layers(self.body)
        if trainable_layers is not None:
            self.set_trainable_layers(trainable_layers)

    @property
    def body(self) -> nn.Module:  # type: ignore[override]  # it has its place within the other model
        """The timm backbone."""
        encoder: Any = self.model.encoder
        return encoder.model

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """From normalised images [B, C, H, W] to `OrderedDict(out=logits)`, [B, num_classes, H, W]."""
        height, width = x.shape[2], x.shape[3]
        logits = self.model(pad_to_multiple(x, self.output_stride))
        out: Dict[str, torch.Tensor] = OrderedDict()
        out['out'] = logits[:, :, :height, :width]
        return out


def upernet(
        backbone_name: str,
        *,
        num_classes: int = 21,
        pretrained_backbone: bool = False,
        trainable_backbone_layers: Optional[int] = None,
        backbone_kwargs: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> Segmenter:
    """UPerNet (https://arxiv.org/abs/1807.10221) of segmentation_models_pytorch on a timm backbone.

    Swin's and ViL's authors measure segmentation with it. Its decoder normalises each level over its channels, as
    `FeaturePyramid` does. In training it needs more than one image per batch, for BatchNorm after global pooling, or
    `decoder_use_norm='layernorm'`.

    Args:
        backbone_name: A timm model whose features have strides 4, 8, 16 and so on, or 2, 4, 8 and so on.
        num_classes: Classes, background included.
        pretrained_backbone: Load the backbone's weights.
        trainable_backbone_layers: Levels of the backbone that are trained, counted from its last; by default all
            without weights and up to 3 with them.
        backbone_kwargs: More arguments for `timm.create_model`, such as `drop_path_rate`.
        **kwargs: Arguments of `segmentation_models_pytorch.UPerNet`, such as `decoder_channels` (256).

    Raises:
        ImportError: segmentation_models_pytorch is not installed.
        ValueError: An argument is out of range, or asks for a classifier of whole images (`aux_params`).
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ImportError("UPerNet is segmentation_models_pytorch's: pip install 'timm-ls[clients]'") from error
    if kwargs.get('aux_params') is not None:
        raise ValueError('aux_params: a segmenter has no classifier of whole images; put one on the backbone yourself.')
    backbone_kwargs = backbone_kwargs or {}
    with torch.device('meta'):
        strides = feature_info(timm.create_model(backbone_name, features_only=True, **backbone_kwargs)).reduction()
    model = smp.UPerNet(
        f'tu-{backbone_name}',
        encoder_depth=strides[-1].bit_length() - 1,
        encoder_weights=True if pretrained_backbone else None,
        classes=num_classes,
        **kwargs,
        **backbone_kwargs,
    )
    if trainable_backbone_layers is None:
        trainable_backbone_layers = default_trainable_layers(model.encoder.model, pretrained_backbone)
    return Segmenter(model, trainable_backbone_layers)
