"""A character language model of Python source: long-short attention, its window alone, or full attention.

The text is the top level of Python's own standard library, 168 files and 4.7 MB in Python 3.11, which every
installation has, under the PSF License Version 2. Characters are bytes. The last ones are the test set, as many before
them the validation set. Each sequence is read alone, with no memory of another.

    python charlm.py                        # long-short attention
    python charlm.py --attention window     # without landmarks
    python charlm.py --attention full       # with rotary positions
    python charlm.py --cost-at 16384        # of one training step over one sequence of that length, instead

The last line printed is a report in JSON.
"""
import argparse
import json
import math
import sysconfig
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from sequence_cost import CausalFullAttention, peak_mib

from timm_ls.cli import whole_number
from timm_ls.sequence import CausalLanguageModel


def read_text() -> torch.Tensor:
    """Return the bytes of the standard library's top level, in the order of the file names."""
    files = sorted(Path(sysconfig.get_path('stdlib')).glob('*.py'))
    return torch.frombuffer(bytearray(b''.join(file.read_bytes() for file in files)), dtype=torch.uint8)


def build(args: argparse.Namespace) -> CausalLanguageModel:
    """Return the language model with the attention asked for."""
    num_heads, rank = args.dim // 32, args.rank if args.attention == 'long-short' else 0
    model = CausalLanguageModel(
        256, args.dim, args.depth, num_heads, args.window_size, args.segment_size, rank, args.max_segments)
    if args.attention == 'full':
        for block in model.blocks:
            block.attn = CausalFullAttention(args.dim, num_heads)
        model.init_weights()
    return model


def bits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean bits per character of sequences [B, N + 1], of all but their first."""
    logits, _ = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / math.log(2)


def train(model: nn.Module, data: torch.Tensor, args: argparse.Namespace) -> List[Tuple[int, float]]:
    """Train with AdamW on sequences from anywhere in the text; return the course of bits per character.

    The learning rate rises for a tenth of the steps and falls then.
    """
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(.9, .98), weight_decay=.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps + 1, pct_start=.1)
    history, losses = [], []
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(data) - args.length, (args.batch_size, 1), generator=generator)
        loss = bits(model, data[starts + torch.arange(args.length + 1)].long())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == args.steps:
            history.append((step, round(sum(losses) / len(losses), 3)))
            losses.clear()
            print('step {}: {:.3f} bits per character'.format(*history[-1]), flush=True)
    return history


@torch.no_grad()
def evaluate(model: nn.Module, data: torch.Tensor, args: argparse.Namespace) -> float:
    """Return the mean bits per character over text, cut into sequences of the training's length."""
    model.eval()
    whole = data[:(len(data) - 1) // args.length * args.length + 1].long()
    sequences = whole.unfold(0, args.length + 1, args.length)
    result = sum(bits(model, part).item() * len(part) for part in sequences.split(args.batch_size))
    model.train()
    return result / len(sequences)


def run(arguments: Optional[Sequence[str]] = None) -> Tuple[CausalLanguageModel, Dict[str, Any]]:
    """Train and test one model, or measure a training step; return the model and a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--attention', choices=['long-short', 'window', 'full'], default='long-short')
    parser.add_argument('--dim', type=whole_number(), default=128)
    parser.add_argument('--depth', type=whole_number(), default=4)
    parser.add_argument('--window-size', type=whole_number(), default=64)
    parser.add_argument('--segment-size', type=whole_number(), default=16)
    parser.add_argument('--rank', type=whole_number(), default=1)
    parser.add_argument('--max-segments', type=whole_number(), default=64,
                        help='that a query sees: at the length of 1,024, all')
    parser.add_argument('--length', type=whole_number(), default=1024)
    parser.add_argument('--batch-size', type=whole_number(), default=8)
    parser.add_argument('--steps', type=whole_number(), default=1000)
    parser.add_argument('--lr', type=float, default=1e-3, help='the highest learning rate')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--held-out', type=whole_number(), default=200_000,
                        help='characters to test with, and to validate with')
    parser.add_argument('--cost-at', type=whole_number(), metavar='LENGTH')
    args = parser.parse_args(arguments)
    data = read_text()
    if args.cost_at and args.cost_at >= len(data):
        parser.error(f'--cost-at {args.cost_at}: expected fewer than the {len(data)} characters of the text')
    if not args.cost_at and not args.length < args.held_out < (len(data) - args.length) / 2:
        parser.error(
            f'--held-out {args.held_out}: expected more than --length {args.length}, and as much of the text,'
            f' {len(data)} characters, to be left when it is taken twice')
    torch.manual_seed(args.seed)
    model = build(args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    report: Dict[str, Any] = {'attention': args.attention, 'parameters': parameters}
    start = time.process_time()
    if args.cost_at:
        bits(model, data[None, :args.cost_at + 1].long()).backward()
        report.update(length=args.cost_at)
    else:
        history = train(model, data[:-2 * args.held_out], args)
        report.update(characters=args.steps * args.batch_size * args.length, lr=args.lr, history=history)
    report.update(cpu_seconds=round(time.process_time() - start, 1), peak_mib=round(peak_mib()))
    if not args.cost_at:
        report['val'] = round(evaluate(model, data[-2 * args.held_out:-args.held_out], args), 4)
        report['test'] = round(evaluate(model, data[-args.held_out:], args), 4)
    return model, report


if __name__ == '__main__':
    print(json.dumps(run()[1]))
