"""The benchmark command: what it computes, what it writes, and what it says when something does not run."""
import itertools
import json
import re
import textwrap
from types import SimpleNamespace

import pytest
import timm
import torch

import timm_ls.linear
from timm_ls import benchmark
from timm_ls.benchmark import (
    RELEASED,
    Setting,
    build,
    describe_error,
    fit_exponent,
    growth,
    image_size,
    interquartile_range,
    main,
    make_step,
    matmul_rate,
    paired_ratio,
    peak_memory,
    released_architecture,
    summarize,
    time_in_turns,
)

PEER = 'test_resnet'
CELL_FIELDS = {
    'model', 'comparison', 'kind', 'mode', 'batch_size', 'dtype', 'execution', 'height', 'width', 'linear', 'seconds',
    'median_s', 'iqr_s', 'images_per_s', 'speed', 'peak_bytes', 'memory', 'macs', 'matmul_fraction', 'launches',
    'max_difference', 'error'}


def setting(**changes):
    return Setting(**{**dict(
        mode='forward', batch_size=1, dtype='float32', execution='eager', height=64, width=64, device='cpu',
        reference=None), **changes})


def test_statistics():
    """Values worked out by hand."""
    assert interquartile_range([1., 2., 3., 4., 5.]) == 2.
    assert interquartile_range([4., 1., 3., 2.]) == 1.5
    assert interquartile_range([7.]) == 0.
    assert paired_ratio([2., 30., 4.], [1., 10., 4.]) == 2.


def test_summary():
    """Values worked out by hand: four images per call, two operations per multiply-add, a backward pass twice the
    forward; above 1 is faster than the baseline, below 1 takes less memory.
    """
    cell = dict(seconds=[2., 4., 6.], macs=10 ** 9, peak_bytes=300, error=None)
    base = dict(seconds=[1., 1., 3.], peak_bytes=100, error=None)
    where = setting(mode='train', batch_size=4)
    alone = dict(median_s=4., iqr_s=2., images_per_s=1., matmul_fraction=pytest.approx(6 / 60))
    assert summarize(cell, base, where, 60.) == dict(alone, speed=.5, memory=3.)
    assert summarize(cell, dict(base, error='out of memory'), where, 60.) == alone
    forward = summarize(cell, base, setting(batch_size=4), 60.)
    assert forward == dict(alone, matmul_fraction=pytest.approx(2 / 60), speed=.5, memory=3.)


def test_fitted_exponent():
    """A power law's exponent, noise averaged out, and none where there is nothing to fit."""
    sizes = [2. ** n for n in range(8)]
    assert fit_exponent(sizes, [3. * s ** 1.25 for s in sizes]) == pytest.approx(1.25)
    noisy = [s ** 2 * (1.1 if n % 2 else 1 / 1.1) for n, s in enumerate(sizes)]
    assert fit_exponent(sizes, noisy) == pytest.approx(2., abs=.05)
    assert fit_exponent([4., 4.], [1., 2.]) is None
    assert fit_exponent([1., 4.], [0., 2.]) is None


def test_growth():
    """Fitted per model and kind of setting, over the cells that ran."""
    def cell(model, side, seconds, peak):
        return dict(model=model, kind='forward', height=side, width=2 * side, median_s=seconds, peak_bytes=peak)
    cells = [cell('a', 10, 1., 5), cell('a', 20, 4., None), cell('b', 10, 1., 5), cell('b', 20, 16., 10),
             cell('c', 10, None, None), cell('c', 20, None, None)]
    fits = {fit.pop('model'): fit for fit in growth(cells)}
    assert fits == {'a': dict(kind='forward', time=pytest.approx(1.), memory=None),
                    'b': dict(kind='forward', time=pytest.approx(2.), memory=pytest.approx(.5))}


@pytest.mark.parametrize('text, size', [('224', (224, 224)), ('800x1333', (800, 1333)), ('4096x64', (4096, 64))])
def test_image_size(text, size):
    assert image_size(text) == size


def test_matmul_rate(monkeypatch):
    """Two operations per multiply-add: here, a product takes a second by the clock."""
    monkeypatch.setattr(benchmark, 'time', SimpleNamespace(perf_counter=itertools.count().__next__))
    assert matmul_rate('cpu', 'float32') == pytest.approx(2 * 1024 ** 3 / 1e9)


def test_models_are_made_for_the_image():
    """Height and width: a map of 4 x 6 tokens at stride 16 has 7 x 11 offsets."""
    model = build('vil_ls_tiny', setting(height=64, width=96))
    assert model.stages[2].blocks[0].attn.rel_pos.table.shape[1:] == (7, 11)


@pytest.mark.parametrize('changes', [
    {}, dict(mode='train'), dict(dtype='bfloat16'), dict(dtype='pure_bfloat16'), dict(execution='channels_last'),
    dict(mode='train', dtype='bfloat16', execution='channels_last', height=96, batch_size=2),
], ids=str)
def test_step(changes):
    """The logits of the model in that setting, and no gradient left behind."""
    where = setting(**changes)
    torch.manual_seed(0)
    model = build('vil_ls_tiny_hires', where)
    logits = make_step(model, where)()
    assert logits.shape == (where.batch_size, 1000) and logits.isfinite().all()
    assert logits.dtype == getattr(torch, where.dtype.removeprefix('pure_'))
    assert next(model.parameters()).dtype == (logits.dtype if where.dtype.startswith('pure_') else torch.float32)
    assert model.training == (where.mode == 'train')
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('linear', benchmark.LINEAR)
def test_linear_layers(linear, monkeypatch):
    """Of all models alike, as told."""
    calls = []
    convolve = timm_ls.linear.convolve
    monkeypatch.setattr(timm_ls.linear, 'convolve', lambda *args: calls.append(1) or convolve(*args))
    for name in ('vil_ls_tiny_hires', 'test_vit'):
        where = setting(linear=linear, batch_size=16)
        make_step(build(name, where), where)()
        assert bool(calls) == (linear == 'onednn'), name
        calls.clear()
    assert where.kind() == 'forward, batch 16, float32, eager' + (
        '' if linear == 'default' else f', {linear} linear layers')


def test_turns(monkeypatch):
    """After two calls each, one to count launches in, forwards and backwards in turn: neither is always timed first."""
    order = []
    monkeypatch.setattr(benchmark, 'build', lambda label, where: label)
    monkeypatch.setattr(benchmark, 'make_step', lambda model, where: lambda: order.append(model))
    cells = {label: dict(seconds=[], error=None) for label in 'ab'}
    time_in_turns(cells, setting(), 2, benchmark.tqdm(disable=True))
    assert ''.join(order) == 'aabb' + 'ab' + 'ba'
    assert [len(cell['seconds']) for cell in cells.values()] == [2, 2]


def test_a_model_says_how_it_runs(monkeypatch, capsys, tmp_path):
    """Executions of one model in turns, whatever `--execution` says of the others."""
    ran = []
    monkeypatch.setattr(benchmark, 'make_step', lambda model, where: lambda: ran.append(where.execution))
    labels = ['compiled:test_cvt_ls', 'test_cvt_ls', 'eager:test_cvt_ls']
    report = tmp_path / 'report.json'
    main([*labels, '--img-size', '64', '--execution', 'channels_last', '--no-memory', '--repeats', '1',
          '--json', str(report)])
    assert ran == ['compiled', 'channels_last', 'eager', 'eager', 'compiled', 'channels_last', 'eager']
    printed = capsys.readouterr().out
    assert all(re.search(rf'64x64 +{label} +[\d.]+ ', printed) for label in labels)
    assert printed.count('times faster and share of memory') == 1  # one table
    for cell, execution in zip(json.loads(report.read_text())['cells'], ran[:3]):
        assert cell['execution'] == execution and cell['kind'].endswith(execution)
        assert cell['comparison'].endswith('channels_last')
    monkeypatch.undo()
    assert peak_memory('channels_last:test_vit', setting())['peak_bytes'] > 0


def test_engines(capsys, tmp_path):
    """Files of both engines run, and give the model's logits; what they cannot do is said."""
    for name, package in (('openvino', 'openvino'), ('onnxruntime', 'onnxscript')):
        pytest.importorskip(package, reason=f'{package} is not installed')
        where = setting(execution=name)
        torch.manual_seed(0)
        model = benchmark.build('test_cvt_ls', where).eval()
        out = benchmark.make_step(model, where)()
        with torch.no_grad():
            x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)
    main(['test_cvt_ls', '--img-size', '64', '--execution', 'openvino', '--mode', 'train', '--no-memory', '--repeats',
          '1', '--json', str(tmp_path / 'report.json')])
    assert 'not supported: engines run forward passes on a CPU' in capsys.readouterr().out


def test_compared(tmp_path, capsys):
    """Table, JSON and plot of two models in two modes."""
    main(['vil_ls_tiny_hires', PEER, '--img-size', '64', '64x96', '--mode', 'forward', 'train', '--repeats', '2',
          '--no-memory', '--baseline', 'vil_ls_tiny_hires', '--json', str(tmp_path / 'report.json'),
          '--plot', str(tmp_path / 'plot.png')])
    printed = capsys.readouterr().out
    assert f'torch {torch.__version__}, timm {timm.__version__}' in printed
    assert re.search(r'matrix products: \d+ GFLOP/s in float32', printed)
    for mode in ('forward', 'train'):
        assert f'{mode}, batch 1, float32, eager; times faster and share of memory against vil_ls_tiny_hires' in printed
    assert len(re.findall(rf'64x96 +{PEER} +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +- +- +\d+%', printed)) == 2
    assert len(re.findall(r'vil_ls_tiny_hires +(forward|train), batch 1.*: time -?[\d.]+, memory -', printed)) == 2

    report = json.loads((tmp_path / 'report.json').read_text())
    assert set(report) == {'machine', 'baseline', 'cells', 'growth'}
    assert report['machine'].keys() == {'device', 'cores', 'threads', 'allocator', 'torch', 'timm', 'matmul_gflops'}
    assert len(report['cells']) == 8
    for cell in report['cells']:
        assert set(cell) == CELL_FIELDS
        assert cell['error'] is None and len(cell['seconds']) == 2
        assert cell['images_per_s'] == pytest.approx(1 / cell['median_s'])
        assert cell['macs'] > 0 and cell['matmul_fraction'] > 0
        assert cell['launches'] > 20
        assert cell['speed'] == 1. or cell['model'] == PEER
    assert (tmp_path / 'plot.png').stat().st_size > 10000


def test_memory(capsys):
    """Peak memory comes from a process of its own, and a model that cannot take the size says so in its cell."""
    main(['test_resnet', 'test_vit', '--img-size', '65', '--repeats', '1', '--baseline', 'test_resnet'])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith('65x65')]
    assert rows[0][:2] == ['65x65', PEER] and int(rows[0][6]) < 1000
    assert rows[1][:4] == ['65x65', 'test_vit', 'not', 'supported:']


@pytest.mark.skipif(not benchmark.sys.platform.startswith('linux'), reason='measured on Linux')
def test_peak_memory_counts_what_a_call_allocates(monkeypatch):
    """A call that takes 64 MiB for a moment, whatever was taken and handed back before."""
    class Hungry(torch.nn.Module):
        def forward(self, x):
            return torch.ones(64 * 2 ** 18)[:1000].reshape(1, -1)
    torch.ones(256 * 2 ** 18)
    monkeypatch.setattr(benchmark, 'build', lambda label, where: Hungry())
    assert peak_memory('hungry', setting())['peak_bytes'] == pytest.approx(64 * 2 ** 20, rel=.1)


def test_failure_is_a_cell(monkeypatch):
    """Running out of memory, and anything else."""
    assert describe_error(MemoryError()) == 'out of memory'
    assert describe_error(torch.OutOfMemoryError('CUDA out of memory')) == 'out of memory'
    text = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
    assert describe_error(RuntimeError(text)) == 'out of memory'
    assert describe_error(AssertionError('odd size\nand more')) == 'not supported: odd size'
    assert describe_error(KeyError()) == 'not supported: KeyError'
    assert peak_memory('test_vit', setting(height=65, width=65))['error'].startswith('not supported')

    for code, error in ((-9, 'out of memory'), (-11, 'killed by signal 11'), (1, 'not supported: boom')):
        result = benchmark.subprocess.CompletedProcess([], code, stdout='', stderr='x\nboom\n')
        monkeypatch.setattr(benchmark.subprocess, 'run', lambda *args, result=result, **kwargs: result)
        assert benchmark.run_peak_memory('vil_ls_base', setting()) == dict(error=error)


def test_allocator(monkeypatch):
    """A process of its own with the thresholds raised, unless this one has them."""
    commands = []

    def run(command, env):
        commands.append((command[3:], env['MALLOC_MMAP_THRESHOLD_'], env['MALLOC_TRIM_THRESHOLD_']))
        return benchmark.subprocess.CompletedProcess(command, 3)
    monkeypatch.setattr(benchmark.platform, 'libc_ver', lambda: ('glibc', '2.36'))
    monkeypatch.setattr(benchmark.subprocess, 'run', run)
    arguments = ['--allocator', 'tuned', '--img-size', '64']
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 3
    assert commands == [(arguments, str(2 ** 34), str(2 ** 34))]


RELEASED_ARCHITECTURES = {
    'vil_ls_medium': 'l1,h3,d96,n1,s1,g1,p4,f7,a0,r8_l2,h3,d192,n4,s1,g1,p2,f7,a0,r8_'
                     'l3,h6,d384,n16,s0,g1,p2,f7,a0,r0_l4,h12,d768,n1,s0,g0,p2,f7,a0,r0',
    'vil_ls_tiny_hires': 'l1,h1,d48,n1,s1,g1,p4,f7,a0,r8_l2,h3,d96,n1,s1,g1,p2,f7,a0,r8_'
                         'l3,h3,d192,n9,s1,g1,p2,f7,a0,r8_l4,h6,d384,n1,s1,g0,p2,f7,a0,r8',
}


@pytest.mark.parametrize('name', RELEASED_ARCHITECTURES)
def test_released_architecture(name):
    assert released_architecture(timm.create_model(name, device='meta')) == RELEASED_ARCHITECTURES[name]


def test_reference(tmp_path, capsys):
    """The released code joins with the same weights: here, a stand-in that is our own model under another name."""
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models' / '__init__.py').write_text('from .msvit import MsViT\n')
    (tmp_path / 'models' / 'msvit.py').write_text(textwrap.dedent('''
        import timm
        def MsViT(arch, img_size, attn_type, norm_embed):
            assert arch.startswith('l1,h1,d48') and (img_size, attn_type, norm_embed) == (64, 'ls', True)
            model = timm.create_model('vil_ls_tiny_hires')
            model.head.bias.data.uniform_(-1, 1)
            return model
    '''))
    main(['vil_ls_tiny_hires', '--img-size', '64', '64x96', '--reference', str(tmp_path), '--repeats', '1',
          '--no-memory'])
    printed = capsys.readouterr().out
    assert f'against {RELEASED}vil_ls_tiny_hires' in printed
    assert 'Logits differ from those of the released code by at most 0.0e+00' in printed
    assert re.search(rf'64x96 +{RELEASED}vil_ls_tiny_hires +not supported: square images only', printed)


@pytest.mark.parametrize('arguments, message', [
    (['vil_ls_huge'], "unknown model 'vil_ls_huge'"),
    (['eager:vil_ls_huge'], "unknown model 'vil_ls_huge'"),
    (['jitted:vil_ls_tiny'], "unknown execution 'jitted' in 'jitted:vil_ls_tiny': expected one of eager, compiled"),
    (['--img-size', '16'], "'16' is no image size: expected a side or HEIGHTxWIDTH, from 32 pixels"),
    (['--img-size', '224x'], "'224x' is no image size"),
    (['--img-size', '22²'], "'22²' is no image size"),
    (['--plot', 'cost.foo'], "--plot: expected a name that ends with .png, .jpg"),
    (['--img-size', '64x64x3'], "'64x64x3' is no image size"),
    (['--batch-size', '0'], 'expected a whole number from 1 on'),
    (['--repeats', '0'], 'expected a whole number from 1 on'),
    (['--reference', 'nowhere'], "no models/msvit.py in 'nowhere': expected the authors' imagenet/ folder"),
    (['--baseline', 'resnet50'], "baseline 'resnet50' is not compared; compared are vil_ls_small_hires, swin_tiny"),
    (['--json', 'no/such/folder.json'], "no folder to write 'no/such/folder.json' to"),
    (['--device', 'nonsense'], "--device: 'nonsense' is not available here"),
])
def test_usage_errors(arguments, message, capsys):
    """Wrong arguments: the reason, before anything is measured."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
