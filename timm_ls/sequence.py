"""Models of sequences from long-short attention: an encoder, a causal language model, the authors' parameter names.

Of the shapes in Zhu et al., "Long-Short Transformer", NeurIPS 2021, sections 4.1 (Long Range Arena) and 4.2 (enwik8).
"""
import re
from typing import Any, Dict, List, Optional, Tuple, Union, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp

from .attention.layers import LayerNorm
from .attention.sequence import CausalCache, CausalLongShortAttention1d, LongShortAttention1d
from .ops.capture import is_captured
from .pretrained.checkpoint import unwrap_state_dict

__all__ = ['CausalBlock', 'CausalLanguageModel', 'EncoderBlock', 'SequenceEncoder', 'convert_released']


class Block(nn.Module):
    """Attention and an MLP with GELU, and a norm for each.

    Args:
        attn: The attention layer; any other with its `forward` may take its place later.
        mlp_ratio: Channels inside the MLP, as a multiple of the layer's.
        drop: Dropout probability inside the MLP and of what it adds.
    """

    def __init__(self, attn: Union[LongShortAttention1d, CausalLongShortAttention1d], mlp_ratio: float, drop: float):
        super().__init__()
        self.norm1 = LayerNorm(attn.dim)
        self.attn = attn
        self.norm2 = LayerNorm(attn.dim)
        self.mlp = Mlp(attn.dim, int(attn.dim * mlp_ratio), drop=drop)


class EncoderBlock(Block):
    """Pre-norm block of an encoder; global tokens go through the same layers."""

    attn: LongShortAttention1d

    def forward(
            self,
            x: torch.Tensor,
            mask: Optional[torch.Tensor] = None,
            global_tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Update tokens and global tokens; see `LongShortAttention1d.forward`. Behind the mask, too, `x` is finite."""
        dx, dg = self.attn(self.norm1(x), mask, None if global_tokens is None else self.norm1(global_tokens))
        x = x + dx
        x = x + self.mlp(self.norm2(x))
        if global_tokens is not None:
            global_tokens = global_tokens + dg
            global_tokens = global_tokens + self.mlp(self.norm2(global_tokens))
        return x, global_tokens


class SequenceEncoder(nn.Module):
    """Encoder of token numbers with learned positions; the defaults are the paper's for Long Range Arena.

    Args:
        vocab_size: Token numbers are below this.
        max_length: Positions that are learned, and so the longest sequence.
        dim: Channels.
        depth: Blocks.
        num_heads: Attention heads.
        window_size: Window of the attention, in tokens.
        rank: Landmarks per head.
        num_global_tokens: Learned tokens that the sequence is summarized in; a classifier takes the first.
        mlp_ratio: Channels inside the MLP, as a multiple of `dim`.
        drop: Dropout probability of embeddings, of what blocks add, and inside the MLP.
        attn_drop: Dropout probability of attention weights.
    """

    def __init__(
            self,
            vocab_size: int,
            max_length: int,
            dim: int = 64,
            depth: int = 2,
            num_heads: int = 2,
            window_size: int = 8,
            rank: int = 32,
            num_global_tokens: int = 1,
            mlp_ratio: float = 2.,
            drop: float = 0.,
            attn_drop: float = 0.,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.pos_embed = nn.Parameter(torch.empty(max_length, dim))
        self.global_tokens = nn.Parameter(torch.empty(1, num_global_tokens, dim)) if num_global_tokens > 0 else None
        self.drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                LongShortAttention1d(
                    dim, num_heads, window_size, rank, num_global_tokens, attn_drop=attn_drop, proj_drop=drop),
                mlp_ratio, drop)
            for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw embeddings with a standard deviation of 0.02, and all else as torch does."""
        for module in self.blocks.modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        self.norm.reset_parameters()
        for parameter in (self.embed.weight, self.pos_embed, self.global_tokens):
            if parameter is not None:
                nn.init.normal_(parameter, std=.02)

    def forward(
            self,
            tokens: torch.Tensor,
            mask: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Encode sequences.

        Args:
            tokens: Token numbers, [B, N].
            mask: True where a token counts, [B, N]; None if all do. The numbers elsewhere may be any.

        Returns:
            Features of the tokens, [B, N, C], zeros where the mask is False, and of the global tokens, [B, g, C] or
            None.

        Raises:
            ValueError: The sequence is longer than `max_length`.
        """
        N = tokens.shape[1]
        if not is_captured() and N > self.pos_embed.shape[0]:
            raise ValueError(f'A sequence of {N} tokens: expected at most max_length={self.pos_embed.shape[0]}.')
        if mask is not None:
            tokens = tokens.masked_fill(~mask, 0)
        x = self.drop(self.embed(tokens) + self.pos_embed[:N])
        global_tokens = None if self.global_tokens is None else self.global_tokens.expand(x.shape[0], -1, -1)
        for block in self.blocks:
            x, global_tokens = block(x, mask, global_tokens)
        x = self.norm(x)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.)
        return x, None if global_tokens is None else self.norm(global_tokens)


class CausalBlock(Block):
    """Block of the causal language model: x = norm(x), x + attention(x), and the same with the MLP.

    Unlike in a pre-norm block as it is usual, what is added to are the normalized tokens, as in the authors' code.
    """

    attn: CausalLongShortAttention1d

    def forward(self, x: torch.Tensor, memory: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Update tokens [B, N, C]; the memory are the block's inputs of earlier calls, [B, M, C]."""
        x = self.norm1(x)
        return self.add_mlp(x + self.attn(x, None if memory is None else self.norm1(memory)))

    def prefill(
            self,
            x: torch.Tensor,
            memory: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, CausalCache]:
        """Return `forward(x, memory)` and what `step` needs to continue from there."""
        x = self.norm1(x)
        dx, cache = self.attn.prefill(x, None if memory is None else self.norm1(memory))
        return self.add_mlp(x + dx), cache

    def step(self, x: torch.Tensor, cache: CausalCache) -> Tuple[torch.Tensor, CausalCache]:
        """Update one more token, [B, 1, C]."""
        x = self.norm1(x)
        dx, cache = self.attn.step(x, cache)
        return self.add_mlp(x + dx), cache

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the second half of the block."""
        x = self.norm2(x)
        return x + self.mlp(x)


class CausalLanguageModel(nn.Module):
    """Language model that predicts the next token; the paper's for characters, its base size by default.

    Embeddings are shared between input and output. Positions are relative, within the attention: any length will do.

    Args:
        vocab_size: Token numbers are below this.
        dim: Channels.
        depth: Blocks.
        num_heads: Attention heads.
        window_size: Tokens that a query sees, itself included.
        segment_size: Tokens of a segment.
        rank: Landmarks per head and segment.
        max_segments: Finished segments that a query sees; None for all, see `CausalLongShortAttention1d`.
        memory_length: Tokens that a call remembers for the next one, at most: a multiple of `segment_size`.
        mlp_ratio: Channels inside the MLP, as a multiple of `dim`.
        qkv_bias: Learn a bias for queries, keys and values.
        drop: Dropout probability of embeddings, of what blocks add, inside the MLP, and before the output.
        attn_drop: Dropout probability of attention weights.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
            self,
            vocab_size: int,
            dim: int = 512,
            depth: int = 12,
            num_heads: int = 8,
            window_size: int = 512,
            segment_size: int = 16,
            rank: int = 1,
            max_segments: Optional[int] = None,
            memory_length: int = 0,
            mlp_ratio: float = 4.,
            qkv_bias: bool = True,
            drop: float = 0.,
            attn_drop: float = 0.,
    ):
        super().__init__()
        if memory_length < 0 or memory_length % max(segment_size, 1) != 0:
            raise ValueError(f'memory_length={memory_length}: expected a multiple of segment_size={segment_size}.')
        self.dim = dim
        self.segment_size = segment_size
        self.memory_length = memory_length
        self.embed = nn.Embedding(vocab_size, dim)
        self.drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(
            CausalBlock(
                CausalLongShortAttention1d(
                    dim, num_heads, window_size, segment_size, rank, max_segments, qkv_bias, attn_drop, proj_drop=drop),
                mlp_ratio, drop)
            for _ in range(depth))
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all but biases with a standard deviation of 0.02, norms around 1, as the authors do."""
        for name, parameter in self.named_parameters():
            if name.endswith('bias') and not name.endswith(('content_bias', 'position_bias')):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 1. if 'norm' in name else 0., .02)

    def forward(
            self,
            tokens: torch.Tensor,
            memory: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Predict each next token.

        Args:
            tokens: Token numbers, [B, N].
            memory: What an earlier call returned, for the tokens before, [depth, B, M, C]; None to begin. The authors
                begin with zeros, which are attended like tokens: `zero_memory`.

        Returns:
            Logits of the next tokens, [B, N, vocab_size], and the memory for the next call, without a gradient: the
            last `memory_length` tokens, or as many whole segments as there are. None if `memory_length` is 0.

        Raises:
            ValueError: The memory has another shape.
        """
        self.check_memory(memory)
        x = self.embed_tokens(tokens)
        inputs: List[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            past = None if memory is None else memory[i]
            inputs.append(x.detach() if past is None else torch.cat([past, x.detach()], dim=1))
            x = block(x, past)
        if self.memory_length == 0:
            return self.logits(x), None
        length = inputs[0].shape[1]
        kept = min(self.memory_length, length // self.segment_size * self.segment_size)
        return self.logits(x), torch.stack([h[:, length - kept:] for h in inputs])

    def zero_memory(self, batch_size: int) -> torch.Tensor:
        """Return the memory that the authors' code begins with, [depth, B, memory_length, C]."""
        return self.embed.weight.new_zeros(len(self.blocks), batch_size, self.memory_length, self.dim)

    def prefill(
            self,
            tokens: torch.Tensor,
            memory: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, List[CausalCache]]:
        """Return the logits of `forward` and what `step` needs to continue from there."""
        self.check_memory(memory)
        x = self.embed_tokens(tokens)
        caches = []
        for i, block in enumerate(cast(List[CausalBlock], self.blocks)):
            x, cache = block.prefill(x, None if memory is None else memory[i])
            caches.append(cache)
        return self.logits(x), caches

    def step(self, tokens: torch.Tensor, caches: List[CausalCache]) -> Tuple[torch.Tensor, List[CausalCache]]:
        """Predict from one more token.

        Args:
            tokens: Its number in each sequence, [B, 1].
            caches: What `prefill`, or the last step, returned.

        Returns:
            Logits of the next token, [B, 1, vocab_size], and the caches for the next step.
        """
        x = self.embed_tokens(tokens)
        following = []
        for block, cache in zip(cast(List[CausalBlock], self.blocks), caches):
            x, cache = block.step(x, cache)
            following.append(cache)
        return self.logits(x), following

    @torch.no_grad()
    def generate(
            self,
            tokens: torch.Tensor,
            num_tokens: int,
            temperature: float = 1.,
            generator: Optional[torch.Generator] = None,
    ) -> torch.Tensor:
        """Continue sequences token by token; call `eval()` first.

        Args:
            tokens: Beginnings, [B, N], N >= 1.
            num_tokens: Tokens to add.
            temperature: Divides the logits; 0 takes the likeliest token.
            generator: Source of randomness.

        Returns:
            The sequences with their continuations, [B, N + num_tokens].

        Raises:
            ValueError: The temperature is negative.
        """
        if temperature < 0:
            raise ValueError(f'temperature={temperature}: expected 0 (the likeliest token) or more.')
        logits, caches = self.prefill(tokens)
        for i in range(num_tokens):
            if i > 0:
                logits, caches = self.step(tokens[:, -1:], caches)
            if temperature == 0:
                token = logits[:, -1].argmax(dim=-1, keepdim=True)
            else:
                token = torch.multinomial((logits[:, -1].float() / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, token], dim=1)
        return tokens

    def check_memory(self, memory: Optional[torch.Tensor]) -> None:
        """Raise a ValueError unless there is a memory for each block; blocks look at the rest of its shape."""
        if memory is not None and not is_captured() and (memory.ndim != 4 or memory.shape[0] != len(self.blocks)):
            raise ValueError(
                f'Expected memory as [{len(self.blocks)}, batch, length, {self.dim}], of an earlier call;'
                f' got {list(memory.shape)}.')

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up token numbers [B, N] as [B, N, C], of a size that suits the shared embedding's small values."""
        return self.drop(self.embed(tokens) * self.dim ** .5)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compare features [B, N, C] with all tokens, [B, N, vocab_size]."""
        return F.linear(self.drop(x), self.embed.weight, self.head_bias)


# The authors' layers that each of ours consists of, one below the other
RELEASED_BIDIRECTIONAL = {
    'qkv': ('W_q', 'W_k', 'W_v'),
    'norm_kv': ('dual_ln_l',),
    'dynamic_projection': ('dconv_fc',),
    'norm_landmarks': ('dual_ln_s',),
    'proj': ('W_o',),
}
RELEASED_CAUSAL = {
    'qkv': ('proj_query', 'proj_key', 'proj_val'),
    'norm_kv': ('dual_ln_win',),
    'dynamic_projection': ('dconv_1',),
    'norm_landmarks': ('dual_ln_dproj',),
    'window_position': ('r_net',),
    'segment_position': ('r_net_chunk',),
    'proj': ('proj_out',),
}
RELEASED_BIASES = {'content_bias': 'r_w_bias', 'position_bias': 'r_r_bias'}  # per head, dimensions of size 1 around
RELEASED_MODEL = {
    r'in_emb\.weight': 'embed.weight',
    r'out_emb\.bias': 'head_bias',
    r'layers\.(\d+)\.(norm[12]\.(?:weight|bias))': r'blocks.\1.\2',
    r'layers\.(\d+)\.ff\.(fc[12]\.(?:weight|bias))': r'blocks.\1.mlp.\2',
}
RELEASED_UNUSED = ('pos_emb.inv_freq', 'out_emb.weight')  # computed where needed; the same as in_emb.weight


def convert_released(state_dict: Dict[str, Any]) -> Dict[str, torch.Tensor]:
    """Convert parameters of the authors' sequence models to our names.

    Their names tell what they are of:

    - `lra/attention_transformer_ls.py`: they become those of `LongShortAttention1d`;
    - `autoregressive/model_lib/layer.py`: of `CausalLongShortAttention1d`. If trained without biases, the default
      there, they fit `qkv_bias=False`, and the bias of the output projection is zero;
    - `autoregressive/model_lib/model.py`, trained with `--pre-ln --use-gelu` as all of the authors' scripts do: of
      `CausalLanguageModel`. fairseq's wrapping is removed.

    Values are joined and reshaped, never copied out of a graph: gradients flow back to those given.

    Args:
        state_dict: Parameters by the authors' names, or a checkpoint that holds them.

    Returns:
        Parameters by our names, for `load_state_dict`.

    Raises:
        RuntimeError: The names are not of these models, or some are missing or have no counterpart, such as the
            bidirectional layer's optional convolution.
    """
    given = {
        name.removeprefix('decoder.').removeprefix('model.'): value
        for name, value in unwrap_state_dict(state_dict).items()}
    is_query = re.compile(r'(?:.*\.)?(W_q|proj_query)\.weight')
    queries = [match for match in map(is_query.fullmatch, given) if match]
    if len({match[1] for match in queries}) != 1:
        raise RuntimeError(
            "Expected parameters of the authors' sequence attention, bidirectional (W_q.weight, ...) or causal"
            f' (proj_query.weight, ...); got {", ".join(list(given)[:5])}, ...')
    table = RELEASED_CAUSAL if queries[0][1] == 'proj_query' else RELEASED_BIDIRECTIONAL
    converted = {}
    for query in queries:
        theirs = query[0].removesuffix(f'{query[1]}.weight')
        ours = re.sub(r'^layers\.', 'blocks.', theirs)
        for layer, sources in table.items():
            for leaf in ('weight', 'bias'):
                parts = [given.pop(f'{theirs}{source}.{leaf}', None) for source in sources]
                values = [part for part in parts if part is not None]
                if values and len(values) < len(parts):
                    raise RuntimeError(f'{theirs}: expected all or none of {", ".join(sources)} to have a {leaf}.')
                if values:
                    converted[f'{ours}{layer}.{leaf}'] = torch.cat(values) if len(values) > 1 else values[0]
        if f'{ours}proj.weight' in converted and f'{ours}proj.bias' not in converted:
            weight = converted[f'{ours}proj.weight']
            converted[f'{ours}proj.bias'] = weight.new_zeros(weight.shape[0])
        for bias, source in RELEASED_BIASES.items():
            if f'{theirs}{source}' in given:
                value = given.pop(f'{theirs}{source}')
                converted[f'{ours}{bias}'] = value.reshape(value.shape[1], -1)
    for name in RELEASED_UNUSED:
        given.pop(name, None)
    for name in list(given):
        for pattern, ours in RELEASED_MODEL.items():
            if re.fullmatch(pattern, name):
                converted[re.sub(pattern, ours, name)] = given.pop(name)
    if given:
        raise RuntimeError(f'There is no counterpart of {", ".join(list(given)[:5])} in our sequence models.')
    return converted
