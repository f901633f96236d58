"""Generated images to learn detection and segmentation from: overlapping shapes on real photographs, nothing to load.

Shapes are filled with a color mixed with another photograph. The hue tells the class of most shapes, not of all. Later
shapes hide earlier ones; boxes and masks are those of what is visible. Backgrounds are photographs that come with
scikit-learn and scikit-image, held-out images have photographs of their own.
"""
import colorsys
from functools import lru_cache
from typing import Dict, List, Tuple

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from torchvision.ops import masks_to_boxes

CLASSES = ('background', 'ellipse', 'triangle', 'star')
PHOTOS = {
    'train': ('china', 'flower', 'astronaut', 'cat', 'hubble_deep_field', 'retina'),
    'held_out': ('coffee', 'rocket', 'immunohistochemistry'),
}
HUE_SPREAD = 0.1  # of a class, whose mean hues are a third apart: color alone is wrong in a tenth of the shapes
MIN_VISIBLE = 0.4  # of a shape's area; a new shape that would hide more of another one is left out


@lru_cache
def photo(name: str) -> Image.Image:
    """A photograph, its shorter side 320 pixels."""
    pixels = load_sample_image(f'{name}.jpg') if name in ('china', 'flower') else getattr(skimage.data, name)()
    image = Image.fromarray(pixels)
    scale = 320 / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def random_crop(split: str, size: Tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A crop of a random photograph, [H, W, 3] in 0..1: scale, sides, order of colors and contrast are random.

    There are few photographs: a model that has seen little else takes whatever it does not know for a shape.
    """
    source = photo(str(rng.choice(PHOTOS[split])))
    height, width = size
    scale = 0.2 ** rng.uniform() * min(source.height / height, source.width / width)
    left = rng.uniform(0, source.width - scale * width)
    top = rng.uniform(0, source.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    pixels = np.asarray(source.resize((width, height), Image.Resampling.BILINEAR, box=box), dtype=np.float32) / 255
    pixels = pixels[::rng.choice((-1, 1)), ::rng.choice((-1, 1)), rng.permutation(3)]
    return (pixels ** rng.uniform(0.6, 1.6)).astype(np.float32)


def random_shape(kind: str, size: Tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The mask [H, W] of a shape at a random place, size, rotation and stretch."""
    height, width = size
    corners = {'ellipse': 48, 'triangle': 3, 'star': 10}[kind]
    angles = 2 * np.pi * (np.arange(corners) + 0.5) / corners
    radii = np.where(np.arange(corners) % 2, 0.4, 1.) if kind == 'star' else np.ones(corners)
    points = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points[:, 1] *= rng.uniform(0.6, 1.)
    turn = rng.uniform(0, 2 * np.pi)
    points = points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    points = points * rng.uniform(0.18, 0.36) * min(size) + rng.uniform(0.1, 0.9, 2) * [width, height]
    mask = Image.new('L', (width, height))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=1)
    return np.array(mask, dtype=bool)


class Shapes(torch.utils.data.Dataset):
    """Images of 1 to 5 shapes with torchvision's detection targets; the same index gives the same image.

    Args:
        split: 'train' or 'held_out', which differ in their photographs.
        size: Height and width.
        length: Number of images.
        seed: Another set of images for each seed.
    """

    def __init__(self, split: str, size: Tuple[int, int], length: int, seed: int = 0):
        self.split, self.size, self.length, self.seed = split, size, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index, self.split == 'train'))
        image = random_crop(self.split, self.size, rng).copy()
        masks, areas, labels = [], [], []  # of what is visible, of the whole shape
        wanted = rng.integers(1, 6)
        for _ in range(4 * wanted):
            label = int(rng.integers(1, len(CLASSES)))
            shape = random_shape(CLASSES[label], self.size, rng)
            visible = [mask & ~shape for mask in masks]
            if shape.sum() < 60 or any(left.sum() < MIN_VISIBLE * area for left, area in zip(visible, areas)):
                continue
            masks, areas, labels = [*visible, shape], [*areas, shape.sum()], [*labels, label]
            texture = random_crop(self.split, self.size, rng)
            hue = label / (len(CLASSES) - 1) + rng.normal(0, HUE_SPREAD)
            color = np.float32(colorsys.hsv_to_rgb(hue % 1, rng.uniform(.6, 1.), rng.uniform(.6, 1.)))
            image[shape] = 0.8 * color + 0.2 * texture[shape]
            if len(masks) == wanted:
                break
        masks = torch.from_numpy(np.stack(masks))
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1  # from the last pixel to its far edge
        target = dict(
            boxes=boxes, labels=torch.tensor(labels), masks=masks.to(torch.uint8), image_id=index)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), target


def class_map(target: Dict[str, torch.Tensor]) -> torch.Tensor:
    """The class of each pixel [H, W], for semantic segmentation; 0 is background."""
    return (target['masks'].long() * target['labels'][:, None, None]).amax(0)


def collate(samples: List[Tuple[torch.Tensor, Dict[str, torch.Tensor]]]):
    """A batch as torchvision's detectors take it: lists of images and targets."""
    images, targets = zip(*samples)
    return list(images), list(targets)
