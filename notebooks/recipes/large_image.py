"""Train segmentation on images larger than a device holds: `torchrun --nproc-per-node 8 large_image.py --data-dir DIR`.

DIR holds pairs NAME.npy, [H, W, 3] of uint8, and NAME.mask.npy, [H, W] of uint8 classes, 255 where there is none. They
are mapped, not read: a process reads the rows of its band. `--bands 8` processes share an image, the others have other
images: with two machines of 8 GPUs, `--bands 8` keeps the exchange of rows within a machine and trains two images a
step, `--bands 16` trains one of twice the size.
"""
import argparse
import os
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from timm_ls.cli import known_model, whole_number
from timm_ls.fpn import FeaturePyramid
from timm_ls.parallel import average_gradients, band_mean, band_rows, level_rows, spatial_parallel

NO_CLASS = 255


class PixelClassifier(nn.Module):
    """A feature pyramid whose finest map gives every token the classes of its pixels: nothing that looks further."""

    def __init__(self, args, num_classes):
        super().__init__()
        body = timm.create_model(args.model, pretrained=args.pretrained, features_only=True)
        self.pyramid = FeaturePyramid(body, out_channels=args.width, extra_blocks=None)
        self.stride = self.pyramid.strides[0]
        self.head = nn.Conv2d(args.width, num_classes * self.stride ** 2, 1)

    def forward(self, x):
        """From a band of the image to logits of the rows of its finest level, [B, num_classes, rows, W]."""
        return F.pixel_shuffle(self.head(self.pyramid(x)['0']), self.stride)


def read(array, rows):
    """Some rows of a mapped array: the one place where pixels are read."""
    return torch.from_numpy(np.array(array[rows]))


def pixel_loss(model, name, bands, args, device):
    """The mean loss of the pixels of an image that this process has a band of; equal on all that have the others."""
    image = np.load(f'{name}.npy', mmap_mode='r')
    mask = np.load(f'{name}.mask.npy', mmap_mode='r')
    height, width = mask.shape
    rows = band_rows(model.pyramid, height)
    x = read(image, rows).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
        logits = model(x)
    finest = level_rows(model.pyramid)[model.pyramid.body.feature_info.out_indices[0]]
    rows = slice(finest.start * model.stride, min(finest.stop * model.stride, height))
    labels = read(mask, rows).to(device).long()[None]
    losses = F.cross_entropy(
        logits[:, :, :labels.shape[1], :width].float(), labels, reduction='none', ignore_index=NO_CLASS)
    return band_mean(losses[labels != NO_CLASS], bands)


def train(args, device):
    """Train within a group of processes."""
    mesh = init_device_mesh(
        device.type, (dist.get_world_size() // args.bands, args.bands), mesh_dim_names=('data', 'bands'))
    names = sorted(str(path)[:-len('.mask.npy')] for path in Path(args.data_dir).glob('*.mask.npy'))
    groups, group = mesh.shape[0], mesh.get_local_rank('data')
    if len(names) < groups:
        raise SystemExit(f'{args.data_dir} has {len(names)} images with a mask: expected {groups}, one for each group.')
    torch.manual_seed(args.seed)  # the same weights on all
    model = PixelClassifier(args, args.num_classes).to(device)
    if args.grad_checkpointing:
        model.pyramid.set_grad_checkpointing()
    spatial_parallel(model.pyramid, mesh['bands'])
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=.05)
    for step in range(args.steps):
        name = names[(step * groups + group) % len(names)]
        loss = pixel_loss(model, name, mesh['bands'], args, device)
        loss.backward()
        average_gradients(model, dist.group.WORLD)  # over bands and images at once
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f'step {step + 1} of {args.steps}: loss {loss.item():.6f}', flush=True)
    if dist.get_rank() == 0:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), Path(args.output) / 'weights.safetensors')


def main(argv=None):
    """Set up the processes and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--output', default='output/large_image')
    parser.add_argument('--model', type=known_model, default='vil_ls_tiny_hires',
                        help='long-short attention throughout')
    parser.add_argument('--pretrained', action='store_true')
    parser.add_argument('--num-classes', type=whole_number(), default=2)
    parser.add_argument('--width', type=whole_number(), default=128, help='channels of the pyramid')
    parser.add_argument('--bands', type=whole_number(), help='processes that share an image; all by default')
    parser.add_argument('--steps', type=whole_number(), default=1000)
    parser.add_argument('--lr', type=float, default=1e-4)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--bf16', action='store_true')
    parser.add_argument('--grad-checkpointing', action='store_true')
    args = parser.parse_args(argv)
    if 'RANK' not in os.environ:
        parser.error('there is no group of processes: start this with torchrun instead of python')
    device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if torch.cuda.is_available() else torch.device('cpu')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
    args.bands = args.bands or dist.get_world_size()
    if dist.get_world_size() % args.bands:
        parser.error(f'--bands {args.bands}: expected a divisor of the {dist.get_world_size()} processes.')
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == '__main__':
    main()
