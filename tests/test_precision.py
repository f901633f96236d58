"""Reduced precision: the command's numbers, tiles against the plain form, finite values."""
import copy
import json
import math

import pytest
import timm
import torch

from timm_ls import attention_implementation
from timm_ls.precision import FORMATS, INPUTS, main, measure, relative_error, run, use_order_one_weights

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


class NanGradient(torch.nn.Module):
    """Values as they are, gradients not a number."""

    def forward(self, x):
        x.register_hook(lambda grad: grad * math.nan)
        return x


@pytest.mark.parametrize('where', ['values', 'gradients'])
def test_planted_nan_is_reported(monkeypatch, capsys, where):
    """A value, or a gradient alone, that is not finite: named in the table, and the command fails."""
    create_model = timm.create_model

    def broken(name, **kwargs):
        model = create_model(name, **kwargs)
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
    (['vil_ls_huge'], "'vil_ls_huge' is no model of ours"),
    (['resnet18'], "'resnet18' is no model of ours"),
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
