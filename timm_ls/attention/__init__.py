"""Attention layers: the mathematics, readable from top to bottom. How it is computed is in `timm_ls.ops`."""
from .full import FullAttention, FullAttention2d, GlobalAttention2d
from .long_short import LongShortAttention, LongShortAttention2d
from .sequence import CausalLongShortAttention1d, LongShortAttention1d

__all__ = [
    'CausalLongShortAttention1d',
    'FullAttention',
    'FullAttention2d',
    'GlobalAttention2d',
    'LongShortAttention',
    'LongShortAttention1d',
    'LongShortAttention2d',
]
