"""How much is taken at a time where a map is too large to be taken whole."""
from functools import lru_cache
from typing import List

import torch

from .capture import ceil_div

__all__ = ['chunk_bytes', 'equal_chunks']

# Bytes of a map or of an MLP's hidden layer to take at a time. On a CPU queries, keys and values of a chunk stay below
# the 32 MB from which glibc maps memory anew for every tensor, and so do a tile's gathered keys and values, of twice as
# many bytes; fewer make more calls, more are no faster. A GPU has to be kept busy for longer than kernels take to
# launch: by a share of its memory, which grows with what it computes. An H200, whose share is 2.2 GiB, has 0.92 of the
# speed with chunks of 1 GiB that it has with those of 4 GiB, and 0.27 with those of 64 MiB.
CPU_CHUNK_BYTES = 8 * 2 ** 20
CHUNK_BYTES = 64 * 2 ** 20
CUDA_SHARE = 64


def chunk_bytes(device: torch.device) -> int:
    """Return the bytes to take at a time on a device."""
    if device.type == 'cpu':
        return CPU_CHUNK_BYTES
    if device.type == 'cuda' and torch.cuda.is_available():
        return max(CHUNK_BYTES, cuda_memory(device) // CUDA_SHARE)
    return CHUNK_BYTES


@lru_cache(maxsize=64)
def cuda_memory(device: torch.device) -> int:
    """Return the bytes that a CUDA device has."""
    return torch.cuda.get_device_properties(device).total_memory


def equal_chunks(total: int, most: int, step: int = 1) -> List[slice]:
    """Cut a range into chunks that are as equal as can be.

    Args:
        total: Length of the range.
        most: Of a chunk; rounded down to a multiple of `step`, but at least one step.
        step: All chunks but the last are multiples of it.
    """
    if total == 0:
        return []
    steps = ceil_div(total, step)
    count = ceil_div(steps, max(1, most // step))
    size = ceil_div(steps, count) * step
    return [slice(start, min(total, start + size)) for start in range(0, total, size)]
