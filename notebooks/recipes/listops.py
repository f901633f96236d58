"""ListOps of Long Range Arena: nested lists of operations on digits, generated, and a classifier of their results.

The task is that of Nangia & Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", 2018 (arXiv 1804.06028)
at the lengths of Tay et al., "Long Range Arena", 2021 (arXiv 2011.04006): sequences such as

    [MAX 2 9 [MIN 4 7 ] 0 ]

of more than 500 and fewer than 2,000 tokens, whose result, a digit, is to be told. A node is an operation with
probability 1/4, down to a depth of 10, and a digit otherwise; an operation is one of four and has two to ten arguments,
each number equally likely. Sequences are distinct: 2,000 to test, 2,000 to validate and 96,000 to train with, drawn in
this order, so that those of a smaller training set are tested likewise.

    python listops.py                     # one pass over the training set, with long-short attention
    python listops.py --attention full
    python listops.py --min-length 50 --max-length 200 --steps 300    # shorter sequences, for a first look

The last line printed is a report in JSON.
"""
import argparse
import json
import random
import time
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from sequence_cost import FullAttention, peak_mib

from timm_ls.cli import whole_number
from timm_ls.sequence import SequenceEncoder

MAX_DEPTH, MAX_ARGS = 10, 10
Examples = List[Tuple[bytes, int]]  # sequences, a byte a token, with their results


def median(values: List[int]) -> int:
    """Return the middle value, or the mean of the middle two, rounded down."""
    middle = sorted(values)[(len(values) - 1) // 2:len(values) // 2 + 1]
    return sum(middle) // len(middle)


OPERATIONS = {'[MIN': min, '[MAX': max, '[MED': median, '[SM': lambda values: sum(values) % 10}
VOCABULARY = [str(digit) for digit in range(10)] + list(OPERATIONS) + [']']


def draw(rng: random.Random, tokens: List[int], max_length: int, depth: int = 1) -> Optional[int]:
    """Append a random expression to `tokens` and return its value, or None as soon as there are `max_length`."""
    if depth == MAX_DEPTH or rng.random() > .25:
        tokens.append(rng.randrange(10))
        return tokens[-1]
    operation = rng.choice(list(OPERATIONS))
    tokens.append(VOCABULARY.index(operation))
    values = []
    for _ in range(rng.randint(2, MAX_ARGS)):
        value = draw(rng, tokens, max_length, depth + 1)
        if value is None or len(tokens) >= max_length:
            return None
        values.append(value)
    tokens.append(VOCABULARY.index(']'))
    return OPERATIONS[operation](values)


def examples(number: int, min_length: int = 500, max_length: int = 2000, seed: int = 0) -> Examples:
    """Draw distinct sequences, longer than `min_length` and shorter than `max_length`."""
    rng, found = random.Random(seed), {}
    while len(found) < number:
        tokens: List[int] = []
        value = draw(rng, tokens, max_length)
        if value is not None and min_length < len(tokens) < max_length:
            found[bytes(tokens)] = value
    return list(found.items())


class Classifier(nn.Module):
    """The encoder with the paper's sizes for Long Range Arena, and a digit told from its global token."""

    def __init__(self, attention: str, max_length: int, window_size: int, rank: int):
        super().__init__()
        self.encoder = SequenceEncoder(len(VOCABULARY), max_length, window_size=window_size, rank=rank)
        if attention == 'full':
            for block in self.encoder.blocks:
                block.attn = FullAttention(block.attn.dim, block.attn.num_heads)
        dim = self.encoder.norm.normalized_shape[0]
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, 10))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(tokens, mask)[1][:, 0])


def batches(data: Examples, batch_size: int, rng: random.Random) -> Iterator[Tuple[torch.Tensor, ...]]:
    """Yield all data in a random order: tokens and mask, [B, N], and results, [B]; lengths in a batch are similar."""
    data = rng.sample(data, len(data))
    pool = 64 * batch_size
    for start in range(0, len(data), pool):
        part = sorted(data[start:start + pool], key=lambda example: len(example[0]))
        groups = [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
        for group in rng.sample(groups, len(groups)):
            length = max(len(tokens) for tokens, _ in group)
            tokens = torch.tensor([list(tokens.ljust(length, b'\0')) for tokens, _ in group])
            lengths = torch.tensor([len(tokens) for tokens, _ in group])
            yield tokens, torch.arange(length) < lengths[:, None], torch.tensor([result for _, result in group])


def train(model: nn.Module, data: Examples, args: argparse.Namespace) -> List[Tuple[int, float]]:
    """Train with AdamW, the learning rate rising for a fifth of the steps, then falling; return the course of loss."""
    rng, history, losses, step = random.Random(args.seed), [], [], 0
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, args.steps + 1, pct_start=.2, anneal_strategy='linear')
    while step < args.steps:
        for tokens, mask, results in batches(data, args.batch_size, rng):
            loss = F.cross_entropy(model(tokens, mask), results)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.)
            optimizer.step()
            schedule.step()
            step += 1
            losses.append(loss.item())
            if step % 20 == 0 or step == args.steps:
                history.append((step, round(sum(losses) / len(losses), 3)))
                losses.clear()
                print('step {}: loss {:.3f}'.format(*history[-1]), flush=True)
            if step == args.steps:
                break
    return history


@torch.no_grad()
def accuracy(model: nn.Module, data: Examples, batch_size: int) -> float:
    """Return the share of right results."""
    model.eval()
    right = sum((model(tokens, mask).argmax(1) == results).sum().item()
                for tokens, mask, results in batches(data, batch_size, random.Random(0)))
    model.train()
    return right / len(data)


def run(arguments: Optional[Sequence[str]] = None) -> Tuple[Classifier, Dict[str, Any]]:
    """Train and test one model; return it and a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--attention', choices=['long-short', 'full'], default='long-short')
    parser.add_argument('--window-size', type=whole_number(), default=8)
    parser.add_argument('--rank', type=whole_number(), default=32)
    parser.add_argument('--steps', type=whole_number(), default=3000,
                        help='3,000 batches of 32 are the training set, once')
    parser.add_argument('--batch-size', type=whole_number(), default=32)
    parser.add_argument('--lr', type=float, default=1e-3, help='the highest learning rate')
    parser.add_argument('--min-length', type=whole_number(), default=500, help='sequences are longer')
    parser.add_argument('--max-length', type=whole_number(), default=2000, help='sequences are shorter')
    parser.add_argument('--train-examples', type=whole_number(), default=96_000)
    parser.add_argument('--held-out', type=whole_number(), default=2_000,
                        help='sequences to test with, and to validate with')
    parser.add_argument('--seed', type=int, default=0, help='of the weights and the order of the data')
    args = parser.parse_args(arguments)
    if args.max_length - args.min_length < 2:
        parser.error(f'--max-length {args.max_length}: expected 2 more than --min-length {args.min_length}, or longer')
    data = examples(2 * args.held_out + args.train_examples, args.min_length, args.max_length)
    test, val, data = data[:args.held_out], data[args.held_out:2 * args.held_out], data[2 * args.held_out:]

    torch.manual_seed(args.seed)
    model = Classifier(args.attention, args.max_length, args.window_size, args.rank)
    at_rest, start = peak_mib(), time.process_time()
    history = train(model, data, args)
    return model, {
        'attention': args.attention,
        'parameters': sum(parameter.numel() for parameter in model.parameters()),
        'examples': args.steps * args.batch_size,
        'lr': args.lr,
        'cpu_seconds': round(time.process_time() - start, 1),
        'peak_mib': round(peak_mib() - at_rest),
        'val': accuracy(model, val, args.batch_size),
        'test': accuracy(model, test, args.batch_size),
        'history': history,
    }


if __name__ == '__main__':
    print(json.dumps(run()[1]))
