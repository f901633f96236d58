"""Private names of torch, timm and the hub client that this package uses, each with why no public one serves."""
from typing import Any, List, Tuple

import torch
from huggingface_hub.file_download import http_get  # resumes a broken download; the public ones want a hub repository
from timm.models._features import feature_take_indices  # timm's own rules for the indices of levels
from timm.models._input import update_model_input_size  # keeps `pretrained_cfg` and `img_size` in step, as timm's do
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

__all__ = [
    'default_store',
    'fake_mode',
    'feature_take_indices',
    'function_modes',
    'functorch_is_active',
    'has_hooks',
    'http_get',
    'is_exporting',
    'is_fake_mode',
    'is_in_forward_mode',
    'layer_norm_backward',
    'softmax_backward',
    'update_model_input_size',
]


@torch.compiler.assume_constant_result  # compilers before torch 2.15 would keep the question in the graph
def functorch_is_active() -> bool:
    """Whether a transform of `torch.func` is at work; it takes no autograd function of the old kind, nor in-place."""
    return torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Whether `torch.export` is at work; before torch 2.15, the public name says so of all compiled code."""
    flag = getattr(torch.compiler, '_is_exporting_flag', None)
    return torch.compiler.is_compiling() if flag is None else flag  # torch 2.6 does not tell one from the other


def is_in_forward_mode() -> bool:
    """Whether forward-mode derivatives may be asked for: within `forward_ad.dual_level()`."""
    return forward_ad._current_level >= 0


def function_modes() -> List[Any]:
    """The instances of `TorchFunctionMode` active in this thread; the public ones tell nobody but their own kind."""
    return torch.overrides._get_current_function_mode_stack()


def softmax_backward(grad: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Gradient of a softmax over the last dimension; one pass, where plain operations take three."""
    return torch._softmax_backward_data(grad, output, -1, output.dtype)


def layer_norm_backward(
        grad_out: torch.Tensor,
        x: torch.Tensor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        weight: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of a layer norm's input, weight and bias, from what `torch.native_layer_norm` gave; one call."""
    return torch.ops.aten.native_layer_norm_backward(
        grad_out, x, weight.shape, mean, scale, weight, weight, [True, True, True])  # of the bias, only its shape


def has_hooks(module: Any) -> bool:
    """Whether somebody wants to see each call of the module; torch has no question for that."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def fake_mode() -> FakeTensorMode:
    """A mode in which tensors have no values; parameters may have."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake_mode() -> bool:
    """Whether tensors are made without values now, under `FakeTensorMode`: none of them may be kept."""
    return torch._guards.detect_fake_mode() is not None


def default_store() -> Any:
    """The store that the process groups were made with; no public name gives it back."""
    return torch.distributed.distributed_c10d._get_default_store()
