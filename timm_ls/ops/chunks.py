"""How much is taken at a time where a map is too large to be taken whole."""
from typing import List

import torch

from .capture import ceil_div

__all__ = ['chunk_bytes', 'equal_chunks']

# Bytes of a map or of an MLP's hidden layer to take at a time. On a CPU queries, keys and values of a chunk stay below
# the 32 MB from which glibc maps memory anew for every tensor, and so do a tile's gathered keys and values, of three
# times as many bytes; fewer make more calls, more are no faster. Elsewhere a chunk has to keep a large device busy.
CPU_CHUNK_BYTES = 8 * 2 ** 20
CHUNK_BYTES = 64 * 2 ** 20


def chunk_bytes(device: torch.device) -> int:
    """Return the bytes to take at a time on a device."""
    return CPU_CHUNK_BYTES if device.type == 'cpu' else CHUNK_BYTES


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
