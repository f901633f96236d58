"""What was measured to be the fastest implementation of window attention, where that is not the first in rank.

Rows are those that `python -m timm_ls.gpu_check` writes to overrides.json. Empty: on an H200, in bfloat16, the first in
rank was the fastest everywhere.
"""
from typing import Any, Dict, Optional, Tuple

import torch

__all__ = ['gpu_family', 'override']

OVERRIDES: Tuple[Dict[str, Any], ...] = ()


def override(call: Any) -> Optional[str]:
    """Return the implementation to ask first for a `WindowCall`, None if none was found to be faster than the usual."""
    if not OVERRIDES or call.device.type != 'cuda' or not torch.cuda.is_available():
        return None
    if call.captured and not call.compiled:  # for another machine
        return None
    return look_up(call.device, call.dtype, call.window_size, call.head_dim)


@torch.compiler.assume_constant_result
def look_up(device: torch.device, dtype: torch.dtype, window_size: int, head_dim: int) -> Optional[str]:
    """Return the implementation in the row for such a call, if there is one."""
    call = dict(
        gpu=gpu_family(device), dtype=str(dtype).removeprefix('torch.'), window_size=window_size, head_dim=head_dim)
    for row in OVERRIDES:
        if call.items() <= row.items():
            return row['implementation']
    return None


def gpu_family(device: torch.device) -> str:
    """Return the GPUs that one of these stands for: those of its compute capability, such as 'sm_90'."""
    major, minor = torch.cuda.get_device_capability(device)
    return f'sm_{major}{minor}'
