"""The command line, as a person uses it."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from macs import macs_by_hand
from paths import ROOT
from PIL import Image

import timm_ls.__main__
from timm_ls.__main__ import COMMANDS, draw, main, principal_colors, timm_ls_models
from timm_ls.cli import open_image


def test_sample_photo(tmp_path, monkeypatch, capsys):
    """No argument but a small model: every level with its shape, that there are no weights, and a picture."""
    monkeypatch.chdir(tmp_path)
    main(['--model', 'vil_ls_tiny', '--img-size', '96', '160'])
    printed = capsys.readouterr().out
    assert 'grace_hopper.jpg: 512 x 600 pixels, seen by vil_ls_tiny at 160 x 96' in printed
    assert re.search(r'\d+ ms on cpu', printed)
    assert 'No weights loaded' in printed
    for line in ('stages.0: stride  4, [1, 48, 24, 40]', 'stages.1: stride  8, [1, 96, 12, 20]',
                 'stages.2: stride 16, [1, 192, 6, 10]', 'stages.3: stride 32, [1, 384, 3, 5]'):
        assert line in printed
    picture = np.asarray(Image.open(tmp_path / 'pyramid.png').convert('RGB')).astype(float)
    assert picture.shape[1] > 3 * picture.shape[0]
    fifths = np.array_split(picture[picture.shape[0] // 2:], 5, axis=1)  # the photo and four levels
    assert all(part.std() > 20 for part in fifths)


def test_two_photos_with_a_checkpoint(tmp_path, capsys):
    """Classes come from the weights given: here, of a head that knows only one."""
    model = timm.create_model('vil_ls_tiny')
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data[24] = 20.
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    for name, colour in (('red.png', (200, 30, 30)), ('blue.png', (30, 30, 200))):
        Image.new('RGB', (90, 70), colour).save(tmp_path / name)
    main([str(tmp_path / 'red.png'), str(tmp_path / 'blue.png'), '--model', 'vil_ls_tiny', '--img-size', '64',
          '--checkpoint', str(tmp_path / 'weights.pth'), '--out', str(tmp_path / 'two.png')])
    printed = capsys.readouterr().out
    assert printed.count('100.0%  great grey owl') == 2
    assert 'No weights loaded' not in printed
    assert printed.count('90 x 70 pixels') == 2
    one_row, two_rows = Image.open(tmp_path / 'two.png').size
    assert two_rows > .3 * one_row


def test_sixteen_bits(tmp_path):
    """A photo of 16 bits is scaled to 8, not cut off."""
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(grey).save(tmp_path / 'grey.png')
    picture = open_image(str(tmp_path / 'grey.png'))
    np.testing.assert_array_equal(np.asarray(picture), np.broadcast_to((grey // 256)[..., None], (256, 256, 3)))


def test_photo_is_shown_as_the_model_sees_it(tmp_path, monkeypatch):
    """At a size that was asked for, the whole photo, edges included, in its own colours."""
    drawn = []
    monkeypatch.setattr(timm_ls.__main__, 'draw', lambda rows, *args: drawn.extend(rows))
    photo = Image.fromarray(np.random.default_rng(0).integers(256, size=(128, 192, 3), dtype=np.uint8))
    photo.save(tmp_path / 'photo.png')
    main([str(tmp_path / 'photo.png'), '--model', 'vil_ls_tiny', '--img-size', '64', '96'])
    expected = np.asarray(photo.resize((96, 64), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(drawn[0][1].permute(1, 2, 0), expected, atol=1e-6)


@pytest.mark.parametrize('arguments, message', [
    ([__file__], 'Could not read .*test_cli.py as an image'),
    (['--checkpoint', __file__, '--model', 'vil_ls_tiny'], r'Could not read .*test_cli.py \(.* Cause: \w[^\n]*$'),
    (['--checkpoint', 'x.pth', '--model', 'resnet18'], 'Expected a model of timm_ls to load x.pth into, got ResNet'),
    (['--checkpoint', 'nothing.pth', '--model', 'vil_ls_tiny'], 'No checkpoint file at nothing.pth'),
    (['--model', 'vil_ls_tiny', '--img-size', '31'], 'at least 32 x 32 pixels, got 31 x 31'),
    (['--model', 'vit_tiny_patch16_224', '--img-size', '64'], r'224 at 64 x 64 pixels: Input height \(64\)'),
    (['--model', 'vil_ls_tiny', '--pretrained'], 'No pretrained weights exist for vil_ls_tiny'),
    (['run'], 'Usage: python -m timm_ls run SCRIPT.py'),
    (['run', 'nothing.py'], 'got nothing.py'),
])
def test_errors_are_one_line(arguments, message):
    """A person who mistypes reads what was wrong, not a traceback."""
    with pytest.raises(SystemExit, match=message):
        main(arguments)


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'vil_ls_huge'], "unknown model 'vil_ls_huge'; ours: .*vil_ls_medium"),
    (['--img-size', '1', '2', '3'], r'got \[1, 2, 3\]'),
    (['--img-size', '0'], r'in pixels, got \[0\]'),
    (['--device', 'nonsense'], "--device: 'nonsense' is not available here"),
    (['--device', 'meta'], "--device: 'meta' is not available here"),
    (['nothing.jpg'], "'nothing.jpg' is neither a photo, .* nor a command: .*models, .*export"),
    (['.'], "'.' is neither a photo"),
    ([''], "'' is neither a photo"),
    (['models', 'foo'], 'python -m timm_ls models: error: unrecognized arguments: foo'),
    (['gpu_check', '--device', 'cpu', '--minutes', '0'], '--minutes takes a positive number, got 0.0'),
    (['gpu_check', '--device', 'cpu', '--out', __file__], "--out: no folder can be made at '.*test_cli.py'"),
    (['gpu_check', '--device', 'cpu', '--reference', 'nowhere'], "no models/msvit.py in 'nowhere'"),
    (['--out', 'no/such/x.png'], "--out: no folder to write 'no/such/x.png' to"),
    (['--out', 'x.foo'], "ends with .png, .* got 'x.foo'"),
])
def test_usage_errors(arguments, message, capsys):
    """Wrong arguments: usage and the reason."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_help_names_every_command(capsys):
    """Each on a line of its own, and each has a --help."""
    with pytest.raises(SystemExit):
        main(['--help'])
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf'^  {command} +\w', printed, re.MULTILINE)
        with pytest.raises(SystemExit):
            main([command, '--help'])


@pytest.mark.parametrize('arguments', [
    ['--out', 'taken.png'], ['export', 'test_vil_ls', 'taken.onnx'], ['benchmark', '--plot', 'taken.png'],
    ['benchmark', '--json', 'taken.json'], ['precision', '--json', 'taken.json']])
def test_folder_in_the_way(arguments, tmp_path, monkeypatch, capsys):
    """A folder of the name of the file to write is an error before the work, and nothing is put into it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / arguments[-1]).mkdir()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert f"'{arguments[-1]}' is a folder: expected the name of a file" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch, tmp_path, capsys):
    """What to install, before any work."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    Image.new('RGB', (32, 32)).save(tmp_path / 'photo.png')
    with pytest.raises(SystemExit, match=r"pip install 'timm-ls\[demo\]'"):
        main([str(tmp_path / 'photo.png'), '--model', 'vil_ls_tiny', '--img-size', '32'])
    assert capsys.readouterr().out == ''


def test_interrupted(monkeypatch):
    """Ctrl-C ends a command without a traceback."""
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(timm_ls.__main__, 'show_pyramid', interrupt)
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 130


def test_run_a_script(tmp_path):
    """`run` starts a script with our models registered, its own arguments, and its folder to import from."""
    (tmp_path / 'neighbour.py').write_text('VALUE = 41\n')
    (tmp_path / 'script.py').write_text(
        'import sys, timm, neighbour\n'
        'assert __name__ == "__main__"\n'
        'print(timm.is_model("vil_ls_tiny"), sys.argv[1:], neighbour.VALUE)\n')
    result = subprocess.run(
        [sys.executable, '-m', 'timm_ls', 'run', str(tmp_path / 'script.py'), '--model', 'x'],
        capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "True ['--model', 'x'] 41\n", result.stderr


def test_principal_colors():
    """Colours separate what differs most, cope with maps of one token, and stay in range."""
    level = torch.zeros(5, 4, 6)
    level[2, :, 3:] = 1.
    colours = principal_colors(level)
    assert colours.shape == (4, 6, 3)
    assert (colours[:, :3, 0] - colours[:, 3:, 0]).abs().min() > .999
    assert principal_colors(torch.randn(5, 1, 1)).isfinite().all()


@pytest.mark.parametrize('size', [(64, 96), (96, 96), (32, 128)])
@pytest.mark.parametrize('photos', [1, 2])
def test_titles_do_not_touch(tmp_path, monkeypatch, size, photos):
    """At least 4 pixels between the title and those of the panels, and between those of neighbours."""
    import matplotlib.pyplot as plt
    figures = []
    monkeypatch.setattr(plt, 'close', figures.append)
    levels = [torch.rand(48, size[0] // stride, size[1] // stride) for stride in (4, 8, 16, 32)]
    row = ('a photo with a name that is longer than its panel is wide.jpeg', torch.rand(3, *size), levels)
    draw([row] * photos, 'vil_ls_tiny', [4, 8, 16, 32], False, str(tmp_path / 'pyramid.png'))
    title = figures[0].get_suptitle()
    heading, = (text for text in figures[0].texts if text.get_text() == title)
    panels = [axis.title.get_window_extent() for axis in figures[0].axes]
    assert heading.get_window_extent().y0 - max(panel.y1 for panel in panels) >= 4
    for left, right in zip(panels[:5], panels[1:5]):
        assert right.x0 - left.x1 >= 4


def test_readme_table_is_what_the_command_prints(monkeypatch, capsys):
    """The model table in the README, row by row; counting by hand, which agrees (`test_macs`), is quicker."""
    monkeypatch.setattr(timm_ls.__main__, 'count_macs', macs_by_hand)
    main(['models'])
    readme = (ROOT / 'README.md').read_text()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| `')]
    assert len(rows) == len(timm_ls_models())
    catalogue = json.loads((ROOT / 'timm_ls' / 'pretrained' / 'catalogue.json').read_text())
    published = {entry['architecture']: entry['published'] for entry in catalogue.values() if 'published' in entry}
    for row in rows:
        accuracies = published.get(row.split('`')[1])
        row += f" {accuracies['top1']:.3f} | {accuracies['top5']:.3f} |" if accuracies else ' | |'
        assert row in readme, row


def test_readme_says_what_its_chart_shows():
    """Time and memory against Swin-T at the largest side, from the benchmark's report that the chart is drawn from."""
    cells = json.loads((ROOT / 'notebooks' / 'figures' / 'cost.json').read_text())['cells']
    side = max(cell['height'] for cell in cells)
    ours, swin = (
        next(cell for cell in cells if cell['model'] == name and cell['height'] == side)
        for name in ('vil_ls_small_hires', 'swin_tiny_patch4_window7_224'))
    time, memory = swin['images_per_s'] / ours['images_per_s'], ours['peak_bytes'] / swin['peak_bytes']
    text = (f"at {side} x {side} on a CPU, `vil_ls_small_hires` takes {time:.2f} times Swin-T's time and"
            f" {memory:.2f} of its memory")
    assert text in ' '.join((ROOT / 'README.md').read_text().split())


def test_readme_says_what_was_measured_on_a_gpu():
    """Images per second over Swin-S's, from the table in MEASUREMENTS.md."""
    lines = (ROOT / 'timm_ls' / 'MEASUREMENTS.md').read_text().splitlines()
    first = lines.index('| | ours | Swin-S | SwinV2-S | ConvNeXt-S | Hiera-S | ViT-S/16 | released code |') + 2
    rows = (line.split(' | ') for line in lines[first:first + 7])
    ratios = {row[0].strip('| '): float(row[1].replace(',', '')) / float(row[2].replace(',', '')) for row in rows}
    text = (f"has {ratios['1024 x 1024, 64 images']:.1f} times Swin-S's images per second at 1024 x 1024 and"
            f" {ratios['1024 x 1024, 16 images, training']:.1f} in training; at 224 x 224"
            f" {ratios['224 x 224, 256 images']:.1f}, and {ratios['224 x 224, 128 images, training']:.1f} in training")
    assert text in ' '.join((ROOT / 'README.md').read_text().split())


def test_ci_runs_the_command_of_the_readme():
    """The README's second command is what CI executes."""
    command = 'pip install -e ".[test]" && python -m pytest'
    assert command in (ROOT / 'README.md').read_text().splitlines()
    assert command in (ROOT / '.ci' / 'run').read_text().splitlines()


def test_import_does_nothing_else():
    """Importing opens no connection, touches no device, reads no weights, and is quick beyond timm's own import."""
    code = (
        'import socket, time, timm\n'
        'def refuse(*a, **k): raise AssertionError("network")\n'
        'socket.socket.connect = refuse\n'
        'import torch\n'
        'torch.load = refuse\n'
        'start = time.process_time(); import timm_ls; seconds = time.process_time() - start\n'
        'assert not torch.cuda.is_initialized()\n'
        'import sys; assert not {"matplotlib", "onnx", "transformers"} & set(sys.modules)\n'
        'print(seconds)\n')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.
