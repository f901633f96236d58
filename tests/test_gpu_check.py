"""The command for whoever has a GPU: everything that it does, on a CPU, with a few tokens."""
import contextlib
import json
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from triton_interpreter import interpreted, not_interpreted

pytest.importorskip('triton', reason='triton is not installed: torch brings it along on Linux only')
from timm_ls import attention_implementation, gpu_check  # noqa: E402
from timm_ls.ops import overrides  # noqa: E402
from timm_ls.ops.triton import attention, self_check  # noqa: E402
from timm_ls.ops.window_attention import window_attention  # noqa: E402

ON_CPU = ('--device', 'cpu')


def read(folder):
    return json.loads((folder / 'report.json').read_text())


@interpreted
@pytest.mark.parametrize('left_out', [
    ('compiled', 'channels_last', 'as chosen, autocast bfloat16'), pytest.param((), marks=pytest.mark.slow)])
def test_everything(left_out, monkeypatch, tmp_path):
    """All pieces, to the end."""
    every_mode = gpu_check.modes(gpu_check.CPU)
    some = {name: mode for name, mode in every_mode.items() if name not in left_out and 'autocast f' not in name}
    monkeypatch.setattr(gpu_check, 'modes', lambda scale: some if left_out else every_mode)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(self_check, '_known', {})
    monkeypatch.setattr(gpu_check, 'CANDIDATES', dict(forward=[(32, 32, 2, 2)], bias_grad=[(64, 32, 4, 3)]))
    gpu_check.main([*ON_CPU, '--minutes', '60', '--out', str(tmp_path)])
    data = read(tmp_path)
    pieces = data['pieces']
    assert data['unfinished'] == [] and list(pieces) == [*gpu_check.PIECES, 'overrides']

    assert [(row['dtype'], row['window'], row['head_dim']) for row in pieces['kernels']] == [('float32', 5, 8)]
    for row in pieces['kernels']:
        assert row['passed'] and row['same_bits'] and row['gradients of the bias'] < 1e-5

    modes = {row['mode']: row for row in pieces['modes']}
    assert list(modes) == list(gpu_check.modes(gpu_check.CPU))
    assert modes.pop('CUDA graph')['error'] == 'RuntimeError: there are CUDA graphs on CUDA devices only'
    for name, row in modes.items():
        assert max(row['logits'], row['gradients']) < (.03 if 'autocast' in name else 1e-5), row

    attention = {(row['implementation'], row['map']): row for row in pieces['attention']}
    assert set(attention) == {
        (name, side) for name in gpu_check.IMPLEMENTATIONS + gpu_check.OTHERS for side in (8, 4)}
    for (name, _), row in attention.items():
        assert 'error' in row if name == 'natten' else row['forward_ms'] > 0
        assert ('train_ms' in row) == (name in gpu_check.IMPLEMENTATIONS)

    models = ['test_vil_ls/triton', 'test_vil_ls/masked', 'test_vit']
    assert [(row['model'], row['mode'], row['batch']) for row in pieces['models']] == [
        (model, mode, 1) for mode in ('forward', 'train') for model in models]
    assert all(row['ms'] > 0 and row['images_per_s'] == pytest.approx(1e3 / row['ms']) for row in pieces['models'])

    assert [row['mode'] for row in pieces['profile']] == ['forward'] * 10 + ['train'] * 10
    for mode in ('forward', 'train'):
        shares = {row['operator']: row['share'] for row in pieces['profile'] if row['mode'] == mode}
        assert '_TritonAttention' in shares and sum(shares.values()) < 1.001
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert [(row['kernel'], row['map'], row['ours']) for row in pieces['blocks']] == [
        (kernel, side, ours) for side in (8, 4) for kernel in ('forward', 'bias_grad') for ours in (True, False)]
    assert all(row['ms'] > 0 for row in pieces['blocks'])

    assert json.loads((tmp_path / 'overrides.json').read_text()) == pieces['overrides'] == gpu_check.overrides(data)
    tables = (tmp_path / 'report.md').read_text()
    assert all(f'\n## {name}\n' in tables for name in pieces) and '| test_vit |' in tables


def test_profile(monkeypatch):
    """Operators in the order of their own time, ten at most, as shares of all there are."""
    times = [10, 700, 40, *[20] * 9, 70]
    events = [Namespace(key=f'operator {i}', count=i, self_cpu_time_total=time) for i, time in enumerate(times)]
    profile = contextlib.nullcontext(Namespace(key_averages=lambda: events))
    monkeypatch.setattr(gpu_check.torch.profiler, 'profile', lambda activities: profile)
    monkeypatch.setattr(gpu_check, 'make_step', lambda model, where: lambda: None)
    monkeypatch.setattr(gpu_check, 'attention_implementation', lambda name: contextlib.nullcontext())
    rows = list(gpu_check.profile_models(Namespace(device='cpu'), gpu_check.CPU, None))
    assert [row['mode'] for row in rows] == ['forward'] * 10 + ['train'] * 10
    for part in (rows[:10], rows[10:]):
        assert [row['share'] for row in part] == [.7, .07, .04] + [.02] * 7
        assert [row['calls'] for row in part[:3]] == [1, 12, 2] and part[0]['ms'] == .7


@pytest.mark.filterwarnings('ignore:The Triton kernel')
def test_a_failed_self_check_shows(monkeypatch):
    """Where a user would get a slower form and a warning."""
    def run_model(implementation, *args):
        assert implementation == 'auto'
        return self_check.failure('landmarks', torch.device('cpu'), torch.float32, 8, 8, True)

    monkeypatch.setattr(gpu_check, 'run_model', run_model)
    monkeypatch.setattr(self_check, '_known', {})
    monkeypatch.setattr(self_check, '_has_warned', False)
    monkeypatch.setenv('TIMM_LS_SELF_CHECK', 'always')
    monkeypatch.setattr(self_check, 'check', lambda *call: 'outputs differ')
    with pytest.raises(UserWarning, match='outputs differ'):
        gpu_check.run_chosen('triton', 'test_vil_ls', 32, torch.device('cpu'))


@pytest.fixture
def pieces(monkeypatch):
    """Pieces to be filled in by a test."""
    pieces = {}
    monkeypatch.setattr(gpu_check, 'PIECES', pieces)
    monkeypatch.setattr(gpu_check, 'conclude', lambda report: None)
    monkeypatch.setattr(gpu_check, 'SHARES', dict.fromkeys(('first', 'second', 'bad', 'good'), .5))
    monkeypatch.setattr(gpu_check.triton_attention, 'is_interpreted', lambda: True)
    monkeypatch.setattr(gpu_check, 'describe_machine', lambda *args: dict(device='a GPU', torch='2', timm='1'))
    return pieces


def test_cut_off(pieces, tmp_path):
    """What was measured is on disk when the process dies."""
    def piece(args, scale, report):
        yield dict(value=1)
        yield dict(value=2)
        raise KeyboardInterrupt

    pieces['first'] = piece
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main([*ON_CPU, '--out', str(tmp_path / 'new' / 'folder')])
    assert read(tmp_path / 'new' / 'folder')['pieces'] == dict(first=[dict(value=1), dict(value=2)])


def test_candidates():
    """Each kernel has some, of sizes that its tables allow."""
    assert set(gpu_check.CANDIDATES) == set(attention.BLOCKS)
    for kernel, candidates in gpu_check.CANDIDATES.items():
        for queries, keys, warps, _ in candidates:
            assert kernel == 'additional_grad' or attention.TABLE_BLOCK % max(queries, keys) == 0
            assert warps & (warps - 1) == 0


@pytest.mark.parametrize('rows, status, words', [
    ([dict(passed=True), dict(passed=True), dict(error='not finished')], 0, '2 kinds of kernel calls are right, 0 wr'),
    ([dict(passed=True), dict(passed=False)], 1, '1 wrong or failed, 0 not finished'),
    ([dict(passed=True), dict(error='ValueError: no')], 1, '1 wrong or failed'),
    ([dict(error='not finished')], 1, '0 kinds of kernel calls are right, 0 wrong or failed, 1 not finished'),
])
def test_conclusion(rows, status, words, tmp_path, capsys):
    """What is right and what is not is said last, beside where the report is; that nothing is wrong is not enough."""
    report = gpu_check.Report(tmp_path, 1, {})
    report.add('kernels', rows)
    with pytest.raises(SystemExit) if status else contextlib.nullcontext() as caught:
        gpu_check.conclude(report)
    assert status == 0 or caught.value.code == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert words in last and str(tmp_path / 'report.md') in last


@pytest.mark.parametrize('minutes, first, unfinished', [
    (1, 1, ['first', 'second']),
    (3, 4, ['first']),  # three rows are the share of the first, the fourth comes after the second
    (4, 4, []),
])
def test_minutes(minutes, first, unfinished, pieces, tmp_path, monkeypatch):
    """Each piece has its share; then they go on; when all is over, tables are written, and what is missing is said."""
    now = [0.]
    monkeypatch.setattr(gpu_check.time, 'monotonic', lambda: now[0])

    def piece(number):
        def rows(args, scale, report):
            for _ in range(number):
                now[0] += 40
                yield dict(time=now[0])
        return rows

    pieces.update(first=piece(4), second=piece(1))
    gpu_check.main([*ON_CPU, '--out', str(tmp_path), '--minutes', str(minutes)])
    data = read(tmp_path)
    assert data['unfinished'] == unfinished
    assert [len(data['pieces'][name]) for name in ('first', 'second')] == [first, 1]
    if first == 4:
        assert [row['time'] for row in data['pieces']['first']] == [40, 80, 120, 200]
    words = f'Not finished in {minutes} minutes: {", ".join(unfinished)}.'
    assert (words in (tmp_path / 'report.md').read_text()) == bool(unfinished)


def test_shares():
    """Every piece has one, and they are the whole."""
    assert list(gpu_check.SHARES) == list(gpu_check.PIECES) and sum(gpu_check.SHARES.values()) == pytest.approx(1)


def test_a_piece_that_fails(pieces, tmp_path):
    """Leaves its rows, its error and the other pieces."""
    def bad(args, scale, report):
        yield dict(value=1)
        raise RuntimeError('CUDA error: an illegal memory access was encountered')

    def good(args, scale, report):
        yield dict(value='a|b')

    pieces.update(bad=bad, good=good)
    gpu_check.main([*ON_CPU, '--out', str(tmp_path)])
    assert read(tmp_path)['pieces'] == dict(
        bad=[dict(value=1), dict(error='RuntimeError: CUDA error: an illegal memory access was encountered')],
        good=[dict(value='a|b')], overrides=[])
    assert '| a/b |' in (tmp_path / 'report.md').read_text()


def test_kernel_processes(monkeypatch):
    """A process that dies, or takes too long, is a row."""
    def run(command, **options):
        assert command[1:4] == ['-m', 'timm_ls.gpu_check', '--kernel'] and command[4:6] == ['cpu', 'float32']
        window = command[6]
        if window == '3':
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(
            command, {'1': 0, '2': 1, '4': -11}[window], 'noise\n{"passed": true}\n', 'Traceback\nValueError: no' * (
                window == '2'))

    monkeypatch.setattr(gpu_check.subprocess, 'run', run)
    scale = gpu_check.CPU._replace(kernels=tuple((window, 8) for window in (1, 2, 3, 4)))
    args = type('Args', (), dict(device='cpu'))
    report = type('Report', (), dict(left=lambda self: 9.))()
    rows = sorted(gpu_check.check_kernels(args, scale, report), key=lambda row: row['window'])
    assert [row.get('passed', row.get('error')) for row in rows] == [True, 'ValueError: no', 'not finished', 'killed']


@interpreted
def test_a_wrong_kernel_shows(monkeypatch):
    """In the row of its process."""
    def wrong(*call, **options):
        yield None, 'outputs', 1e-6
        yield None, 'outputs', float('nan')
        yield None, 'outputs', 1e-6

    monkeypatch.setattr(self_check, 'attention_differences', wrong)
    row = gpu_check.kernel_row('cpu', 'float32', 3, 8)
    assert not row['passed'] and row['same_bits'] and row['outputs'] != row['outputs']


def test_flex_attention():
    """What is timed as the same attention is the same."""
    torch.manual_seed(0)
    q, kv, additional = torch.randn(2, 8, 11, 16), torch.randn(2, 8, 11, 2, 16), torch.randn(2, 3, 2, 16)
    bias = torch.randn(2, 3, 3, 5, 5)
    with attention_implementation('masked'):
        expected = window_attention(q, kv, additional, bias, 3, 2)
    flex = gpu_check.FlexAttention(compiled=False)
    for _ in range(2):  # the second time with the mask of the first
        torch.testing.assert_close(flex(q, kv, additional, bias, 3, 2), expected, rtol=0, atol=1e-5)


def test_stages():
    """Of 1024 pixels in patches of 4, 2, 2 and 2; eight landmarks, and a class token but in the last."""
    found = gpu_check.stages(gpu_check.GPU, 1024)
    assert [tuple(stage) for stage in found] == [
        (256, 96, 3, 7, 9, 1), (128, 192, 3, 7, 9, 1), (64, 384, 6, 7, 9, 1), (32, 768, 12, 7, 8, 1)]
    assert gpu_check.stages(gpu_check.GPU, 224)[0][::5] == (56, 16)


def test_least_times(monkeypatch):
    """By hand: a map of 3 x 3 tokens of 16 channels, 25 + 2 keys each; bytes count here, and products where memory is
    fast."""
    monkeypatch.setattr(gpu_check, 'measure', lambda step, device, seconds: (1., 5.))
    stage = gpu_check.Stage(3, 16, 2, 3, 2, 1)
    inputs = gpu_check.stage_inputs(stage, torch.device('cpu'), torch.float32)
    for bandwidth, forward, train in (
            (3e12, 4 * 144 * 4 / 3e12, 12 * 144 * 4 / 3e12), (1e18, 4 * 144 * 27 / 4e14, 14 * 144 * 27 / 4e14)):
        monkeypatch.setattr(gpu_check, 'BANDWIDTH', bandwidth)
        row = gpu_check.attention_times(None, inputs, stage, gpu_check.CPU, True)
        assert row['forward_of_least'] == pytest.approx(1 / forward)
        assert row['train_of_least'] == pytest.approx(1 / train)
        assert row['forward_ms'] == 1000. and row['train_MiB'] == 5.


def test_graphs_are_timed_by_replays(monkeypatch):
    """The time of one of ten replays, the peak of a step; on a CPU, that of the step."""
    graph = Namespace(replay=lambda: calls.append('replay'))
    calls = []

    def measure(step, device, seconds):
        step()
        return 1., {0.: 7., .5: 3.}[seconds]

    monkeypatch.setattr(gpu_check, 'measure', measure)
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: graph)
    monkeypatch.setattr(torch.cuda, 'graph', lambda captured: contextlib.nullcontext(captured))
    step = lambda: calls.append('step')  # noqa: E731
    assert gpu_check.measure_graph(step, torch.device('cuda'), .5) == (.1, 7.)
    assert calls == ['step', 'step', *['replay'] * 10]
    assert gpu_check.measure_graph(step, torch.device('cpu'), .5) == (1., 3.)


def test_largest_batch(monkeypatch):
    """A power of two, within four fifths of the free memory."""
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (1000 * 2 ** 20, None))
    device = torch.device('cuda')
    assert [gpu_check.largest_batch(peak, device, 64) for peak in (1., 99., 101., 900., None)] == [64, 8, 4, 1, 64]


def test_overrides(monkeypatch):
    """Where another form is faster at all sizes, for each dtype, window and width, as the choice reads them."""
    def row(implementation, forward, train, dtype='bfloat16', **others):
        return dict(dict(
            dtype=dtype, window=7, head_dim=32, map=8, batch=1, implementation=implementation, forward_ms=forward,
            train_ms=train), **others)

    rows = [row('triton', 1., 5.), row('masked', 2., 3.), row('tiled', 9., 9.), row('flex_attention', 0., 0.),
            row('triton', 1., 1., 'float32'), row('masked', 2., 1., 'float32'), dict(row('tiled', 0., 0.), error='no')]
    data = dict(machine=dict(gpu='sm_90'), pieces=dict(attention=rows))
    wanted = dict(gpu='sm_90', dtype='bfloat16', window_size=7, head_dim=32, implementation='masked')
    assert gpu_check.overrides(data) == [wanted]
    assert gpu_check.overrides(dict(data, pieces={})) == []
    more = [row('triton', 1., 1., map=16), row('masked', 2., 2., map=16)]
    assert gpu_check.overrides(dict(data, pieces=dict(attention=rows + more))) == []
    monkeypatch.setattr(overrides, 'OVERRIDES', (wanted,))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    assert overrides.look_up(torch.device('cuda'), torch.bfloat16, 7, 32) == 'masked'


@not_interpreted
def test_without_a_gpu(tmp_path):
    """What to do is said at once."""
    command = [sys.executable, '-m', 'timm_ls.gpu_check', '--out', str(tmp_path / 'out'), *ON_CPU]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and 'to run it on cpu, set TRITON_INTERPRET=1' in result.stderr
    assert not (tmp_path / 'out').exists()
