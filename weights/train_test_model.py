"""Train, or evaluate, the tiny models that ship with the package: handwritten digits, on a CPU, in minutes.

    python weights/train_test_model.py --model test_vil_ls             train, evaluate and write the weights
    python weights/train_test_model.py --model test_vil_ls --evaluate  evaluate the weights that ship

The images are scikit-learn's copy of the UCI digits: 1,797 scans of 8 x 8 pixels, a quarter of them held out.
"""
import argparse
import json
import math
import time
from pathlib import Path
from typing import List, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import timm_ls

SHIPPED = Path(timm_ls.__file__).parent / 'pretrained' / 'shipped_weights'


def digits() -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, held-out images [N, 8, 8] of uint8, training labels, held-out labels."""
    data = load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)
    return train_test_split(images, data.target, test_size=0.25, random_state=0, stratify=data.target)


def to_pil(images: np.ndarray) -> List[Image.Image]:
    """Images as a user would open them: RGB."""
    return [Image.fromarray(image).convert('RGB') for image in images]


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate by up to 15 degrees, scale by up to 15%, shift by up to 10%, each image on its own."""
    angle, scale, dx, dy = (torch.rand(4, x.shape[0], generator=generator) * 2 - 1).unbind(0)
    angle, scale, dx, dy = angle * math.radians(15), 1 + scale * .15, dx * .2, dy * .2
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, dx], dim=1), torch.stack([sin, cos, dy], dim=1)], dim=1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode='border', align_corners=False)


@torch.inference_mode()
def accuracy(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Percentage of images that the model tells right."""
    model.eval()
    right = sum((model(images).argmax(dim=1) == target).sum().item()
                for images, target in zip(x.split(64), labels.split(64), strict=True))
    return 100 * right / len(labels)


def train(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> None:
    """AdamW, one cosine cycle after a warm-up, label smoothing."""
    generator = torch.Generator().manual_seed(seed)
    batch_size, lr = 32, 1e-3
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        (no_decay if parameter.ndim < 2 or name in model.no_weight_decay() else decay).append(parameter)
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=.05), dict(params=no_decay, weight_decay=0.)], lr=lr)
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 50, .5 * (1 + math.cos(math.pi * i / steps))))
    for epoch in range(epochs):
        model.train()
        start, total = time.time(), 0.
        order = torch.randperm(len(x), generator=generator)
        for indices in order[:len(x) // batch_size * batch_size].split(batch_size):
            loss = F.cross_entropy(model(augment(x[indices], generator)), labels[indices], label_smoothing=.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f'epoch {epoch + 1}/{epochs}  loss {total / (len(x) // batch_size):.4f}  {time.time() - start:.0f} s',
              flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='test_vil_ls', help='a test_ model of timm_ls')
    parser.add_argument('--evaluate', action='store_true', help='evaluate the shipped weights, train nothing')
    parser.add_argument('--epochs', type=int, default=12)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output', type=Path, help='safetensors file to write (default: the one that ships)')
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(2)  # sums depend on how they are split
    torch.use_deterministic_algorithms(True)
    model = timm.create_model(args.model, pretrained=args.evaluate)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    train_images, test_images, train_labels, test_labels = digits()
    if not args.evaluate:
        x = torch.stack([transform(image) for image in to_pil(train_images)])
        train(model, x, torch.from_numpy(train_labels), args.epochs, args.seed)
    x = torch.stack([transform(image) for image in to_pil(test_images)])
    result = {
        'model': args.model,
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'held_out_images': len(x),
        'held_out_top1': round(accuracy(model, x, torch.from_numpy(test_labels)), 2),
    }
    if not args.evaluate:
        output = args.output or SHIPPED / f'{args.model}.digits.safetensors'
        output.parent.mkdir(exist_ok=True)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, output, {'format': 'pt'})
        result['file'] = output.name
    print(json.dumps(result))


if __name__ == '__main__':
    main()
