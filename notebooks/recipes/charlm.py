"""A character language model of Python source: long-short attention, its window alone, or full attention.

The text is the top level of Python's own standard library, 168 files and 4.7 MB in Python 3.11, which every
installation has, under the PSF License Version 2. Characters are bytes; the last 200,000 are the test set, those before
them the validation set. Each sequence is read alone, with no memory of another.

    python charlm.py                        # long-short attention
    python charlm.py --attention window     # without landmarks
    python charlm.py --attention full
    python charlm.py --peak-at 16384        # memory of one training step instead, one sequence of that length

The last line printed is a report in JSON.
"""
import argparse
import json
import math
import resource
import sysconfig
import time
from pathlib import Path
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_ls.sequence import CausalLanguageModel

HELD_OUT = 200_000


def text() -> torch.Tensor:
    """Return the bytes of the standard library's top level, in the order of the file names."""
    files = sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    return torch.frombuffer(bytearray(b''.join(file.read_bytes() for file in files)), dtype=torch.uint8)


class FullAttention(nn.Module):
    """Attention to all tokens up to one's own, with rotary positions, in place of `CausalLongShortAttention1d`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, memory: Optional[torch.Tensor] = None) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, h, N, d]
        half = q.shape[3] // 2
        frequencies = 10000 ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            first, second = x.split(half, dim=3)
            return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3)

        out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


def build(args: argparse.Namespace) -> CausalLanguageModel:
    """Return the language model with the attention asked for."""
    rank = args.rank if args.attention == 'long-short' else 0
    model = CausalLanguageModel(
        256, args.dim, args.depth, args.dim // 32, args.window_size, args.segment_size, rank, args.max_segments)
    if args.attention == 'full':
        for block in model.blocks:
            block.attn = FullAttention(args.dim, block.attn.num_heads)
        model.init_weights()
    return model


def bits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean bits per character of sequences [B, N + 1], of all but their first."""
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


def train(model: nn.Module, data: torch.Tensor, args: argparse.Namespace) -> None:
    """Train with AdamW on sequences from anywhere in the text, the learning rate rising, then falling."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(.9, .98), weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps + 1, pct_start=.1)
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(data) - args.length, (args.batch_size, 1), generator=generator)
        loss = bits(model, data[starts + torch.arange(args.length + 1)].long())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f'step {step}: {loss.item():.3f} bits per character', flush=True)


@torch.no_grad()
def evaluate(model: nn.Module, data: torch.Tensor, args: argparse.Namespace) -> float:
    """Mean bits per character over text, cut into sequences of the training's length."""
    model.eval()
    whole = data[:(len(data) - 1) // args.length * args.length + 1].long()
    sequences = whole.unfold(0, args.length + 1, args.length)
    result = sum(bits(model, part).item() * len(part) for part in sequences.split(args.batch_size))
    model.train()
    return result / len(sequences)


def peak_mib() -> int:
    """Most memory that the process has held, Python and torch included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Train and test one model, or measure a training step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--attention', choices=['long-short', 'window', 'full'], default='long-short')
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument('--depth', type=int, default=4)
    parser.add_argument('--window-size', type=int, default=64)
    parser.add_argument('--segment-size', type=int, default=16)
    parser.add_argument('--rank', type=int, default=1)
    parser.add_argument('--max-segments', type=int, help='segments that a query sees; all by default')
    parser.add_argument('--length', type=int, default=1024)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--steps', type=int, default=1000)
    parser.add_argument('--lr', type=float, default=1e-3, help='the highest learning rate')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--held-out', type=int, default=HELD_OUT, help='characters to test with, and to validate with')
    parser.add_argument('--peak-at', type=int, metavar='LENGTH')
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, data = build(args), text()
    start = time.process_time()
    report = {'attention': args.attention, 'parameters': sum(parameter.numel() for parameter in model.parameters())}
    if args.peak_at:
        bits(model, data[None, :args.peak_at + 1].long()).backward()
        report['length'] = args.peak_at
    else:
        train(model, data[:-2 * args.held_out], args)
        report.update(steps=args.steps, characters=args.steps * args.batch_size * args.length, lr=args.lr)
    report.update(cpu_seconds=round(time.process_time() - start, 1), peak_mib=peak_mib())
    if not args.peak_at:
        report['val'] = evaluate(model, data[-2 * args.held_out:-args.held_out], args)
        report['test'] = evaluate(model, data[-args.held_out:], args)
    print(json.dumps(report))


if __name__ == '__main__':
    main()
