"""How much is taken at a time."""
from types import SimpleNamespace

import pytest
import torch

from timm_ls.ops import chunks

MIB = 2 ** 20


@pytest.mark.parametrize('device, memory, expected', [
    ('cpu', 128 * 1024 * MIB, 8 * MIB),
    ('mps', 128 * 1024 * MIB, 64 * MIB),
    ('cuda', 128 * 1024 * MIB, 2048 * MIB),
    ('cuda', 2 * 1024 * MIB, 64 * MIB),
    ('cuda', None, 64 * MIB),  # tensors without values, where there is no such device
])
def test_chunk_bytes(device, memory, expected, monkeypatch):
    """A share of a GPU's memory, no less than elsewhere."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: memory is not None)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(total_memory=memory))
    chunks.cuda_memory.cache_clear()
    try:
        assert chunks.chunk_bytes(torch.device(device)) == expected
    finally:
        chunks.cuda_memory.cache_clear()


def test_equal_chunks():
    """As equal as can be, in steps, of at least one."""
    assert chunks.equal_chunks(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert chunks.equal_chunks(21, 10, step=7) == [slice(0, 7), slice(7, 14), slice(14, 21)]
    assert chunks.equal_chunks(3, 0) == [slice(0, 1), slice(1, 2), slice(2, 3)] and chunks.equal_chunks(0, 4) == []
