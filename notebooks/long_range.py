"""Two tasks that need detail and distance at once, and small models of several kinds to learn them.

Striped marks of 14 pixels lie on photographs. At each mark a model answers two questions: which way its own stripes
run, which needs detail, and one that needs distance, as nothing near the mark tells:

- *pairs*: which way those of the *other* mark run;
- *counting*: how many of the other four marks have stripes like its own.

Shrunk from 512 x 512 to 224 x 224, the stripes are gray.

    python notebooks/long_range.py FOLDER  # all that notebooks/long_range.ipynb shows; goes on where it was stopped

trains every model into FOLDER, a process per core, or one after the other on a GPU; then
`LONG_RANGE_RUNS=FOLDER jupyter nbconvert --execute ...` draws.
"""
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from shapes import random_crop
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from timm_ls.vil_ls import VilLs

KINDS = 4  # directions that stripes run in: -, |, / and \
MARK = 14  # pixels
STRIDE = 16  # pixels from token to token
EVALUATED = {'pairs': (32, 64, 96, 192, 384, 768), 'counting': (64, 96, 128, 192, 256)}  # pixels
# steps and images a step, by size: a model learns what to look for in small images, and goes on in larger ones
BUDGET = {128: (400, 32), 256: (300, 16), 512: (200, 8), 1024: (80, 4)}


@dataclass(frozen=True)
class Run:
    """One training: what is learned, by which model, from how much."""

    task: str = 'pairs'  # or 'counting'
    size: int = 512  # side of the images in pixels
    shrunk: bool = False  # to 7/16 before a model sees them: from 512 to 224
    model: str = 'long-short'  # a key of `MODELS`
    rank: int = 8
    dual_norm: bool = True
    seed: int = 0
    share: float = 1.  # of the steps

    @property
    def side(self) -> int:
        """What the model is given."""
        return self.size * 7 // 16 if self.shrunk else self.size

    def name(self) -> str:
        """A file name."""
        return '-'.join(str(value) for value in asdict(self).values())

    def start(self) -> Optional['Run']:
        """The run on images of half the size, whose weights this one starts from."""
        return replace(self, size=self.size // 2) if self.size // 2 in BUDGET else None


# Data

@lru_cache(maxsize=2)
def backgrounds(split: str, size: int, count: int) -> torch.Tensor:
    """Crops of photographs, [count, 3, size, size] in 0..255; held-out ones are of other photographs."""
    rng = np.random.default_rng((split == 'train', size))
    crops = [(random_crop(split, (size, size), rng) * 255).astype(np.uint8) for _ in range(count)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def stripes(kind: int) -> np.ndarray:
    """A mark, [MARK, MARK]: white lines of one pixel, three pixels apart, on black."""
    y, x = np.mgrid[:MARK, :MARK]
    return np.where((y, x, y + x, y - x)[kind] % 3 == 0, .95, .05).astype(np.float32)


def draw_pair(image: np.ndarray, distance: float, rng: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
    """Draw two marks into an image [3, H, W]; return their centers [2, (row, column)] and kinds [2]."""
    size, margin = image.shape[-1], MARK
    while True:
        first = rng.uniform(margin, size - margin, 2)
        angle = rng.uniform(0, 2 * np.pi)
        second = first + distance * np.array([np.sin(angle), np.cos(angle)])
        if (second >= margin).all() and (second < size - margin).all():
            break
    corners, kinds = np.stack([first, second]).astype(int) // 8 * 8, rng.integers(KINDS, size=2)
    for (row, col), kind in zip(corners, kinds):
        image[:, row:row + MARK, col:col + MARK] = stripes(kind)
    return corners + MARK // 2, kinds


def draw_group(image: np.ndarray, spread: float, rng: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
    """Draw five marks of two kinds into a square of side `spread` of an image; return as `draw_pair` does."""
    top, left = rng.uniform(0, image.shape[-1] - spread, 2)
    while True:
        corners = (np.array([top, left]) + rng.uniform(0, spread - MARK, (5, 2))).astype(int) // 8 * 8
        apart = np.abs(corners[:, None] - corners[None]).max(-1) + 99 * np.eye(5, dtype=int)
        if apart.min() > MARK:
            break
    first, second = rng.permutation(KINDS)[:2]
    kinds = np.where(np.arange(5) < rng.integers(1, 5), first, second)
    for (row, col), kind in zip(corners, kinds):
        image[:, row:row + MARK, col:col + MARK] = stripes(kind)
    return corners + MARK // 2, kinds


def batch_of(
    run: Run, split: str, count: int, rng: np.random.Generator, distance: float = 0,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [count, 3, size, size] in 0..1, places [count, marks, 2] in pixels, targets [count, marks, 2].

    Targets are the kind of a mark itself, and of the other one (pairs) or how many other marks are of its kind
    (counting), 0 to 3. Without `distance`, the marks lie as far apart as chance has it.
    """
    photos = backgrounds(split, run.size, 16 if run.share < 1 else 128 if split == 'train' else 64)
    images = photos[torch.from_numpy(rng.integers(len(photos), size=count))].float().div(255).numpy()
    places, targets = [], []
    for image in images:
        pairs = run.task == 'pairs'
        nearest, farthest = (24, .94 * run.size) if pairs else (64, run.size)
        far = distance or 2 ** rng.uniform(math.log2(nearest), math.log2(farthest))
        centers, kinds = (draw_pair if pairs else draw_group)(image, far, rng)
        places.append(centers)
        others = kinds[::-1] if pairs else (kinds[:, None] == kinds).sum(1) - 1
        targets.append(np.stack([kinds, others], axis=1))
    return torch.from_numpy(images), torch.from_numpy(np.stack(places)), torch.from_numpy(np.stack(targets))


# Models

class FixedProjection(nn.Module):
    """The same weights for whatever image: what Linformer distils its keys with, under the same softmax over tokens."""

    def __init__(self, num_tokens: int, columns: int):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(num_tokens, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(x.shape[0], -1, -1)


class AblatedVilLs(VilLs):
    """ViL-LS without the two norms of DualLN, or with a fixed projection in place of the dynamic one.

    Args:
        img_size: Side in pixels.
        dual_norm: Normalize keys and values, and landmarks again.
        dynamic: Let the image decide what landmarks are distilled from.
        **kwargs: As for `VilLs`.
    """

    def __init__(self, img_size: int, dual_norm: bool, dynamic: bool, **kwargs: Any):
        super().__init__(img_size=img_size, **kwargs)
        for stage, reduction in zip(self.stages, self.reductions):
            for block in stage.blocks:
                attn = block.attn
                if not dual_norm:
                    attn.norm_kv, attn.norm_landmarks = nn.Identity(), nn.Identity()
                if not dynamic:
                    num_tokens = attn.num_global_tokens + math.ceil(img_size / reduction) ** 2
                    attn.dynamic_projection = FixedProjection(num_tokens, attn.num_heads * attn.rank)


class TokenClassifier(nn.Module):
    """A body and a linear layer that answers at every token: images to [B, rows, columns, 2 questions, 4 answers]."""

    def __init__(self, run: Run):
        super().__init__()
        self.body, dim = make_body(run.model, run.side, run.rank, run.dual_norm)
        self.head = nn.Linear(dim, 2 * KINDS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.body.forward_features((images - .45) / .25)
        if isinstance(self.body, SwinTransformer):
            x = x.permute(0, 3, 1, 2)  # NHWC
        if x.ndim == 3:
            side = math.isqrt(x.shape[1])
            x = x[:, x.shape[1] - side ** 2:].transpose(1, 2).unflatten(2, (side, side))  # without global tokens
        return self.head(x.permute(0, 2, 3, 1)).unflatten(-1, (2, KINDS))


MODELS = {
    'long-short': 'window and landmarks',
    'window': 'window only',
    'fixed': 'window and a fixed projection',
    'swin': 'Swin',
    'vit': 'ViT',
}


def make_body(model: str, side: int, rank: int, dual_norm: bool) -> Tuple[nn.Module, int]:
    """A model of some 150,000 to 200,000 parameters and its channels, at a stride of 16."""
    shape: Dict[str, Any] = dict(embed_dims=(32, 64), depths=(1, 3), num_heads=(2, 2), patch_sizes=(8, 2))
    stages, dim = len(shape['depths']), shape['embed_dims'][-1]
    if model == 'swin':
        return SwinTransformer(
            img_size=side, patch_size=shape['patch_sizes'][0], embed_dim=shape['embed_dims'][0], depths=shape['depths'],
            num_heads=shape['num_heads'], window_size=8, drop_path_rate=0., num_classes=0), dim
    if model == 'vit':
        return VisionTransformer(
            img_size=side, patch_size=math.prod(shape['patch_sizes']), embed_dim=dim, depth=shape['depths'][-1],
            num_heads=shape['num_heads'][-1], class_token=False, global_pool='avg', fc_norm=False, num_classes=0), dim
    far = model != 'window'
    return AblatedVilLs(
        side, dual_norm, model != 'fixed', rank=rank if far else 0, num_global_tokens=(int(far),) * stages,
        attn_types=('ls',) * stages, num_classes=0, global_pool='', **shape), dim


# Training

def answers(model: nn.Module, run: Run, images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Logits at the tokens that hold the places, [B, places, 2, 4]."""
    scale = run.side / run.size
    if run.shrunk:
        images = F.interpolate(images, size=(run.side, run.side), mode='bicubic', antialias=True, align_corners=False)
    logits = model(images)
    cells = (places * scale / STRIDE).long()
    return logits[torch.arange(len(images), device=images.device)[:, None], cells[..., 0], cells[..., 1]]


def resize_map(x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Resample what is learned per token, [1, tokens, channels], global tokens first, to another number of tokens."""
    old, new = math.isqrt(x.shape[1]), math.isqrt(num_tokens)
    first = x.shape[1] - old ** 2
    square = x[:, first:].transpose(1, 2).unflatten(2, (old, old))
    square = F.interpolate(square, size=(new, new), mode='bicubic', align_corners=False)
    return torch.cat([x[:, :first], square.flatten(2).transpose(1, 2)], dim=1)


def load_smaller(model: nn.Module, weights: Dict[str, torch.Tensor]) -> None:
    """Load the weights of the same model for smaller images."""
    for name, wanted in model.state_dict().items():
        if weights[name].shape != wanted.shape:
            x = weights[name].reshape(1, -1, wanted.shape[-1])
            weights = {**weights, name: resize_map(x, wanted.shape[-2]).reshape(wanted.shape)}
    model.load_state_dict(weights)


def train(run: Run, device: str = 'cpu', start: Optional[Dict[str, torch.Tensor]] = None) -> Dict[str, Any]:
    """Train a model and measure it on held-out images: its weights and the measurements."""
    torch.manual_seed(run.seed)
    rng = np.random.default_rng((1, run.seed))
    model = TokenClassifier(run).to(device)
    if start:
        load_smaller(model, start)
    steps, batch = BUDGET[run.size]
    steps = math.ceil(run.share * steps)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=decayed), dict(params=others, weight_decay=0.)]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=.02)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / warmup, .5 + .5 * math.cos(math.pi * step / steps)))
    losses, seconds = [], -time.process_time()
    for _ in range(steps):
        images, places, targets = (x.to(device) for x in batch_of(run, 'train', batch, rng))
        logits = answers(model, run, images, places)
        loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        schedule.step()
        losses.append(F.cross_entropy(logits[..., -1, :].flatten(0, 1), targets[..., -1].flatten()).item())
    seconds += time.process_time()
    return dict(
        weights={name: x.cpu() for name, x in model.state_dict().items()}, losses=losses, cpu_seconds=seconds,
        parameters=sum(p.numel() for p in model.parameters()), correct=evaluate(model, run, device))


@torch.no_grad()
def evaluate(model: nn.Module, run: Run, device: str = 'cpu') -> Dict[str, float]:
    """Share of right answers on held-out images: about other marks, by distance, and about the mark itself, 'own'."""
    model.eval()
    rng = np.random.default_rng((2, run.size))  # the same images for all models
    correct: Dict[str, float] = {}

    def ask(distance: float) -> torch.Tensor:
        right = []
        for _ in range(8 if run.share == 1 else 1):
            images, places, targets = (x.to(device) for x in batch_of(run, 'held_out', 8, rng, distance))
            right.append(answers(model, run, images, places).argmax(-1) == targets)
        return torch.cat(right).float()

    most = .8 * run.size if run.task == 'pairs' else run.size
    distances = [distance for distance in EVALUATED[run.task] if distance <= most]
    for distance in distances:
        right = ask(distance)
        correct[str(distance)] = right[..., 1].mean().item()
        correct['own'] = correct.get('own', 0.) + right[..., 0].mean().item() / len(distances)
    model.train()
    return correct


# All runs

def all_runs(share: float = 1., seeds: Sequence[int] = (0, 1, 2)) -> Dict[str, List[Run]]:
    """What the notebook shows: the runs of each of its sections."""
    models = ('long-short', 'window', 'swin', 'vit')
    pairs = [Run(model=model, seed=seed, share=share) for seed in seeds for model in models]
    counting = [replace(run, task='counting', size=256) for run in pairs]
    return dict(
        pairs=pairs,
        shrunk=[Run(shrunk=True, seed=seed, share=share) for seed in seeds],
        large=[replace(run, size=1024) for run in pairs if run.model != 'vit'],
        counting=counting,
        small_counting=[replace(run, size=128) for run in counting],
        ablation=[Run(size=256, share=share, **changed) for changed in (
            dict(), dict(dual_norm=False), dict(rank=0), dict(rank=2), dict(rank=32), dict(model='fixed'))])


def result(run: Run, folder: Path, device: str = 'cpu') -> Dict[str, Any]:
    """Return what a run gave, from the folder, or train it now."""
    file = folder / f'{run.name()}.pt'
    if not file.exists():
        if device == 'cpu':
            torch.set_num_threads(1)
        start = run.start()
        trained = train(run, device, result(start, folder, device)['weights'] if start else None)
        temporary = file.with_suffix(f'.{os.getpid()}')
        torch.save(trained, temporary)
        temporary.replace(file)
    return torch.load(file, weights_only=True)


def with_starts(runs: Sequence[Run]) -> List[Run]:
    """The runs and those that they start from, each once, smallest images first."""
    found = dict.fromkeys(runs)
    for run in found.copy():
        start = run.start()
        while start:
            found[start] = None
            start = start.start()
    return sorted(found, key=lambda run: run.size)


def train_all(runs: Sequence[Run], folder: Path) -> None:
    """Train what the folder lacks, a process per core without a GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    workers = 1 if device == 'cuda' else len(os.sched_getaffinity(0))
    missing = [run for run in with_starts(runs) if not (folder / f'{run.name()}.pt').exists()]
    started, done = time.time(), 0
    with ProcessPoolExecutor(workers, multiprocessing.get_context('spawn')) as pool:
        for _, ready in groupby(missing, key=lambda run: run.size):  # what they start from is there
            for future in [pool.submit(result, run, folder, device) for run in ready]:
                future.result()
                done += 1
                print(f'\r{done} of {len(missing)} trained, {(time.time() - started) / 60:.0f} min', end='', flush=True)
    print()


def load(run: Run, folder: Path) -> nn.Module:
    """The trained model of a run."""
    model = TokenClassifier(run)
    model.load_state_dict(result(run, folder)['weights'])
    return model.eval()


if __name__ == '__main__':
    train_all([run for runs in all_runs().values() for run in runs], Path(sys.argv[1]))
