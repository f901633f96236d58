"""The notebooks: that they run from top to bottom, with a small budget, and report figures."""
import json
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip('nbformat', reason="nbformat is not installed: pip install 'timm-ls[notebooks]'")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ['detection', 'segmentation']
FIGURES = {'detection': ['box mAP@0.5', 'mask mAP@0.5'], 'segmentation': ['mIoU']}


def read(name):
    return nbformat.read(ROOT / 'notebooks' / f'{name}.ipynb', as_version=4)


def printed(notebook):
    """All that the cells wrote to stdout."""
    return ''.join(
        output.text for cell in notebook.cells for output in cell.get('outputs', []) if output.get('name') == 'stdout')


def figures(notebook):
    """The figures that the notebook reports, from the line of JSON that it prints."""
    return json.loads(next(line for line in printed(notebook).splitlines() if line.startswith('{')))


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_kept_files_are_small_and_hold_no_paths(name):
    text = (ROOT / 'notebooks' / f'{name}.ipynb').read_text()
    assert len(text) < 1_000_000
    assert not re.search(r'/(?:home|root|work|tmp|usr|venv|Users)/|site-packages', text)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_runs(name, monkeypatch):
    """With two training steps: every cell, the same kinds of figures."""
    nbclient = pytest.importorskip('nbclient', reason="nbclient is not installed: pip install 'timm-ls[notebooks]'")
    pytest.importorskip('ipykernel', reason="ipykernel is not installed: pip install 'timm-ls[notebooks]'")
    monkeypatch.setenv('NOTEBOOK_STEPS', '2')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    notebook = read(name)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': ROOT / 'notebooks'}}).execute()
    report = figures(notebook)
    assert report['steps'] == 2 and report['held_out_images'] == 8
    assert len(report['results']) == 2 and 'ResNet-18' in report['results']
    for result in report['results'].values():
        assert all(0 <= result[figure] <= 1 for figure in FIGURES[name])
