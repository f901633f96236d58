"""Long-short attention over sequences, bidirectional and causal: linear in the number of tokens.

Zhu et al., "Long-Short Transformer: Efficient Transformers for Language and Vision", NeurIPS 2021, arXiv 2107.02192.
Both layers cut a sequence into blocks of queries, and each block attends, in one softmax, to a fixed number of keys.
"""
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import use_fused_attn

from ..ops.attend import attend_heads
from ..ops.autocast import cast_once
from ..ops.blocks import first_tokens, gather_windows, in_chunks, join_blocks, num_blocks, skew, split_blocks
from ..ops.capture import ceil_div, is_captured
from ..ops.merge import pool_tokens, query_logits
from .layers import LayerNorm, check_global_tokens, check_heads

__all__ = ['CausalCache', 'CausalLongShortAttention1d', 'LongShortAttention1d']

MIN_BLOCK = 32  # queries to attend at once, at least: products of fewer are slow


class SequenceAttention(nn.Module):
    """What both layers consist of; see them for the arguments."""

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int,
            rank: int,
            num_global_tokens: int,
            qkv_bias: bool,
            attn_drop: float,
            proj_drop: float,
            dd: Any,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        if window_size < 1 or rank < 0 or num_global_tokens < 0:
            raise ValueError(
                f'window_size={window_size}, rank={rank}, num_global_tokens={num_global_tokens}:'
                ' expected window_size >= 1, rank >= 0 and num_global_tokens >= 0.')
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.window_size = window_size
        self.rank = rank
        self.num_global_tokens = num_global_tokens
        self.fused_attn = use_fused_attn()

        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **dd)
        self.norm_kv = LayerNorm(dim, keep_type=True, **dd)
        self.dynamic_projection = nn.Linear(dim, num_heads * rank, **dd) if rank > 0 else nn.Identity()
        has_norm = rank + num_global_tokens > 0
        self.norm_landmarks = LayerNorm(dim, keep_type=True, **dd) if has_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def check_tokens(self, x: torch.Tensor) -> None:
        """Raise a ValueError unless `x` is [B, N, C] with at least one token."""
        if not is_captured() and (x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != self.dim):
            raise ValueError(f'Expected tokens as [batch, length, {self.dim}], length >= 1; got {list(x.shape)}.')

    def project(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return queries, [B, ..., C], and keys and values, [B, ..., 2, C], of tokens [B, ..., C]."""
        q, kv = self.qkv(x).split([self.dim, 2 * self.dim], dim=-1)
        return q, kv.unflatten(-1, (2, self.dim))

    def attend(self, q: torch.Tensor, kv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Attend from blocks of queries, each to keys of its own.

        Args:
            q: Queries, [blocks, L, C], not yet scaled.
            kv: Keys and values, [blocks, S, 2, C].
            bias: Added to the scaled logits, [blocks, h or 1, L, S].

        Returns:
            [blocks, L, C].
        """
        k, v = kv.unbind(2)
        dropout_p = self.attn_drop.p if self.training else 0.
        return attend_heads(q, k, v, bias, self.num_heads, dropout_p, self.fused_attn)


class LongShortAttention1d(SequenceAttention):
    r"""Bidirectional long-short attention over a sequence: one softmax over a window and a few landmarks.

    With the symbols of the paper (sections 3.1 to 3.3): segment or window `w`, projection rank `r`, heads `h` of
    `d = C / h` channels, `X` the tokens of a sequence that the mask leaves and `g` global tokens (class tokens):

        Q, K, V  =  X W_Q, X W_K, X W_V                        qkv; of the global tokens likewise
        K, V     <- LN_full(K), LN_full(V)                     norm_kv; DualLN, eq. 8; not of the global tokens
        P        =  softmax_tokens(X W_P),  N x r per head     dynamic_projection, eq. 4
        K', V'   =  LN_dp([P^T K; K_g]), LN_dp([P^T V; V_g])   norm_landmarks; r landmarks per head, global tokens
        O_t      =  softmax(Q_t [K'; K_halo(t)]^T / sqrt(d)) [V'; V_halo(t)]
        O_g      =  softmax(Q_g [K_g; O]^T / sqrt(d)) [V_g; O]
        Y        =  [O_g; O] W_O                               proj

    `halo(t)` are the keys of the window of token `t` and `max(w // 2, 1)` on either side of it. Nothing outside the
    sequence or behind the mask is ever attended, and its values, NaN included, change nothing. There is no position
    term: embed positions in the tokens. Time and memory grow linearly with the number of tokens.

    Equal to the authors' `lra/attention_transformer_ls.py` without its convolution, where that is defined: `w` divides
    the length there, there is at most one global token, and every sequence has a token that counts. Here the last
    window may be shorter, global tokens also attend to each other, and in a sequence without any token that counts
    they attend to themselves only.

    Args:
        dim: Channels C.
        num_heads: Attention heads h.
        window_size: Window w, in tokens.
        rank: Landmarks per head r; 0 leaves long-range attention out.
        num_global_tokens: Global tokens g that each call brings.
        qkv_bias: Learn a bias for queries, keys and values.
        attn_drop: Dropout probability of attention weights of the sequence's tokens; the authors drop none of the
            global tokens'.
        proj_drop: Dropout probability of the output.
        device: Where to create parameters.
        dtype: Their type.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int,
            rank: int,
            num_global_tokens: int = 0,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(
            dim, num_heads, window_size, rank, num_global_tokens, qkv_bias, attn_drop, proj_drop,
            {'device': device, 'dtype': dtype})
        # whole windows, so many that copying the additional keys to each block costs no more than the queries
        self.block_size = ceil_div(max(MIN_BLOCK, rank + num_global_tokens), window_size) * window_size

    def forward(
            self,
            x: torch.Tensor,
            mask: Optional[torch.Tensor] = None,
            global_tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Attend over a sequence.

        Args:
            x: Tokens, [B, N, C], N >= 1.
            mask: True where a token counts, [B, N]; None if all do. What `x` holds elsewhere has no effect.
            global_tokens: [B, num_global_tokens, C]; None if there are none.

        Returns:
            The updated tokens and global tokens, of the same shapes. Where the mask is False, tokens are the bias of
            the output projection.

        Raises:
            ValueError: A shape is not as above, or the mask is not of booleans.
        """
        self.check_tokens(x)
        check_global_tokens(global_tokens, self.num_global_tokens)
        if mask is None:
            mask = torch.ones(x.shape[:2], device=x.device, dtype=torch.bool)
        elif mask.dtype != torch.bool or not is_captured() and mask.shape != x.shape[:2]:
            raise ValueError(
                f'Expected a mask of booleans, {list(x.shape[:2])}, True where a token counts;'
                f' got {mask.dtype}, {list(mask.shape)}.')
        N = x.shape[1]
        pad = num_blocks(N, self.block_size) * self.block_size - N
        x, mask = F.pad(cast_once(x), (0, 0, 0, pad)), F.pad(mask, (0, pad))
        x = x.masked_fill(~mask[..., None], 0.)  # neither a value nor a gradient passes, not even as 0 * NaN
        q, kv = self.project(x)
        kv = self.norm_kv(kv)

        additional_kv = kv[:, :0]  # [B, E, 2, C]
        if self.rank > 0:
            additional_kv = pool_tokens(hide(self.dynamic_projection(x), mask), kv, self.num_heads)
        if global_tokens is not None:
            global_q, global_kv = self.project(cast_once(global_tokens))
            additional_kv = torch.cat([additional_kv, global_kv], dim=1)

        out = self.attend_windows(q, kv, self.norm_landmarks(additional_kv), mask).masked_fill(~mask[..., None], 0.)
        y = self.proj_drop(self.proj(first_tokens(out, N)))
        if global_tokens is None:
            return y, None
        return y, self.proj_drop(self.proj(self.attend_global(global_q, global_kv, out, mask)))

    def attend_windows(
            self,
            q: torch.Tensor,
            kv: torch.Tensor,
            additional_kv: torch.Tensor,
            mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from every token of n whole blocks of b tokens to its window's halo and to additional keys.

        Args:
            q: Queries, [B, n * b, C].
            kv: Keys and values, [B, n * b, 2, C].
            additional_kv: Keys and values that all queries of a sequence see, [B, E, 2, C].
            mask: True where a key may be attended, [B, n * b].

        Returns:
            [B, n * b, C]; finite, but of no meaning where the mask is False.
        """
        B, E, w, b = q.shape[0], additional_kv.shape[1], self.window_size, self.block_size
        halo = max(w // 2, 1)
        K = b + 2 * halo  # tokens that a block sees
        kv, mask = F.pad(kv, (0, 0, 0, 0, halo, halo)), F.pad(mask, (halo, halo))
        first, token = torch.arange(b, device=q.device)[:, None] // w * w, torch.arange(K, device=q.device)
        near = (first <= token) & (token < first + w + 2 * halo)  # [b, K]

        def attend_blocks(n: int, q: torch.Tensor, kv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            additional = additional_kv[:, None].expand(-1, n, -1, -1, -1).flatten(0, 1)
            kv = torch.cat([additional, gather_windows(kv, K, b, n)], dim=1)  # [B * n, E + K, 2, C]
            seen = F.pad(gather_windows(mask, K, b, n)[:, None] & near, (E, 0), value=True)  # [B * n, b, E + K]
            seen = seen | ~seen.any(dim=2, keepdim=True)  # a query without a key does not count, but must not be NaN
            bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, float('-inf'))
            return join_blocks(self.attend(split_blocks(q, b), kv, bias[:, None]), B)

        block_bytes = B * (E + K) * (2 * self.dim + self.num_heads * b) * q.element_size()
        return in_chunks(
            attend_blocks, q.shape[1] // b, block_bytes, (q, b, 0), (kv, b, 2 * halo), (mask, b, 2 * halo))

    def attend_global(
            self,
            q: torch.Tensor,
            kv: torch.Tensor,
            out: torch.Tensor,
            mask: torch.Tensor,
    ) -> torch.Tensor:
        """Return what the global tokens attend to, themselves and the outputs of the sequence's tokens, [B, g, C].

        Args:
            q: Their queries, [B, g, C].
            kv: Their keys and values, [B, g, 2, C].
            out: Outputs of the tokens, [B, N, C].
            mask: True where an output may be attended, [B, N].
        """
        keys, values = (torch.cat([own, out], dim=1) for own in kv.unbind(2))
        logits = hide(query_logits(q, keys, self.num_heads), F.pad(mask, (self.num_global_tokens, 0), value=True))
        return pool_tokens(logits, values[:, :, None], self.num_heads)[:, :, 0]


def hide(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Give logits [B, N, ...] of tokens that do not count, by the mask [B, N], no weight in a softmax over tokens.

    Not by minus infinity: a softmax over such tokens alone is to be finite.
    """
    return logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)


class CausalCache(NamedTuple):
    """What a layer keeps of the tokens so far, to attend from the next one: w + c tokens and the landmarks at most."""

    window: torch.Tensor  # keys and values of the last w - 1 tokens, normalized; [B, <w, 2, C]
    landmarks: torch.Tensor  # keys and values of the last `max_segments` finished segments; [B, L, 2, C]
    segment: torch.Tensor  # tokens of the unfinished segment; [B, <c, C]
    window_terms: torch.Tensor  # projected distances w - 1 to 0, in tokens; [w, h, d]
    landmark_terms: torch.Tensor  # projected distances L - 1 to 0, in landmarks; [L, h, d]


class CausalLongShortAttention1d(SequenceAttention):
    r"""Causal long-short attention: one softmax over the last tokens and the landmarks of finished segments.

    With the symbols of the paper (sections 3.2 and 3.3): window `w`, segments of `c` tokens with `r` landmarks each,
    heads `h` of `d = C / h` channels, `X` the tokens, the `s`-th segment of which is `X_s`:

        Q, K, V    =  X W_Q, X W_K, X W_V                            qkv
        P_s        =  softmax_tokens(X_s W_P),  c x r per head       dynamic_projection, eq. 5
        K'_s, V'_s =  LN_dp(P_s^T K_s), LN_dp(P_s^T V_s)             norm_landmarks
        K, V       <- LN_win(K), LN_win(V)                           norm_kv; DualLN
        a_ti       =  (Q_t / sqrt(d) + u) K_i + (Q_t / sqrt(d) + b) R_w(t - i)     t - w < i <= t
        a'_tj      =  Q_t / sqrt(d) (K'_j + R_c(j_t - 1 - j))        landmarks j of the segments before that of t
        O_t        =  softmax([a'_t; a_t]) [V'; V]
        Y          =  O W_O                                          proj

    `R_w = S W_R` (window_position) and `R_c = S W_C` (segment_position) are projections of sinusoids `S` of a distance
    in tokens and in landmarks, the latest landmark that `t` may see (number `j_t - 1`) being at distance 0; `u` is
    content_bias, `b` position_bias.

    A memory `M` are tokens before `X`, in whole segments, as hidden states of an earlier call. They are attended like
    earlier tokens, except that their landmarks are distilled from hidden states and projected then:
    `K'_s = LN_dp((P_s^T M_s) W_K)`, where head i of `P_s` weighs the i-th `d` channels of `M_s`. With one head the two
    are the same.

    Equal to the authors' `autoregressive/model_lib/layer.py` where that is defined: there, memory has at least `w`
    tokens, `c` divides the length, and so does `w` unless the sequence is shorter. Here any length will do, and no
    memory, of which nothing is attended then.

    A query sees the landmarks of all earlier segments unless `max_segments` limits them: with a limit, time and
    memory are linear in the length, and generating a token costs the same at any position. Without, as in the authors'
    code, which bounds the length of a call and of the memory instead, they grow with the number of segments as well.

    Args:
        dim: Channels C, an even number.
        num_heads: Attention heads h.
        window_size: Tokens w that a query sees, itself included.
        segment_size: Tokens c of a segment.
        rank: Landmarks per head and segment r; 0 leaves the window alone.
        max_segments: Finished segments that a query sees, the last ones before its own; None for all.
        qkv_bias: Learn a bias for queries, keys and values.
        attn_drop: Dropout probability of attention weights.
        proj_drop: Dropout probability of the output.
        device: Where to create parameters.
        dtype: Their type.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int,
            window_size: int,
            segment_size: int,
            rank: int,
            max_segments: Optional[int] = None,
            qkv_bias: bool = True,
            attn_drop: float = 0.,
            proj_drop: float = 0.,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        dd: Any = {'device': device, 'dtype': dtype}
        super().__init__(dim, num_heads, window_size, rank, 0, qkv_bias, attn_drop, proj_drop, dd)
        if dim % 2 != 0:
            raise ValueError(f'dim={dim}: expected an even number, as positions are pairs of a sine and a cosine.')
        if segment_size < 1 or max_segments is not None and max_segments < 1:
            raise ValueError(
                f'segment_size={segment_size}, max_segments={max_segments}: expected 1 or more, or max_segments=None.')
        self.segment_size = segment_size
        self.max_segments = max_segments
        self.block_segments = ceil_div(max(MIN_BLOCK, window_size), segment_size)  # segments of a block of queries

        self.window_position = nn.Linear(dim, dim, bias=False, **dd)
        self.content_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim, **dd))
        self.position_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim, **dd))
        if rank > 0:
            self.segment_position = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor, memory: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Attend over a sequence.

        Args:
            x: Tokens, [B, N, C], N >= 1.
            memory: Hidden states of the tokens before `x`, [B, M, C], in whole segments: c divides M.

        Returns:
            The updated tokens, [B, N, C].

        Raises:
            ValueError: A shape is not as above.
        """
        return first_tokens(self.attend_sequence(*self.keys(x, memory)), x.shape[1])

    def prefill(
            self,
            x: torch.Tensor,
            memory: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, CausalCache]:
        """Return `forward(x, memory)` and what `step` needs to continue from there."""
        N, c = x.shape[1], self.segment_size
        q, window, landmarks = self.keys(x, memory)
        out = self.attend_sequence(q, window, landmarks)[:, :N]
        end = window.shape[1] - q.shape[1] + N
        finished = landmarks.shape[1] - q.shape[1] // c + N // c
        first = 0 if self.max_segments is None else max(finished - self.max_segments, 0)
        landmarks = landmarks[:, first:finished].flatten(1, 2).clone()  # not a view, which would keep all the rest
        return out, CausalCache(
            window=window[:, max(end - self.window_size + 1, 0):end].clone(),
            landmarks=landmarks,
            segment=x[:, N // c * c:].clone(),
            window_terms=self.window_terms(x),
            landmark_terms=self.landmark_terms(x, 0, landmarks.shape[1]))

    def step(self, x: torch.Tensor, cache: CausalCache) -> Tuple[torch.Tensor, CausalCache]:
        """Attend from one more token.

        Args:
            x: The token, [B, 1, C].
            cache: What `prefill`, or the last step, returned; it stays as it is.

        Returns:
            The updated token, [B, 1, C], and the cache for the next one. Outputs are those of `forward` over all
            tokens at once.

        Raises:
            ValueError: There is not exactly one token.
        """
        if x.shape[1:] != (1, self.dim):
            raise ValueError(f'Expected one token, [batch, 1, {self.dim}]; got {list(x.shape)}.')
        window, landmarks, segment, window_terms, landmark_terms = cache
        q, kv = self.project(x)
        window = torch.cat([window, self.norm_kv(kv)], dim=1)
        kv = torch.cat([landmarks, window], dim=1)
        valid = torch.ones(kv.shape[:2], device=x.device, dtype=torch.bool)
        near = window_terms[self.window_size - window.shape[1]:]
        bias = self.position_logits(q, window, near, landmark_terms, 1, valid)
        out = self.proj_drop(self.proj(self.attend(q, kv, bias)))

        segment = torch.cat([segment, x], dim=1)
        if segment.shape[1] == self.segment_size:
            new = self.norm_landmarks(self.distill(segment, self.project(segment)[1]))
            landmarks = torch.cat([landmarks, new.flatten(1, 2)], dim=1)
            segment = segment[:, :0]
            if self.max_segments is not None:
                landmarks = landmarks[:, max(landmarks.shape[1] - self.max_segments * self.rank, 0):]
            farther = self.landmark_terms(x, landmark_terms.shape[0], landmarks.shape[1])
            landmark_terms = torch.cat([farther, landmark_terms])
        window = window[:, max(window.shape[1] - self.window_size + 1, 0):]
        return out, CausalCache(window, landmarks, segment, window_terms, landmark_terms)

    def keys(
            self,
            x: torch.Tensor,
            memory: Optional[torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project a sequence and its memory (see `forward`), zeros after it, up to n whole blocks of b tokens.

        Returns:
            Queries of the sequence, [B, n * b, C]; keys and values of the last w - 1 tokens of the memory, at most, and
            of the sequence, [B, <w + n * b, 2, C]; those of the landmarks of all segments, [B, J, r, 2, C].
        """
        self.check_tokens(x)
        (B, N), c, b = x.shape[:2], self.segment_size, self.block_segments * self.segment_size
        x = F.pad(cast_once(x), (0, 0, 0, num_blocks(N, b) * b - N))
        q, kv = self.project(x)
        landmarks = self.distill(x, kv)
        if memory is not None:
            M = memory.shape[1]
            if not is_captured() and (memory.shape != (B, M, self.dim) or M % c != 0):
                raise ValueError(
                    f'Expected memory as [{B}, M, {self.dim}], M a multiple of segment_size={c};'
                    f' got {list(memory.shape)}.')
            memory = cast_once(memory)
            past = self.project(memory[:, max(M - self.window_size + 1, 0):])[1]
            kv = torch.cat([past, kv], dim=1)
            hidden = self.distill(memory, memory[:, :, None])[:, :, :, 0]  # [B, J, r, C]
            landmarks = torch.cat([self.project(hidden)[1], landmarks], dim=1)
        return q, self.norm_kv(kv), self.norm_landmarks(landmarks)

    def distill(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Sum values over each segment, with weights that the dynamic projection gives.

        Args:
            x: Tokens of whole segments, [B, J * c, C].
            values: P values per token, [B, J * c, P, C].

        Returns:
            [B, J, r, P, C].
        """
        B, c = x.shape[0], self.segment_size
        values = values.flatten(0, 1).unflatten(0, (-1, c))  # [B * J, c, P, C]
        if self.rank == 0:
            return values[:, :0].unflatten(0, (B, -1))
        logits = self.dynamic_projection(x).flatten(0, 1).unflatten(0, (-1, c))
        return pool_tokens(logits, values, self.num_heads).unflatten(0, (B, -1))

    def attend_sequence(self, q: torch.Tensor, window: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        """Attend from every token to its window and to the landmarks of segments before its own; see `keys`."""
        (B, N), w, r, s = q.shape[:2], self.window_size, self.rank, self.block_segments
        b = s * self.segment_size
        K = w - 1 + b  # tokens that a block sees
        S = landmarks.shape[1]  # segments that a query sees, at most
        if self.max_segments is not None:
            S = self.max_segments if is_captured() else min(S, self.max_segments)
        T = S + s - 1  # segments that a block sees
        before = landmarks.shape[1] - N // self.segment_size  # segments of the memory

        # each block is to find K tokens and T segments
        window, window_mask = pad_start(window, w - 1 - (window.shape[1] - N))
        landmarks, segment_mask = pad_start(landmarks[:, max(before - S, 0):], max(S - before, 0))
        window_terms, landmark_terms = self.window_terms(q), self.landmark_terms(q, 0, S * r)

        def attend_blocks(
                n: int,
                q: torch.Tensor,
                window: torch.Tensor,
                window_mask: torch.Tensor,
                landmarks: torch.Tensor,
                segment_mask: torch.Tensor,
        ) -> torch.Tensor:
            q = split_blocks(q, b)  # [B * n, b, C]
            window = gather_windows(window, K, b, n)  # [B * n, K, 2, C]
            landmarks = gather_windows(landmarks, T, s, n).flatten(1, 2)  # [B * n, T * r, 2, C]
            segment_mask = gather_windows(segment_mask, T, s, n)[..., None].expand(-1, -1, r).flatten(1)
            valid = torch.cat([segment_mask, gather_windows(window_mask, K, b, n)], dim=1)
            bias = self.position_logits(q, window, window_terms, landmark_terms, s, valid)
            return join_blocks(self.attend(q, torch.cat([landmarks, window], dim=1), bias), B)

        block_bytes = 4 * B * b * self.num_heads * (T * r + K) * q.element_size()
        out = in_chunks(
            attend_blocks, N // b, block_bytes, (q, b, 0), (window, b, w - 1), (window_mask, b, w - 1),
            (landmarks, s, S - 1), (segment_mask, s, S - 1))
        return self.proj_drop(self.proj(out))

    def position_logits(
            self,
            q: torch.Tensor,
            window: torch.Tensor,
            window_terms: torch.Tensor,
            landmark_terms: torch.Tensor,
            segments: int,
            valid: torch.Tensor,
    ) -> torch.Tensor:
        """Return all terms of the logits but the product of query and key.

        Args:
            q: Queries, [blocks, L, C], not yet scaled.
            window: Keys and values of the tokens that they see, [blocks, w - 1 + L, 2, C].
            window_terms: See `window_terms`, [w, h, d].
            landmark_terms: See `landmark_terms`, [S * r, h, d].
            segments: Segments s of a block, which share its queries evenly.
            valid: True where there are landmarks and tokens, [blocks, (S + s - 1) * r + w - 1 + L].

        Returns:
            [blocks, h, L, (S + s - 1) * r + w - 1 + L], landmarks first. Query i sees w tokens from the i-th on, and S
            segments from its own segment's number in the block on; minus infinity elsewhere.
        """
        heads = (self.num_heads, self.head_dim)
        scaled = (q * self.head_dim ** -0.5).unflatten(2, heads)  # [blocks, L, h, d]
        near = skew(torch.einsum('blhd,whd->bhlw', scaled + self.position_bias, window_terms), 1)
        far = torch.einsum('blhd,jhd->bhlj', scaled, landmark_terms).unflatten(2, (segments, -1))
        far = skew(far.transpose(2, 3), self.rank).transpose(2, 3).flatten(2, 3)
        content = torch.einsum('bkhd,hd->bhk', window[:, :, 0].unflatten(2, heads), self.content_bias)
        content = F.pad(content, (far.shape[3], 0)).masked_fill(~valid[:, None], float('-inf'))
        return (torch.cat([far, near], dim=3) + content[:, :, None]).to(q.dtype)

    def window_terms(self, x: torch.Tensor) -> torch.Tensor:
        """Project the distances of a window's tokens, w - 1 to 0, to [w, h, d], in the type and place of `x`."""
        return self.window_position(self.distances(x, 0, self.window_size)).unflatten(1, (self.num_heads, -1))

    def landmark_terms(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Project the distances of landmarks, stop - 1 to start, to [stop - start, h, d]."""
        if self.rank == 0:
            return x.new_empty(0, self.num_heads, self.head_dim)
        return self.segment_position(self.distances(x, start, stop)).unflatten(1, (self.num_heads, -1))

    def distances(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Encode distances from stop - 1 down to start, [stop - start, C]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return sinusoids(torch.arange(start, stop, device=x.device, dtype=dtype).flip(0), self.dim).to(x.dtype)


def pad_start(x: torch.Tensor, count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Put zeros before tokens [B, N, ...]; return as well which tokens are none of them, [B, count + N]."""
    mask = torch.ones(x.shape[:2], device=x.device, dtype=torch.bool)
    return F.pad(x, (0, 0) * (x.ndim - 2) + (count, 0)), F.pad(mask, (count, 0))


def sinusoids(positions: torch.Tensor, dim: int) -> torch.Tensor:
    """Encode positions [n] as [n, dim]: sines, then cosines, of wavelengths from 2 pi to 10,000 times 2 pi."""
    frequencies = 10000 ** (torch.arange(0, dim, 2, device=positions.device, dtype=positions.dtype) / -dim)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
