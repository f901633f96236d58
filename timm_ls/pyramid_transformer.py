"""What the families share: a block, a stage, and a pyramid of stages that keeps timm's contract for a backbone."""
from contextvars import copy_context
from functools import partial
from itertools import accumulate
from operator import index, mul
from typing import Any, Callable, Dict, Final, List, Mapping, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    Mlp,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
    get_device_dtype,
    get_norm_layer,
    trunc_normal_,
)
from timm.models import checkpoint, named_apply

from ._compat import feature_take_indices, update_model_input_size
from .attention.chunked import forward_in_chunks, runs_in_chunks
from .attention.full import FullAttention
from .attention.layers import LayerNorm
from .attention.rel_pos import resize_tables
from .linear import as_now
from .ops.capture import ceil_div, is_captured
from .pretrained.checkpoint import check_state_dict

__all__ = [
    'Block',
    'PyramidTransformer',
    'Stage',
    'check_image',
    'check_stages',
    'feature_config',
    'grid_size',
    'norm_layer_with_eps',
    'pad_to_multiple',
]

ImageSize = Union[int, Sequence[int]]  # side, or height and width, in pixels; integers of any kind
MIN_IMAGE_SIZE: Final[int] = 32  # the total stride of four stages: less would leave no token at the last


@torch.fx.wrap
def check_image(x: torch.Tensor, min_size: int = MIN_IMAGE_SIZE) -> torch.Tensor:
    """Return `x` if it is a batch of images that the models accept, [B, C, H >= min_size, W >= min_size].

    Raises:
        ValueError: It is not; the message says what was given and what is expected.
    """
    if not is_captured():
        if x.ndim != 4:
            raise ValueError(f'Expected images of shape [batch, channels, height, width], got {list(x.shape)}.')
        if x.shape[2] < min_size or x.shape[3] < min_size:
            raise ValueError(
                f'Expected images of at least {min_size} x {min_size} pixels, got {x.shape[2]} x {x.shape[3]}.')
    return x


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Pad a map [B, C, H, W] with zeros at the right and the bottom, so that `multiple` divides H and W."""
    H, W = x.shape[2], x.shape[3]
    bottom, right = ceil_div(H, multiple) * multiple - H, ceil_div(W, multiple) * multiple - W
    if is_captured() or bottom > 0 or right > 0:
        x = F.pad(x, (0, right, 0, bottom))
    return x


class Block(nn.Module):
    """Pre-norm attention and MLP over a sequence of global tokens and a map.

    Args:
        dim: Channels.
        attn: Attention layer, from (tokens, size of the map) to tokens.
        mlp_ratio: MLP width over `dim`.
        proj_drop: Dropout probability in the MLP.
        drop_path: Probability of skipping each of the two branches, for an image as a whole.
        norm_layer: From channels to a norm over the last dimension.
        act_layer: Activation of the MLP.
        device: Where to create parameters.
        dtype: Their type.
    """

    def __init__(
            self,
            dim: int,
            attn: nn.Module,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            norm_layer: Callable[..., nn.Module] = LayerNorm,
            act_layer: Type[nn.Module] = nn.GELU,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: torch.Tensor, size: Tuple[int, int]) -> torch.Tensor:
        """From tokens [B, g + H * W, C] of maps of a size (H, W), global ones first, to the same."""
        if not torch.jit.is_scripting():
            if runs_in_chunks(self, x):
                return forward_in_chunks(self, x, size)
        x = x + self.drop_path1(self.attn(self.norm1(x), size))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x


class Stage(nn.Module):
    """One level of the pyramid: a patch embedding, the stage's own global tokens, blocks.

    Args:
        dim: Channels of the level.
        embed: Patch embedding, from [B, C_in, H_in, W_in] to [B, H, W, dim].
        blocks: Blocks over (tokens, size of the map).
        num_global_tokens: Learned tokens that join the map in this stage.
        return_global_tokens: Give the tokens, global ones first, as a sequence instead of a map; for a last stage
            whose global tokens are pooled.
        pos_drop: Dropout probability after the patch embedding.
        device: Where to create parameters.
        dtype: Their type.
    """

    def __init__(
            self,
            dim: int,
            embed: nn.Module,
            blocks: List[nn.Module],
            num_global_tokens: int = 0,
            return_global_tokens: bool = False,
            pos_drop: float = 0.,
            device: torch.types.Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        self.num_global_tokens = num_global_tokens
        self.return_global_tokens = return_global_tokens and num_global_tokens > 0
        self.grad_checkpointing = False
        self.embed = embed
        self.global_tokens: Optional[nn.Parameter] = None
        if num_global_tokens > 0:
            self.global_tokens = nn.Parameter(torch.empty(1, num_global_tokens, dim, device=device, dtype=dtype))
        self.pos_drop = nn.Dropout(pos_drop)
        self.blocks = nn.ModuleList(blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the global tokens from a truncated normal of standard deviation 0.02, as released."""
        if self.global_tokens is not None:
            trunc_normal_(self.global_tokens, std=.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From a map [B, C_in, H_in, W_in] to [B, dim, H, W], or to [B, g + H * W, dim] with `return_global_tokens`."""
        x = self.embed(x)
        B, H, W, C = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
        x = x.reshape(B, H * W, C)
        if self.global_tokens is not None:
            x = torch.cat([self.global_tokens.expand(B, -1, -1).to(x.dtype), x], dim=1)
        x = self.pos_drop(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(in_this_context(block), x, (H, W))
            else:
                x = block(x, (H, W))
        if self.return_global_tokens:
            return x
        return x[:, self.num_global_tokens:].reshape(B, H, W, C).permute(0, 3, 1, 2)


def in_this_context(module: nn.Module) -> Callable[..., Any]:
    """Return a module that, whenever it is called, sees what context variables hold now.

    Checkpointing calls it again in the backward pass, perhaps in another thread. Attention and linear layers have to be
    computed in the same way then.
    """
    return module if is_captured() else partial(copy_context().run, as_now(module))


class PyramidTransformer(nn.Module):
    """Stages, a final norm, pooling and a classifier, with the methods that timm and its clients expect.

    Args:
        embed_layer: For each stage, from input and output channels to a patch embedding, NCHW to NHWC.
        attn_layers: For each kind of attention and each stage, from channels, `num_heads` and `num_global_tokens`, and
            for 'full' `grid_size`, to the attention of a block.
        strides: Stride of each stage with respect to the one before.
        norm_layer: From channels to a norm over the last dimension.
        act_layer: Activation of the MLPs.
        **: As documented by the families. Per-stage arguments have an entry for each of `embed_dims`.

    Raises:
        ValueError: An argument is out of range; the message names it.
    """

    def __init__(
            self,
            *,
            embed_layer: Sequence[Callable[..., nn.Module]],
            attn_layers: Dict[str, Sequence[Callable[..., nn.Module]]],
            strides: Tuple[int, ...],
            norm_layer: Callable[..., nn.Module],
            act_layer: Type[nn.Module],
            embed_dims: Tuple[int, ...],
            depths: Tuple[int, ...],
            num_heads: Tuple[int, ...],
            num_global_tokens: Tuple[int, ...],
            attn_types: Tuple[str, ...],
            img_size: ImageSize,
            in_chans: int,
            num_classes: int,
            global_pool: str,
            mlp_ratio: float,
            drop_rate: float,
            pos_drop_rate: float,
            proj_drop_rate: float,
            drop_path_rate: float,
            device: torch.types.Device,
            dtype: Optional[torch.dtype],
    ):
        super().__init__()
        dd: Any = {'device': device, 'dtype': dtype}
        check_stages(
            len(embed_dims), depths=depths, num_heads=num_heads, num_global_tokens=num_global_tokens,
            attn_types=attn_types, strides=strides)
        for attn_type in attn_types:
            if attn_type not in attn_layers:
                raise ValueError(
                    f'Unknown attention {attn_type!r} in attn_types: expected {" or ".join(map(repr, attn_layers))}.')
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = embed_dims[-1]
        self.num_global_tokens = num_global_tokens[-1]
        self.attn_types = tuple(attn_types)
        self.reductions = list(accumulate(strides, mul))  # a list: a script indexes no tuple
        self.grad_checkpointing = False
        self.feature_info = [
            dict(num_chs=dim, reduction=reduction, module=f'stages.{i}')
            for i, (dim, reduction) in enumerate(zip(embed_dims, self.reductions))
        ]

        drop_path_rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, dim in enumerate(embed_dims):
            attn_args: Dict[str, Any] = dict(num_heads=num_heads[i], num_global_tokens=num_global_tokens[i])
            if attn_types[i] == 'full':
                attn_args['grid_size'] = grid_size(img_size, self.reductions[i])
            embed = embed_layer[i](in_chans if i == 0 else embed_dims[i - 1], dim)
            blocks: List[nn.Module] = [
                Block(
                    dim,
                    attn_layers[attn_types[i]][i](dim, **attn_args),
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    **dd,
                )
                for rate in drop_path_rates[i]
            ]
            stages.append(Stage(
                dim,
                embed,
                blocks,
                num_global_tokens=num_global_tokens[i],
                return_global_tokens=i == len(embed_dims) - 1,
                pos_drop=pos_drop_rate,
                **dd,
            ))
        self.stages = nn.Sequential(*stages)
        self.norm = norm_layer(embed_dims[-1], **dd)
        self.set_global_pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = (
            nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity())
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as released: linear weights truncated normal of std 0.02, biases 0, norms 1 and 0.

        Args:
            needs_reset: Also call `reset_parameters()` of the other modules, needed after `to_empty()`.
        """

        def init(module: nn.Module, name: str = '') -> None:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and module is not self:
                reset_parameters: Any = getattr(module, 'reset_parameters', lambda: None)
                reset_parameters()

        named_apply(init, self)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Initialise everything anew."""
        self.init_weights(needs_reset=True)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that weight decay should leave alone: global tokens and position biases."""
        return {name for name, _ in self.named_parameters() if 'global_tokens' in name or '.rel_pos.' in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Parameter groups from input to output, for layer-wise learning rate decay."""
        return dict(
            stem=r'^stages\.0\.(?:embed|global_tokens)',
            blocks=r'^stages\.(\d+)' if coarse else [
                (r'^stages\.(\d+)\.(?:embed|global_tokens)', (0,)),
                (r'^stages\.(\d+)\.blocks\.(\d+)', None),
                (r'^norm', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        for stage in self.modules():
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: ImageSize) -> None:
        """Make the full-attention stages' bias tables for another image size, resizing what was learned.

        Never needed to run another size, which resizes on the way: it is for training at that size. Exported
        configurations keep the size.

        Args:
            img_size: Side, or height and width, in pixels.

        Raises:
            ValueError: It is something else.
        """
        img_size = grid_size(img_size, 1)
        for stage, reduction in zip(self.stages, self.reductions):
            for module in stage.modules():
                if isinstance(module, FullAttention):
                    module.set_grid_size(grid_size(img_size, reduction))
        update_model_input_size(self, img_size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier, an `nn.Linear`, or `nn.Identity` if there is none."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: See the constructor; None keeps the pooling.

        Raises:
            ValueError: The model has no such pooling; nothing is changed.
        """
        if global_pool is not None:
            self.set_global_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            head = nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self))
            trunc_normal_(head.weight, std=.02)
            nn.init.zeros_(head.bias)
            self.head = head
        self.head.train(self.training)

    @torch.jit.ignore
    def set_global_pool(self, global_pool: str) -> None:
        """Choose how `forward_head` pools.

        Raises:
            ValueError: The model has no such pooling.
        """
        known = ('token', 'avg', '') if self.num_global_tokens > 0 else ('avg', 'max', 'avgmax', 'catavgmax', '')
        if global_pool not in known:
            raise ValueError(f'Unknown global_pool={global_pool!r}: this model has {", ".join(map(repr, known))}.')
        self.global_pool = global_pool
        pool_type = 'fast' + global_pool if global_pool and self.num_global_tokens == 0 else ''
        self.pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type)).train(self.training)
        self.head_hidden_size = self.num_features * self.pool.feat_mult()

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does; those of the original authors are recognized by their names and converted first.

        Bias tables of another grid are resized: timm's `checkpoint_path` (`--initial-checkpoint`) goes this way.

        Raises:
            RuntimeError: With `strict`, if the weights belong to another architecture; for the authors' weights the
                message names the first differences.
        """
        if self.is_foreign(state_dict):
            state_dict = self.convert_state_dict(dict(state_dict))
            if strict:
                check_state_dict(state_dict, self)
        else:
            state_dict = resize_tables(state_dict, self)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @torch.jit.ignore
    def is_foreign(self, state_dict: Mapping[str, Any]) -> bool:
        """Return whether these are weights by other names than ours, which `convert_state_dict` knows."""
        return False

    @torch.jit.ignore
    def convert_state_dict(self, state_dict: Dict[str, Any]) -> Dict[str, torch.Tensor]:
        """Apply the family's checkpoint conversion; see `checkpoint_filter_fn` beside each family."""
        return state_dict

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Run the stages and collect their maps.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: Levels to collect: the last n if an int, all if None.
            norm: Apply the final norm to the last level.
            stop_early: Do not run stages beyond the last level that is collected.
            output_fmt: 'NCHW', the only one.
            intermediates_only: Return the list only.

        Returns:
            The result of `forward_features` (of the last stage run, with `stop_early`) and the list of maps.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"Unknown output_fmt='{output_fmt}': maps are returned as 'NCHW' only.")
        num_stages = len(self.stages)
        take_indices, max_index = feature_take_indices(num_stages, indices)
        x = check_image(x)
        height, width = x.shape[2], x.shape[3]
        intermediates: List[torch.Tensor] = []
        if torch.jit.is_scripting() or not stop_early:  # a script cannot slice modules
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                level = self.forward_norm(x) if norm and i == num_stages - 1 else x
                if level.ndim == 3:  # global tokens in front
                    rows, cols = ceil_div(height, self.reductions[i]), ceil_div(width, self.reductions[i])
                    level = level[:, self.num_global_tokens:].transpose(1, 2)
                    level = level.reshape(level.shape[0], level.shape[1], rows, cols)
                intermediates.append(level)
        if intermediates_only:
            return intermediates
        if i == num_stages - 1:
            x = self.forward_norm(x)
        return x, intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop the stages, and optionally the norm and the head, that these intermediates do not need.

        Returns:
            The levels, counted from the first.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if max_index < len(self.feature_info) - 1:
            self.stages = self.stages[:max_index + 1]
            self.feature_info = self.feature_info[:max_index + 1]
            self.num_features = self.feature_info[-1]['num_chs']
            self.num_global_tokens = 0
            prune_norm = True  # made for the channels of a stage that is gone
        if prune_norm:
            self.norm = nn.Identity()
        self.head_hidden_size = self.num_features * self.pool.feat_mult()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm, over the channels of a map [B, C, H, W] or of tokens [B, N, C]."""
        if self.num_global_tokens > 0:
            return self.norm(x)
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """From images [B, in_chans, H, W] to the last level after the final norm, unpooled.

        Returns:
            A map [B, C, ceil(H / stride), ceil(W / stride)]; tokens [B, g + N, C], global ones first, if the last
            stage keeps global tokens.
        """
        x = check_image(x)
        return self.forward_norm(self.stages(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """From the result of `forward_features` to logits, or to what the classifier sees with `pre_logits`."""
        if self.num_global_tokens > 0:
            if self.global_pool == 'token':
                x = x[:, :self.num_global_tokens].mean(dim=1)
            elif self.global_pool == 'avg':
                x = x[:, self.num_global_tokens:].mean(dim=1)
        else:
            x = self.pool(x)
        x = self.head_drop(x)
        if pre_logits:
            return x
        if self.num_global_tokens == 0 and self.global_pool == '':  # classify every position of the map
            return self.head(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def grid_size(img_size: ImageSize, reduction: int) -> Tuple[int, int]:
    """Return rows and columns of tokens that a level of stride `reduction` has for an image: every part is covered."""
    try:
        is_pair = hasattr(img_size, '__len__') and getattr(img_size, 'ndim', 1) > 0
        sides: Any = img_size if is_pair else (img_size, img_size)
        height, width = map(index, sides)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(f'img_size={img_size!r}: expected a side, or height and width, in pixels.')
    return ceil_div(height, reduction), ceil_div(width, reduction)


def norm_layer_with_eps(norm_layer: Union[str, Callable[..., nn.Module]], eps: float) -> Callable[..., nn.Module]:
    """Return a norm by its name or class, with `eps` unless it brings its own. 'layernorm' is `LayerNorm` of here."""
    norm = LayerNorm if norm_layer == 'layernorm' else get_norm_layer(norm_layer)
    given = norm.keywords if isinstance(norm, partial) else {}
    return partial(norm, **{'eps': eps, **given})


def check_stages(num_stages: int, **per_stage: Tuple[Any, ...]) -> None:
    """Raise a ValueError unless every per-stage argument has an entry for each stage."""
    for name, value in per_stage.items():
        if len(value) != num_stages:
            raise ValueError(f'{name}={tuple(value)} has {len(value)} entries, but embed_dims has {num_stages} stages.')


def feature_config(embed_dims: Tuple[int, ...], num_global_tokens: Tuple[int, ...] = (0,), **_: Any) -> Dict[str, Any]:
    """How timm is to extract features from a model of these arguments, `feature_cfg` of its builder."""
    levels = tuple(range(len(embed_dims)))
    if num_global_tokens[-1] > 0:  # the last stage gives a sequence of tokens, not a map
        return dict(out_indices=levels, feature_cls='getter')
    return dict(out_indices=levels, flatten_sequential=True)
