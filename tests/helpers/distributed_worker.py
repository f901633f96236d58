"""Run by torchrun: the gradients of several processes, each with a part of a batch, against one with all of it.

Prints, from the first process, a line of JSON for each model: the largest error of any gradient by way of training.
"""
import copy
import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from paths import RECIPES
from small_models import create
from timm.layers import convert_sync_batchnorm
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(RECIPES))
from fsdp import shard  # noqa: E402

IMAGES = 4


def build(name):
    """A small model in training mode, its weights of order one, BatchNorm by statistics that it has already."""
    torch.manual_seed(0)
    model = create(name, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += .1 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, .1)
            module.running_var.uniform_(.5, 2.)
    return train(model)


def train(model):
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def batch():
    """All images, not square, and labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, 64, 96, generator=generator), torch.tensor([0, 3, 1, 3])


def gradients(model, x, labels):
    """Whole gradients by name, after one backward pass."""
    F.cross_entropy(model(x).float(), labels).backward()
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grads[name.removeprefix('module.')] = grad.full_tensor() if hasattr(grad, 'full_tensor') else grad
    return grads


def error(actual, expected):
    """The largest difference of any gradient over its largest value; of those that are all but zero, over 1e-3 of the
    largest of all.
    """
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(value.abs().max() for value in expected.values())
    return max(
        ((actual[name] - value).abs().max() / max(value.abs().max(), floor)).item()
        for name, value in expected.items())


def norm(values):
    return torch.cat([value.flatten() for value in values]).norm()


def compare(name):
    """Errors of every way, and whether weights leave the shards as they should."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    x, labels = batch()
    mine = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    plain = build(name)
    expected = gradients(copy.deepcopy(plain), x, labels)
    report = {}
    for checkpointing in (False, True):
        suffix = ', checkpointing' if checkpointing else ''
        for way in ('DDP', 'FSDP2'):
            model = build(name)
            model.set_grad_checkpointing(checkpointing)
            model = DistributedDataParallel(model) if way == 'DDP' else shard(model)
            report[way + suffix] = error(gradients(model, x[mine], labels[mine]), expected)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    rounded = gradients(shard(build(name), policy), x[mine], labels[mine])
    report['FSDP2, bfloat16'] = (
        norm([rounded[key] - value for key, value in expected.items()]) / norm(expected.values())).item()

    sharded = shard(build(name))
    report['parameters in shards'] = all(
        parameter.to_local().numel() < parameter.numel() or parameter.shape[0] < processes
        for parameter in sharded.parameters())
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        restored = create(name, num_classes=5)
        restored.load_state_dict(whole)
        report['full state dict'] = all(
            torch.equal(value, plain.state_dict()[key]) for key, value in restored.state_dict().items())
        report['output'] = torch.equal(restored.eval()(x), plain.eval()(x))
    return report


def synchronized_batchnorm(name):
    """What conversion to SyncBatchNorm keeps, by torch and by timm, and whether this torch trains with it on a CPU."""
    plain = build(name).eval()
    x, _ = batch()
    report = {}
    for maker, convert in (
            ('torch', torch.nn.SyncBatchNorm.convert_sync_batchnorm), ('timm', convert_sync_batchnorm)):
        model = convert(copy.deepcopy(plain))
        kinds = [type(module) for module in model.modules() if isinstance(module, _BatchNorm)]
        weights = model.state_dict()
        report[maker] = dict(
            layers=len(kinds),
            converted=all(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds),
            same_weights=weights.keys() == plain.state_dict().keys() and all(
                torch.equal(weights[key], value) for key, value in plain.state_dict().items()),
            same_output=torch.equal(model(x), plain(x)))
        try:
            model.train()(x)
            report[maker]['trains_on_cpu'] = True
        except ValueError as refusal:
            report[maker]['trains_on_cpu'] = str(refusal)
    return report


def main():
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        report = compare(name)
        if name.startswith('cvt'):
            report['SyncBatchNorm'] = synchronized_batchnorm(name)
        if dist.get_rank() == 0:
            print('report ' + json.dumps({name: report}), flush=True)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
