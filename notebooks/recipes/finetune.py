"""What the recipes share: arguments, images, model, optimizer. The training loops belong to the engines."""
import argparse
import math
import random
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import Dataset, DistributedSampler
from torchvision.datasets import ImageFolder

from timm_ls.cli import known_model, whole_number
from timm_ls.pyramid_transformer import MIN_IMAGE_SIZE


def training_parser(description, data_dir):
    """The arguments of every recipe that trains; `data_dir` says what images it takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data-dir', required=True, help=data_dir)
    parser.add_argument('--output', default='output', help='folder for checkpoints and weights')
    parser.add_argument('--resume', action='store_true', help='go on from the newest checkpoint in --output, if any')
    parser.add_argument('--model', type=known_model, default='vil_ls_medium')
    parser.add_argument('--pretrained-path', help='start from the weights in this file; the classifier may differ')
    parser.add_argument('--epochs', type=whole_number(), default=10)
    parser.add_argument('--batch-size', type=whole_number(), default=32, help='images per process')
    parser.add_argument('--weight-decay', type=float, default=.05)
    parser.add_argument('--warmup', type=float, default=.1, help='part of the steps in which the learning rate rises')
    parser.add_argument('--drop-path', type=float, default=.1, help='stochastic depth')
    parser.add_argument('--clip-grad', type=float, default=1., help='largest norm of the gradient')
    parser.add_argument('--grad-checkpointing', action='store_true', help='less memory, more computation')
    parser.add_argument('--bf16', action='store_true', help='compute in bfloat16')
    parser.add_argument('--save-steps', type=whole_number(), default=500, help='steps between checkpoints')
    parser.add_argument('--log-steps', type=whole_number(), default=10)
    parser.add_argument('--workers', type=whole_number(0), default=4, help='processes that load images')
    parser.add_argument('--seed', type=int, default=42)
    return parser


def parser(description):
    """The arguments of every recipe that fine-tunes."""
    parser = training_parser(description, 'folder with a folder of images per class, or such folders train and val')
    parser.add_argument('--no-pretrained', dest='pretrained', action='store_false', help='start from random weights')
    parser.add_argument('--img-size', type=whole_number(MIN_IMAGE_SIZE),
                        help='side in pixels; the native one of the model if left out')
    parser.add_argument('--lr', type=float, default=2e-4, help='learning rate of the last layer')
    parser.add_argument('--layer-decay', type=float, default=.8, help='factor on the learning rate from layer to layer')
    return parser


def check_output(args, checkpoints):
    """The newest of these checkpoints, oldest first, or None to start afresh; exits rather than mix two runs."""
    if checkpoints and not args.resume:
        raise SystemExit(
            f'{args.output} holds checkpoints: add --resume to go on from them, or choose another --output.')
    return str(checkpoints[-1]) if checkpoints else None


def seed_for(*key):
    """A seed that depends on these numbers alone."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@contextmanager
def drawn_from(*key):
    """What is random inside depends on these numbers alone; the generators come out as they were."""
    seed = seed_for(*key)
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class ReplayableImages(Dataset):
    """Images looked up by (epoch, index), whose augmentation depends on the seed and these two.

    Neither the process that loads an image nor what was loaded before plays a part: a run that resumes sees what it
    would have seen.
    """

    def __init__(self, images, seed):
        self.images = images
        self.seed = seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, position):
        with drawn_from(self.seed, *position):
            return self.images[position[1]]


class ReplayableSampler(DistributedSampler):
    """Gives (epoch, index), shuffled by the seed and the epoch; `start` leaves out the first samples of one epoch."""

    def __init__(self, images, seed, num_replicas=1, rank=0):
        super().__init__(images, num_replicas=num_replicas, rank=rank, seed=seed)
        self.start = 0

    def __iter__(self):
        indices = list(super().__iter__())[self.start:]
        self.start = 0
        return iter([(self.epoch, index) for index in indices])


def steps_per_epoch(args, train, processes=1):
    """Batches of each process in an epoch."""
    return math.ceil(math.ceil(len(train) / processes) / args.batch_size)


def open_images(args):
    """Images for training and, if there are any, for validation."""
    root = Path(args.data_dir)
    if not root.is_dir():
        raise SystemExit(f'There is no folder {root}.')
    has_splits = (root / 'train').is_dir()
    held_out = next((root / name for name in ('val', 'validation') if has_splits and (root / name).is_dir()), None)
    try:
        train = ImageFolder(root / 'train' if has_splits else root)
        val = ImageFolder(held_out) if held_out else None
    except FileNotFoundError as error:
        raise SystemExit(f'Expected a folder of images for every class: {error}') from error
    if val is not None and val.classes != train.classes:
        raise SystemExit(f'Classes differ: {train.classes} in {train.root}, {val.classes} in {val.root}.')
    return ReplayableImages(train, args.seed), val


def make_model(args, train, val):
    """The model for the classes of the images, whose transforms it sets."""
    torch.manual_seed(args.seed)  # for what is not pretrained
    options = dict(num_classes=len(train.images.classes), drop_path_rate=args.drop_path)
    if args.img_size:
        options['img_size'] = args.img_size  # bias tables of this size, from those of the weights
    if args.pretrained_path:
        options['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)  # -1: classifier afresh
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained, **options)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f'No weights to start from: {error}') from error
    model.set_grad_checkpointing(args.grad_checkpointing)

    config = timm.data.resolve_data_config(dict(img_size=args.img_size), model=model)
    train.images.transform = timm.data.create_transform(**config, is_training=True, scale=(.5, 1.))
    if val is not None:
        val.transform = timm.data.create_transform(**config)
    return model


def make_optimizer(model, args):
    """AdamW with layer-wise decay of the learning rate, by timm.

    timm leaves the factors in `lr_scale` for its own schedulers; they are applied here for those of others.
    """
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)
    for group in optimizer.param_groups:
        group['lr'] *= group.pop('lr_scale', 1.)
    return optimizer


def make_schedule(optimizer, args, steps):
    """Linear warm-up and cosine decay, a function of the step: `schedule.step_update(step)`."""
    return CosineLRScheduler(
        optimizer, t_initial=steps, warmup_t=int(args.warmup * steps), warmup_prefix=False, t_in_epochs=False)


def save_weights(weights, args):
    """Keep weights by timm's names: `--pretrained-path`, `timm_ls.load_checkpoint` and timm's scripts read the file."""
    path = Path(args.output) / 'weights.safetensors'
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, path)
    print(f'Weights written to {path}')
