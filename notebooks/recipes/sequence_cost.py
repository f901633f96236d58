"""Time and peak memory of one attention layer over one sequence, for several lengths, each in a process of its own.

    python sequence_cost.py long-short causal full --lengths 1024 4096 16384 65536 --train

256 channels, 8 heads. CPU seconds are those of the fastest of some passes; memory is what the process held beyond what
it held before, freed memory being handed back at once.
"""
import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from typing import Dict, List

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_ls import CausalLongShortAttention1d, LongShortAttention1d

DIM, HEADS = 256, 8


class FullAttention(nn.Module):
    """Attention of every token to all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


LAYERS = {
    'long-short': lambda: LongShortAttention1d(DIM, HEADS, window_size=64, rank=16),
    'causal': lambda: CausalLongShortAttention1d(DIM, HEADS, 64, segment_size=16, rank=1, max_segments=64),
    'full': FullAttention,
}


def measure(name: str, length: int, train: bool) -> Dict[str, float]:
    """Measure one layer in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = LAYERS[name]()

    def run(length: int) -> float:
        start = time.process_time()
        with torch.set_grad_enabled(train):
            out = layer(torch.randn(1, length, DIM, requires_grad=train))
            out = out[0] if isinstance(out, tuple) else out
            if train:
                out.sum().backward()
        return time.process_time() - start

    run(256)  # whatever is set up once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = run(length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = min([seconds] + [run(length) for _ in range(2) if seconds < 20])
    return {'cpu_seconds': seconds, 'peak_mib': peak / 1024}


def cells(names: List[str], lengths: List[int], train: bool) -> List[Dict[str, float]]:
    """Measure layers at lengths, each pair in a fresh process."""
    environment = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536', 'OMP_NUM_THREADS': '1'}
    found = []
    for name in names:
        for length in lengths:
            command = [sys.executable, __file__, name, '--one', str(length)] + ['--train'] * train
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            found.append({'layer': name, 'length': length, **json.loads(output.splitlines()[-1])})
    return found


def exponent(found: List[Dict[str, float]], name: str, figure: str) -> float:
    """Slope of a layer's figure against length, both as logarithms, by least squares."""
    points = [(math.log(cell['length']), math.log(cell[figure])) for cell in found if cell['layer'] == name]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return (sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points))


def main() -> None:
    """Print a table, or one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('layers', nargs='+', choices=LAYERS)
    parser.add_argument('--lengths', type=int, nargs='+', default=[1024, 4096, 16384, 65536])
    parser.add_argument('--train', action='store_true', help='forward and backward')
    parser.add_argument('--one', type=int, metavar='LENGTH', help='measure in this process')
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.layers[0], args.one, args.train)))
        return
    for name in args.layers:
        found = cells([name], args.lengths, args.train)
        for cell in found:
            print(f"{name} {cell['length']}: {cell['cpu_seconds']:.3f} s, {cell['peak_mib']:.0f} MiB", flush=True)
        print(f"{name}: exponents {exponent(found, name, 'cpu_seconds'):.2f} of time,"
              f" {exponent(found, name, 'peak_mib'):.2f} of memory", flush=True)


if __name__ == '__main__':
    main()
