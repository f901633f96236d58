"""Memory: nothing stays behind from one image size to the next; a formula predicts the peaks.

    python tests/test_memory.py growth    # the curve: memory of a process over 500 image sizes; --without-onednn
    python tests/test_memory.py peaks     # measures peaks, fits the formula, prints the table of MEASUREMENTS.md
    python tests/test_memory.py process vil_ls_small_hires 4096   # one image of that side; the whole process's peak
"""
import ctypes
import gc
import inspect
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import timm_ls  # noqa: F401 registers the models
from timm_ls.attention import rel_pos
from timm_ls.benchmark import Setting, resident_bytes, run_peak_memory
from timm_ls.ops import windows

ROOT = Path(__file__).parents[1]  # run as a script, this file finds no helpers

MODELS = ('vil_ls_small_hires', 'cvt_ls_13')
FORMULA_SIZES = ((224, 224), (384, 640), (512, 512), (800, 1333), (1024, 1024), (1536, 1536), (2048, 2048))


def grow(name: str, count: int, onednn: bool) -> list:
    """Resident bytes of this process at rest: after one forward pass, then after every tenth of `count` image sizes.

    oneDNN, which torch's matrix products and convolutions call, keeps the kernels that it has made for up to 1,024
    shapes: what it remembers is left out with `onednn=False`. So are the indices of the last sizes, which are kept for
    a limited number of them (`test_caches_are_bounded`).
    """
    rng = random.Random(0)
    sizes = set()
    while len(sizes) < count:
        sizes.add((rng.randint(32, 224), rng.randint(32, 224)))
    model = timm.create_model(name).eval()
    curve = []
    with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=onednn):
        for i, size in enumerate([(224, 224), *sorted(sizes, key=lambda size: rng.random())]):
            model(torch.randn(1, 3, *size))
            if i % (count // 10) == 0:
                for remembered in (windows.axis_spans, windows.tile_plan, rel_pos.position_index):
                    remembered.cache_clear()
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
                curve.append(resident_bytes('VmRSS'))
    return curve


def predict(coefficients: tuple, height: int, width: int) -> float:
    """Bytes: of a map in one piece, or of what is held for the whole map and of a piece in work."""
    whole, piece, held = coefficients
    pixels = height * width
    return min(whole * pixels, piece + held * pixels)


def fit_peaks(peaks: dict) -> tuple:
    """Coefficients for `predict` from peaks by (height, width): the first from the smallest size, in one piece, the
    others by least squares of relative errors at the other sizes."""
    (smallest, peak), *others = sorted(peaks.items(), key=lambda item: item[0][0] * item[0][1])
    rows = [[1 / peak, height * width / peak] for (height, width), peak in others]
    piece, held = np.linalg.lstsq(np.array(rows), np.ones(len(rows)))[0].tolist()
    return peak / (smallest[0] * smallest[1]), piece, held


def measure_peaks(name: str, sizes=FORMULA_SIZES) -> dict:
    """Peak bytes of a forward pass above the process at rest, by (height, width), each in a process of its own.

    With a fixed threshold glibc hands freed memory back at once: what is measured is what is in use. By default it
    keeps some, more or less from one size to the next.
    """
    peaks = {}
    for height, width in sizes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('MALLOC_MMAP_THRESHOLD_', '65536')
            result = run_peak_memory(name, Setting('forward', 1, 'float32', 'eager', height, width, 'cpu', None))
        assert result.get('peak_bytes'), result
        peaks[height, width] = result['peak_bytes']
    return peaks


def documented_formula() -> dict:
    """What the table of measurements says: model to coefficients."""
    page = (ROOT / 'timm_ls' / 'MEASUREMENTS.md').read_text()
    number = r'([\d.]+)'
    rows = re.findall(
        rf'^\| `(\w+)` \| min\({number} B x pixels, {number} MiB \+ {number} B x pixels\) \|', page, re.M)
    return {name: (float(whole), float(piece) * 2 ** 20, float(held)) for name, whole, piece, held in rows}


def test_caches_are_bounded():
    """Whatever remembers anything has a limit, and keeps to it however many sizes are seen."""
    caches = {
        f'{name}.{key}': value for name, module in sys.modules.items() if name.startswith('timm_ls.')
        for key, value in vars(module).items() if hasattr(value, 'cache_info') and value.__module__ == name}
    assert {'timm_ls.ops.windows.axis_spans', 'timm_ls.ops.windows.tile_plan'} <= caches.keys()
    assert all(cache.cache_info().maxsize is not None or not inspect.signature(cache).parameters
               for cache in caches.values()), caches
    for cache, make in ((windows.axis_spans, lambda size: windows.axis_spans(size, 7)),
                        (rel_pos.position_index, lambda size: rel_pos.position_index(1, 1, 1, size, 1))):
        limit = cache.cache_info().maxsize
        for size in range(1, limit + 200):
            make(size)
        assert cache.cache_info().currsize == limit


@pytest.mark.parametrize('coefficients', [(300., 2e7, 100.), (200., 1e7, 150.)])
def test_fit(coefficients):
    """Coefficients that made the peaks come back."""
    peaks = {size: predict(coefficients, *size) for size in FORMULA_SIZES}
    assert fit_peaks(peaks) == pytest.approx(coefficients, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_no_growth(name):
    """500 image sizes leave nothing behind, but for the kernels that oneDNN keeps."""
    printed = subprocess.run(
        [sys.executable, __file__, 'growth', name, '--without-onednn'], cwd=ROOT, capture_output=True, text=True,
        check=True, env={key: value for key, value in os.environ.items() if not key.startswith('MALLOC_')}).stdout
    print(printed)
    growth = [float(value) for value in re.findall(r'([+-][\d.]+) MiB', printed)]
    assert len(growth) == 10 and max(growth) < 2


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
@pytest.mark.parametrize('name', MODELS)
def test_formula(name):
    """The documented formula is within 15% of the peaks measured from 224 to 2048 pixels."""
    coefficients = documented_formula()[name]
    for (height, width), peak in measure_peaks(name).items():
        predicted = predict(coefficients, height, width)
        print(f'{name} at {height} x {width}: {peak / 2 ** 20:.0f} MiB, predicted {predicted / 2 ** 20:.0f}')
        assert abs(predicted / peak - 1) < .15


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='measures resident memory as Linux counts it')
@pytest.mark.parametrize('name, side, limit', [
    ('vil_ls_small_hires', 4096, 16), ('cvt_ls_13', 4096, 16), ('vil_ls_small_hires', 8192, 20)])
def test_large_images(name, side, limit):
    """An image of 16 or 64 megapixels fits into a process of that many GiB."""
    printed = subprocess.run(
        [sys.executable, __file__, 'process', name, str(side)], cwd=ROOT, capture_output=True, text=True,
        check=True).stdout
    print(printed)
    assert float(re.search(r'([\d.]+) GiB', printed)[1]) <= limit


def main() -> None:
    """Print the curve of growth, the table of peaks, or a process's peak for one image."""
    command, *names = [argument for argument in sys.argv[1:] if not argument.startswith('--')]
    if command == 'growth' and len(names) != 1:
        for name in names or ('test_vil_ls', 'test_cvt_ls'):  # each in a process of its own, with nothing to reuse
            subprocess.run([sys.executable, *sys.argv[:2], name, *(a for a in sys.argv if a[:2] == '--')], check=True)
    elif command == 'growth':
        start, *curve = grow(names[0], 500, onednn='--without-onednn' not in sys.argv)
        for i, value in enumerate(curve, 1):
            print(f'{names[0]} after {50 * i} sizes: {(value - start) / 2 ** 20:+.1f} MiB', flush=True)
    elif command == 'process':
        name, side = names[0], int(names[1])
        with torch.inference_mode():
            assert timm.create_model(name).eval()(torch.randn(1, 3, side, side)).isfinite().all()
        print(f'{name} at {side} x {side}: {resident_bytes("VmHWM") / 2 ** 30:.2f} GiB in the whole process')
    elif command == 'peaks':
        print('| model | peak | worst error | measured at |\n|---|---|---|---|')
        for name in names or MODELS:
            peaks = measure_peaks(name)
            fit = fit_peaks(peaks)
            errors = {size: predict(fit, *size) / peak - 1 for size, peak in peaks.items()}
            measured = ', '.join(f'{h} x {w}: {peak / 2 ** 20:.0f} MiB' for (h, w), peak in peaks.items())
            worst = max(map(abs, errors.values()))
            formula = f'min({fit[0]:.0f} B x pixels, {fit[1] / 2 ** 20:.1f} MiB + {fit[2]:.0f} B x pixels)'
            print(f'| `{name}` | {formula} | {worst:.0%} | {measured} |', flush=True)


if __name__ == '__main__':
    main()
