"""Run by torchrun: self-distillation in several processes, each with a part of the batch, against one with all of it.

Prints, from the first process, a line of JSON for each model: the largest errors of any gradient and of the centers,
and the kNN accuracy of all processes together and of one alone.
"""
import json
import sys
from argparse import Namespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from distributed_worker import error, train
from paths import RECIPES
from small_models import small_args
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(RECIPES))
from self_supervised import Neighbors, SelfDistillation, check_arguments, parser  # noqa: E402

IMAGES = 4
TEMPERATURE = .05


def build(name):
    """A small student and teacher, different, with centers that are not zero, BatchNorm by fixed statistics."""
    args = parser('').parse_args([
        '--data-dir', '', '--model', name, '--global-size', '64', '96', '--local-size', '32', '--output-dim', '32',
        '--hidden-dim', '24', '--bottleneck-dim', '16', '--drop-path', '0'])
    args.model_kwargs = small_args(name)
    check_arguments(args)
    model = SelfDistillation(args)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            value += .1 * torch.randn(value.shape, generator=generator)
        for loss in (model.view_loss, model.region_loss.center):
            loss.center += .1 * torch.randn(loss.center.shape, generator=generator)
    return train(model)


def centers(model):
    return dict(view=model.view_loss.center, region=model.region_loss.center.value)


def step(model, crops):
    """Gradients and centers by name, after one step."""
    module = getattr(model, 'module', model)
    model(crops, TEMPERATURE)[0]['loss'].backward()
    return {name: value.grad for name, value in module.student.named_parameters() if value.grad is not None}, centers(
        module)


def compare(name, folder):
    rank, processes = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    sizes = [(64, 96)] * 2 + [(32, 32)] * 3
    crops = [torch.randn(IMAGES, 3, *size, generator=generator) for size in sizes]
    with patch.object(dist, 'is_initialized', lambda: False):  # or the centers would be averaged over both
        expected, expected_centers = step(build(name), crops)
    mine = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    actual, actual_centers = step(DistributedDataParallel(build(name)), [x[mine] for x in crops])
    report = dict(
        gradients=error(actual, expected), centers=error(actual_centers, expected_centers),
        before=error(centers(build(name)), expected_centers))

    model = build(name)
    args = Namespace(labeled_dir=folder, seed=0, global_size=(64, 96), batch_size=4, workers=0)
    neighbors = Neighbors(args, model.teacher.backbone)
    report['kNN'] = neighbors.accuracy(model.teacher, 'cpu')
    with patch.object(dist, 'is_initialized', lambda: False):
        report['kNN of one'] = neighbors.accuracy(model.teacher, 'cpu')
    return report


def main():
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        report = compare(name, sys.argv[1])
        if dist.get_rank() == 0:
            print('report ' + json.dumps({name: report}), flush=True)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
