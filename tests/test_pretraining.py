"""Pretraining: the region loss by an oracle, self-distillation in one and two processes, killed runs, bad input; the
configurations for timm's train.py.
"""
import csv
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from paths import HELPERS, RECIPES
from PIL import Image
from recipe_runs import assert_same_weights, draw_pictures, environment, run, run_in_processes, run_killed
from safetensors.torch import load_file

import timm_ls  # noqa: F401 registers the models

pytest.importorskip('lightly', reason="lightly is not installed: pip install 'timm-ls[recipes]'")
pytest.importorskip('lightning', reason="lightning is not installed: pip install 'timm-ls[recipes]'")
SMALL = [
    '--model', 'test_vil_ls', '--global-size', '64', '--local-size', '32', '--local-crops', '2', '--epochs', '2',
    '--batch-size', '4', '--workers', '0', '--log-steps', '1', '--output-dim', '64', '--hidden-dim', '64',
    '--bottleneck-dim', '32', '--drop-path', '.3']
STEPS = 12


@pytest.fixture
def pictures(tmp_path):
    return draw_pictures(tmp_path / 'pictures')


@pytest.fixture
def recipe(monkeypatch):
    """The module of the recipe, on one thread."""
    monkeypatch.syspath_prepend(RECIPES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    import self_supervised
    yield self_supervised
    torch.set_num_threads(threads)


def arguments(recipe, *more):
    args = recipe.parser('').parse_args(['--data-dir', 'images', *SMALL, *map(str, more)])
    recipe.check_arguments(args)
    return args


def logged(output, name):
    """What the newest run logged under a name."""
    newest = sorted((output / 'logs').glob('version_*'))[-1]
    with open(newest / 'metrics.csv') as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


# the region loss


def oracle(student, teacher, center, teacher_temp, student_temp):
    """The loss and its gradients by the student's logits, region by region, from (features, logits) of each view."""
    def softmax(y):
        e = np.exp(y - y.max())
        return e / e.sum()

    images = len(student[0][0])
    pairs = [(t, s) for t in range(len(teacher)) for s in range(len(student)) if t != s]
    loss, gradients = 0., [np.zeros_like(y) for _, y in student]
    for t, s in pairs:
        for b in range(images):
            regions = len(student[s][0][b])
            for i in range(regions):
                z = student[s][0][b, i]
                cosines = [z @ w / np.sqrt((z @ z) * (w @ w)) for w in teacher[t][0][b]]
                target = softmax((teacher[t][1][b, np.argmax(cosines)] - center) / teacher_temp)
                output = softmax(student[s][1][b, i] / student_temp)
                share = len(pairs) * images * regions
                loss -= (target * np.log(output)).sum() / share
                gradients[s][b, i] += (output - target) / student_temp / share
    return loss, gradients


@pytest.mark.parametrize(
    'teacher_views, student_regions', [(2, (6, 6, 4, 4)), (1, (6, 4)), (2, (6, 6)), (3, (1, 1, 1))])
def test_region_loss_is_its_formula(recipe, teacher_views, student_regions):
    """Values, gradients and center over three steps, for views with as many and with fewer regions: 1e-10."""
    rng = np.random.default_rng(0)
    loss = recipe.RegionLoss(7, student_temp=.2, center_momentum=.8).double()
    center = np.zeros(7)
    for _ in range(3):
        student = [(rng.normal(size=(3, n, 5)), rng.normal(size=(3, n, 7))) for n in student_regions]
        teacher = [(rng.normal(size=(3, n, 5)), rng.normal(size=(3, n, 7))) for n in student_regions[:teacher_views]]
        expected, gradients = oracle(student, teacher, center, .3, .2)
        center = .8 * center + .2 * np.concatenate([y.reshape(-1, 7) for _, y in teacher]).mean(0)

        student, teacher = (
            [recipe.Regions(*(torch.tensor(x, requires_grad=True) for x in view)) for view in views]
            for views in (student, teacher))
        actual = loss(student, teacher, .3)
        actual.backward()
        assert abs(actual.item() - expected) < 1e-10
        for view, gradient in zip(student, gradients):
            np.testing.assert_allclose(view.logits.grad, gradient, rtol=0, atol=1e-10)
        assert not any(x.grad is not None for x in [*(view.features for view in student), *sum(teacher, ())])
        np.testing.assert_allclose(loss.center.value[0], center, rtol=0, atol=1e-10)


def test_region_loss_is_computed_in_float32(recipe):
    """From bfloat16 logits: that of the same values in float32, to the last bit."""
    generator = torch.Generator().manual_seed(0)
    views = [recipe.Regions(*(torch.randn(2, n, 64, generator=generator).bfloat16() for _ in range(2))) for n in (4, 9)]
    wide = [recipe.Regions(*(x.float() for x in view)) for view in views]
    losses = [recipe.RegionLoss(64)(x, x[:1], .04) for x in (views, wide)]
    assert losses[0].dtype == torch.float32 and losses[0] == losses[1]


def test_region_loss_needs_two_views(recipe):
    view = recipe.Regions(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match='two views or more, got 1 of the teacher and 1 of the student'):
        recipe.RegionLoss(2)([view], [view], .1)


# self-distillation


def test_views_and_losses_come_together(recipe):
    """A step of student and teacher is what their parts give: heads, view and region losses, weighted."""
    args = arguments(recipe, '--region-weight', .3, '--drop-path', 0, '--local-size', 32, 64)
    model = recipe.SelfDistillation(args)
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(2, 3, *size, generator=generator) for size in [(64, 64)] * 2 + [(32, 64)] * 2]
    views = [model.student(crops[i:i + 1])[0] for i in range(4)]
    losses, teacher = model(crops, .05)
    for view, x in zip(views, crops):
        features = model.student.backbone.forward_features(x)
        torch.testing.assert_close(view.features, features.mean((2, 3)), rtol=0, atol=1e-5)
        torch.testing.assert_close(view.regions.features, features.flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
        torch.testing.assert_close(view.logits, model.student.view_head(view.features))
        torch.testing.assert_close(view.regions.logits, model.student.region_head(view.regions.features))
    assert len(teacher) == 2 and views[2].regions.logits.shape == (2, 2, 64)

    def cross_entropy(t, s):
        return -((t / .05).softmax(-1) * (s / .1).log_softmax(-1)).sum(-1).mean()

    expected = torch.stack([
        cross_entropy(teacher[t].logits, views[s].logits) for t in range(2) for s in range(4) if t != s]).mean()
    torch.testing.assert_close(losses['view_loss'], expected)
    expected = recipe.RegionLoss(64)([view.regions for view in views], [view.regions for view in teacher], .05)
    torch.testing.assert_close(losses['region_loss'], expected)
    torch.testing.assert_close(losses['loss'], .7 * losses['view_loss'] + .3 * losses['region_loss'])


def test_checkpointing_changes_no_gradient(recipe):
    gradients = []
    for more in ([], ['--grad-checkpointing']):
        model = recipe.SelfDistillation(arguments(recipe, *more))
        generator = torch.Generator().manual_seed(0)
        crops = [torch.randn(2, 3, side, side, generator=generator) for side in (64, 64, 32)]
        torch.manual_seed(0)  # stochastic depth
        model(crops, .05)[0]['loss'].backward()
        gradients.append({name: x.grad for name, x in model.student.named_parameters()})
    assert model.student.backbone.stages[0].grad_checkpointing
    for name, value in gradients[0].items():
        assert (value is None) == (gradients[1][name] is None), name
        if value is not None:
            torch.testing.assert_close(gradients[1][name], value, rtol=0, atol=1e-6 * value.abs().max().item())


@pytest.mark.parametrize('name, kwargs', [
    ('test_cvt_ls', {}), ('test_resnet', {}), ('test_convnext', {}), ('swin_tiny_patch4_window7_224', dict(
        strict_img_size=False, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)))])
def test_other_models(recipe, name, kwargs):
    """Any model of timm with a map for images of any size, NCHW or not, is student and teacher."""
    args = arguments(recipe, '--model', name, '--drop-path', 0)
    args.model_kwargs = kwargs
    model = recipe.SelfDistillation(args)
    regions = model.student([torch.randn(2, 3, 64, 64)])[0].regions
    channels = model.student.backbone.num_features
    assert regions.features.shape == (2, 16 if name == 'test_cvt_ls' else 4, channels)
    model([torch.randn(2, 3, 64, 64)] * 2, .05)[0]['loss'].backward()
    assert all(x.grad is not None for x in model.student.parameters() if x.requires_grad)
    assert not any(x.requires_grad for x in model.teacher.parameters())


def test_models_without_maps_are_refused(recipe):
    with pytest.raises(SystemExit, match='gives no pooled features and NCHW map for crops of 64 x 64 pixels'):
        recipe.SelfDistillation(arguments(recipe, '--model', 'vit_tiny_patch16_224'))


def test_crops_keep_their_shape(recipe):
    """Wide crops are cut out wide: pixels stay square to a third, at any scale."""
    args = arguments(recipe, '--global-size', 64, 160, '--local-size', 96, 32, '--local-scale', .1, .2)
    views = recipe.multi_crop(args, (.5,) * 3, (.5,) * 3).transforms
    assert [view(Image.new('RGB', (99, 80))).shape for view in views] == [(3, 64, 160)] * 2 + [(3, 96, 32)] * 2
    image = Image.new('RGB', (1000, 1000))
    for view, size, smallest, largest in ((views[1], (64, 160), .4, 1.), (views[3], (96, 32), .1, .2)):
        crop = view.transform.transforms[0]
        torch.manual_seed(0)
        for _ in range(50):
            box = crop.make_params([image])
            assert .99 * smallest < box['height'] * box['width'] / 1e6 < 1.01 * largest
            stretch = size[0] / box['height'] / (size[1] / box['width'])
            assert .74 < stretch < 1.35 or box['width'] == 1000, box
        blur = next(x for x in view.transform.transforms if hasattr(x, 'sigmas'))
        np.testing.assert_allclose(blur.sigmas, [.1 * 64 / 224, 2 * 64 / 224])  # DINO's at 224 pixels


# runs


def state(output):
    """All tensors of the newest checkpoint, optimizer included, by their place in it."""
    tensors = {}

    def collect(value, place):
        if isinstance(value, torch.Tensor):
            tensors[place] = value
        elif isinstance(value, dict):
            for key in value:
                collect(value[key], (*place, key))
        elif isinstance(value, list):
            collect(dict(enumerate(value)), place)

    checkpoint = torch.load(sorted(output.glob('step=*.ckpt'))[-1], weights_only=False)
    for part in ('state_dict', 'optimizer_states'):
        collect(checkpoint[part], (part,))
    return tensors


@pytest.mark.parametrize('save_steps, killed_in', [(4, 10), pytest.param(6, 8, marks=pytest.mark.slow)])
def test_killed_run_ends_with_the_same_weights(tmp_path, pictures, recipe, save_steps, killed_in):
    """Killed in the second epoch, resumed from its middle or its start: weights, centers, optimizer are bit-equal."""
    common = ['--data-dir', pictures / 'train', *SMALL, '--save-steps', save_steps]
    run(recipe, *common, '--output', tmp_path / 'whole')
    assert len(logged(tmp_path / 'whole', 'loss')) == STEPS

    output = tmp_path / 'killed'
    run_killed(killed_in, RECIPES / 'self_supervised.py', *common, '--output', output)
    assert not (output / 'weights.safetensors').exists()
    with pytest.raises(SystemExit, match='add --resume'):
        run(recipe, *common, '--output', output)
    run(recipe, *common, '--output', output, '--resume')
    assert len(logged(output, 'loss')) == STEPS - (killed_in - 1) // save_steps * save_steps
    assert_same_weights(output, tmp_path / 'whole')
    expected, actual = state(tmp_path / 'whole'), state(output)
    assert expected.keys() == actual.keys()
    assert not [place for place, value in expected.items() if not torch.equal(actual[place], value)]
    moved = [place for place in expected if place[0] == 'state_dict' and 'center' in place[1]]
    assert len(moved) == 2 and all(expected[place].abs().max() > 0 for place in moved)


def test_schedules(tmp_path, pictures, recipe, monkeypatch):
    """Learning rate, weight decay, temperature and momentum of every step; the last layer stays as it is at first."""
    moves = []

    def moved(student, teacher, m):
        moves.append(m)
        update(student, teacher, m)

    update = recipe.update_momentum
    monkeypatch.setattr(recipe, 'update_momentum', moved)
    more = ['--lr', .64, '--warmup', .25, '--weight-decay', .1, '--weight-decay-end', .5, '--momentum', .9,
            '--warmup-teacher-temp', .02, '--teacher-temp', .05, '--teacher-temp-warmup', .5, '--freeze-last-layer', 2]
    output = tmp_path / 'out'
    run(recipe, '--data-dir', pictures / 'train', *SMALL, *more, '--save-steps', STEPS, '--output', output)
    step = np.arange(STEPS)
    cosine = (1 + np.cos(np.pi * step / (STEPS - 1))) / 2
    np.testing.assert_allclose(moves, 1 - .1 * cosine)
    np.testing.assert_allclose(
        logged(output, 'lr'), .01 * np.where(step < 3, step / 3, (1 + np.cos(np.pi * step / STEPS)) / 2), rtol=1e-5)
    np.testing.assert_allclose(logged(output, 'teacher_temp'), np.minimum(.02 + .03 * step / 6, .05), rtol=1e-5)

    checkpoint = torch.load(next(output.glob('step=*.ckpt')), weights_only=False)
    groups = checkpoint['optimizer_states'][0]['param_groups']
    assert {(group['weight_decay'], group['decays']) for group in groups} == {(0., False), (.5, True)}
    start = recipe.SelfDistillation(arguments(recipe)).state_dict()
    changed = {name for name, value in start.items()
               if not torch.equal(value, checkpoint['state_dict'][f'distillation.{name}'])}
    assert not [name for name in changed if 'last_layer' in name and name.startswith('student')]
    assert {'student.view_head.layers.0.weight', 'student.backbone.stages.0.embed.proj.weight',
            'teacher.region_head.layers.0.weight', 'view_loss.center', 'region_loss.center.center'} < changed
    names = dict(recipe.SelfDistillation(arguments(recipe)).student.named_parameters())
    exempt = recipe.SelfDistillation(arguments(recipe)).student.no_weight_decay()
    assert 'backbone.stages.0.global_tokens' in exempt and exempt <= names.keys()


LEARN = ['--epochs', 12, '--lr', 6.4e-2, '--teacher-temp', .02, '--warmup-teacher-temp', .02, '--drop-path', 0]


def assert_loss_falls(losses):
    first, last = np.mean(losses[:6]), np.mean(losses[-12:])
    print(f'loss {first:.3f} at first, {last:.3f} at last')
    assert last < .85 * first


def test_it_learns(tmp_path, pictures, recipe):
    """In one process: losses on views and regions fall, kNN accuracy is measured, schedules end where they should."""
    run(recipe, '--data-dir', pictures / 'train', *SMALL, *LEARN, '--output', tmp_path / 'out',
        '--labeled-dir', pictures, '--knn-epochs', 5)
    for name in ('loss', 'view_loss', 'region_loss'):
        assert_loss_falls(logged(tmp_path / 'out', name))
    assert len(logged(tmp_path / 'out', 'knn_accuracy')) == 3  # after epochs 5, 10 and 12
    assert logged(tmp_path / 'out', 'lr')[-1] < 1e-4


@pytest.mark.slow
def test_two_processes_learn(tmp_path, pictures):
    """By torchrun, half of each batch in either: as many images in as many steps, and losses fall."""
    output = tmp_path / 'out'
    run_in_processes(
        2, RECIPES / 'self_supervised.py', '--devices', 2, '--data-dir', pictures / 'train', *SMALL, *LEARN,
        '--batch-size', 2, '--output', output)
    losses = logged(output, 'loss')
    assert len(losses) == 12 * 6 and (output / 'weights.safetensors').exists()
    assert_loss_falls(losses)


@pytest.fixture(scope='module')
def reports(tmp_path_factory):
    """What two processes find out about both families."""
    folder = tmp_path_factory.mktemp('labeled')
    rng = np.random.default_rng(3)
    for i in range(16):
        (folder / 'ab'[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(folder / 'ab'[i % 2] / f'{i}.png')
    printed = run_in_processes(
        2, HELPERS / 'pretraining_worker.py', folder, 'vil_ls_small', 'cvt_ls_13')
    found = {}
    for line in printed.splitlines():
        if line.startswith('report '):
            found.update(json.loads(line.removeprefix('report ')))
    print(json.dumps(found, indent=1))
    return found


@pytest.mark.parametrize('name', ['vil_ls_small', 'cvt_ls_13'])
def test_gradients_of_two_processes(reports, name):
    """Those of one process; centers are averaged over both, kNN accuracy counts the images of both."""
    report = reports[name]
    assert report['gradients'] < 1e-5
    assert report['centers'] < 1e-6 < report['before']
    assert 0 < report['kNN'] == report['kNN of one'] < 1


@pytest.mark.parametrize(
    'more', [['--bf16', '--grad-checkpointing'], ['--global-size', '96', '64', '--region-weight', '0']])
def test_options_run(tmp_path, pictures, recipe, more):
    """In bfloat16 with checkpointing, with crops that are not square, on views alone: finite losses, usable weights."""
    output = tmp_path / 'out'
    run(recipe, '--data-dir', pictures / 'train', *SMALL, '--epochs', 1, *more, '--output', output)
    losses = logged(output, 'loss')
    assert len(losses) == 6 and np.isfinite(losses).all()
    assert bool(logged(output, 'region_loss')) == ('--bf16' in more)
    weights = load_file(output / 'weights.safetensors')
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in weights.values())


# weights


def test_weights_are_read(tmp_path, pictures, recipe):
    """By timm as a classifier and as a pyramid, by detectors, by the recipes for fine-tuning: those of the teacher."""
    from timm_ls.detection import maskrcnn_fpn
    output = tmp_path / 'out'
    run(recipe, '--data-dir', pictures / 'train', *SMALL, '--epochs', 1, '--output', output, '--save-steps', 6)
    weights = load_file(output / 'weights.safetensors')
    teacher = {
        place[1].removeprefix('distillation.teacher.backbone.'): value for place, value in state(output).items()
        if str(place[1]).startswith('distillation.teacher.backbone.')}
    assert weights.keys() == teacher.keys() and all(torch.equal(weights[name], teacher[name]) for name in weights)

    overlay = dict(file=str(output / 'weights.safetensors'), num_classes=-1)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, img_size=64)
    model = timm.create_model('test_vil_ls', num_classes=2, **options).eval()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    x = torch.randn(1, 3, 64, 64)
    pyramid = timm.create_model('test_vil_ls', features_only=True, **options).eval()
    torch.testing.assert_close(pyramid(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    detector = maskrcnn_fpn(
        'test_vil_ls', num_classes=2, pretrained_backbone=True,
        backbone_kwargs=dict(pretrained_cfg_overlay=overlay, img_size=64))
    body = {name.split('stages', 1)[1].lstrip('._'): x for name, x in detector.state_dict().items() if 'stages' in name}
    expected = {name.removeprefix('stages.'): x for name, x in weights.items() if name.startswith('stages.')}
    assert body.keys() == expected.keys() and all(torch.equal(body[name], x) for name, x in expected.items())

    import finetune
    args = finetune.parser('').parse_args([
        '--data-dir', str(pictures), '--model', 'test_vil_ls', '--img-size', '64',
        '--pretrained-path', overlay['file']])
    model = finetune.make_model(args, *finetune.open_images(args))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_it_starts_from_weights(tmp_path, recipe):
    """Of a file, for student and teacher."""
    torch.manual_seed(5)
    start = timm.create_model('test_vil_ls', img_size=64)
    torch.save(start.state_dict(), tmp_path / 'start.pth')
    model = recipe.SelfDistillation(arguments(recipe, '--pretrained-path', tmp_path / 'start.pth'))
    for branch in (model.student, model.teacher):
        weights = branch.backbone.state_dict()
        assert all(torch.equal(weights[name], x) for name, x in start.state_dict().items() if 'head' not in name)


# what can go wrong


@pytest.mark.parametrize('more, message', [
    (['--global-size', '31'], '--global-size 31: expected a side or a height and a width, 32 pixels or more'),
    (['--local-size', '64', '16'], '--local-size 64 16: expected'),
    (['--local-size', '64', '64', '64'], '--local-size 64 64 64: expected'),
    (['--local-scale', '.5', '.2'], '--local-scale 0.5 0.2: expected parts of the image'),
    (['--global-scale', '.5', '1.5'], '--global-scale 0.5 1.5: expected parts of the image'),
    (['--region-weight', '2'], '--region-weight 2.0: expected a value from 0 to 1'),
    (['--teacher-temp', '.02'], '--warmup-teacher-temp 0.04 --teacher-temp 0.02: expected a temperature that rises'),
])
def test_arguments_that_do_not_fit_are_refused(tmp_path, pictures, recipe, more, message):
    """Before anything else, with what was given."""
    with pytest.raises(SystemExit, match=message):
        run(recipe, '--data-dir', pictures, *SMALL, *more, '--output', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def spoil(pictures):
    """Put images into the folder that cannot be used, and some that can though they are not RGB."""
    (pictures / 'broken.jpg').write_bytes(b'\xff\xd8 no image')
    (pictures / 'empty.PNG').touch()
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(pictures / 'deep.png')
    (pictures / 'notes.txt').write_text('not an image')
    for mode in ('L', 'RGBA', 'P', 'CMYK'):
        Image.new(mode, (50, 40)).save(pictures / f'{mode}.{"jpg" if mode == "CMYK" else "png"}')


def test_images_that_cannot_be_used_are_skipped_and_counted(pictures, recipe, capsys):
    """Broken and deep ones, before training, with the reason; other channels are converted."""
    spoil(pictures)
    images = recipe.find_images(Namespace(data_dir=pictures, workers=2, seed=0)).images
    names = {Path(path).name for path in images.paths}
    assert len(images) == 34 and {'L.png', 'RGBA.png', 'P.png', 'CMYK.jpg'} < names and 'deep.png' not in names
    printed = capsys.readouterr().out
    assert '34 images' in printed and '3 others are skipped' in printed and 'broken.jpg: cannot identify' in printed
    assert recipe.defect(pictures / 'deep.png') == 'its mode is I;16, convert it to 8 bits per channel'
    images.transform = np.asarray
    assert {images[i][0].shape[2] for i in range(len(images))} == {3}


def test_images_cut_short_give_way_to_the_next(tmp_path, pictures, recipe):
    """Their header is whole, so that they fail in training, which goes on and counts them."""
    folder = pictures / 'train' / 'dark'
    whole = (folder / '3.png').read_bytes()
    (folder / '3.png').write_bytes(whole[:len(whole) // 2])
    images = recipe.find_images(Namespace(data_dir=pictures / 'train', workers=0, seed=0)).images
    images.transform = np.asarray
    index = images.paths.index(str(folder / '3.png'))
    with pytest.warns(UserWarning, match='3.png is skipped, it cannot be decoded'):
        image, skipped = images[index]
    assert skipped == 1 and (image == images[index + 1][0]).all() and images[index + 1][1] == 0

    with pytest.warns(UserWarning, match='3.png is skipped'):
        run(recipe, '--data-dir', pictures / 'train', *SMALL, '--output', tmp_path / 'out')
    assert logged(tmp_path / 'out', 'skipped') == [1, 1]


def test_folders_that_do_not_do_are_refused(tmp_path, pictures, recipe):
    """No folder, no image, one image: with what was found."""
    def find(folder):
        return recipe.find_images(Namespace(data_dir=folder, workers=0, seed=0))

    with pytest.raises(SystemExit, match='There is no folder'):
        find(tmp_path / 'nowhere')
    folder = tmp_path / 'few'
    folder.mkdir()
    (folder / 'a.png').touch()
    with pytest.raises(SystemExit, match='0 images in .*few, 1 others are skipped. The first one is .*a.png: cannot'):
        find(folder)
    shutil.copy(pictures / 'train' / 'dark' / '3.png', folder / 'a.png')
    with pytest.raises(SystemExit, match='1 images in .*few, 0 others are skipped. Expected two images or more'):
        find(folder)


def test_a_collapsed_run_stops(tmp_path, pictures, recipe, monkeypatch):
    """A teacher that says the same of all images, being too warm here."""
    monkeypatch.setattr(recipe, 'PATIENCE', 4)
    with pytest.raises(SystemExit, match='Collapsed: the teacher has said the same of all images for 4 steps') as stop:
        run(recipe, '--data-dir', pictures / 'train', *SMALL, '--teacher-temp', 50, '--warmup-teacher-temp', 50,
            '--output', tmp_path / 'out')
    assert '(at most 4.1589)' in str(stop.value) and 'Start again with a smaller --lr' in str(stop.value)
    assert not (tmp_path / 'out' / 'weights.safetensors').exists()


@pytest.mark.parametrize('collapsed', [dict(information=.001, deviation=.5), dict(information=.5, deviation=.001)])
@pytest.mark.parametrize('recovers', [True, False])
def test_collapse_counts_only_in_a_row(tmp_path, pictures, recipe, monkeypatch, collapsed, recovers):
    """Either measure stops a run, at the limit; one check that finds it healthy starts the count again."""
    checks = []

    def spread(*_):
        checks.append(len(checks))
        healthy = dict(information=.5, deviation=.5)
        return dict(entropy=1., **healthy if recovers and len(checks) % 4 == 0 else collapsed)

    monkeypatch.setattr(recipe, 'PATIENCE', 4)
    monkeypatch.setattr(recipe, 'spread', spread)
    common = ['--data-dir', pictures / 'train', *SMALL, '--output', tmp_path / 'out']
    if recovers:
        run(recipe, *common)
        assert len(checks) == STEPS
    else:
        with pytest.raises(SystemExit, match='Collapsed'):
            run(recipe, *common)
        assert len(checks) == 4


def test_a_loss_that_is_not_finite_stops(tmp_path, pictures, recipe):
    with pytest.raises(SystemExit, match='The loss is nan in step'):
        run(recipe, '--data-dir', pictures / 'train', *SMALL, '--lr', 1e30, '--warmup', 0, '--output', tmp_path / 'out')


def test_collapse_is_measured(recipe):
    """Entropy, information and deviation are those of their definitions; constant or uniform outputs have none."""
    rng = np.random.default_rng(0)
    p, z = rng.dirichlet(np.ones(5), size=8), rng.normal(1, 1, size=(8, 6))
    measures = recipe.spread(torch.tensor(p), torch.tensor(z), lambda x: x)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    mean_entropy = -(p * np.log(p)).sum(1).mean()
    assert measures['entropy'] == pytest.approx(mean_entropy)
    assert measures['information'] == pytest.approx(-(p.mean(0) * np.log(p.mean(0))).sum() - mean_entropy)
    assert measures['deviation'] == pytest.approx(z.std(0).mean() * np.sqrt(6))
    for same in (torch.full((8, 5), .2), torch.eye(5)[[1] * 8], torch.tensor(p[:1]).expand(8, 5)):
        measures = recipe.spread(same, torch.ones(8, 6), lambda x: x)
        assert abs(measures['information']) < recipe.LEAST_INFORMATION / 100 and measures['deviation'] < 1e-3
    measures = recipe.spread(torch.eye(8), torch.eye(8), lambda x: x)
    assert measures['information'] == pytest.approx(np.log(8)) and measures['deviation'] > .9


# labeled images


def nearest(bank, bank_labels, queries, labels, k):
    """Accuracy of votes by the k nearest, each weighted by exp(cosine / 0.07), image by image."""
    right = 0
    for query, label in zip(queries, labels):
        cosines = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(max(bank_labels) + 1)
        for i in np.argsort(-cosines)[:k]:
            votes[bank_labels[i]] += np.exp(cosines[i] / .07)
        right += votes.argmax() == label
    return right / len(labels)


@pytest.mark.parametrize('splits', [True, False])
def test_knn_accuracy(recipe, pictures, splits):
    """Of val by train if there are such folders, else of every second image by the others."""
    class Branch(torch.nn.Module):
        def features(self, x):
            x = x[:, :, 10:14, 10:14].flatten(1)
            return x - x.mean(1, keepdim=True), None  # without what tells dark from light

    args = Namespace(labeled_dir=pictures if splits else pictures / 'train', seed=0, global_size=(64, 64), batch_size=5,
                     workers=0)
    neighbors = recipe.Neighbors(args, timm.create_model('test_vil_ls'))
    images = [[(Branch().features(x[None])[0][0].double().numpy(), y) for x, y in part]
              for part in (neighbors.bank, neighbors.queries)]
    assert [len(part) for part in images] == ([24, 6] if splits else [12, 12])
    assert sum(label for _, label in images[1]) == len(images[1]) // 2
    (bank, bank_labels), (queries, labels) = (map(np.array, zip(*part)) for part in images)
    branch = Branch()
    expected = nearest(bank, bank_labels, queries, labels, k=20 if splits else 12)
    assert neighbors.accuracy(branch, 'cpu') == expected and 0 < expected < 1
    assert branch.training


# configurations of timm's train.py


CONFIGS = RECIPES / 'configs'
# images of all processes in a step, learning rate for as many, weight decay, stochastic depth, repeated augmentation
VIL, CVT = (1024, 8e-4, .1), (2048, 2e-3)
FROM_SCRATCH = dict(
    vil_ls_tiny=(*VIL, .1, 0), vil_ls_small=(*VIL, .1, 0), vil_ls_medium=(*VIL, .3, 0), vil_ls_base=(*VIL, .5, 0),
    vil_ls_tiny_hires=(*VIL, .1, 0), vil_ls_small_hires=(*VIL, .1, 0), vil_ls_medium_hires=(*VIL, .3, 0),
    vil_ls_base_hires=(*VIL, .5, 0), vil_ls_medium_384=(*VIL, .2, 0),
    cvt_ls_13=(*CVT, .05, .1, 0), cvt_ls_17=(*CVT, .05, .1, 0), cvt_ls_21=(*CVT, .1, .1, 3),
    cvt_ls_21s=(*CVT, .1, .1, 3))
WARM = [name for name in FROM_SCRATCH if name not in ('vil_ls_medium_384', 'cvt_ls_17', 'cvt_ls_21s')]
CONFIG_FILES = [('imagenet', name) for name in FROM_SCRATCH] + [('warm_start', name) for name in WARM]


def test_every_model_has_its_configuration():
    """From scratch all of them, from a warm start those that have a source."""
    models = {
        name for name in timm.list_models(exclude_filters='test_*')
        if timm.models.model_entrypoint(name).__module__.startswith('timm_ls.')}
    assert set(FROM_SCRATCH) == models
    assert {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob('*.*')} == {
        f'{kind}/{name}.yaml' for kind, name in CONFIG_FILES}


@pytest.mark.parametrize('kind, name', CONFIG_FILES)
def test_configurations_are_those_published(kind, name):
    """Every value, the learning rate that timm computes from them, and the processes that the comment tells."""
    text = (CONFIGS / kind / f'{name}.yaml').read_text()
    config = yaml.safe_load(text)
    images, lr, weight_decay, drop_path, repeats = FROM_SCRATCH[name]
    processes = int(text.split('# per process, ')[1].split()[0])
    assert f'{processes} of them: {images:,} in all' in text and config.pop('batch_size') * processes == images
    assert config.pop('lr_base_scale') == 'linear'
    warm = kind == 'warm_start'
    assert config.pop('lr_base') * images / config.pop('lr_base_size') == pytest.approx(lr / 4 if warm else lr)
    expected = dict(
        model=name, device_modules=['timm_ls'], num_classes=1000, opt='adamw', weight_decay=weight_decay,
        sched='cosine', epochs=30 if warm else 300, warmup_epochs=5, amp=True, amp_dtype='bfloat16',
        aa='rand-m9-mstd0.5-inc1', train_interpolation='bicubic', reprob=.25, mixup=.8, cutmix=1., smoothing=.1,
        drop_path=drop_path)
    if name.startswith('vil'):
        expected.update(sched_on_updates=True, warmup_lr=1.6e-6, min_lr=1e-6)
    else:
        expected.update(warmup_lr=1e-6, min_lr=1e-6 if warm else 1e-5)
    if repeats:
        expected['aug_repeats'] = repeats
        assert '--aug-repeats 0' in text
    assert config == expected


@pytest.fixture
def train_script(tmp_path):
    """timm's train.py, apart from the clone's own timm."""
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip("timm's distributions do not hold its scripts: set TIMM_SCRIPTS to a clone of its repository")
    return shutil.copy(Path(os.environ['TIMM_SCRIPTS']) / 'train.py', tmp_path)


@pytest.mark.parametrize('kind, name', CONFIG_FILES)
def test_configurations_parse(monkeypatch, train_script, kind, name):
    """timm's parser knows every key, where it would pass over others in silence, and takes the values as they are."""
    script = runpy.run_path(str(train_script))  # anew: a configuration changes its parser
    known = vars(script['parser'].parse_args([]))
    path = CONFIGS / kind / f'{name}.yaml'
    monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(path), '--data-dir', 'images'])
    args = vars(script['_parse_args']()[0])
    for key, value in yaml.safe_load(path.read_text()).items():
        assert key in known and args[key] == value and type(args[key]) is type(value), key


def losses_of(processes, script, *arguments):
    """Of each step of timm's train.py on a CPU, as it logs them."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', processes]
    command += [HELPERS / 'timm_train.py', script, *arguments]
    command += ['--num-classes', 2, '--device', 'cpu', '--workers', 0, '--log-interval', 1]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    return [float(loss) for loss in re.findall(r'Train: .*Loss: ([\d.e+-]+) ', result.stdout + result.stderr)]


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('name, model', [('vil_ls_tiny', 'test_vil_ls'), ('cvt_ls_13', 'test_cvt_ls')])
def test_configurations_train(tmp_path, pictures, train_script, processes, name, model):
    """The small model of a family by the configuration of another one, at a learning rate for a short run."""
    losses = losses_of(
        processes, train_script, '--config', CONFIGS / 'imagenet' / f'{name}.yaml', '--data-dir', pictures,
        '--output', tmp_path / 'out', '--model', model, '--img-size', 64, '--batch-size', 24 // processes,
        '--epochs', 20, '--lr', 1e-3, '--warmup-epochs', 1, '--aa', 'rand-m1-n1')
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < .9 * np.mean(losses[:2]), losses


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('kind, name', CONFIG_FILES)
def test_configurations_run(tmp_path, train_script, processes, kind, name):
    """Each model by its own configuration, at its native size, two steps: finite losses."""
    images, batch = draw_pictures(tmp_path / 'pictures'), ['--batch-size', 4 // processes]
    for path in images.rglob('*.png'):
        if int(path.stem) >= (4 if 'train' in path.parts else 1):
            path.unlink()
    if FROM_SCRATCH[name][-1] and processes == 2:  # timm draws for repeated augmentation from 256 images or more
        for i in range(256):
            shutil.copy(images / 'train' / 'dark' / '0.png', images / 'train' / 'dark' / f'more {i}.png')
        batch = ['--batch-size', 64, '--img-size', 32]
    elif FROM_SCRATCH[name][-1]:
        batch += ['--aug-repeats', 0]
    start = []
    if kind == 'warm_start':
        torch.save(timm.create_model(name, num_classes=2).state_dict(), tmp_path / 'start.pth')
        start = ['--initial-checkpoint', tmp_path / 'start.pth']
    losses = losses_of(
        processes, train_script, '--config', CONFIGS / kind / f'{name}.yaml', '--data-dir', images, *start,
        '--output', tmp_path / 'out', *batch, '--epochs', 1)
    assert len(losses) == 2 and np.isfinite(losses).all()
