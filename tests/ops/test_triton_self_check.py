"""The check of Triton's kernels where they run: what it finds, what becomes of that, and where it is asked."""
import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_interpreter import interpreted

from timm_ls import attention_implementation
from timm_ls.ops.window_attention import recorded_choices, window_attention

pytest.importorskip('triton', reason='triton is not installed: torch brings it along on Linux only')
from timm_ls.ops.masked import plain_attention  # noqa: E402
from timm_ls.ops.merge import pool_plain  # noqa: E402
from timm_ls.ops.triton import attention, kernels, landmarks, self_check  # noqa: E402

CPU = torch.device('cpu')
CALL = ('window attention', CPU, torch.float32, 5, 8, True)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """A process that has checked nothing yet, and an empty cache."""
    monkeypatch.setattr(self_check, '_known', {})
    monkeypatch.setattr(self_check, '_has_warned', False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('TIMM_LS_SELF_CHECK', raising=False)
    return tmp_path / 'timm_ls' / 'self_check'


def forget(monkeypatch):
    """Another process: nothing is known but what is on disk."""
    monkeypatch.setattr(self_check, '_known', {})
    monkeypatch.setattr(self_check, '_has_warned', False)


@pytest.fixture
def checks(monkeypatch):
    """Calls of the check, which finds `checks.seen` and runs nothing."""
    class Checks(list):
        seen = None

        def __call__(self, *call):
            self.append(call)
            if isinstance(self.seen, Exception):
                raise self.seen
            return self.seen

    checks = Checks()
    monkeypatch.setattr(self_check, 'check', checks)
    return checks


def attend(inputs, window=5):
    """The output, and what was chosen."""
    with recorded_choices() as choices:
        out = window_attention(*inputs, window, 2)
    return out, choices[0]


def wrong_scale(monkeypatch):
    monkeypatch.setattr(kernels, 'LOG2_E', kernels.tl.constexpr(1.6))


def wrong_mask(monkeypatch):
    """One column less than the map has."""
    def is_inside(y, x, top, left, H, W):
        return (y + top >= 0) & (y + top < H) & (x + left >= 0) & (x + left < W - 1)

    monkeypatch.setattr(kernels, 'is_inside', is_inside)


def launch_fails(monkeypatch):
    class Kernel:
        arg_names = ()

        def __getitem__(self, grid):
            raise RuntimeError('Triton Error [CUDA]: out of resources\nand more')

    monkeypatch.setattr(kernels, 'forward_kernel', Kernel())


def not_a_number(monkeypatch):
    monkeypatch.setattr(kernels, 'LOG2_E', kernels.tl.constexpr(float('nan')))


def wrong_gradient(monkeypatch):
    """Of the bias, which loses a run of tiles."""
    monkeypatch.setattr(torch.Tensor, 'as_strided', lambda x, *a: torch.as_strided(x, *a)[:1] * .9)


@interpreted
@pytest.mark.parametrize('plant, words', [
    (wrong_scale, 'outputs differ from those of plain operations by'),
    (wrong_mask, 'outputs differ from those of plain operations by'),
    (launch_fails, 'they raised RuntimeError: Triton Error [CUDA]: out of resources'),
    (not_a_number, 'outputs differ from those of plain operations by nan'),
    (wrong_gradient, 'gradients of the bias differ from those of plain operations by'),
])
def test_faults_are_caught(monkeypatch, plant, words):
    """Another form is taken, and one warning says what was seen."""
    plant(monkeypatch)
    inputs = self_check.make_inputs(self_check.Case(1, 4, 6, 2, True), CPU, torch.float32, 5, 2, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        results = [attend(inputs) for _ in range(3)]
    with attention_implementation('tiled'):
        expected = window_attention(*inputs, 5, 2)
    for out, choice in results:
        assert torch.equal(out, expected) and choice.name == 'tiled' and choice.why_not['triton'].startswith(words)
    ours = [str(w.message) for w in caught if 'Triton kernel' in str(w.message)]
    assert len(ours) == 1 and words in ours[0] and 'windows of 5 x 5, heads of 8 channels, torch.float32' in ours[0]
    assert 'and more' not in ours[0]


@interpreted
@pytest.mark.parametrize('dtype, window, needs_grad', [
    (torch.bfloat16, 5, True), (torch.float32, 2, False), (torch.float16, 2, False)])
def test_the_kernels_pass(dtype, window, needs_grad, folder):
    """Without a warning, whatever mode the caller is in; what was found is on disk."""
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='The Triton kernel')
        with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
            assert self_check.failure('window attention', CPU, dtype, window, 8, needs_grad) is None
        inputs = self_check.make_inputs(self_check.Case(1, 1, 2, 0, True), CPU, dtype, window, 2, 8)
        out, choice = attend([x.detach().requires_grad_(needs_grad) for x in inputs], window)
    assert choice.name == 'triton' and ('TritonAttention' in type(out.grad_fn).__name__) == needs_grad
    (path,) = folder.iterdir()
    record = json.loads(path.read_text())
    assert record['seen'] is None
    assert record['subject']['precision'] == str(dtype).removeprefix('torch.')
    assert record['subject']['size'] == window and record['subject']['backward'] == needs_grad


@pytest.mark.filterwarnings('ignore:The Triton kernel')
@pytest.mark.parametrize('seen', [None, 'outputs differ'])
def test_record(seen, checks, monkeypatch, folder):
    """One check per subject; a later process looks it up, and warns again."""
    checks.seen = seen
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            assert self_check.failure(*CALL) == self_check.failure(*CALL) == seen
        assert ['outputs differ' in str(warning.message) for warning in caught] == [True] * (seen is not None)
        forget(monkeypatch)
    assert checks == [CALL]
    self_check.failure(*CALL[:5], False)  # with and without gradients are two subjects
    assert len(checks) == 2 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize('name, value', [
    ('describe_kernels', dict(triton='0', kernels='0')), ('describe_device', dict(device='another')),
    ('precision', 'tf32')])
def test_record_of_something_else(name, value, checks, monkeypatch):
    """Another compiler, source, device or precision is checked anew."""
    self_check.failure(*CALL)
    forget(monkeypatch)
    monkeypatch.setattr(self_check, name, lambda *args: value)
    self_check.failure(*CALL)
    assert len(checks) == 2


@pytest.mark.parametrize('content', ['', '{"seen": null', '[]', 'null', '{"seen": null, "subject": {}}', '{"seen": 3}'])
def test_broken_record(content, checks, monkeypatch, folder):
    self_check.failure(*CALL)
    (path,) = folder.iterdir()
    path.write_text(content)
    forget(monkeypatch)
    assert self_check.failure(*CALL) is None
    assert len(checks) == 2 and json.loads(path.read_text())['seen'] is None


def test_exceptions_are_not_kept(checks, monkeypatch, folder):
    """Out of memory today is no reason tomorrow."""
    checks.seen = torch.OutOfMemoryError('CUDA out of memory')
    with pytest.warns(UserWarning, match='they raised OutOfMemoryError: CUDA out of memory'):
        assert 'OutOfMemoryError' in self_check.failure(*CALL)
    assert not folder.exists()
    forget(monkeypatch)
    checks.seen = None
    assert self_check.failure(*CALL) is None


@pytest.mark.parametrize('home', ['file', 'none'])
def test_nowhere_to_write(home, checks, monkeypatch, tmp_path):
    """A cache that cannot be written, or no home at all."""
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file') if home == 'file' else '')

    def no_home():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.setattr(Path, 'home', no_home)
    assert self_check.failure(*CALL) is None and self_check.failure(*CALL) is None
    assert len(checks) == 1


def test_setting(checks, monkeypatch):
    """'skip' asks nobody, 'always' asks once in a process, anything else is an error."""
    monkeypatch.setenv('TIMM_LS_SELF_CHECK', 'skip')
    assert self_check.failure(*CALL) is None and checks == []
    monkeypatch.setenv('TIMM_LS_SELF_CHECK', 'always')
    for _ in range(2):
        self_check.failure(*CALL), self_check.failure(*CALL)
        forget(monkeypatch)
    assert len(checks) == 2
    monkeypatch.setenv('TIMM_LS_SELF_CHECK', 'never')
    with pytest.raises(ValueError, match="TIMM_LS_SELF_CHECK='never': expected 'skip', 'always'"):
        self_check.failure(*CALL)


def test_threads(checks, monkeypatch):
    """Several ask at once: one check, and all wait for it."""
    entered, proceed = threading.Event(), threading.Event()

    def slow(*call):
        checks.append(call)
        entered.set()
        assert proceed.wait(20)
        return 'outputs differ'

    monkeypatch.setattr(self_check, 'check', slow)
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        answers = [pool.submit(self_check.failure, *CALL) for _ in range(4)]
        assert entered.wait(20)
        proceed.set()
        assert [answer.result() for answer in answers] == ['outputs differ'] * 4
    assert len(checks) == 1 and len(caught) == 1


def test_modes_of_the_caller(checks, monkeypatch, folder):
    """The check sees none of them: tensors have values, gradients are taken, nothing is cast, saved or counted."""
    seen = []

    def look(*call):
        x = torch.ones(2, 2, requires_grad=True)
        y = x @ x
        seen.append((type(y), y.dtype, torch.autograd.grad(y.sum(), x)[0].sum().item()))

    monkeypatch.setattr(self_check, 'check', look)
    hooked = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: hooked.append(x), lambda x: None)
    from torch._subclasses.fake_tensor import FakeTensorMode
    modes = (torch.no_grad(), torch.inference_mode(), torch.autocast('cpu', torch.bfloat16), torch.device('meta'))
    for mode in (*modes, FakeTensorMode(), hooks):
        with mode:
            assert self_check.failure(*CALL) is None
        forget(monkeypatch)
        for path in folder.iterdir():
            path.unlink()
    assert seen == [(torch.Tensor, torch.float32, 16.)] * 6 and hooked == []


@pytest.mark.filterwarnings('ignore:The Triton kernel')
@pytest.mark.parametrize('seen', [None, 'outputs differ'])
def test_in_compiled_code(seen, checks):
    """Asked while a graph is captured: outside of it, and the answer is a constant of the graph."""
    checks.seen = seen

    def choose(x):
        reason = self_check.failure('landmarks', x.device, x.dtype, 5, x.shape[-1], torch.is_grad_enabled())
        return x + 1 if reason is None else x - 1

    class Choose(torch.nn.Module):
        def forward(self, x):
            return choose(x)

    torch.compiler.reset()  # the function's code may have been compiled with another answer
    x = torch.zeros(3, 8)
    results = [torch.compile(choose, backend='eager', fullgraph=True)(x)]
    results += [torch.export.export(Choose(), (x,), strict=strict).module()(x) for strict in (False, True)]
    assert all(torch.equal(result, x + (1 if seen is None else -1)) for result in results) and len(checks) == 1


def test_during_graph_capture(checks, monkeypatch):
    """Nothing may run then: the kernel is not taken, which is not kept; a record is looked up."""
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    monkeypatch.setattr(self_check, 'describe_device', lambda device: dict(device='a GPU'))
    call = (CALL[0], torch.device('cuda', 0), *CALL[2:])
    with pytest.warns(UserWarning, match='run the model once before'):
        assert 'run the model once before' in self_check.failure(*call)
    assert checks == []
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    assert self_check.failure(*call) is None and len(checks) == 1
    forget(monkeypatch)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert self_check.failure(*call) is None and len(checks) == 1


@pytest.mark.parametrize('window', range(1, 17))
def test_cases(window):
    """Maps to check on: a tile whose region lies inside, ragged ends, rows from another than the first, few tokens."""
    cases = list(self_check.cases(window))
    tile_rows, tile_cols = (n * window for n in attention.TILES.get(window, (1, 1)))
    p = window // 2
    assert cases[0].height >= 2 * tile_rows + p and cases[0].width >= 2 * tile_cols + p
    assert any(case.height % window for case in cases) or window == 1
    assert any(0 < case.first_row < case.height and case.first_row % window == 0 for case in cases)
    assert any(case.height < window + p and case.width < window + p for case in cases) or window == 1
    assert {case.has_bias for case in cases} == {True, False}
    assert 0 in {case.num_additional for case in cases} or window == 1


@pytest.mark.parametrize('kind, size', [('window attention', 1), ('window attention', 2), ('window attention', 7),
                                        ('landmarks', 8)])
def test_nothing_compared_is_zero(kind, size, monkeypatch):
    """A gradient that is zero but for rounding differs from itself, on a device that rounds otherwise."""
    seen = []
    monkeypatch.setattr(self_check, 'relative_error', lambda x, y: seen.append(y) or 0.)
    monkeypatch.setattr(attention, 'triton_attention', plain_attention)
    monkeypatch.setattr(landmarks, 'triton_pool_tokens', pool_plain)
    assert len(list(self_check.DIFFERENCES[kind](CPU, torch.float32, size, 8, True))) == len(seen) > 5
    assert min(y.abs().max().item() for y in seen if y.numel() > 0) > 1e-2


@pytest.mark.parametrize('driver', [13000, None])
def test_devices_have_names(driver, monkeypatch):
    """A record tells devices and drivers apart, whatever torch calls them; without the driver's library it has none."""
    def load(name):
        if driver is None:
            raise OSError(name)

        def version(pointer):
            pointer._obj.value = driver
        return SimpleNamespace(cuDriverGetVersion=version)

    monkeypatch.setattr(self_check.ctypes, 'CDLL', load)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    self_check.driver_version.cache_clear()
    try:
        described = self_check.describe_device(torch.device('cuda', 0))
    finally:
        self_check.driver_version.cache_clear()
    assert described == dict(device='a GPU', capability=[9, 0], driver=driver or 0)
