"""The first name of `timm_ls.fpn`, kept for those who import it."""
from .fpn import FeaturePyramid, timm_fpn_backbone

__all__ = ['FeaturePyramid', 'timm_fpn_backbone']
