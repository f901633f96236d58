"""The recipes for training: they learn, save, and a killed run that resumes ends as one that nothing happened to."""
import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from paths import RECIPES
from recipe_runs import assert_same_weights, draw_pictures, environment, run, run_killed
from safetensors.torch import load_file

import timm_ls
from timm_ls.pyramid_transformer import PyramidTransformer

NEEDS = {'hf_trainer': ['transformers', 'accelerate'], 'lightning_finetune': ['lightning'], 'fsdp': []}
SMALL = ['--model', 'test_vil_ls', '--img-size', '64', '--epochs', '2', '--batch-size', '4', '--workers', '0',
         '--log-steps', '1', '--lr', '1e-3', '--drop-path', '.3']
STEPS_PER_EPOCH, STEPS = 6, 12


@pytest.fixture
def pictures(tmp_path):
    return draw_pictures(tmp_path / 'pictures')


@pytest.fixture
def recipe(request, monkeypatch):
    """The module of a recipe, on one thread."""
    monkeypatch.syspath_prepend(RECIPES)
    for library in NEEDS.get(request.param, []):
        pytest.importorskip(library, reason=f"{library} is not installed: pip install 'timm-ls[recipes]'")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module(request.param)
    torch.set_num_threads(threads)


def logged_losses(name, output, printed):
    """The loss of each step, as the engine logs it."""
    if name == 'hf_trainer':
        history = json.loads((output / f'checkpoint-{STEPS}' / 'trainer_state.json').read_text())['log_history']
        return [entry['loss'] for entry in history if 'loss' in entry]
    if name == 'lightning_finetune':
        with open(output / 'logs' / 'version_0' / 'metrics.csv') as file:
            return [float(row['loss']) for row in csv.DictReader(file) if row['loss']]
    return [float(line.split('loss ')[1]) for line in printed.splitlines() if line.startswith('step ')]


EPOCH_END = pytest.param(STEPS_PER_EPOCH, 8, marks=pytest.mark.slow)


@pytest.mark.parametrize('save_steps, killed_in', [(4, 10), EPOCH_END])
@pytest.mark.parametrize('recipe', NEEDS, indirect=True)
def test_killed_run_ends_with_the_same_weights(tmp_path, pictures, recipe, monkeypatch, capfd, save_steps, killed_in):
    """Killed in the second epoch, resumed from its middle or its start: bit-equal, with augmentation and drop path."""
    name = recipe.__name__
    common = ['--data-dir', pictures, *SMALL, '--save-steps', save_steps]
    run(recipe, *common, '--output', tmp_path / 'whole')
    losses = logged_losses(name, tmp_path / 'whole', capfd.readouterr().out)
    assert len(losses) == STEPS and sum(losses[-3:]) < .8 * sum(losses[:3]), losses

    output = tmp_path / 'killed'
    run_killed(killed_in, RECIPES / f'{name}.py', *common, '--output', output)
    assert not (output / 'weights.safetensors').exists()
    with pytest.raises(SystemExit, match='add --resume'):
        run(recipe, *common, '--output', output)

    steps = []
    forward = PyramidTransformer.forward

    def counted(self, x):
        if self.training:
            steps.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(PyramidTransformer, 'forward', counted)
    run(recipe, *common, '--output', output, '--resume')
    assert len(steps) == STEPS - (killed_in - 1) // save_steps * save_steps
    assert_same_weights(output, tmp_path / 'whole')

    model = timm.create_model('test_vil_ls', num_classes=2, img_size=64)
    timm_ls.load_checkpoint(model, output / 'weights.safetensors')
    if name == 'hf_trainer':
        final = recipe.TimmWrapperForImageClassification.from_pretrained(output / 'final')
        assert torch.equal(final.timm_model.head.weight, model.head.weight)
        assert final.config.id2label == {0: 'dark', 1: 'light'}


@pytest.mark.parametrize('recipe', ['finetune'], indirect=True)
def test_images_depend_on_seed_epoch_and_index_only(pictures, recipe):
    """Whatever was drawn before, and in any process; the generators of whoever asks stay as they are."""
    args = recipe.parser('').parse_args(['--data-dir', str(pictures), *SMALL])
    train, val = recipe.open_images(args)
    recipe.make_model(args, train, val)
    expected = train[1, 5][0]
    state = torch.get_rng_state()
    torch.rand(3), np.random.rand(3)
    assert torch.equal(train[1, 5][0], expected)
    torch.set_rng_state(state)
    train[1, 5]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(train[0, 5][0], expected)
    assert val[0][0].shape == (3, 64, 64)

    sampler = recipe.ReplayableSampler(train, args.seed)
    whole = list(sampler)
    sampler.start = 8
    assert list(sampler) == whole[8:] and list(sampler) == whole
    sampler.set_epoch(1)
    assert [index for _, index in sampler] != [index for _, index in whole]
    assert {epoch for epoch, _ in sampler} == {1}
    loader = torch.utils.data.DataLoader(train, 4, sampler=sampler, num_workers=1)
    for x, y in zip(loader, torch.utils.data.DataLoader(train, 4, sampler=sampler), strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


@pytest.mark.parametrize('recipe', ['finetune'], indirect=True)
def test_learning_rate_decays_from_layer_to_layer(pictures, recipe):
    """By the factor per layer, throughout the schedule; position biases and global tokens without weight decay."""
    args = recipe.parser('').parse_args(['--data-dir', str(pictures), *SMALL, '--layer-decay', '.5'])
    train, val = recipe.open_images(args)
    model = recipe.make_model(args, train, val)
    optimizer = recipe.make_optimizer(model, args)
    rates = {id(p): group for group in optimizer.param_groups for p in group['params']}
    assert rates[id(model.head.weight)]['lr'] == args.lr
    depth = len({group['lr'] for group in optimizer.param_groups}) - 1
    assert depth >= sum(len(stage.blocks) for stage in model.stages)
    assert rates[id(model.stages[0].embed.proj.weight)]['lr'] == pytest.approx(args.lr * .5 ** depth)
    assert rates[id(model.stages[0].global_tokens)]['weight_decay'] == 0
    schedule = recipe.make_schedule(optimizer, args, 100)
    for step, factor in ((0, 0.), (5, .5), (55, np.cos(.55 * np.pi) / 2 + .5), (100, 0.)):
        schedule.step_update(step)
        assert rates[id(model.head.weight)]['lr'] == pytest.approx(factor * args.lr)
        assert rates[id(model.stages[0].embed.proj.weight)]['lr'] == pytest.approx(factor * args.lr * .5 ** depth)


@pytest.mark.parametrize('recipe', ['finetune'], indirect=True)
def test_folders_that_do_not_fit_are_refused(tmp_path, pictures, recipe):
    """With the reason."""
    def opened(folder):
        return recipe.open_images(recipe.parser('').parse_args(['--data-dir', str(folder)]))

    train, val = opened(pictures / 'train')  # no split: all of it is for training
    assert len(train) == 24 and val is None
    with pytest.raises(SystemExit, match='no folder'):
        opened(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit, match='folder of images for every class'):
        opened(tmp_path / 'empty')
    (pictures / 'val' / 'dark').rename(pictures / 'val' / 'dim')
    with pytest.raises(SystemExit, match='Classes differ'):
        opened(pictures)


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'vil_ls_huge'], "--model: unknown model 'vil_ls_huge'"),
    (['--img-size', '31'], "--img-size: expected a whole number from 32 on, got '31'"),
    (['--epochs', '0'], "--epochs: expected a whole number from 1 on, got '0'"),
    (['--batch-size', '-1'], '--batch-size: expected a whole number from 1 on'),
    (['--save-steps', 'some'], "--save-steps: expected a whole number from 1 on, got 'some'"),
])
@pytest.mark.parametrize('recipe', ['finetune'], indirect=True)
def test_arguments_that_do_not_fit_are_refused(recipe, arguments, message, capsys):
    """Before any image is read."""
    with pytest.raises(SystemExit) as stop:
        recipe.parser('').parse_args(['--data-dir', '.', *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize('arguments, message', [
    (['--pretrained-path', 'nothing.pth'], 'No weights to start from: No checkpoint file at nothing.pth'),
    ([], 'No weights to start from: No pretrained weights exist for vil_ls_tiny'),
])
@pytest.mark.parametrize('recipe', ['finetune'], indirect=True)
def test_missing_weights(pictures, recipe, arguments, message):
    """A line that says so."""
    args = recipe.parser('').parse_args(['--data-dir', str(pictures), '--model', 'vil_ls_tiny', *arguments])
    with pytest.raises(SystemExit, match=message):
        recipe.make_model(args, *recipe.open_images(args))


@pytest.mark.parametrize('recipe', ['fsdp', 'large_image'], indirect=True)
def test_started_without_torchrun(recipe, monkeypatch, capsys):
    """What to start it with."""
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(SystemExit) as stop:
        recipe.main(['--data-dir', '.'])
    assert stop.value.code == 2 and 'start this with torchrun' in capsys.readouterr().err


@pytest.mark.parametrize('recipe', ['hf_trainer', 'fsdp'], indirect=True)
def test_incomplete_checkpoints_are_passed_over(tmp_path, pictures, recipe):
    """What was cut short while it was written is not resumed from."""
    folder = tmp_path / ('checkpoint-4' if recipe.__name__ == 'hf_trainer' else 'step-00000004')
    folder.mkdir()
    (folder / 'model.safetensors').write_bytes(b'half')
    run(recipe, '--data-dir', pictures, *SMALL, '--epochs', 1, '--output', tmp_path, '--resume')
    assert (tmp_path / 'weights.safetensors').exists()


def bicubic(old, new):
    """Weights [new, old] of cubic convolution with a = -0.75 between pixels whose outer edges coincide."""
    positions = (np.arange(new) + .5) * old / new - .5
    first = np.floor(positions).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        d = np.abs(positions - first - tap)
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(new), (first + tap).clip(0, old - 1)), np.where(d <= 1, near, far))
    return weights


def larger(checkpoint, size, by):
    """The model that timm's train.py makes from a checkpoint by this option of its own, for images of a size."""
    if by == '--initial-checkpoint':
        return timm.create_model('test_vil_ls', num_classes=2, checkpoint_path=str(checkpoint), img_size=size).eval()
    overlay = dict(file=str(checkpoint), num_classes=-1)
    return timm.create_model(
        'test_vil_ls', num_classes=2, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size).eval()


@pytest.mark.parametrize('by', ['--initial-checkpoint', '--pretrained-path'])
def test_weights_for_another_resolution(tmp_path, by):
    """Bias tables of full attention are resized, everything else stays; at the same size all of it is bit-equal."""
    torch.manual_seed(0)
    model = timm.create_model('test_vil_ls', pretrained=True, num_classes=2, img_size=64).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'last.pth.tar')
    weights = model.state_dict()
    same, other = (larger(tmp_path / 'last.pth.tar', size, by).state_dict() for size in (64, 112))
    tables = [name for name in weights if weights[name].shape != other[name].shape]
    assert len(tables) == 3 and all(name.endswith('.attn.rel_pos.table') for name in tables)  # stages 3 and 4
    for name, value in weights.items():
        if name.startswith('head.') and by == '--pretrained-path':
            continue  # a new classifier
        assert torch.equal(same[name], value), name
        if name not in tables:
            assert torch.equal(other[name], value), name
            continue
        height, width = (bicubic(old, new) for old, new in zip(value.shape[1:], other[name].shape[1:]))
        expected = torch.from_numpy(height @ value.double().numpy() @ width.T).float()
        torch.testing.assert_close(other[name], expected, rtol=0, atol=1e-6)

    other = larger(tmp_path / 'last.pth.tar', 112, by)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = model.forward_features(x), other.forward_features(x)
    print(f'at 64 pixels again: {((actual - expected).abs().max() / expected.abs().max()).item():.1e} of max')
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize('recipe', ['lightning_finetune'], indirect=True)
def test_fine_tuning_goes_on_at_another_resolution(tmp_path, pictures, recipe):
    """What was learned at 64 pixels starts well at 96, and gets better."""
    common = ['--data-dir', pictures, *SMALL]
    run(recipe, *common, '--output', tmp_path / 'small')
    learned = tmp_path / 'small' / 'weights.safetensors'
    run(recipe, *common, '--output', tmp_path / 'large', '--img-size', 96, '--pretrained-path', learned)
    weights = load_file(tmp_path / 'large' / 'weights.safetensors')
    assert weights['stages.2.blocks.0.attn.rel_pos.table'].shape[1:] == (11, 11)
    losses = logged_losses(recipe.__name__, tmp_path / 'large', '')
    assert sum(losses[-3:]) < .8 * sum(losses[:3]), losses


@pytest.fixture
def train_script(tmp_path, pictures):
    """Runs timm's train.py, killed in a step if one is given; the loss of each step and the learning rate, printed."""
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip("timm's distributions do not hold its scripts: set TIMM_SCRIPTS to a clone of its repository")
    script = shutil.copy(Path(os.environ['TIMM_SCRIPTS']) / 'train.py', tmp_path)  # apart from the clone's own timm
    common = [
        '--data-dir', pictures, '--model', 'test_vil_ls', '--pretrained', '--num-classes', 2, '--device', 'cpu',
        '--workers', 0, '--opt', 'adamw', '--lr', 1e-3, '--layer-decay', .8, '--weight-decay', .05,
        '--warmup-epochs', 0, '--log-interval', 1, '--output', tmp_path]

    def train(*arguments, killed_in=None):
        if killed_in:
            return run_killed(killed_in, script, '--device-modules', 'timm_ls', *common, *arguments)
        command = [sys.executable, '-m', 'timm_ls', 'run', script, *common, *arguments]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())
        assert result.returncode == 0, result.stderr[-3000:]
        return re.findall(r'Train: (\d+) \[.*Loss: ([\d.e+-]+) .*LR: ([\d.e+-]+)', result.stdout + result.stderr)

    return train


AT_64 = ['--img-size', 64, '--model-kwargs', 'img_size=64']


@pytest.mark.slow
def test_timm_script_goes_on_from_an_epoch(tmp_path, train_script):
    """Weights, optimizer and schedule are restored: with one batch of unaugmented images per epoch, the same weights.

    What is drawn at random is not: images come in another order than in a run without an end.
    """
    common = [*AT_64, '--batch-size', 24, '--no-aug', '--epochs', 4]
    whole = train_script(*common, '--experiment', 'whole')
    assert len(whole) == 4 and float(whole[-1][1]) < .8 * float(whole[0][1])
    train_script(*common, '--experiment', 'killed', killed_in=4)
    resumed = train_script(*common, '--experiment', 'killed', '--resume', tmp_path / 'killed' / 'last.pth.tar')
    assert [step[0] for step in resumed] == ['3'] and resumed[0][2] == whole[3][2]
    weights, expected = (
        torch.load(tmp_path / name / 'last.pth.tar', weights_only=False)['state_dict'] for name in ('killed', 'whole'))
    error = max((weights[name] - value).abs().max().item() for name, value in expected.items())
    print(f'largest difference of a weight: {error:.1e}')
    assert error < 1e-5


@pytest.mark.slow
def test_timm_script_repeats_an_epoch_that_was_cut_short(tmp_path, train_script):
    """From a recovery checkpoint with --start-epoch; without, timm takes the epoch for done and leaves the rest out."""
    common = [*AT_64, '--batch-size', 4, '--epochs', 3, '--recovery-interval', 2, '--experiment', 'killed']
    train_script(*common, killed_in=11)
    recovery = shutil.copy(tmp_path / 'killed' / 'recovery-1-3.pth.tar', tmp_path)
    assert [step[0] for step in train_script(*common, '--resume', recovery)] == ['2'] * 6
    again = train_script(*common, '--resume', recovery, '--start-epoch', 1)
    assert [step[0] for step in again] == ['1'] * 6 + ['2'] * 6


def test_timm_script_at_another_resolution(tmp_path, train_script):
    """One command from 64 to 96 pixels: bias tables of that size, a loss that starts low and falls."""
    common = ['--batch-size', 24, '--no-aug', '--epochs', 4]
    small = train_script(*AT_64, *common, '--experiment', 'small')
    large = train_script(
        '--img-size', 96, '--model-kwargs', 'img_size=96', *common, '--experiment', 'large',
        '--initial-checkpoint', tmp_path / 'small' / 'last.pth.tar')
    weights = torch.load(tmp_path / 'large' / 'last.pth.tar', weights_only=False)['state_dict']
    assert weights['stages.2.blocks.0.attn.rel_pos.table'].shape[1:] == (11, 11)
    first, start, end = (float(step[1]) for step in (small[0], large[0], large[-1]))
    assert end < .8 * start < .8 * first
