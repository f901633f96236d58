"""What `timm_ls.adopt` saves: time and peak memory of one attention layer of Surya, as it is and adopted.

    pip install --no-deps terratorch-surya einops
    python adopt_cost.py --tokens 65536 --train --bf16
    python adopt_cost.py --whole 2048           # peak memory of the whole model instead, for images of that side

Surya's sizes: 1,280 channels, 16 heads, windows of 2, 4 landmarks. The two take turns in one process, for their times;
then each runs in a process of its own, for the most that it holds beyond what it held before.
"""
import argparse
import json
import math
import time
import warnings
from typing import Any, Callable, Dict, Optional, Sequence

import torch
import torch.nn as nn
from sequence_cost import in_process

from timm_ls import adopt
from timm_ls.benchmark import resident_bytes
from timm_ls.cli import whole_number

LAYERS = ('theirs', 'ours')


def build(name: str, side: int = 0) -> nn.Module:
    """Return a model of one layer of Surya, adopted or not; with a side, the whole of it, for images of that size."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # it imports from timm.models.layers
        from terratorch_surya.models.helio_spectformer import HelioSpectFormer
        from terratorch_surya.models.transformer_ls import AttentionLS
    torch.manual_seed(0)
    model = HelioSpectFormer(
        side, 16, 13, 1280, dict(type='linear', time_dim=2), 10, 2, 16, 4., 0., 2, 4, finetune=False,
    ) if side else nn.Sequential(AttentionLS(1280, 16, w=2, dp_rank=4, nglo=0))
    if name == 'ours':
        adopt(model)
    return model


def make_step(name: str, args: argparse.Namespace) -> Callable[[int], torch.Tensor]:
    """Return what runs a layer once, over so many tokens of a square map."""
    model = build(name, args.whole).train(args.train)

    def step(tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        if args.whole:
            images = torch.randn(1, 13, 2, args.whole, args.whole, generator=generator)
            x: Any = {'ts': images, 'time_delta_input': torch.zeros(1, 2)}
        else:
            x = torch.randn(1, tokens, 1280, generator=generator, requires_grad=args.train)
        with torch.set_grad_enabled(args.train), torch.autocast('cpu', torch.bfloat16, enabled=args.bf16):
            out = model(x)
        if args.train:
            out.sum().backward()
            model.zero_grad()
        return out.detach().float()

    return step


def peaks(options: Sequence[Any], args: argparse.Namespace) -> Dict[str, int]:
    """Return the peak of each, measured in a process of its own."""
    options = [*options, *['--train'] * args.train, *['--bf16'] * args.bf16]
    return {name: in_process(__file__, '--one', name, *options)['peak_mib'] for name in LAYERS}


def main(arguments: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    """Print a report in JSON, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=whole_number(), default=65536, help='of a square map')
    parser.add_argument('--whole', type=int, default=0, metavar='SIDE', help='the whole model, its memory only')
    parser.add_argument('--train', action='store_true', help='forward and backward')
    parser.add_argument('--bf16', action='store_true', help='under autocast')
    parser.add_argument('--turns', type=whole_number(), default=3)
    parser.add_argument('--one', choices=LAYERS, help='measure the memory of one in this process')
    args = parser.parse_args(arguments)
    side = math.isqrt(args.tokens)
    if side ** 2 != args.tokens or side % 2:
        parser.error(f'--tokens {args.tokens}: expected the square of an even side, for windows of 2 x 2')
    if args.one:
        step = make_step(args.one, args)
        if not args.whole:
            step(16)  # whatever is set up once
        before = resident_bytes('VmRSS')
        step(args.tokens)
        report: Dict[str, Any] = {'peak_mib': (resident_bytes('VmHWM') - before) >> 20}
    elif args.whole:
        report = {'peak_mib': peaks(['--whole', args.whole], args)}
    else:
        steps = {name: make_step(name, args) for name in LAYERS}
        outs = {name: step(args.tokens) for name, step in steps.items()}
        report = {'difference': ((outs['ours'] - outs['theirs']).abs().max() / outs['theirs'].abs().max()).item()}
        faster = []
        for _ in range(args.turns):
            seconds = {}
            for name, step in steps.items():
                start = time.perf_counter()
                step(args.tokens)
                seconds[name] = time.perf_counter() - start
            faster.append(seconds['theirs'] / seconds['ours'])
        report['times_faster'] = sorted(faster)[len(faster) // 2]
        report['peak_mib'] = peaks(['--tokens', args.tokens], args)
    print(json.dumps(report))
    return report


if __name__ == '__main__':
    main()
