"""The notebooks: that they run from top to bottom, with a small budget, and report figures."""
import json
import os
import re

import pytest
from paths import ROOT

nbformat = pytest.importorskip('nbformat', reason="nbformat is not installed: pip install 'timm-ls[notebooks]'")

NOTEBOOKS = [
    'attention_maps', 'deploy', 'detection', 'finetune', 'high_resolution', 'long_range', 'long_sequences',
    'pretraining', 'quickstart', 'segmentation']
# what a model of ours has to reach on held-out images, at least
FIGURES = {'detection': {'box mAP@0.5': .6, 'mask mAP@0.5': .5}, 'segmentation': {'mIoU': .7}}


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


@pytest.fixture
def execute(monkeypatch):
    """Run a notebook, with variables in its environment."""
    nbclient = pytest.importorskip('nbclient', reason="nbclient is not installed: pip install 'timm-ls[notebooks]'")
    pytest.importorskip('ipykernel', reason="ipykernel is not installed: pip install 'timm-ls[notebooks]'")
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))

    def run(name, **environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        notebook = read(name)
        resources = {'metadata': {'path': ROOT / 'notebooks'}}
        nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3', resources=resources).execute()
        return notebook

    return run


def test_every_notebook_is_tested_and_listed():
    names = {path.stem for path in (ROOT / 'notebooks').glob('*.ipynb')}
    assert names == set(NOTEBOOKS)
    readme = (ROOT / 'notebooks' / 'README.md').read_text()
    assert {name for name in names if f'[{name}.ipynb]({name}.ipynb)' in readme} == names


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_kept_outputs_are_of_one_clean_run(name):
    """Every cell ran, from top to bottom, without errors and warnings; there are pictures."""
    cells = [cell for cell in read(name).cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == 'error' or output.get('name') == 'stderr']
    assert any({'image/png', 'image/jpeg'} & set(output.get('data', {})) for output in outputs)


def test_finetune_keeps_what_it_claims():
    """97% of the held-out digits with every seed, within ten minutes of two cores; peers with as many epochs."""
    report = figures(read('finetune'))
    results = report['results']
    scratch = ['test_vil_ls', 'ResNet-18', 'Swin micro']
    assert report['held_out_images'] == 450 and report['seeds'] == 3
    assert set(results) == {*scratch, 'test_vil_ls, shipped weights'}
    assert all(len(result['accuracy']) == 3 for result in results.values())
    assert min(results['test_vil_ls']['accuracy']) >= .97
    assert max(results['test_vil_ls']['cpu_seconds']) <= 2 * 600
    assert {results[name]['epochs'] for name in scratch} == {15}
    assert .8 < results['Swin micro']['parameters'] / results['test_vil_ls']['parameters'] < 1.25


def test_high_resolution_keeps_what_it_claims():
    """Linear in pixels where attention is, from 224 to 4096 a side; full attention grows faster."""
    results = figures(read('high_resolution'))['results']
    ours, swin, vit = (results[name] for name in (
        'vil_ls_tiny_hires', 'swin_tiny_patch4_window7_224', 'vit_tiny_patch16_224'))
    for result in (ours, swin):
        assert result['sides'][0] == 224 and result['sides'][-1] == 4096 and all(result['peak_mb'])
    assert ours['time_exponent'] < 1.15 and ours['memory_exponent'] < 1.15
    assert vit['time_exponent'] > ours['time_exponent'] + .3


def test_long_range_keeps_what_it_claims():
    """Marks are found at any distance with landmarks, not beyond the reach of windows, and not at 224 x 224."""
    report = figures(read('long_range'))
    assert report['share'] == 1 and report['seeds'] == 3
    pairs, large = report['correct']['pairs'], report['correct']['large']
    assert large['window and landmarks']['768'] > .7 and pairs['window and landmarks']['384'] > .8
    text = (f"768 pixels away, tiny models are right {large['window and landmarks']['768']:.0%} of the time with"
            f" landmarks and {large['window only']['768']:.0%} without")
    assert text in (ROOT / 'README.md').read_text()
    for name in ('window only', 'Swin'):
        assert large[name]['own'] > .95 and large[name]['768'] < .35
        assert pairs['window and landmarks']['384'] > pairs[name]['384'] + .2
    assert max(pairs['landmarks, image at 224'].values()) < .35
    shares = report['landmarks_on_marks']
    assert shares['trained'] > 3 * shares['random weights']
    assert report['marks_found'] > .8


def test_long_sequences_keeps_what_it_claims():
    """Linear where full attention is quadratic; models that learned; token by token the same as at once."""
    report = figures(read('long_sequences'))
    assert report['steps'] == 300 and report['generation_difference'] < 1e-5
    assert max(report['exponents'][name] for name in ('long-short', 'causal')) < 1.2 < 1.6 < report['exponents']['full']
    assert min(report['listops'].values()) > .25
    assert set(report['bits_per_character']) == {'long-short', 'window', 'full'}
    assert max(report['bits_per_character'].values()) < 4


def test_pretraining_keeps_what_it_claims():
    """Three seeds; weights learned without labels are worth more than random ones, by neighbors and fine-tuned."""
    report = figures(read('pretraining'))
    assert report['epochs'] == 12 and report['seeds'] == 3
    for results in (report['neighbors'], report['few_labels']):
        assert all(len(values) == 3 for values in results.values())
        means = {kind: sum(values) / 3 for kind, values in results.items()}
        assert min(means['views and regions'], means['views alone']) > means['random weights'] + .05


def test_deploy_keeps_what_it_claims():
    """Files say what the model says: all of it in float32, 99% and more in eight bits, in half the bytes."""
    report = figures(read('deploy'))
    assert report['held_out_images'] == 450
    for name, result in report['results'].items():
        assert result['accuracy'] >= .99 and result['agreement'] >= (.99 if '8 bits' in name else 1)
    for engine in ('OpenVINO', 'ONNX Runtime'):
        sizes = [report['results'][f'{engine}, {kind}']['kilobytes'] for kind in ('8 bits', 'float32')]
        assert sizes[0] < .5 * sizes[1]


@pytest.mark.parametrize('name', FIGURES)
def test_detector_and_segmenter_keep_what_they_claim(name):
    """Good from scratch, beside a ResNet-18 that saw the same images, in twenty minutes of one core's time."""
    report = figures(read(name))
    assert report['held_out_images'] == 200 and set(report['results']) == {report['model'], 'ResNet-18'}
    assert all(report['results'][report['model']][figure] >= least for figure, least in FIGURES[name].items())
    assert sum(report['cpu_seconds'].values()) < 1200


@pytest.mark.parametrize('name', FIGURES)
def test_detector_and_segmenter_run(execute, name):
    """With two training steps: every cell, the same kinds of figures."""
    report = figures(execute(name, NOTEBOOK_STEPS='2'))
    assert report['steps'] == 2 and report['held_out_images'] == 8
    assert len(report['results']) == 2 and 'ResNet-18' in report['results']
    for result in report['results'].values():
        assert all(0 <= result[figure] <= 1 for figure in FIGURES[name])


def test_quickstart_runs(execute):
    """The shipped weights know the held-out digits."""
    text = printed(execute('quickstart'))
    assert float(re.search(r'([\d.]+)% of 450 held-out digits are classified correctly', text)[1]) >= 99
    assert 'stride 4 [1, 64, 84, 63], stride 16 [1, 384, 21, 16]' in text


def test_attention_maps_runs(execute):
    """Both models know the digit; a model with random weights has even landmarks."""
    text = printed(execute('attention_maps'))
    assert all(re.search(rf'{name}: predicted 2 \(\d+%\), true 2', text) for name in ('test_cvt_ls', 'test_vil_ls'))
    assert int(re.search(r'a landmark is spread over (\d+)% to', text)[1]) >= 80


def test_finetune_runs(execute):
    """With two training steps and two seeds: every run reports, and the saved model is the trained one."""
    notebook = execute('finetune', NOTEBOOK_STEPS='2')
    report = figures(notebook)
    assert report['steps'] == report['seeds'] == 2 and report['held_out_images'] == 450
    assert len(report['results']) == 4
    assert all(0 <= a <= 1 for result in report['results'].values() for a in result['accuracy'])
    assert 'Restored: the same logits' in printed(notebook)


def test_high_resolution_runs(execute):
    """At two small sizes, without memory."""
    results = figures(execute('high_resolution', NOTEBOOK_MAX_SIDE='256'))['results']
    assert len(results) == 3
    for result in results.values():
        assert result['sides'] == [224, 256] and min(result['seconds']) > 0 and result['peak_mb'] == [None, None]


@pytest.mark.slow
def test_long_range_runs(execute):
    """With a hundredth of the steps and one seed: every cell, the same kinds of figures."""
    report = figures(execute('long_range', NOTEBOOK_SHARE='.01'))
    assert report['share'] == .01 and report['seeds'] == 1
    assert set(report['correct']) == {'pairs', 'large', 'small_counting', 'counting'}
    assert len(report['correct']['pairs']) == 5 and len(report['correct']['large']) == 3
    assert all(0 <= value <= 1 for table in report['correct'].values() for row in table.values()
               for value in row.values())


@pytest.mark.slow
def test_deploy_runs(execute):
    """With a smaller backbone: every cell, both engines, the same classes."""
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('openvino', reason='openvino is not installed')
    report = figures(execute('deploy', NOTEBOOK_STEPS='2'))
    assert len(report['results']) == 5
    assert min(result['agreement'] for result in report['results'].values()) >= .99


@pytest.mark.slow
def test_long_sequences_runs(execute):
    """With two training steps: every cell, the same kinds of figures."""
    report = figures(execute('long_sequences', NOTEBOOK_STEPS='2'))
    assert report['steps'] == 2 and report['generation_difference'] < 1e-5
    assert set(report['listops']) == {'long-short', 'full'} and len(report['bits_per_character']) == 3


@pytest.mark.slow
def test_pretraining_runs(execute):
    """With one epoch and one seed: every cell, the same kinds of figures."""
    report = figures(execute('pretraining', NOTEBOOK_STEPS='1'))
    assert report['epochs'] == report['seeds'] == 1
    assert set(report['neighbors']) == set(report['few_labels']) == {
        'random weights', 'views and regions', 'views alone'}
