"""The libraries that build on timm backbones, with ours in them: forward and backward at sizes that are not square.

A test is skipped only where its library is not installed: `pip install 'timm-ls[clients]'`.
"""
import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from small_models import create, small_args
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
NAME = 'vil_ls_tiny'


def image(batch=2, size=(64, 96), seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_trains(model, loss):
    """The loss is finite, and its gradient reaches every parameter of ours."""
    assert loss.isfinite()
    loss.backward()
    ours = {name: p for name, p in model.named_parameters() if 'blocks.' in name}
    assert len(ours) > 50
    for name, parameter in ours.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize('decoder', ['Unet', 'FPN', 'UPerNet', 'Segformer'])
def test_segmentation_models_pytorch(decoder):
    """A segmenter by name, eager, scripted, and compiled as one graph for all sizes."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    args = dict(small_args(NAME), depths=(1, 1, 1, 1))
    model = getattr(smp, decoder)(f'tu-{NAME}', encoder_weights=None, classes=3, **args)
    x = image()
    masks = model(x)
    assert masks.shape == (2, 3, 64, 96)
    assert_trains(model, masks.square().mean())

    model.eval()
    with torch.no_grad():
        scripted = torch.jit.script(model)
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for size in ((64, 96), (96, 64)):
            x = image(1, size)
            expected = model(x)
            torch.testing.assert_close(scripted(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


def test_effdet():
    """EfficientDet on levels 1 to 3: a training step with boxes, then detections."""
    effdet = pytest.importorskip('effdet')
    config = effdet.get_efficientdet_config('tf_efficientdet_d0')
    config.update(dict(
        backbone_name=NAME, backbone_args=small_args(NAME), backbone_indices=(1, 2, 3), image_size=(128, 192),
        num_classes=3, fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1))
    model = effdet.EfficientDet(config, pretrained_backbone=False)
    target = dict(
        bbox=[torch.tensor([[10., 20., 60., 90.]]), torch.tensor([[0., 0., 100., 150.], [5., 5., 40., 40.]])],
        cls=[torch.tensor([1.]), torch.tensor([2., 3.])])
    assert_trains(model.backbone, effdet.DetBenchTrain(model, config)(image(2, (128, 192)), target)['loss'])
    with torch.no_grad():
        assert effdet.DetBenchPredict(model).eval()(image(2, (128, 192))).shape == (2, 100, 6)


def test_transformers_backbone():
    """`TimmBackbone`: the chosen levels, NCHW."""
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmBackboneConfig(backbone=NAME, out_indices=[1, 3])
    model = transformers.TimmBackbone(config, **small_args(NAME))
    assert model.channels == [24, 48]
    maps = model(image()).feature_maps
    assert [tuple(level.shape) for level in maps] == [(2, 24, 8, 12), (2, 48, 2, 3)]
    assert_trains(model, sum(level.square().mean() for level in maps))


def test_transformers_image_classification(tmp_path):
    """`TimmWrapperForImageClassification`: trained a step, checkpointed, saved, loaded again to the same logits."""
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture=NAME, num_labels=5, model_args=small_args(NAME))
    model = transformers.TimmWrapperForImageClassification(config).train()
    model.gradient_checkpointing_enable()
    assert model.timm_model.grad_checkpointing
    assert_trains(model, model(image(), labels=torch.tensor([1, 4])).loss)
    model.eval().save_pretrained(tmp_path)
    restored = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    outputs = restored(image(), output_hidden_states=True)
    assert torch.equal(outputs.logits, model(image()).logits)
    assert [level.shape[1] for level in outputs.hidden_states] == [16, 24, 32, 48]
    features = transformers.TimmWrapperModel.from_pretrained(tmp_path).eval()(image())
    assert features.last_hidden_state.shape == (2, 48, 2, 3)
    torch.testing.assert_close(features.pooler_output, features.last_hidden_state.mean((2, 3)))


@pytest.mark.parametrize('kind', ['Detr', 'Mask2Former'])
def test_transformers_detection_and_segmentation(tmp_path, kind):
    """Built from a configuration on our backbone: losses with targets, images padded to a common size, reload."""
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('scipy', reason='transformers matches targets with scipy')
    backbone = transformers.TimmBackboneConfig(backbone=NAME, out_indices=[0, 1, 2, 3], freeze_batch_norm_2d=False)
    x, mask = image(), torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, 50:], mask[1, :, 70:] = 0, 0
    if kind == 'Detr':
        config = transformers.DetrConfig(
            backbone_config=backbone, d_model=16, num_queries=5, num_labels=3, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
        model = transformers.DetrForObjectDetection(config)
        labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[.5, .5, .3, .4]]))] * 2
        outputs = model(pixel_values=x, pixel_mask=mask, labels=labels)
        assert outputs.pred_boxes.shape == (2, 5, 4)
    else:
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=5, num_labels=3,
            encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16, num_attention_heads=2,
            train_num_points=64)
        model = transformers.Mask2FormerForUniversalSegmentation(config)
        masks = torch.zeros(1, 64, 96)
        masks[:, 10:40, 20:60] = 1.
        outputs = model(
            pixel_values=x, pixel_mask=mask, mask_labels=[masks, masks], class_labels=[torch.tensor([1])] * 2)
        assert outputs.masks_queries_logits.shape[:2] == (2, 5)
    assert_trains(model, outputs.loss)

    model.eval().save_pretrained(tmp_path)
    restored = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, actual = model(pixel_values=x, pixel_mask=mask), restored(pixel_values=x, pixel_mask=mask)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize('kind', ['FasterRCNN', 'RetinaNet', 'MaskRCNN'])
def test_torchvision_detection(kind):
    """Detectors on `BackboneWithFPN`: losses and detections for two batches of different sizes, none of them square."""
    detection = torchvision.models.detection
    body = create(NAME, features_only=True)
    levels = {name: str(i) for i, name in enumerate(body.return_layers)}
    backbone = detection.backbone_utils.BackboneWithFPN(body, levels, body.feature_info.channels(), out_channels=16)
    model = getattr(detection, kind)(backbone, num_classes=3, min_size=64, max_size=160)
    for sizes in ([(70, 100), (64, 80)], [(90, 61), (120, 64)]):
        images = [image(1, size)[0] for size in sizes]
        targets = []
        for size in sizes:
            mask = torch.zeros(1, *size, dtype=torch.uint8)
            mask[:, 10:40, 5:50] = 1
            targets.append(dict(boxes=torch.tensor([[5., 10., 50., 40.]]), labels=torch.tensor([1]), masks=mask))
        model.train().zero_grad()
        losses = model(images, targets)
        assert ('loss_mask' in losses) == (kind == 'MaskRCNN')
        assert_trains(model, sum(losses.values()))
        with torch.no_grad():
            detections = model.eval()(images)
        assert all(found['boxes'].isfinite().all() for found in detections)


def test_lightning():
    """A few steps of `Trainer.fit` in bfloat16 with checkpointing: the loss goes down."""
    lightning = pytest.importorskip('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = create(NAME, num_classes=2)
            self.model.set_grad_checkpointing()
            self.losses = []

        def training_step(self, batch, _):
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return create_optimizer_v2(self.model, 'adamw', lr=1e-3, weight_decay=.05, layer_decay=.8)

    x = image(4)
    x[2:] += 1.
    module = Classifier()
    trainer = lightning.Trainer(
        accelerator='cpu', max_epochs=6, precision='bf16-mixed', logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(TensorDataset(x, torch.tensor([0, 0, 1, 1])), batch_size=4))
    assert len(module.losses) == 6 and module.losses[-1] < .7 * module.losses[0]


def test_peft():
    """LoRA on the linear layers: only its own parameters train, and the merged model equals the unmerged one."""
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(
        r=4, target_modules=['qkv', 'proj', 'fc1', 'fc2'], modules_to_save=['head'], init_lora_weights=False)
    base = create(NAME, num_classes=5)
    expected = base.eval()(image())
    model = peft.get_peft_model(copy.deepcopy(base), config)
    adapted = {name.split('.')[-2] for name, _ in model.named_parameters() if 'lora_A' in name}
    linear = sum(isinstance(module, torch.nn.Linear) for module in base.modules()) - 1
    dynamic = sum('dynamic_projection.weight' in name for name, _ in base.named_parameters())
    assert len([name for name, _ in model.named_parameters() if 'lora_A' in name]) == linear - dynamic + 4, adapted
    model(image()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ('lora_' in name or 'modules_to_save' in name), name
    model.eval()
    unmerged = model(image())
    assert not torch.allclose(unmerged, expected, atol=1e-2)
    merged = model.merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in base.named_parameters()}
    torch.testing.assert_close(merged(image()), unmerged, rtol=1e-4, atol=1e-4)


def photos():
    """Photographs that other packages bring along, [N, 3, 96, 128]."""
    paths = []
    for package, pattern in (
            ('matplotlib', 'mpl-data/sample_data/grace_hopper.jpg'), ('sklearn', 'datasets/images/*.jpg'),
            ('skimage', 'data/[acimrh]*.[jp][pn]g')):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            paths.extend(sorted(Path(spec.origin).parent.glob(pattern)))
    pictures = [Image.open(path).convert('RGB').resize((128, 96)) for path in paths]
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1. for picture in pictures])


def test_torchao():
    """int8 weights tell photos apart as float32 ones do: each photo's flip and crop is nearest to the same photo."""
    torchao = pytest.importorskip('torchao.quantization')
    x = photos()
    assert len(x) >= 3
    model = timm.create_model(NAME, num_classes=len(x)).eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        features = (features - features.mean(0)) / features.std(0)
        model.head.weight.copy_(torch.nn.functional.normalize(features, dim=1))
        model.head.bias.zero_()
        quantized = copy.deepcopy(model)
        torchao.quantize_(quantized, torchao.Int8WeightOnlyConfig())
        assert sum(type(module.weight) is not torch.nn.Parameter for module in quantized.modules()
                   if isinstance(module, torch.nn.Linear)) == sum(
                       isinstance(module, torch.nn.Linear) for module in model.modules())
        crop = torch.nn.functional.interpolate(x[:, :, 6:-6, 8:-8], size=x.shape[2:], mode='bilinear')
        views = torch.cat([x, x.flip(3), crop, x * .8 + .1])
        expected, actual = model(views), quantized(views)
    difference = (actual - expected).abs().max() / expected.abs().max()
    agreement = (actual.argmax(1) == expected.argmax(1)).float().mean().item()
    print(f'{len(views)} views of {len(x)} photos: top-1 agreement {agreement:.1%}, difference {difference:.1e}')
    assert 0 < difference < .1
    assert agreement >= .95


@pytest.fixture
def timm_scripts(tmp_path):
    """The folder of timm's scripts, of a clone of its repository: its distributions do not hold them."""
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip("timm's distributions do not hold its scripts: set TIMM_SCRIPTS to a clone of its repository")
    for name in ('train.py', 'validate.py', 'benchmark.py'):  # apart from the clone's own timm
        shutil.copy(Path(os.environ['TIMM_SCRIPTS']) / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize('script', ['train.py', 'validate.py', 'benchmark.py', 'train.py --device-modules'])
def test_timm_scripts(tmp_path, timm_scripts, script):
    """timm's own scripts, by `python -m timm_ls run`, and train.py by its own option as well."""
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label, level in (('dark', 40), ('light', 200)):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                noise = rng.normal(level, 20, (64, 96, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(tmp_path / split / label / f'{i}.png')
    model = ['--model', NAME, '--model-kwargs', 'embed_dims=(16,24,32,48)', 'depths=(1,1,1,1)', 'num_heads=(1,2,2,3)']
    size, device = ['--input-size', '3', '64', '96', '--num-classes', '2'], ['--device', 'cpu']
    name, _, option = script.partition(' ')
    if name == 'train.py':
        command = ['--data-dir', str(tmp_path), *size, *device, '--epochs', '2', '--batch-size', '4', '--workers', '0',
                   '--opt', 'adamw', '--lr', '1e-3', '--layer-decay', '.8', '--model-ema',
                   '--output', str(tmp_path / 'out')]
        expect = 'Best metric'
    elif name == 'validate.py':
        command = ['--data-dir', str(tmp_path / 'validation'), *size, *device, '--batch-size', '4', '--workers', '0',
                   '--checkpoint', str(tmp_path / 'weights.pth')]
        torch.save(create(NAME, depths=(1, 1, 1, 1), num_classes=2).state_dict(), tmp_path / 'weights.pth')
        expect = '"top1"'
    else:
        command = [*size, *device, '--batch-size', '2', '--num-warm-iter', '1', '--num-bench-iter', '5',
                   '--bench', 'train']
        expect = '"train_samples_per_sec"'
    prefix = [] if option else ['-m', 'timm_ls', 'run']
    modules = [option, 'timm_ls'] if option else []
    result = subprocess.run(
        [sys.executable, *prefix, str(timm_scripts / name), *modules, *command, *model],
        capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert result.returncode == 0, result.stderr[-3000:]
    assert expect in result.stdout + result.stderr
    if name == 'train.py':
        checkpoint = torch.load(next((tmp_path / 'out').rglob('last.pth.tar')), weights_only=False)
        assert 'stages.0.embed.proj.weight' in checkpoint['state_dict']
        assert {'state_dict_ema', 'optimizer'} <= checkpoint.keys()
