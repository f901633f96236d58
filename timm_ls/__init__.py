"""Long-short attention backbones for timm: importing this package registers the models."""
from importlib.metadata import version as _version

from . import sequence
from .adopt import Adopted, adopt
from .attention import (
    CausalLongShortAttention1d,
    FullAttention2d,
    GlobalAttention2d,
    LongShortAttention1d,
    LongShortAttention2d,
)
from .attention.explain import AttentionChoice, explain_attention
from .cvt_ls import CvtLs, fuse_conv_bn
from .linear import linear_implementation
from .ops.window_attention import attention_implementation
from .pretrained.checkpoint import load_checkpoint
from .pretrained.warm_start import WarmStart, warm_start
from .vil_ls import VilLs

__version__ = _version('timm-ls')

__all__ = [
    'Adopted',
    'AttentionChoice',
    'CausalLongShortAttention1d',
    'CvtLs',
    'FullAttention2d',
    'GlobalAttention2d',
    'LongShortAttention1d',
    'LongShortAttention2d',
    'VilLs',
    'WarmStart',
    'adopt',
    'attention_implementation',
    'explain_attention',
    'fuse_conv_bn',
    'linear_implementation',
    'load_checkpoint',
    'sequence',
    'warm_start',
]
