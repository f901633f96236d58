"""Long-short attention backbones for timm: importing this package registers the models."""
from importlib.metadata import version as _version

from .attention import GlobalAttention2d, LongShortAttention2d
from .checkpoint import load_checkpoint
from .cvt_ls import CvtLs, fuse_conv_bn
from .linear import linear_implementation
from .vil_ls import VilLs
from .warm_start import WarmStart, warm_start
from .window_attention import attention_implementation

__version__ = _version('timm-ls')

__all__ = [
    'CvtLs',
    'GlobalAttention2d',
    'LongShortAttention2d',
    'VilLs',
    'WarmStart',
    'attention_implementation',
    'fuse_conv_bn',
    'linear_implementation',
    'load_checkpoint',
    'warm_start',
]
