"""The export command: files that give what the model gives, in their engines, or none."""
import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from timm_ls import export
from timm_ls.__main__ import main
from timm_ls.export import Outputs, check_file, export_file, load_file

pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
pytest.importorskip('openvino', reason='openvino is not installed')


def command(capsys, *args):
    """What the command prints."""
    main(['export', *map(str, args)])
    return capsys.readouterr().out


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2'])
def test_written_file(tmp_path, capsys, name, suffix):
    """At the native size: the model's logits at another batch than was captured, from the file that is left."""
    path = tmp_path / f'model{suffix}'
    printed = command(capsys, name, path, '--pretrained')
    model = timm.create_model(name, pretrained=True).eval()
    size = model.pretrained_cfg['input_size'][1:]
    x = torch.randn(4, model.in_chans, *size)
    with torch.no_grad():
        out, = load_file(path, {'.onnx': 'onnx', '.xml': 'openvino', '.pt2': 'pt2'}[suffix])(x)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
    assert f'Written to {path}' in printed and f'3 x {size[0]} x {size[1]}: differs by' in printed
    names = {path.name, 'model.bin'} if suffix == '.xml' else {path.name}
    assert {part.name for part in tmp_path.iterdir()} == names


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_any_size(tmp_path, capsys, name):
    """Dynamic: levels of the pyramid at rectangles that were not captured."""
    path = tmp_path / 'model.xml'
    printed = command(capsys, name, path, '--img-size', 'dynamic', '--features')
    assert 'any height and width' in printed and '3 x 100 x 190: differs by' in printed


def test_half_precision(tmp_path, capsys):
    """Weights take two bytes each instead of four."""
    sizes = []
    for precision in ('f32', 'f16'):
        path = tmp_path / f'{precision}.pt2'
        command(capsys, 'test_vil_ls', path, '--precision', precision)
        sizes.append(path.stat().st_size)
    saved = 2 * sum(p.numel() for p in timm.create_model('test_vil_ls').parameters())
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=.05)


@pytest.fixture
def digits(tmp_path):
    """A folder of images of digits, those that the shipped weights were not trained on among them."""
    folder = tmp_path / 'digits'
    folder.mkdir()
    for i, digit in enumerate(load_digits().images[:40]):
        Image.fromarray((digit * 15.9).astype('uint8')).resize((96, 96)).convert('RGB').save(folder / f'{i}.png')
    return folder


@pytest.mark.parametrize('suffix', ['.onnx', '.xml'])
def test_int8(tmp_path, capsys, digits, suffix):
    """The file is smaller, and nearly all classes stay."""
    if suffix == '.xml':
        pytest.importorskip('nncf', reason='nncf is not installed')
    path = tmp_path / f'model{suffix}'
    printed = command(
        capsys, 'test_vil_ls', path, '--pretrained', '--precision', 'int8', '--calibration', digits)
    share = float(printed.split('eager mode: ')[1].split('%')[0])
    assert share >= 95 and 'of 40 images' in printed


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch):
    """Nothing is written, the error says by how much."""
    def wrong(outputs, path, *args):
        other = Outputs(timm.create_model('test_vil_ls').eval(), features=False)
        export_file(other, path, *args)

    monkeypatch.setattr(export, 'export_file', wrong)
    with pytest.raises(SystemExit, match='Nothing was written: the file differs'):
        main(['export', 'test_vil_ls', str(tmp_path / 'model.pt2'), '--pretrained'])
    assert not list(tmp_path.iterdir())


def test_check_sees_what_is_wrong(tmp_path):
    """One level of the pyramid, in one image of three."""
    model = timm.create_model('test_cvt_ls', pretrained=True).eval()
    outputs, path = Outputs(model, features=True), Path(tmp_path, 'model.pt2')
    export_file(outputs, path, 'pt2', (96, 64))
    checks = check_file(outputs, path, 'pt2', (96, 64), repeats=1)
    assert [(check.batch, check.size) for check in checks] == [(1, (96, 64)), (3, (96, 64))]
    assert max(check.error for check in checks) < 1e-4
    with torch.no_grad():
        model.stages[2].blocks[0].attn.proj.bias += .01
    assert min(check.error for check in check_file(outputs, path, 'pt2', (96, 64), repeats=1)) > 1e-4


@pytest.mark.parametrize('arguments, message', [
    (['resnet18', 'model.onnx'], "'resnet18' is no model of ours"),
    (['nothing', 'model.onnx'], "'nothing' is no model of ours"),
    (['test_vil_ls', 'model.bin'], 'OUT ends with .onnx, .xml'),
    (['test_vil_ls', 'model.onnx', '--format', 'pt2'], 'as its --format'),
    (['test_vil_ls', 'nowhere/model.onnx'], 'no folder to write'),
    (['test_vil_ls', 'model.onnx', '--img-size', '16'], 'from 32 pixels'),
    (['test_vil_ls', 'model.onnx', '--img-size', 'any'], 'or "dynamic"'),
    (['test_vil_ls', 'model.onnx', '--img-size', '²'], 'or "dynamic"'),
    (['test_vil_ls', 'model.pt2', '--precision', 'int8', '--calibration', '.'], 'pt2 takes f32 or f16'),
    (['test_vil_ls', 'model.onnx', '--precision', 'int8'], 'needs --calibration DIR'),
])
def test_errors_come_before_the_work(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(['export', *arguments])
    assert message in capsys.readouterr().err


def test_empty_folder(tmp_path):
    with pytest.raises(SystemExit, match='No images in'):
        main(['export', 'test_vil_ls', str(tmp_path / 'm.onnx'), '--precision', 'int8', '--calibration', str(tmp_path)])


def test_damaged_image(tmp_path):
    """The one of a folder that cannot be read is named."""
    (tmp_path / 'damaged.png').write_text('no image')
    with pytest.raises(SystemExit, match='Could not read .*damaged.png as an image'):
        main(['export', 'test_vil_ls', str(tmp_path / 'm.onnx'), '--precision', 'int8', '--calibration', str(tmp_path)])


def test_missing_engine(tmp_path, monkeypatch):
    """What would be missing in the end is asked for at the start."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        export.importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else find_spec(name))
    monkeypatch.setattr(export, 'load_model', lambda *args: pytest.fail('the work has begun'))
    with pytest.raises(SystemExit, match=r"^onnxruntime is missing: pip install 'timm-ls\[deploy\]'\.$"):
        main(['export', 'test_vil_ls', str(tmp_path / 'm.onnx')])
