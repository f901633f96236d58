"""torchvision's detectors and UPerNet on our backbones: anchors, training at any sizes, scripts, memory."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from paths import ROOT

from timm_ls.detection import fasterrcnn_fpn, fcos_fpn, maskrcnn_fpn, retinanet_fpn
from timm_ls.segmentation import upernet

DETECTORS = [fasterrcnn_fpn, maskrcnn_fpn, retinanet_fpn, fcos_fpn]
BACKBONES = ['test_vil_ls', 'test_cvt_ls', 'resnet10t']
# the first two of other proportions than the last two; torchvision pads a batch to multiples of 32
BATCHES = [[(70, 100), (64, 80)], [(90, 61), (120, 64)]]
# scaled by powers of two: a script of torchvision's computes the scale in float32, and may get a pixel less
EXACT_BATCHES = [[(64, 100), (128, 160)], [(120, 64), (90, 64)]]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def create(constructor, name='test_vil_ls', **kwargs):
    """A detector small enough to train and to script, which detects five things whatever their scores."""
    if constructor in (retinanet_fpn, fcos_fpn):
        few = dict(score_thresh=0., topk_candidates=100, detections_per_img=5)
    else:
        few = dict(
            box_score_thresh=0., box_detections_per_img=5, box_batch_size_per_image=16, rpn_post_nms_top_n_train=40,
            rpn_post_nms_top_n_test=20)
    return constructor(name, **dict(
        dict(num_classes=3, min_size=64, max_size=160, backbone_kwargs=dict(out_channels=32)), **few, **kwargs))


def batch(sizes):
    images, targets = [], []
    for i, (height, width) in enumerate(sizes):
        images.append(torch.rand(3, height, width, generator=torch.Generator().manual_seed(i)))
        mask = torch.zeros(2, height, width, dtype=torch.uint8)
        mask[0, 10:40, 5:50] = 1
        mask[1, 30:60, 20:60] = 1
        boxes = torch.tensor([[5., 10., 50., 40.], [20., 30., 60., 60.]])
        targets.append(dict(boxes=boxes, labels=torch.tensor([1, 2]), masks=mask))
    return images, targets


def assert_same_detections(actual, expected):
    assert len(actual) == len(expected)
    for found, wanted in zip(actual, expected):
        assert found.keys() == wanted.keys() and len(wanted['boxes']) > 0
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('constructor', DETECTORS)
def test_trains_at_any_size(constructor, name):
    """Two batches of different sizes in a row: finite losses, a gradient for every parameter, equal to a fresh model's.
    """
    model = create(constructor, name)
    fresh = create(constructor, name)
    fresh.load_state_dict(model.state_dict())
    model.eval()(batch(BATCHES[0])[0])
    for sizes in BATCHES:
        images, targets = batch(sizes)
        results = []
        for detector in (model, fresh):
            detector.train().zero_grad()
            torch.manual_seed(1)
            losses = detector(images, targets)
            assert ('loss_mask' in losses) == (constructor is maskrcnn_fpn)
            assert all(loss.isfinite() for loss in losses.values())
            sum(losses.values()).backward()
            results.append([losses[key].item() for key in losses])
        assert results[0] == results[1]
        missing = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
        assert not missing
    with torch.no_grad():
        detections = model.eval()(images)
    for found, (height, width) in zip(detections, sizes, strict=True):
        assert found['boxes'].isfinite().all() and len(found['boxes']) > 0
        assert (found['boxes'] <= torch.tensor([width, height, width, height])).all()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['vil_ls_tiny_hires', 'cvt_ls_13'])
def test_trains_at_full_size(name):
    """torchvision's own sizes, 800 to 1333 pixels: a batch upright and one lying, all gradients finite."""
    model = fasterrcnn_fpn(name, num_classes=3, backbone_kwargs=dict(grad_checkpointing=True))
    transform = model.transform
    for sizes, padded in (([(427, 640), (384, 640)], (800, 1344)), ([(640, 480)], (1088, 800))):
        images, targets = batch(sizes)
        assert transform(images)[0].tensors.shape[2:] == padded
        model.zero_grad()
        losses = model(images, targets)
        sum(losses.values()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('constructor, name, sizes', [
    (fasterrcnn_fpn, 'test_vil_ls', [[32.], [64.], [128.], [256.], [512.]]),
    (maskrcnn_fpn, 'test_cvt_ls', [[32.], [64.], [128.], [256.], [512.]]),
    (fcos_fpn, 'test_cvt_ls', [[8.], [16.], [32.], [64.]]),
    (fcos_fpn, 'resnet10t', [[8.], [16.], [32.], [64.], [128.]]),
    (retinanet_fpn, 'test_vil_ls', [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]),
    (retinanet_fpn, 'test_cvt_ls', [
        *[[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128)], [256, 256 * 2 ** (5 / 6), 512 * 2 ** (2 / 3)]]),
])
def test_anchors_grow_with_the_strides(constructor, name, sizes):
    """One entry per map of the pyramid, and the largest anchors of all backbones are the same, but for FCOS."""
    model = create(constructor, name)
    generator = model.rpn.anchor_generator if hasattr(model, 'rpn') else model.anchor_generator
    assert [list(level) for level in generator.sizes] == [pytest.approx(level) for level in sizes]
    assert len(generator.sizes) == len(model.backbone.strides)
    assert set(generator.aspect_ratios) == {(1.,) if constructor is fcos_fpn else (.5, 1., 2.)}
    if hasattr(model, 'roi_heads'):
        levels = dict(zip(model.backbone.names, model.backbone.strides))
        assert [levels[n] for n in model.roi_heads.box_roi_pool.featmap_names] == [4, 8, 16, 32]
        assert model.roi_heads.box_roi_pool.canonical_scale == 224
        small = create(constructor, name, anchor_scale=2.)
        assert small.rpn.anchor_generator.sizes[0] == (8.,)
        assert small.roi_heads.box_roi_pool.canonical_scale == 56


def test_pooling_of_boxes():
    """As torchvision's: 7 x 7 for boxes, 14 x 14 for masks, 2 x 2 samples for each."""
    heads = create(maskrcnn_fpn).roi_heads
    assert (heads.box_roi_pool.output_size, heads.box_roi_pool.sampling_ratio) == ((7, 7), 2)
    assert (heads.mask_roi_pool.output_size, heads.mask_roi_pool.sampling_ratio) == ((14, 14), 2)


@pytest.mark.parametrize('constructor', DETECTORS)
def test_arguments_reach_the_backbone_and_the_detector(constructor):
    model = constructor(
        'test_vil_ls', num_classes=3, pretrained_backbone=True,
        trainable_backbone_layers=1, image_mean=[.1, .2, .3], backbone_kwargs=dict(out_channels=32, drop_path_rate=.5))
    assert model.backbone.trainable_layers == 1 and model.backbone.out_channels == 32
    assert model.backbone.body.stages_3.blocks[0].drop_path1.drop_prob == .5
    weights = timm.create_model('test_vil_ls', pretrained=True).state_dict()
    assert torch.equal(model.backbone.body.stages_0.embed.proj.weight, weights['stages.0.embed.proj.weight'])
    assert model.transform.image_mean == [.1, .2, .3]
    assert model.transform.image_std == pytest.approx([.229, .224, .225])
    cfg = dict(mean=(.5, .5, .5), std=(.4, .4, .4))
    model = create(constructor, backbone_kwargs=dict(out_channels=32, pretrained_cfg_overlay=cfg))
    assert model.transform.image_mean == [.5, .5, .5] and model.transform.image_std == [.4, .4, .4]
    grey = dict(in_chans=1, out_channels=32)
    with pytest.raises(ValueError, match='in_chans=1: pass image_mean and image_std, 1 numbers each'):
        create(constructor, backbone_kwargs=grey)
    model = create(constructor, backbone_kwargs=grey, image_mean=[.5], image_std=[.2], min_size=256, max_size=320)
    model.eval()
    assert len(model([torch.rand(1, 64, 80)])[0]['boxes']) > 0


@pytest.mark.parametrize('constructor, name', [
    (fasterrcnn_fpn, 'test_cvt_ls'), (maskrcnn_fpn, 'test_vil_ls'), (retinanet_fpn, 'test_vil_ls'),
    (fcos_fpn, 'test_cvt_ls')])
def test_script(constructor, name):
    """A scripted detector finds what the model finds, at sizes that it was not scripted with."""
    model = create(constructor, name).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # heads start with scores that hardly differ
            parameter.add_(torch.randn_like(parameter), alpha=.05)
        script = torch.jit.script(model)
        for sizes in EXACT_BATCHES:
            images, _ = batch(sizes)
            assert_same_detections(script(images)[1], model(images))


@pytest.mark.parametrize('name', BACKBONES)
def test_segmenter(name):
    """Logits of the image padded to a multiple of the stride, cut to the image; every parameter trains; scripts."""
    pytest.importorskip('segmentation_models_pytorch')
    segmenter = upernet(name, num_classes=3, decoder_channels=16)
    x = torch.randn(2, 3, 70, 100)
    F.cross_entropy(segmenter(x)['out'], torch.randint(3, (2, 70, 100))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in segmenter.parameters())
    segmenter.eval()
    stride = 16 if name == 'test_cvt_ls' else 32
    assert segmenter.output_stride == stride
    with torch.no_grad():
        script = torch.jit.script(segmenter)
        for height, width in ((70, 100), (64, 96), (65, 33)):
            x = torch.randn(1, 3, height, width)
            padded = torch.zeros(1, 3, -(-height // stride) * stride, -(-width // stride) * stride)
            padded[:, :, :height, :width] = x
            out = segmenter(x)
            assert list(out) == ['out'] and out['out'].shape == (1, 3, height, width)
            assert torch.equal(out['out'], segmenter.model(padded)[:, :, :height, :width])
            torch.testing.assert_close(script(x)['out'], out['out'], atol=1e-4, rtol=1e-4)


def test_arguments_reach_the_backbone_and_the_segmenter():
    pytest.importorskip('segmentation_models_pytorch')
    segmenter = upernet('test_vil_ls', num_classes=3, decoder_channels=16, backbone_kwargs=dict(drop_path_rate=.5))
    assert segmenter.body.stages_3.blocks[0].drop_path1.drop_prob == .5
    assert segmenter.model.segmentation_head[0].weight.shape[:2] == (3, 16)


def test_segmenter_freezes_and_checkpoints():
    """As pyramids do, and the default with weights is the same."""
    pytest.importorskip('segmentation_models_pytorch')
    segmenter = upernet('test_cvt_ls', trainable_backbone_layers=1, decoder_channels=16)
    segmenter.set_grad_checkpointing()
    x = torch.randn(2, 3, 64, 96)
    before = {n: b.clone() for n, b in segmenter.body.named_buffers()}
    segmenter.train()(x)['out'].square().mean().backward()
    trained = {n.split('.')[0] for n, p in segmenter.body.named_parameters() if p.grad is not None}
    assert trained == {'stages_2'}
    assert {n.split('.')[0] for n, b in segmenter.body.named_buffers() if not torch.equal(b, before[n])} == trained
    assert segmenter.body.stages_2.grad_checkpointing
    pretrained = upernet('test_vil_ls', pretrained_backbone=True, decoder_channels=16)
    assert pretrained.trainable_layers == 3
    weights = timm.create_model('test_vil_ls', pretrained=True).state_dict()
    assert torch.equal(pretrained.body.stages_0.embed.proj.weight, weights['stages.0.embed.proj.weight'])
    with pytest.raises(ValueError, match='trainable_layers=5.* has 4'):
        upernet('test_vil_ls', trainable_backbone_layers=5)
    with pytest.raises(ValueError, match='aux_params: a segmenter has no classifier'):
        upernet('test_vil_ls', aux_params=dict(classes=4))


def test_segmenter_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, 'segmentation_models_pytorch', None)
    with pytest.raises(ImportError, match=r"pip install 'timm-ls\[clients\]'"):
        upernet('test_vil_ls')


MEMORY = """
import json, random, torch
from timm_ls.detection import maskrcnn_fpn

def peak():  # of the process since it started, in KiB
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))

torch.manual_seed(0)
model = maskrcnn_fpn(
    'NAME', num_classes=3, box_batch_size_per_image=64, _skip_resize=True, backbone_kwargs=dict(out_channels=32))
optimizer = torch.optim.AdamW(model.parameters())
sizes = random.Random(0).sample([(h, w) for h in range(64, 320, 7) for w in range(64, 320, 7) if h != w], 29)
sizes.insert(1, (480, 640))
peaks = []
for height, width in sizes:
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, 10:50, 10:50] = 1
    target = dict(boxes=torch.tensor([[10., 10., 50., 50.]]), labels=torch.tensor([1]), masks=mask)
    sum(model([torch.rand(3, height, width)], [target]).values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    peaks.append(peak())
print(json.dumps(dict(sizes=sizes, peaks=peaks)))
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
@pytest.mark.parametrize('name', ['test_vil_ls', pytest.param('test_cvt_ls', marks=pytest.mark.slow)])
def test_memory_does_not_grow(name):
    """30 training steps at 30 sizes: the peak is that of the largest one, the second, within 5%."""
    env = {key: value for key, value in os.environ.items() if not key.startswith('MALLOC_')}  # a user's allocator
    result = subprocess.run(
        [sys.executable, '-c', MEMORY.replace('NAME', name)], capture_output=True, text=True, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    peaks = measured['peaks']
    assert peaks[1] > peaks[0]
    print(f'{name}: {peaks[1] / 1024:.0f} MiB after the largest of 30 sizes, {peaks[-1] / 1024:.0f} MiB after all')
    assert len(set(map(tuple, measured['sizes']))) == 30
    assert peaks[-1] <= 1.05 * peaks[1]
