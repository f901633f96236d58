"""Attention layers: the mathematics, readable from top to bottom. How it is computed is in `timm_ls.ops`."""
from .full import FullAttention, FullAttention2d, GlobalAttention2d
from .long_short import LongShortAttention, LongShortAttention2d

__all__ = ['FullAttention', 'FullAttention2d', 'GlobalAttention2d', 'LongShortAttention', 'LongShortAttention2d']
