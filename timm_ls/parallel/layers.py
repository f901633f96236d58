"""Layers on bands of rows: each a mixin that a module's class is swapped for, its weights and names as they are.

A layer that looks at one token at a time needs none. The others ask the neighbors for rows, or all ranks for sums.
"""
from functools import partial
from typing import Any, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import checkpoint
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..attention.full import FullAttention, GridBias, attend_grid_rows
from ..attention.layers import check_tokens, split_tokens
from ..attention.long_short import LongShortAttention
from ..ops.autocast import cast_once, without_autocast
from ..ops.capture import ceil_div
from ..ops.chunks import equal_chunks
from ..ops.merge import SoftmaxSum, query_logits, softmax_sum, token_chunks, wide
from ..ops.merge import _PoolTokens as PoolTokens
from ..ops.window_attention import window_attention
from ..ops.windows import halo_width
from .bands import BandSize, Cuts, Spans, overlap, spans, strided_cuts
from .collectives import Bands, all_reduce_sum, exchange_rows

__all__ = [
    'BandBatchNorm',
    'BandConv2d',
    'BandDropPath',
    'BandDropout',
    'BandEmbed',
    'BandFullAttention',
    'BandLongShortAttention',
    'BandSubsample',
    'WindowHalo',
    'all_reduce_softmax',
    'band_max',
    'band_mean',
    'pool_bands',
]


class BandConv2d(nn.Conv2d):
    """A convolution, or a strided one that makes `ceil(n / stride)` rows of `n`, of a map on bands."""

    bands: Bands

    def forward(self, x: torch.Tensor, cuts: Optional[Cuts] = None) -> torch.Tensor:
        """Convolve a band [B, C, rows, W] of the map that `bands.cuts` divides.

        Args:
            x: The band; without `bands.cuts`, a map of its own.
            cuts: How to divide the result; by default, rows stay where their centers are.
        """
        if not self.bands.cuts:
            return super().forward(x)
        k, (s, sw) = self.kernel_size[0], self.stride
        p, pw = (int(side) for side in self.padding)  # never a name, see `check_module`
        have, height = self.bands.cuts, self.bands.cuts[-1]
        cuts = cuts or strided_cuts(have, s)
        need: List[Tuple[int, int]] = []
        for start, stop in spans(cuts):  # at least a row is computed, to keep the graph the same on all ranks
            need.append((start * s - p, (max(stop, start + 1) - 1) * s - p + k))
        start, stop = need[self.bands.rank]
        rows: Spans = tuple(overlap(span, (0, height)) for span in need)
        pad = (max(0, -start), max(0, stop - max(height, start)))
        if rows != spans(have) or pad != (0, 0):
            x = exchange_rows(x, self.bands, 2, spans(have), rows, pad)
        right = ceil_div(x.shape[3], sw) * sw - x.shape[3]
        if right > 0:
            x = F.pad(x, (0, right))
        x = F.conv2d(x, self.weight, self.bias, self.stride, (0, pw), self.dilation, self.groups)
        self.bands.cuts = cuts
        return x[:, :, :cuts[self.bands.rank + 1] - cuts[self.bands.rank]]


class BandEmbed(nn.Module):
    """A patch embedding of either family."""

    proj: BandConv2d
    norm: nn.Module

    def forward(self, x: torch.Tensor, cuts: Cuts) -> torch.Tensor:
        """From a band [B, C_in, rows, W] of the map that `bands.cuts` divides to [B, rows, W, C], divided by `cuts`."""
        return self.norm(self.proj(x, cuts).permute(0, 2, 3, 1))


class BandSubsample(LastLevelMaxPool):
    """Every second row and column, as torchvision's `LastLevelMaxPool` adds a level."""

    bands: Bands

    def forward(
            self,
            x: List[torch.Tensor],
            y: List[torch.Tensor],
            names: List[str],
    ) -> Tuple[List[torch.Tensor], List[str]]:
        """Add a level to bands of levels."""
        first = self.bands.cuts[self.bands.rank] % 2
        self.bands.cuts = strided_cuts(self.bands.cuts, 2)
        return [*x, x[-1][:, :, first::2, ::2]], [*names, 'pool']


class BandBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose batch is that of all ranks; torch's `SyncBatchNorm` takes no tensors on a CPU."""

    bands: Bands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize a band [B, C, rows, W]."""
        use_running = not self.training and self.running_mean is not None and self.running_var is not None
        if use_running:
            return super().forward(x)
        x_wide = wide(x.detach())
        axes = [0, 2, 3]
        count = x.new_full((1,), x.numel() // x.shape[1], dtype=x_wide.dtype)
        sums = self.bands.all_reduce(torch.cat([x_wide.sum(axes), count]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        var = self.bands.all_reduce((x_wide - mean[:, None, None]).square().sum(axes)) / count
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1. / self.num_batches_tracked if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = var * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, (var + self.eps).rsqrt(), count, self.bands)


class _Normalize(torch.autograd.Function):
    """BatchNorm by statistics of all ranks, which depend on the input in turn."""

    @staticmethod
    def forward(
            ctx: Any,
            x: torch.Tensor,
            weight: Optional[torch.Tensor],
            bias: Optional[torch.Tensor],
            mean: torch.Tensor,
            inverse_std: torch.Tensor,
            count: torch.Tensor,
            bands: Bands,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, inverse_std, count)
        ctx.bands = bands
        scale = inverse_std if weight is None else inverse_std * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        grad = wide(grad)
        normalized = (wide(x) - mean[:, None, None]) * inverse_std[:, None, None]
        grad_bias, grad_weight = grad.sum([0, 2, 3]), (grad * normalized).sum([0, 2, 3])
        means = ctx.bands.all_reduce(torch.stack([grad_bias, grad_weight])) / count
        scale = inverse_std if weight is None else inverse_std * weight
        grad_x = (grad - means[0][:, None, None] - normalized * means[1][:, None, None]) * scale[:, None, None]
        if weight is None:
            return grad_x.to(x.dtype), None, None, None, None, None, None
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None, None


# Random numbers: what is equal on all ranks must be dropped on all of them alike


class BandDropPath(DropPath):
    """Stochastic depth, for an image as a whole: the first rank draws for all."""

    bands: Bands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop images of tokens [B, ...]."""
        if not self.training or self.drop_prob == 0.:
            return x
        factors = super().forward(x.new_ones((x.shape[0],) + (1,) * (x.ndim - 1)))
        return x * self.bands.broadcast(factors)


class BandDropout(nn.Dropout):
    """Dropout of tokens, or of what a classifier sees: the first rank draws for what all ranks hold.

    Attributes:
        num_shared: Tokens, [B, num_shared + N, C], that all ranks hold; None for everything.
    """

    bands: Bands
    num_shared: Optional[int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop values of tokens [B, N, C], or of [B, C]."""
        if not self.training or self.p == 0. or self.num_shared == 0:
            return super().forward(x)
        shared, own = (x, x[:0]) if self.num_shared is None else split_tokens(x, self.num_shared)
        factors = F.dropout(torch.ones_like(shared, memory_format=torch.contiguous_format), self.p)
        shared = shared * self.bands.broadcast(factors)
        return shared if self.num_shared is None else torch.cat([shared, F.dropout(own, self.p)], dim=1)


# Sums over all tokens


def all_reduce_softmax(part: SoftmaxSum, bands: Bands) -> SoftmaxSum:
    """Return the sums over the tokens of all ranks, without a gradient."""
    maximum = bands.all_reduce(part.maximum, dist.ReduceOp.MAX)
    factor = (part.maximum - maximum).exp()
    total, weighted = part.total * factor, part.weighted * factor[..., None]
    sums = bands.all_reduce(torch.cat([total.flatten(), weighted.flatten()]))
    return SoftmaxSum(
        maximum, sums[:total.numel()].view(total.shape), sums[total.numel():].view(weighted.shape))


def pool_bands(logits: torch.Tensor, values: torch.Tensor, num_heads: int, bands: Bands) -> torch.Tensor:
    """Return `pool_tokens` of the tokens of all ranks."""
    with without_autocast(values):
        return _PoolBands.apply(logits, values, num_heads, bands)


class _PoolBands(torch.autograd.Function):
    """`pool_bands`, a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, values: torch.Tensor, num_heads: int, bands: Bands) -> torch.Tensor:
        sums: Optional[SoftmaxSum] = None
        for tokens in token_chunks(values):
            part = softmax_sum(logits[:, tokens], values[:, tokens], num_heads)
            sums = part if sums is None else sums.merge(part)
        assert sums is not None
        sums = all_reduce_softmax(sums, bands)
        out = sums.output()
        ctx.save_for_backward(logits, values, sums.log_sum_exp(), out)
        ctx.num_heads, ctx.bands = num_heads, bands
        return out.to(values.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        grads = PoolTokens.backward(ctx, ctx.bands.all_reduce(wide(grad_out)))
        return (*grads, None)


def band_mean(x: torch.Tensor, bands: Bands, dims: Tuple[int, ...]) -> torch.Tensor:
    """Return the mean of a band's values and those of all others, over some dimensions."""
    count = x.new_full((1,), 1., dtype=wide(x[:0]).dtype)
    for dim in dims:
        count = count * x.shape[dim]
    return (all_reduce_sum(wide(x).sum(dims), bands) / bands.all_reduce(count)).to(x.dtype)


def band_max(x: torch.Tensor, bands: Bands, dims: Tuple[int, ...]) -> torch.Tensor:
    """Return the largest of a band's values and those of all others; its gradient is divided as torch's `amax` does."""
    maximum = bands.all_reduce(x.amax(dims, keepdim=True), dist.ReduceOp.MAX)
    is_largest = (x == maximum).to(x.dtype)
    share = is_largest / bands.all_reduce(is_largest.sum(dims, keepdim=True))
    change = ((x - x.detach()) * share).sum(dims)  # zero, with the gradient of the maximum
    return maximum.squeeze(dims) + all_reduce_sum(change, bands)


# Attention


class WindowHalo:
    """The rows around a band that the windows of its queries see, and how they lie in memory.

    Args:
        cuts: How the map is divided.
        rank: Of the band.
        window_size: w.
    """

    def __init__(self, cuts: Cuts, rank: int, window_size: int):
        height, p = cuts[-1], halo_width(window_size)
        windows: List[Tuple[int, int]] = []  # rows of the windows that hold each rank's queries
        for start, stop in spans(cuts):
            first = start // window_size * window_size
            windows.append((first, min(height, ceil_div(stop, window_size) * window_size)))
        self.keys: Spans = tuple((max(0, first - p), min(height, last + p)) for first, last in windows)
        first, last = windows[rank]
        self.before, self.after = cuts[rank] - first, last - cuts[rank + 1]  # queries of others in its windows
        above = first - self.keys[rank][0]
        self.first_row = window_size if above > 0 else 0  # windows begin at multiples of w in memory as well
        self.pad = self.first_row - above  # rows of nothing, of which no window sees any
        self.top = self.first_row + self.before  # where the band begins in memory


class BandLongShortAttention(LongShortAttention):
    """Long-short attention: keys and values of `p` rows from the neighbors, landmarks and global tokens from all."""

    bands: Bands

    def attend(self, x: torch.Tensor, size: BandSize) -> torch.Tensor:  # type: ignore[override]
        """See `LongShortAttention.attend`; of a band, and where it lies."""
        check_tokens(x, size, self.num_global_tokens)
        B, (H, W), C, g = x.shape[0], size, self.dim, self.num_global_tokens
        self.bands.cuts = size.cuts
        x = cast_once(x)
        q, kv = self.project(x, size, g)
        global_q, map_q = split_tokens(q, g)
        global_kv, map_kv = split_tokens(kv, g)
        halo = WindowHalo(size.cuts, self.bands.rank, self.window_size)
        kv_rows = exchange_rows(
            map_kv.reshape(B, H, W, 2, C), self.bands, 1, spans(size.cuts), halo.keys, (halo.pad, 0))
        map_kv = kv_rows[:, halo.top:halo.top + H].flatten(1, 2)  # a view: training keeps one of them
        additional_kv = global_kv
        if self.rank > 0:
            landmarks = self.landmarks(split_tokens(self.dynamic_projection(x), g)[1], map_kv)
            additional_kv = torch.cat([landmarks, global_kv], dim=1)  # [B, r + g, 2, C]
        out = window_attention(
            pad_rows(map_q.reshape(B, H, W, C), halo.before, halo.after),
            kv_rows,
            additional_kv,
            self.window_bias(),
            self.window_size,
            self.num_heads,
            first_row=halo.first_row,
            dropout_p=self.attn_drop.p if self.training else 0.,
            fused=self.fused_attn,
        )
        out = out[:, halo.before:halo.before + H].reshape(B, H * W, C)
        if g > 0:
            out = torch.cat([self.attend_global(global_q, global_kv, map_kv, out), out], dim=1)
        return self.proj_drop(self.proj(out))

    def landmarks(self, logits: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """See `LongShortAttention.landmarks`."""
        return self.norm_landmarks(pool_bands(logits, kv, self.num_heads, self.bands))

    def attend_global(
            self,
            q: torch.Tensor,
            global_kv: torch.Tensor,
            map_kv: torch.Tensor,
            out: torch.Tensor,
    ) -> torch.Tensor:
        """See `LongShortAttention.attend_global`; the global tokens' own keys are the first rank's."""
        k, v = (out, out) if self.update_from_outputs else (map_kv[:, :, 0], map_kv[:, :, 1])
        if self.bands.rank == 0:
            k, v = torch.cat([global_kv[:, :, 0], k], dim=1), torch.cat([global_kv[:, :, 1], v], dim=1)
        return pool_bands(query_logits(q, k, self.num_heads), v[:, :, None], self.num_heads, self.bands)[:, :, 0]


def pad_rows(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Add rows of zeros to [B, H, W, C]."""
    return F.pad(x, (0, 0, 0, 0, before, after)) if before > 0 or after > 0 else x


class BandFullAttention(FullAttention):
    """Full attention: every rank gets all keys and values, and attends from its rows; quadratic, in memory as well."""

    bands: Bands

    def attend(self, x: torch.Tensor, size: BandSize) -> torch.Tensor:  # type: ignore[override]
        """See `FullAttention.attend`; of a band, and where it lies."""
        check_tokens(x, size, self.num_global_tokens)
        g, cuts = self.num_global_tokens, size.cuts
        self.bands.cuts = cuts
        q, k, v = self.project(x, size, g)
        k, v = gather_tokens(
            torch.stack([k, v], dim=2), g, strided_cuts(cuts, self.kv_stride), ceil_div(size[1], self.kv_stride),
            self.bands).unbind(2)
        whole = (cuts[-1], size[1])
        out = attend_rows(self, q, k, v, self.biases(whole), whole, cuts[self.bands.rank], g)
        return self.proj_drop(self.proj(out))


def gather_tokens(x: torch.Tensor, num_global_tokens: int, cuts: Cuts, width: int, bands: Bands) -> torch.Tensor:
    """Return global tokens and a whole map, [B, g + H * width, ...], of those and the bands of a map."""
    global_tokens, tokens = split_tokens(x, num_global_tokens)
    rows = cuts[bands.rank + 1] - cuts[bands.rank]
    tokens = tokens.reshape(tokens.shape[0], rows, width, *tokens.shape[2:])
    tokens = exchange_rows(tokens, bands, 1, spans(cuts), ((0, cuts[-1]),) * bands.ranks).flatten(1, 2)
    return tokens if num_global_tokens == 0 else torch.cat([global_tokens, tokens], dim=1)


def attend_rows(
        attn: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        parts: Optional[GridBias],
        size: Tuple[int, int],
        first_row: int,
        num_global: int,
) -> torch.Tensor:
    """Return full attention of global tokens and some rows, [B, g + rows * W, C], a few rows of bias at a time.

    Args:
        attn: The layer.
        q: Queries of the global tokens and rows.
        k: Keys of the global tokens and the whole map.
        v: Values of the same.
        parts: What the bias is made from.
        size: Rows and columns of the whole map.
        first_row: First of the rows.
        num_global: Global tokens g among the queries: all or none, but all with the first row of the map.
    """
    g, W = num_global, size[1]
    num_rows = (q.shape[1] - g) // W
    most = num_rows
    if parts is not None:
        most = attn.bias_bytes // max(1, attn.num_heads * W * k.shape[1] * k.element_size())
    attend = partial(
        attend_grid_rows, kv_stride=attn.kv_stride, num_heads=attn.num_heads,
        dropout_p=attn.attn_drop.p if attn.training else 0., fused=attn.fused_attn)
    outs: List[torch.Tensor] = []
    if first_row > 0 and g > 0:  # they go with the first row, which is not here
        outs.append(attend(q[:, :g], k, v, parts, size, 0, 0))
    chunks = equal_chunks(num_rows, most)
    for rows in chunks:
        start = first_row + rows.start
        queries = q[:, g + rows.start * W if start > 0 else 0:g + rows.stop * W]
        args = (queries, k, v, parts, size, start, rows.stop - rows.start)
        in_parts = len(chunks) > 1 and torch.is_grad_enabled()
        outs.append(checkpoint(attend, *args) if in_parts else attend(*args))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
