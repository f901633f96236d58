"""Run by torchrun: models on bands of rows against the same on one process, and what goes wrong.

The first argument is a name below, the rest are its arguments. The first rank prints lines of JSON, `report {...}`.
"""
import copy
import json
import random
import sys

import torch
import torch.distributed as dist
from small_models import perturbed

from timm_ls import parallel
from timm_ls.ops import chunks


def rank():
    return dist.get_rank()


def report(**values):
    if rank() == 0:
        print('report ' + json.dumps(values), flush=True)


def draw(seed):
    """Settings of a case: model, image, how it is divided."""
    rng = random.Random(seed)
    ranks = dist.get_world_size()
    family = rng.choice(['test_vil_ls', 'test_cvt_ls'])
    stages = 4 if family == 'test_vil_ls' else 3
    tokens = rng.choice([
        (0,) * stages, (1,) * stages, (2, 0, 1, 0)[:stages], (1, 1, 1, 0)[:stages], (0, 0, 0, 2)[-stages:]])
    types = tuple(rng.choice(['ls', 'ls', 'full']) for _ in range(stages))
    kwargs = dict(
        attn_types=types,
        num_global_tokens=tokens,
        window_size=rng.choice([2, 3, 4, 7]),
        rank=rng.choice([0, 1, 4]),
        global_update=rng.choice(['outputs', 'keys']),
        rel_pos_bias=rng.random() < .7,
        global_pool=rng.choice(['token', 'avg'] if tokens[-1] else ['avg', 'max', 'avgmax', 'catavgmax', '']),
    )
    if family == 'test_cvt_ls':
        kwargs['kv_stride'] = tuple(rng.choice([1, 2]) if kind == 'full' else 1 for kind in types)
    reduction = 32 if stages == 4 else 16
    height, width = rng.randint(max(32, reduction * (ranks - 1) + 1), 150), rng.randint(32, 90)
    cuts = None  # as `band_rows` has it
    if rng.random() < .6:
        cuts = [0, *sorted(rng.sample(range(1, height), ranks - 1)), height]
    return dict(
        family=family, kwargs=kwargs, batch=rng.randint(1, 2), height=height, width=width, cuts=cuts,
        training=rng.random() < .5, checkpointing=rng.random() < .3, seed=seed)


def outputs(model, x):
    """Logits, and all levels."""
    features, levels = model.forward_intermediates(x)
    return [model.forward_head(features), *levels]


def is_map(model, index):
    return index > 0 or model.global_pool == '' and model.num_global_tokens == 0


def error(actual, expected, floor=0.):
    scale = max(expected.abs().max().item(), floor)
    return (actual - expected).abs().max().item() / scale if expected.numel() and scale > 0 else 0.


def compare(case, dtype):
    """The largest errors of outputs, of gradients of parameters and of the image, and of BatchNorm's statistics."""
    ranks = dist.get_world_size()
    kwargs = dict(case['kwargs'])
    model = perturbed(case['family'], dtype=dtype, **kwargs).train(case['training'])
    model.set_grad_checkpointing(case['checkpointing'])
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(case['seed'])
    x = torch.randn(case['batch'], 3, case['height'], case['width'], generator=generator, dtype=dtype)
    whole = x.clone().requires_grad_()
    expected = outputs(reference, whole)
    weights = [torch.randn(y.shape, generator=generator, dtype=dtype) for y in expected]
    sum((y * w).sum() for y, w in zip(expected, weights)).backward()

    group = dist.group.WORLD
    parallel.spatial_parallel(model, group)
    rows = parallel.band_rows(model, case['height'])
    if case['cuts']:
        rows = slice(*case['cuts'][rank():rank() + 2])
    band = x[:, :, rows].clone().requires_grad_()
    actual = outputs(model, band)
    loss, errors = 0., dict(outputs=0.)
    for i, (y, w) in enumerate(zip(actual, weights)):
        if is_map(model, i):
            gathered = parallel.gather_rows(y.detach(), group)
            errors['outputs'] = max(errors['outputs'], error(gathered, expected[i].detach()))
            loss = loss + ranks * (y * w[:, :, parallel.level_rows(model)[i - 1]]).sum()
        else:
            errors['outputs'] = max(errors['outputs'], error(y.detach(), expected[i].detach()))
            loss = loss + (y * w).sum()
    loss.backward()
    parallel.average_gradients(model, group)
    image_grad = parallel.gather_rows(band.grad, group) / ranks
    errors['image'] = error(image_grad, whole.grad)
    expected_grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    floor = 1e-3 * max(value.abs().max().item() for value in expected_grads.values())
    assert {name for name in expected_grads} == set(grads), set(expected_grads) ^ set(grads)
    worst = max(grads, key=lambda name: error(grads[name], expected_grads[name], floor))
    errors['gradients'], errors['worst'] = error(grads[worst], expected_grads[worst], floor), worst
    errors['buffers'] = max(
        [error(a.double(), b.double()) for a, b in zip(model.buffers(), reference.buffers())], default=0.)
    if not case['training']:
        errors['in chunks'] = error_in_chunks(model, reference, x, rows)
    everyone = [None] * ranks
    dist.all_gather_object(everyone, errors)
    return {
        name: max(each[name] for each in everyone) for name in errors if name != 'worst'}, worst


@torch.no_grad()
def error_in_chunks(model, reference, x, rows):
    """The largest error of inference in the smallest chunks."""
    expected = outputs(reference, x)
    before, chunks.CPU_CHUNK_BYTES = chunks.CPU_CHUNK_BYTES, 2000
    try:
        actual = outputs(model, x[:, :, rows])
    finally:
        chunks.CPU_CHUNK_BYTES = before
    return max(
        error(parallel.gather_rows(y, dist.group.WORLD) if is_map(model, i) else y, expected[i])
        for i, y in enumerate(actual))


def drawn(first, number, dtype):
    """Cases of some seeds."""
    for seed in range(int(first), int(first) + int(number)):
        case = draw(seed)
        errors, worst = compare(case, getattr(torch, dtype))
        report(case=case, errors=errors, worst=worst)


COMMANDS = dict(drawn=drawn)


def main():
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    COMMANDS[sys.argv[1]](*sys.argv[2:])
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
