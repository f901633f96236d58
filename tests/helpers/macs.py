"""What a model costs, worked out from its sizes."""
import math

from reference import window_keys

from timm_ls.attention import LongShortAttention


def macs_by_hand(model, side, whole_windows=False):
    """Multiply-adds of a square image: of convolutions, linear layers, and attention to keys inside the image.

    With `whole_windows`, of queries and keys outside as well, as in the authors' code.
    """
    total = 0
    for stage, info in zip(model.stages, model.feature_info, strict=True):
        rows, dim, g = -(-side // info['reduction']), info['num_chs'], stage.num_global_tokens
        total += rows ** 2 * stage.embed.proj.weight.numel()
        tokens = rows ** 2 + g
        for block in stage.blocks:
            total += 12 * tokens * dim ** 2  # projections of queries, keys, values and outputs, and the MLP
            if hasattr(block.attn, 'conv_qkv'):
                total += rows ** 2 * 3 * dim * 9
            if not isinstance(block.attn, LongShortAttention):
                total += 2 * tokens ** 2 * dim
                continue
            w, r, h = block.attn.window_size, block.attn.rank, block.attn.num_heads
            if whole_windows:
                queries = (math.ceil(rows / w) * w) ** 2
                pairs = queries * (w + 2 * (w // 2)) ** 2
            else:
                queries = rows ** 2
                pairs = sum(
                    len(window_keys(y, x, rows, rows, w)) * min(w, rows - y) * min(w, rows - x)
                    for y in range(0, rows, w) for x in range(0, rows, w))
            total += tokens * dim * h * r + 2 * rows ** 2 * dim * r  # the dynamic projection and what it makes
            total += 2 * (pairs + queries * (r + g)) * dim + 2 * g * tokens * dim
    return total + model.num_features * model.num_classes
