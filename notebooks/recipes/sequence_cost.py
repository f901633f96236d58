"""Time and peak memory of one attention layer over one sequence, for several lengths, each in a process of its own.

    python sequence_cost.py long-short causal full --lengths 1024 4096 16384 65536 --train

256 channels, 8 heads, one thread. CPU seconds are those of the fastest of some passes; memory is what the process held
beyond what it held before, freed memory being handed back at once. The other recipes for sequences take their full
attention from here.
"""
import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_ls import CausalLongShortAttention1d, LongShortAttention1d
from timm_ls.cli import whole_number


class FullAttention(nn.Module):
    """Attention of every token to all, in place of `LongShortAttention1d`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
            self,
            x: torch.Tensor,
            mask: Optional[torch.Tensor] = None,
            global_tokens: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        g = 0 if global_tokens is None else global_tokens.shape[1]
        if global_tokens is not None:
            x = torch.cat([global_tokens, x], dim=1)
        if mask is not None:
            mask = F.pad(mask, (g, 0), value=True)[:, None, None]
        q, k, v = self.project(x)
        x = self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x[:, g:], x[:, :g] if g > 0 else None

    def project(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values, each [B, heads, N, channels of a head]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class CausalFullAttention(FullAttention):
    """Attention to all tokens up to one's own, with rotary positions, in place of `CausalLongShortAttention1d`."""

    def forward(self, x: torch.Tensor, memory: None = None) -> torch.Tensor:
        q, k, v = self.project(x)
        half = q.shape[3] // 2
        angles = torch.arange(x.shape[1])[:, None] * 10000 ** (-torch.arange(half) / half)
        cos, sin = angles.cos().to(x), angles.sin().to(x)

        def rotate(x: torch.Tensor) -> torch.Tensor:
            first, second = x.split(half, dim=3)
            return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3)

        out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.proj(out.transpose(1, 2).flatten(2))


WARM_UP = 256  # tokens of a first pass, which is not measured
LAYERS = {
    'long-short': lambda: LongShortAttention1d(256, 8, window_size=64, rank=16),
    'causal': lambda: CausalLongShortAttention1d(256, 8, window_size=64, segment_size=16, rank=1, max_segments=64),
    'full': lambda: FullAttention(256, 8),
}


def peak_mib() -> float:
    """Return the most memory that the process has held, Python and torch included, in MiB."""
    status = Path('/proc/self/status')
    if status.exists():  # Linux, where getrusage counts the process that started this one as well
        line = next(line for line in status.read_text().splitlines() if line.startswith('VmHWM:'))
        return int(line.split()[1]) / 2 ** 10
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


def measure(name: str, length: int, train: bool) -> Dict[str, float]:
    """Measure one layer in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = LAYERS[name]()

    def run(length: int) -> float:
        start = time.process_time()
        with torch.set_grad_enabled(train):
            out = layer(torch.randn(1, length, 256, requires_grad=train))
            if train:
                (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
        return time.process_time() - start

    run(WARM_UP)  # whatever is set up once
    before = peak_mib()
    seconds = [run(length)]
    peak = peak_mib() - before
    while len(seconds) < 5 and sum(seconds) < 10:
        seconds.append(run(length))
    return {'cpu_seconds': min(seconds), 'peak_mib': peak}


def in_process(recipe: str, *options: Any) -> Dict[str, Any]:
    """Run a recipe in a process of its own and return its report, the last line that it prints."""
    # what is freed goes back to the system, and does not hide what is allocated later
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, recipe, *map(str, options)]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def exponent(cells: List[Dict[str, float]], figure: str) -> float:
    """Return the slope of a figure against length, both as logarithms, by least squares."""
    points = [(math.log(cell['length']), math.log(cell[figure])) for cell in cells]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Print a table and a report in JSON, or one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('layers', nargs='+', choices=LAYERS)
    parser.add_argument('--lengths', type=whole_number(), nargs='+', default=[1024, 4096, 16384, 65536])
    parser.add_argument('--train', action='store_true', help='forward and backward')
    parser.add_argument('--one', type=whole_number(), metavar='LENGTH', help='measure in this process')
    args = parser.parse_args(arguments)
    if min(args.lengths) <= WARM_UP:  # whose memory would be no more than what is held already
        parser.error(f'--lengths {args.lengths}: expected lengths above {WARM_UP}, that of the first pass.')
    if args.one:
        print(json.dumps(measure(args.layers[0], args.one, args.train)))
        return
    report = []
    for name in args.layers:
        cells = []
        for length in args.lengths:
            figures = in_process(__file__, name, '--one', length, *['--train'] * args.train)
            cells.append({'length': length, **figures})
            print(f"{name} {length}: {figures['cpu_seconds']:.3f} s, {figures['peak_mib']:.0f} MiB", flush=True)
        exponents = {'time': exponent(cells, 'cpu_seconds'), 'memory': exponent(cells, 'peak_mib')}
        print(f"{name}: exponents {exponents['time']:.2f} of time, {exponents['memory']:.2f} of memory", flush=True)
        report.append({'layer': name, 'cells': cells, 'exponents': exponents})
    print(json.dumps(report))


if __name__ == '__main__':
    main()
