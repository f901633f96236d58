"""One image over several processes of this machine: what they compute together is what one computes alone."""
import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paths import HELPERS, RECIPES, ROOT

from timm_ls.parallel.bands import even_cuts, level_cuts, spans, strided_cuts

ENV = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')


def run(ranks, *commands, script=HELPERS / 'parallel_worker.py'):
    """What some processes print, after torchrun has started them."""
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks), str(script)]
    result = subprocess.run(
        [*command, *' , '.join(commands).split()], capture_output=True, text=True, env=ENV, timeout=1500)
    assert result.returncode == 0, result.stderr[-5000:]
    print(result.stdout)
    return result.stdout


def reports(output):
    """The lines of JSON of a worker."""
    return [json.loads(line.removeprefix('report ')) for line in output.splitlines() if line.startswith('report ')]


def of_kind(found, kind):
    chosen = [each for each in found if kind in each]
    assert chosen
    return chosen


@pytest.fixture(scope='module')
def three():
    """What three processes find."""
    return reports(
        run(3, 'drawn 300 4 float64', 'drawn 330 2 float32', 'pyramids float64', 'maxima', 'random_numbers', 'traffic'))


@pytest.fixture(scope='module')
def two():
    """What two processes find."""
    return reports(run(2, 'drawn 0 4 float64', 'refusals'))


def check_cases(found, expected):
    """Every error of drawn cases: outputs, all gradients, BatchNorm's statistics, inference in chunks.

    In float32, gradients may differ by what those of one process are off, if that is more.
    """
    cases = of_kind(found, 'case')
    assert len(cases) == expected
    for each in cases:
        errors = dict(each['errors'])
        of_one = errors.pop('of one', 0.)
        for name, error in errors.items():
            small = 1e-10 if each['dtype'] == 'float64' else 1e-5
            assert error < (max(small, 3 * of_one) if name == 'gradients' else small), (name, each)


def test_drawn_cases(two, three):
    """Both families, settings at random, sizes that nothing divides, bands of any rows."""
    check_cases(two, 4)
    check_cases(three, 6)
    drawn = [each['case'] for each in of_kind(two + three, 'case')]
    assert {case['family'] for case in drawn} == {'test_vil_ls', 'test_cvt_ls'}
    assert {case['cuts'] is None for case in drawn} == {case['training'] for case in drawn} == {False, True}
    assert any('in chunks' in each['errors'] for each in of_kind(two + three, 'case'))


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [2, 3, 4])
def test_many_drawn_cases(ranks):
    """The same, more of them."""
    output = run(ranks, f'drawn {ranks * 1000} 24 float64', f'drawn {ranks * 1000 + 500} 16 float32')
    check_cases(reports(output), 40)


def test_pyramids(three):
    """`features_only` backbones and feature pyramids, with their extra levels and norms."""
    found = of_kind(three, 'pyramid')
    assert len(found) == 5
    for each in found:
        assert max(each['errors'].values()) < 1e-10, each


def test_maxima(three):
    """Of equal values on several ranks, each has its share of the gradient."""
    (found,) = of_kind(three, 'maxima')
    assert max(found['maxima'].values()) < 1e-12


def test_random_numbers(three):
    """Dropout draws anew, but alike on all ranks what they hold together; paths are those of the first rank."""
    for each in of_kind(three, 'random'):
        errors = each['errors']
        assert errors['same'] < 1e-5 and errors['paths'] < 1e-5 and errors['draws'] > 1e-2 and errors['finite'], each


def test_traffic(three):
    """What an inner rank sends is what the formula in timm_ls/README.md says."""
    B, W, C, w, r, h, e, ranks, rows = 2, 20, 12, 3, 4, 1, 4, 3, 6  # as the worker has them
    p = w // 2
    found = of_kind(three, 'traffic')
    assert len(found) == 6
    for each in found:
        g = each['tokens']
        convolution, back = [], []
        if each['traffic'] == 'test_cvt_ls':  # with BatchNorm
            rows_of_neighbors = ['exchange_rows', 2 * B * W * C * e]
            convolution = [rows_of_neighbors, ['all_reduce', 4 * (3 * C + 1)], ['all_reduce', 4 * 3 * C]]
            back = [['all_reduce', 24 * C], rows_of_neighbors]
        if each['types'] == 'full':
            gather = [['exchange_rows', (ranks - 1) * rows * B * W * 2 * C * e]]
            assert each['inner'] == [convolution + gather, gather + back]
            continue
        halo = [['exchange_rows', 2 * p * B * W * 2 * C * e]]
        landmarks = [['all_reduce', 4 * B * h * r], ['all_reduce', 4 * B * r * (h + 2 * C)]]
        tokens = [['all_reduce', 4 * B * h * g], ['all_reduce', 4 * B * g * (h + C)]] * (g > 0)
        forward = convolution + halo + landmarks + tokens
        backward = [['all_reduce', 4 * B * g * C]] * (g > 0) + [['all_reduce', 4 * B * r * 2 * C]] + halo + back
        assert each['inner'] == [forward, backward]


REFUSALS = dict(
    weights="Rank 1 has other weights than rank 0: 1 differ, 'head.bias' first",
    twice='runs on bands already',
    width='differ in its width: [64, 96]',
    dimensions='got tensors of [3, 4] dimensions',
    gradients='differ in its gradients: [0, 1]',
    small='at least 32 x 32 pixels, a row on each rank; got rows [8, 8] and 64 columns',
    rows='1 rows cannot be divided over 2 ranks',
    strange='stages.0.blocks.0.mlp.act (InstanceNorm1d) may look beyond a band',
    dilated='has to make ceil(n / stride) rows',
    no_model='Linear is no ViL-LS or CvT-LS model',
    not_parallel='call spatial_parallel(model, mesh) first',
    attention_dropout='use attn_drop_rate=0 or no global tokens',
    mesh="choose the one that divides the rows, such as mesh['rows']",
    works='no error',
)


def test_refusals(two):
    """What cannot be right is refused, on all ranks, which then go on."""
    (found,) = of_kind(two, 'refusals')
    assert len(found['refusals']) == 2
    for messages in found['refusals']:
        assert messages.keys() == REFUSALS.keys()
        for name, expected in REFUSALS.items():
            assert expected in messages[name], name


def lose(how, timeout):
    """What the others print when the second of three processes is lost; torchrun would end them all."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HELPERS / 'parallel_worker.py'), 'lost', '1', how], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
            env=dict(ENV, MASTER_ADDR='localhost', MASTER_PORT=str(port), WORLD_SIZE='3', RANK=str(rank),
                     TIMEOUT=str(timeout)))
        for rank in range(3)]
    try:
        return [processes[rank].communicate(timeout=300)[0] for rank in (0, 2)]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize('how, timeout', [('KILL', 60), pytest.param('STOP', 15, marks=pytest.mark.slow)])
def test_lost_rank(how, timeout):
    """Killed or stopped in the middle of a step: the others end with an error that names it."""
    for output in lose(how, timeout):
        (found,) = reports(output)
        assert found['message'].startswith('Rank 1 was lost, of ranks [0, 1, 2] that share an image.')


@pytest.mark.slow
def test_composed():
    """Over images and rows at once, by DDP and FSDP2 over all ranks or over images; autocast as on one process."""
    for each in of_kind(reports(run(4, 'composed')), 'composed'):
        errors = dict(each['errors'])
        rounded, by_one = errors.pop('autocast'), errors.pop('autocast by one')
        assert len(errors) == 8 and max(errors.values()) < 1e-5, each
        assert 1e-4 < rounded < 1.5 * by_one, each


@pytest.mark.slow
def test_recipe(tmp_path):
    """Three processes train on large images as one does, each on the rows of its band."""
    rng = np.random.default_rng(0)
    for i, height in enumerate((150, 163)):
        mask = (np.add.outer(np.arange(height), np.arange(97)) // 40 % 2).astype(np.uint8)
        image = (rng.integers(0, 100, (*mask.shape, 3)) + 100 * mask[..., None]).astype(np.uint8)
        mask[:60] = 255  # a band without a class
        np.save(tmp_path / f'{i}.npy', image)
        np.save(tmp_path / f'{i}.mask.npy', mask)
    losses = []
    for ranks in (1, 3):
        output = run(
            ranks, f'--data-dir {tmp_path} --output {tmp_path}/out --model test_vil_ls --steps 4 --width 16 --lr 1e-3',
            script=RECIPES / 'large_image.py')
        losses.append([float(line.split()[-1]) for line in output.splitlines() if line.startswith('step ')])
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


@given(
    height=st.integers(32, 700), ranks=st.integers(1, 8), reduction=st.sampled_from([1, 4, 8, 32]),
    unit=st.integers(1, 9), data=st.data())
def test_cuts(height, ranks, reduction, unit, data):
    """Bands cover a level once, a row each at least, at edges of windows or, where those are too few, of rows."""
    inner = data.draw(st.lists(st.integers(1, height - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True))
    image = (0, *sorted(inner), height)
    rows = -(-height // reduction)
    if rows < ranks:
        with pytest.raises(ValueError, match=f'{rows} rows cannot be divided over {ranks} ranks'):
            level_cuts(image, reduction, rows, unit)
        return
    cuts = level_cuts(image, reduction, rows, unit)
    assert cuts[0] == 0 and cuts[-1] == rows and len(cuts) == ranks + 1
    assert all(start < stop for start, stop in spans(cuts))
    whole = [min(rows, round(cut / reduction / unit + 1e-9) * unit) for cut in image[1:-1]]  # halves up
    if len({0, *whole, rows}) == ranks + 1:
        assert list(cuts[1:-1]) == whole


def test_even_cuts():
    """As even as windows allow; rows that a stride leaves out go to nobody."""
    assert even_cuts(2048, 4, 28) == (0, 504, 1036, 1540, 2048)
    assert even_cuts(10, 4, 7) == (0, 3, 5, 8, 10)
    assert strided_cuts((0, 3, 4, 9), 2) == (0, 2, 2, 5)
