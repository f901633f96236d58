"""Run by torchrun: models on bands of rows against the same on one process, and what goes wrong.

The first argument is a name below, the rest are its arguments. The first rank prints lines of JSON, `report {...}`.
"""
import copy
import datetime
import json
import os
import random
import signal
import sys
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_models import perturbed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from timm_ls import parallel
from timm_ls.fpn import FeaturePyramid
from timm_ls.ops import chunks
from timm_ls.parallel.bands import BandSize, even_cuts
from timm_ls.parallel.layers import band_max
from timm_ls.pyramid_transformer import Block


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
        training=rng.random() < .5, checkpointing=rng.random() < .3,
        few_bytes=rng.random() < .5, seed=seed)


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
    for module in model.modules():
        if case['few_bytes'] and hasattr(module, 'bias_bytes'):
            module.bias_bytes = 1  # full attention makes the bias of a row at a time
    reference, wider = copy.deepcopy(model), copy.deepcopy(model).double()
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
    if dtype == torch.float32:  # how far float32 is from float64 on one process: BatchNorm in training cancels much
        exact = [y.double() for y in weights]
        sum((y * w).sum() for y, w in zip(outputs(wider, x.double()), exact)).backward()
        errors['of one'] = largest_error(expected_grads, gradients(wider))
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
        report(case=case, dtype=dtype, errors=errors, worst=worst)


def together(values):
    """The largest values of all ranks."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, values)
    return {name: max(each[name] for each in everyone) for name in values}


def gradients(model):
    return {name.removeprefix('module.'): p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_error(grads, expected):
    """The largest error of any gradient; of those that are all but zero, over 1e-3 of the largest of all."""
    whole = {name: g.full_tensor() if hasattr(g, 'full_tensor') else g for name, g in grads.items()}
    assert whole.keys() == expected.keys()
    floor = 1e-3 * max(value.abs().max().item() for value in expected.values())
    return max(error(whole[name], value, floor) for name, value in expected.items())


PYRAMIDS = [
    # backbone, its arguments, arguments of the pyramid
    ('test_vil_ls', dict(attn_types=('ls', 'ls', 'full', 'ls')), dict(extra_blocks='pool')),
    ('test_vil_ls', dict(attn_types=('ls',) * 4), dict(extra_blocks='p6p7', min_stride=8)),
    ('test_vil_ls', dict(num_global_tokens=(1, 1, 1, 1)), dict(extra_blocks=None, level_norm=False)),
    ('test_cvt_ls', dict(), dict(extra_blocks='p6p7', norm_layer=torch.nn.BatchNorm2d)),
    ('test_cvt_ls', dict(num_global_tokens=(0, 2, 0)), dict(extra_blocks='pool')),
]


def pyramids(dtype):
    """Backbones made with `features_only`, alone and under an FPN, in training."""
    group, dtype = dist.group.WORLD, getattr(torch, dtype)
    for number, (name, kwargs, of_pyramid) in enumerate(PYRAMIDS):
        for height, width in ((150, 71), (101, 64))[number % 2:number % 2 + 1]:
            body = perturbed(name, dtype=dtype, features_only=True, num_classes=0, **kwargs)
            model = FeaturePyramid(body, out_channels=8, **of_pyramid).to(dtype).train()
            reference = copy.deepcopy(model)
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(2, 3, height, width, generator=generator, dtype=dtype)
            levels, maps = reference.body(x), reference(x)
            weights = {key: torch.randn(y.shape, generator=generator, dtype=dtype) for key, y in maps.items()}
            sum((y * weights[key]).sum() for key, y in maps.items()).backward()

            parallel.spatial_parallel(model, group)
            band = parallel.shard_image(model, x)
            gathered = parallel.gather_levels(model.body(band), group)
            errors = dict(levels=max(error(a.detach(), b.detach()) for a, b in zip(gathered, levels)))
            bands = model(band)
            gathered = parallel.gather_levels(bands, group)
            assert list(gathered) == list(maps)
            errors['maps'] = max(error(gathered[key].detach(), y.detach()) for key, y in maps.items())
            # through the gathered maps: the loss is the same on all ranks
            sum((y * weights[key]).sum() for key, y in gathered.items()).backward()
            parallel.average_gradients(model, group)
            errors['gradients'] = largest_error(gradients(model), gradients(reference))
            errors['buffers'] = max(
                [error(a.double(), b.double()) for a, b in zip(model.buffers(), reference.buffers())], default=0.)
            report(pyramid=number, size=(height, width), errors=together(errors))


def images(number, dtype=torch.float32, height=96, width=64):
    return torch.randn(number, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def composed():
    """A 2 x 2 mesh: images over one dimension, rows over the other, by DDP and FSDP2; autocast, dropout."""
    mesh = init_device_mesh('cpu', (2, 2), mesh_dim_names=('data', 'rows'))
    mine = mesh['data'].get_local_rank()
    x, labels = images(4), torch.tensor([0, 3, 1, 3])
    half = slice(2 * mine, 2 * mine + 2)
    for name in ('test_vil_ls', 'test_cvt_ls'):
        tokens = dict(num_global_tokens=(1, 1, 1, 1)[:4 if name == 'test_vil_ls' else 3])

        def build(name=name, tokens=tokens):
            model = perturbed(name, dtype=torch.float32, **tokens).train()
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()  # not synchronized over the images
            return model

        def step(model, x, labels):
            F.cross_entropy(model(x).float(), labels).backward()
            return gradients(model)

        expected, errors = step(build(), x, labels), {}
        for checkpointing in (False, True):
            for way in ('DDP', 'DDP over data', 'FSDP2', 'FSDP2 over data'):
                model = parallel.spatial_parallel(build(), mesh['rows'])
                model.set_grad_checkpointing(checkpointing)
                band = parallel.shard_image(model, x[half])
                if way == 'DDP':
                    wrapped = DistributedDataParallel(model)
                elif way == 'DDP over data':
                    wrapped = DistributedDataParallel(model, process_group=mesh['data'].get_group())
                else:
                    over = init_device_mesh('cpu', (4,)) if way == 'FSDP2' else mesh['data']
                    for module in model.modules():
                        if isinstance(module, Block):
                            fully_shard(module, mesh=over)
                    wrapped = fully_shard(model, mesh=over)
                step(wrapped, band, labels[half])
                if 'data' in way:
                    parallel.average_gradients(wrapped, mesh['rows'])
                errors[f'{way}, checkpointing' if checkpointing else way] = largest_error(gradients(wrapped), expected)

        with torch.autocast('cpu', dtype=torch.bfloat16):
            rounded = build()
            by_one = step(rounded, x[half], labels[half])
            model = parallel.spatial_parallel(build(), mesh['rows'])
            step(model, parallel.shard_image(model, x[half]), labels[half])
        parallel.average_gradients(model, mesh['rows'])
        exact = step(build(), x[half], labels[half])

        def distance(grads, exact=exact):
            flat, other = (torch.cat([g[key].flatten() for key in exact]) for g in (grads, exact))
            return ((flat - other).norm() / other.norm()).item()

        errors['autocast'], errors['autocast by one'] = distance(gradients(model)), distance(by_one)
        report(composed=name, errors=together(errors))


def random_numbers():
    """Dropout of all kinds, with other seeds on all ranks: what ranks hold together stays the same on all of them."""
    group = dist.group.WORLD
    for name in ('test_vil_ls', 'test_cvt_ls'):
        stages = 4 if name == 'test_vil_ls' else 3
        model = perturbed(
            name, dtype=torch.float32, num_global_tokens=(2,) * stages, global_pool='token', drop_rate=.2,
            pos_drop_rate=.2, proj_drop_rate=.2, drop_path_rate=.5)
        plain = copy.deepcopy(model)
        parallel.spatial_parallel(model, group)
        model.train().set_grad_checkpointing()
        x = images(2)
        torch.manual_seed(rank())
        logits = [model(parallel.shard_image(model, x)) for _ in range(2)]
        sum(logits).square().sum().backward()
        parallel.average_gradients(model, group)
        theirs = [logits[0].detach().clone() for _ in range(dist.get_world_size())]
        dist.all_gather(theirs, logits[0].detach())
        plain.load_state_dict(model.state_dict())  # BatchNorm's statistics have moved
        # without dropout again: paths alone, of images as a whole, are those of the first rank's numbers
        for net in (model, plain.train()):
            for module in net.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        torch.manual_seed(rank())
        actual = model(parallel.shard_image(model, x)).detach()
        torch.manual_seed(0)
        expected = plain(x).detach()
        report(random=name, errors=together(dict(
            same=max((other - theirs[0]).abs().max().item() for other in theirs),
            draws=error(logits[1].detach(), logits[0].detach()),
            paths=error(actual, expected),
            finite=float(all(g.isfinite().all() for g in gradients(model).values())))))


def maxima():
    """The largest of values of which many are equal, on several ranks: gradients are divided as torch does."""
    shared = parallel.Bands(dist.group.WORLD)
    x = (torch.arange(2 * 3 * 7 * 4, dtype=torch.float64).reshape(2, 3, 7, 4) * 7 % 5).requires_grad_()
    weights = torch.arange(1., 7., dtype=torch.float64).reshape(2, 3)
    (x.amax((2, 3)) * weights).sum().backward()
    rows = slice(*even_cuts(7, shared.ranks, 1)[rank():rank() + 2])
    band = x.detach()[:, :, rows].clone().requires_grad_()
    largest = band_max(band, shared, (2, 3))
    (largest * weights).sum().backward()
    report(maxima=together(dict(
        value=(largest - x.amax((2, 3))).abs().max().item(),
        gradient=(band.grad / shared.ranks - x.grad[:, :, rows]).abs().max().item())))


def message(function, kind=(ValueError, TypeError)):
    try:
        function()
    except kind as error_:
        return str(error_)
    return 'no error'


def refusals():
    """What is refused, in the words of every rank."""
    group, ranks = dist.group.WORLD, dist.get_world_size()

    def build(name='test_vil_ls', **kwargs):
        return perturbed(name, dtype=torch.float32, **kwargs)

    model = parallel.spatial_parallel(build(), group)
    other = build()
    if rank() == 1:
        with torch.no_grad():
            other.head.bias[0] += 1
    wide, flat = images(1, width=64 + 32 * (rank() == 1)), images(1)[0]
    strange = build()
    strange.stages[0].blocks[0].mlp.act = torch.nn.InstanceNorm1d(12)
    dilated = build('test_cvt_ls')
    dilated.stages[0].blocks[0].attn.conv_qkv.depthwise.conv.dilation = (2, 2)
    square = init_device_mesh('cpu', (ranks, 1), mesh_dim_names=('data', 'rows'))

    def pass_of_one():
        with torch.no_grad() if rank() == 0 else nullcontext():
            model(images(1, height=40))

    found = dict(
        weights=message(lambda: parallel.spatial_parallel(other, group)),
        twice=message(lambda: parallel.spatial_parallel(model, group)),
        width=message(lambda: model(wide)),
        dimensions=message(lambda: model(flat if rank() == 0 else images(1))),
        gradients=message(pass_of_one),
        small=message(lambda: model(images(1, height=8))),
        rows=message(lambda: parallel.band_rows(model, ranks - 1)),
        strange=message(lambda: parallel.spatial_parallel(strange, group)),
        dilated=message(lambda: parallel.spatial_parallel(dilated, group)),
        no_model=message(lambda: parallel.spatial_parallel(torch.nn.Linear(2, 2), group)),
        not_parallel=message(lambda: parallel.band_rows(build(), 64)),
        attention_dropout=message(lambda: parallel.spatial_parallel(
            build(num_global_tokens=(1, 1, 1, 1), attn_drop_rate=.1), group)),
        mesh=message(lambda: parallel.spatial_parallel(build(), square)),
        works=message(lambda: model(parallel.shard_image(model, images(1, height=130)))),
    )
    everyone = [None] * ranks
    dist.all_gather_object(everyone, found)
    report(refusals=everyone)


def traffic():
    """What an inner rank sends in a layer, forward and backward."""
    group = dist.group.WORLD
    for name in ('test_vil_ls', 'test_cvt_ls'):
        stages = 4 if name == 'test_vil_ls' else 3
        for types, tokens in (('ls', 0), ('ls', 2), ('full', 2)):
            model = perturbed(
                name, dtype=torch.float32, attn_types=(types,) * stages, num_global_tokens=(tokens,) * stages, depths=(
                    1,) * stages).train()
            parallel.spatial_parallel(model, group)
            block = model.stages[0].blocks[0]
            size = BandSize.of(tuple(6 * i for i in range(dist.get_world_size() + 1)), rank(), 20)
            x = torch.randn(2, tokens + size[0] * size[1], 12, requires_grad=True)
            with parallel.recorded_traffic(model) as forward:
                out = block.attn(x, size)
            with parallel.recorded_traffic(model) as backward:
                out.sum().backward()
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (forward, backward))
            report(traffic=name, types=types, tokens=tokens, inner=everyone[1])


def lost(victim, how):
    """A rank that is killed (KILL) or stopped (STOP) in the middle of a step: how the others end."""
    model = parallel.spatial_parallel(perturbed('test_vil_ls', dtype=torch.float32), dist.group.WORLD)
    band = parallel.shard_image(model, images(1, height=160))
    model(band).sum().backward()
    if rank() == int(victim):
        def die(module, args):
            os.kill(os.getpid(), signal.Signals[f'SIG{how}'])
        model.stages[2].blocks[0].attn.register_forward_pre_hook(die)
    start = time.monotonic()
    try:
        model(band).sum().backward()
    except RuntimeError as error_:
        end = dict(rank=rank(), seconds=time.monotonic() - start, message=str(error_))
        print('report ' + json.dumps(end), flush=True)
        os._exit(3)  # as it is: there is nobody to say good-bye to


COMMANDS = dict(
    drawn=drawn, maxima=maxima, pyramids=pyramids, composed=composed, random_numbers=random_numbers, refusals=refusals,
    traffic=traffic, lost=lost)


def main():
    """Run commands, divided by a comma."""
    torch.set_num_threads(1)
    seconds = float(os.environ.get('TIMEOUT', 120))
    dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=seconds))
    for command in ' '.join(sys.argv[1:]).split(','):
        name, *args = command.split()
        COMMANDS[name](*args)
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
