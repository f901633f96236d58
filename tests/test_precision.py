"""Reduced precision: the command's numbers, tiles against the plain form, and that no query is ever without a key."""
import copy
import json
import math

import pytest
import timm
import torch

import timm_ls.streaming
from timm_ls import attention_implementation
from timm_ls.attention import attend_part, sum_per_head
from timm_ls.precision import FORMATS, INPUTS, main, measure, relative_error, run, use_order_one_weights
from timm_ls.window import token_index, window_index
from timm_ls.window_attention import softmax, window_attention

# Largest error at the logits or any level, on the tiny models: a few units of the last place of each type
BOUNDS = {
    'float32': 5e-6, 'bfloat16 autocast': .1, 'float16 autocast': .01, 'bfloat16': .1, 'float16': .01}


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_command(tmp_path, capsys, name):
    """Every format that a CPU has, on every input, within its bounds; the table and the JSON say the same."""
    main([name, '--img-size', '40', '64', '--json', str(tmp_path / 'precision.json')])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / 'precision.json').read_text())['rows']
    assert [(row['format'], row['input']) for row in rows] == [
        (fmt, kind) for kind in INPUTS for fmt in FORMATS if fmt != 'tf32']
    assert 'tf32: not measured' in printed and f'torch {torch.__version__}' in printed
    for row in rows:
        assert row['finite_values'] and row['finite_gradients']
        assert len(row['errors']) == len(timm.create_model(name, device='meta').stages) + 1
        assert 0 < min(row['errors']) and max(row['errors']) < BOUNDS[row['format']], row
        assert f"| {row['format']} | {row['input']} | {row['errors'][0]:.0e} |" in printed
    for fmt in BOUNDS:  # inputs that differ
        assert len({tuple(row['errors']) for row in rows if row['format'] == fmt}) == len(INPUTS)
    halves = {fmt: max(max(row['errors']) for row in rows if row['format'] == fmt) for fmt in BOUNDS}
    assert halves['float32'] < halves['float16'] < halves['bfloat16']


def root_mean_square(tensors):
    return torch.cat([t.double().flatten() for t in tensors]).square().mean().sqrt()


@pytest.mark.parametrize('fmt', ['bfloat16 autocast', 'float16 autocast', 'bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_tiles_are_as_exact_as_plain_attention(name, fmt):
    """Error against float32, of logits, levels and gradients: at most twice that of one masked softmax; about equal."""
    torch.manual_seed(0)
    image = torch.randn(6, 3, 70, 100)
    model = timm.create_model(name, pretrained=True).eval()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
    with attention_implementation('masked'):
        expected, expected_gradients = run(copy.deepcopy(plain), image.clone(), 'float32')
    errors = {}
    for implementation, subject in (('tiled', model), ('masked', plain)):
        with attention_implementation(implementation):
            outputs, gradients = run(copy.deepcopy(subject), image.clone(), fmt)
        assert all(tensor.isfinite().all() for tensor in outputs + gradients)
        errors[implementation] = [
            root_mean_square([a - b for a, b in zip(actual, wanted)]) / root_mean_square(wanted)
            for actual, wanted in (
                (outputs[:1], expected[:1]), (outputs[1:], expected[1:]), (gradients, expected_gradients))]
    for tiled, masked in zip(errors['tiled'], errors['masked']):
        assert 0 < tiled < 2 * masked


def test_weights_of_many_tokens():
    """Means over so many tokens that half precision holds neither a weight nor the logarithm of their sum."""
    N = 684784  # 1 / N lies between two numbers of float16
    mean = sum_per_head(torch.full((1, 1, N), 1 / N), torch.ones(1, N, 4, dtype=torch.float16), num_heads=1)
    assert (mean.float() - 1).abs().max() < 2e-3
    zeros = torch.zeros(1, 3000, 4, dtype=torch.bfloat16)
    out, share = attend_part(zeros[:, :1], zeros, torch.ones_like(zeros), num_heads=1)
    assert share.dtype == torch.float32 and share.item() == pytest.approx(math.log(3000))
    assert (out == 1).all()
    weights = softmax(zeros, dim=1)
    assert weights.dtype == torch.float32 and weights.sum(1) == pytest.approx(torch.ones(1, 4))


def test_gradients_of_many_tiles(monkeypatch):
    """Sums over all windows are as exact as one tile's: those of global keys and of the bias."""
    torch.manual_seed(0)
    monkeypatch.setattr(timm_ls.streaming, 'CPU_PIECE_BYTES', 1)  # a tile for each window
    shapes = (1, 60, 60, 8), (1, 60, 60, 2, 8), (1, 2, 2, 8), (2, 3, 3, 5, 5)
    tensors = [torch.randn(shape).bfloat16() for shape in shapes]
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        with attention_implementation('tiled'):
            out = window_attention(*inputs, window_size=3, num_heads=2)
        grads.append(torch.autograd.grad(out, inputs[2:], torch.ones_like(out)))
    for exact, half in zip(*grads, strict=True):
        assert (half.float() - exact).norm() < .02 * exact.norm()


class NanGradient(torch.nn.Module):
    """Values as they are, gradients not a number."""

    def forward(self, x):
        x.register_hook(lambda grad: grad * math.nan)
        return x


@pytest.mark.parametrize('where', ['values', 'gradients'])
def test_planted_nan_is_reported(monkeypatch, capsys, where):
    """A value, or a gradient alone, that is not finite: named in the table, and the command fails."""
    create_model = timm.create_model

    def broken(name):
        model = create_model(name)
        if where == 'values':
            model.stages[1].blocks[0].mlp.fc2.bias.data[3] = math.inf
        else:
            model.head_drop = NanGradient()
        return model

    monkeypatch.setattr(timm, 'create_model', broken)
    monkeypatch.setattr('timm_ls.precision.INPUTS', {'normal': 1.})
    with pytest.raises(SystemExit, match='NaN or Inf: test_cvt_ls, float32, normal'):
        main(['test_cvt_ls', '--img-size', '32'])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| float32 | normal')]
    assert rows[0].split(' | ')[-1] == ('values and gradients |' if where == 'values' else 'gradients |')


def test_landmarks_are_one_hot():
    """What the table calls one-hot is: nearly all weight on one token, for nearly every landmark."""
    torch.manual_seed(0)
    model = timm.create_model('test_vil_ls')
    use_order_one_weights(model)
    softmax, largest = torch.Tensor.softmax, []

    with pytest.MonkeyPatch.context() as patch:
        def remember(self, dim=None, dtype=None):
            weights = softmax(self, dim=dim, dtype=dtype)
            if dim == 2 and self.ndim == 3 and self.dtype == torch.float64:
                largest.append(weights.amax(2).flatten())
            return weights

        patch.setattr(torch.Tensor, 'softmax', remember)
        patch.setattr('timm_ls.precision.INPUTS', {'one-hot landmarks': 1.})
        patch.setattr('timm_ls.precision.FORMATS', ('float32',))
        patch.setattr('timm_ls.precision.available_formats', lambda device: {'float32': ''})
        measure('test_vil_ls', model, (64, 96))
    landmarks = torch.cat([weights for weights in largest if weights.numel() % 8 == 0])
    assert landmarks.numel() >= 48 and (landmarks > .99).double().mean() > .9


@pytest.mark.parametrize('arguments, message', [
    (['vil_ls_huge'], 'unknown model'),
    (['--img-size', '16'], 'from 32 pixels'),
    (['--device', 'nonsense'], 'not available here'),
])
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_relative_error():
    """Against the largest value; NaN stays NaN."""
    assert relative_error(torch.tensor([1., -3.5]), torch.tensor([1., -4.]).double()) == pytest.approx(.125)
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.ones(1).double()))


@pytest.mark.parametrize('window_size', range(1, 9))
def test_every_query_has_a_key(window_size):
    """No window of any map is without a valid key, queries in the padding included; every token has one place."""
    for height in range(1, 41):
        for width in range(1, 41):
            halo = window_size + 2 * (window_size // 2)
            index, valid = window_index(1, height, width, window_size, window_size // 2, torch.device('cpu'))
            windows = math.ceil(height / window_size) * math.ceil(width / window_size)
            assert valid.view(windows, halo * halo).any(1).all(), (height, width)
            assert index.min() >= 0 and index.max() < height * width
            if width not in (1, 2, window_size, 23, 40):
                continue
            index, valid = window_index(1, height, width, window_size, 0, torch.device('cpu'))
            place = token_index(1, height, width, window_size, torch.device('cpu'))
            assert valid.sum() == height * width and valid[place].all()
            assert torch.equal(index[place], torch.arange(height * width)), (height, width)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('size', [(33, 40), (32, 96), (57, 32)])
def test_padding_gives_no_nan(dtype, size):
    """Maps smaller than a window, by masks: finite values and gradients in every type, of huge inputs as well."""
    torch.manual_seed(0)
    model = timm.create_model('test_vil_ls', pretrained=True).to(dtype)
    x = (torch.randn(2, 3, *size) * 100).to(dtype).requires_grad_()
    with attention_implementation('masked'):
        logits = model(x)
    logits.float().sum().backward()
    assert all(t.isfinite().all() for t in [logits, x.grad, *(p.grad for p in model.parameters())])
