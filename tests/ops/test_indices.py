"""Index tensors: shared with what made them on a CPU, kept on other devices, never kept as fake tensors."""
from typing import NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from timm_ls.ops import indices
from timm_ls.ops.indices import on_device

ARRAY = np.arange(6)


class Plan(NamedTuple):
    order: np.ndarray
    size: int


def make(size):
    return Plan(ARRAY, size)


def test_memory_is_shared_on_a_cpu():
    """What functions of sizes remember is enough: there is no second copy."""
    kept = indices._kept.cache_info().currsize
    plan = on_device(make, torch.device('cpu'), 3)
    assert plan.size == 3 and plan.order.tolist() == ARRAY.tolist()
    assert plan.order.data_ptr() == ARRAY.ctypes.data
    assert indices._kept.cache_info().currsize == kept


def test_copies_are_kept_elsewhere():
    """A second call copies nothing; another size has its own."""
    device = torch.device('meta')
    plan = on_device(make, device, 4)
    assert plan.order.device == device and on_device(make, device, 4) is plan
    assert on_device(make, device, 5).size == 5


def test_fake_tensors_are_not_kept():
    """They would be wrong as soon as their mode ends."""
    kept = indices._kept.cache_info().currsize
    with FakeTensorMode():
        assert isinstance(on_device(make, torch.device('meta'), 6).order, FakeTensor)
    assert indices._kept.cache_info().currsize == kept
    assert not isinstance(on_device(make, torch.device('meta'), 6).order, FakeTensor)
