"""The libraries that build on timm backbones, with ours in them: forward and backward at sizes that are not square.

A test is skipped only where its library is not installed: `pip install 'timm-ls[clients]'`.
"""
import copy
import importlib.util
import json
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
from paths import ROOT
from PIL import Image
from small_models import create, small_args
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader, TensorDataset

from timm_ls.ops import chunks

NAME = 'vil_ls_small'

both_families = pytest.mark.parametrize('name', [NAME, 'cvt_ls_13'])  # of four levels, and of three


def image(batch=2, size=(64, 96), seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_trains(model, loss):
    """The loss is finite, and its gradient reaches every parameter of ours."""
    assert loss.isfinite()
    loss.backward()
    ours = {name: p for name, p in model.named_parameters() if 'blocks.' in name}
    assert len(ours) > 20
    for name, parameter in ours.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


SEGMENTERS = [(decoder, NAME) for decoder in ('Unet', 'FPN', 'UPerNet', 'Segformer')] + [('Unet', 'cvt_ls_13')]
# what one decoder shows of graphs, the others show as well
GRAPHED = [pytest.param(*segmenter, marks=[] if segmenter[0] == 'Unet' else pytest.mark.slow)
           for segmenter in SEGMENTERS]


def segmenter(decoder, name):
    """A segmenter by name; for a backbone of three levels, of the depth that says so."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    args = small_args(name)
    levels = len(args['depths'])
    if levels == 3:
        args = dict(args, encoder_depth=4, decoder_channels=(32, 16, 16, 16))
    return getattr(smp, decoder)(f'tu-{name}', encoder_weights=None, classes=3, **dict(args, depths=(1,) * levels))


@pytest.mark.parametrize('decoder, name', SEGMENTERS)
def test_segmentation_models_pytorch(decoder, name):
    """A segmenter by name: masks of the image's size, gradients for all of the backbone."""
    model = segmenter(decoder, name)
    masks = model(image())
    assert masks.shape == (2, 3, 64, 96)
    assert_trains(model, masks.square().mean())


@pytest.mark.parametrize('decoder, name', GRAPHED)
def test_segmentation_models_pytorch_as_graph(decoder, name):
    """A segmenter scripted, and compiled as one graph for all sizes."""
    model = segmenter(decoder, name).eval()
    with torch.no_grad():
        scripted = torch.jit.script(model)
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for size in ((64, 96), (96, 64)):
            x = image(1, size)
            expected = model(x)
            torch.testing.assert_close(scripted(x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize('decoder, name', SEGMENTERS)
def test_segmentation_models_pytorch_as_machine_code(decoder, name):
    """A segmenter compiled by inductor: one graph for all sizes, the masks and the gradients of eager mode."""
    model = segmenter(decoder, name).eval()  # no dropout, statistics as they are: both see the same
    parameters = [p for p in model.parameters() if p.requires_grad]
    counter = CompileCounterWithBackend('inductor')
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in ((64, 96), (96, 64), (128, 160)):
        x = image(2, size)
        expected, masks = model(x), compiled(x)
        torch.testing.assert_close(masks, expected, rtol=1e-4, atol=1e-5)
        wanted = torch.autograd.grad(expected.square().mean(), parameters)
        for grad, eager in zip(torch.autograd.grad(masks.square().mean(), parameters), wanted, strict=True):
            torch.testing.assert_close(grad, eager, rtol=1e-3, atol=1e-4 * (1e-3 + eager.abs().max().item()))
    assert 1 <= counter.frame_count <= 2


@both_families
def test_effdet(name):
    """EfficientDet on the last three levels, strides as they are: a training step with boxes, then detections."""
    effdet = pytest.importorskip('effdet')
    config = effdet.get_efficientdet_config('tf_efficientdet_d0')
    first = len(small_args(name)['depths']) - 3  # stride 8 of four levels, stride 4 of three
    config.update(dict(
        backbone_name=name, backbone_args=small_args(name), backbone_indices=tuple(range(first, first + 3)),
        min_level=first + 2, max_level=first + 6, image_size=(128, 192),
        num_classes=3, fpn_channels=16, fpn_cell_repeats=1, box_class_repeats=1))
    model = effdet.EfficientDet(config, pretrained_backbone=False)
    target = dict(
        bbox=[torch.tensor([[10., 20., 60., 90.]]), torch.tensor([[0., 0., 100., 150.], [5., 5., 40., 40.]])],
        cls=[torch.tensor([1.]), torch.tensor([2., 3.])])
    assert_trains(model.backbone, effdet.DetBenchTrain(model, config)(image(2, (128, 192)), target)['loss'])
    with torch.no_grad():
        assert effdet.DetBenchPredict(model).eval()(image(2, (128, 192))).shape == (2, 100, 6)


@both_families
def test_transformers_backbone(name):
    """`TimmBackbone`: the chosen levels, NCHW."""
    transformers = pytest.importorskip('transformers')
    last = len(small_args(name)['depths']) - 1
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[1, last])
    model = transformers.TimmBackbone(config, **small_args(name))
    channels = small_args(name)['embed_dims'][last]
    assert model.channels == [24, channels]
    maps = model(image()).feature_maps
    assert [tuple(level.shape) for level in maps] == [(2, 24, 8, 12), (2, channels, 16 >> last, 24 >> last)]
    assert_trains(model, sum(level.square().mean() for level in maps))


@both_families
def test_transformers_image_classification(tmp_path, name):
    """`TimmWrapperForImageClassification`: trained a step, checkpointed, saved, loaded again to the same logits."""
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture=name, num_labels=5, model_args=small_args(name))
    model = transformers.TimmWrapperForImageClassification(config).train()
    model.gradient_checkpointing_enable()
    assert model.timm_model.grad_checkpointing
    assert_trains(model, model(image(), labels=torch.tensor([1, 4])).loss)
    model.eval().save_pretrained(tmp_path)
    restored = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    outputs = restored(image(), output_hidden_states=True)
    assert torch.equal(outputs.logits, model(image()).logits)
    channels = list(small_args(name)['embed_dims'])
    assert [level.shape[1] for level in outputs.hidden_states] == channels
    features = transformers.TimmWrapperModel.from_pretrained(tmp_path).eval()(image())
    stride = restored.timm_model.feature_info[-1]['reduction']
    assert features.last_hidden_state.shape == (2, channels[-1], 64 // stride, 96 // stride)
    torch.testing.assert_close(features.pooler_output, features.last_hidden_state.mean((2, 3)))


@pytest.mark.parametrize('kind, name', [
    ('Detr', 'test_vil_ls'), ('Detr', 'test_cvt_ls'), ('Mask2Former', 'test_vil_ls')])
def test_transformers_detection_and_segmentation(tmp_path, kind, name):
    """Built from a configuration on our backbone: losses with targets, images padded to a common size, reload.

    Mask2Former is laid out for levels of stride 4, 8, 16 and 32.
    """
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('scipy', reason='transformers matches targets with scipy')
    levels = list(range(4 if name == 'test_vil_ls' else 3))
    backbone = transformers.TimmBackboneConfig(backbone=name, out_indices=levels, freeze_batch_norm_2d=False)
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


@pytest.mark.parametrize('kind, name', [
    ('FasterRCNN', NAME), ('RetinaNet', NAME), ('MaskRCNN', NAME), ('FasterRCNN', 'cvt_ls_13')])
def test_torchvision_detection(kind, name):
    """Detectors on `BackboneWithFPN`: losses and detections for two batches of different sizes, none of them square."""
    detection = torchvision.models.detection
    body = create(name, features_only=True)
    levels = {level: str(i) for i, level in enumerate(body.return_layers)}
    backbone = detection.backbone_utils.BackboneWithFPN(body, levels, body.feature_info.channels(), out_channels=16)
    options = {}
    if len(levels) == 3:  # torchvision's own anchors are for four levels and a pooled one
        options['rpn_anchor_generator'] = detection.anchor_utils.AnchorGenerator(
            sizes=((16,), (32,), (64,), (128,)), aspect_ratios=((.5, 1., 2.),) * 4)
    model = getattr(detection, kind)(backbone, num_classes=3, min_size=64, max_size=160, **options)
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


@both_families
def test_lightning(name):
    """A few steps of `Trainer.fit` in bfloat16 with checkpointing and layer decay: the loss goes down."""
    lightning = pytest.importorskip('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = create(name, num_classes=2)
            self.model.set_grad_checkpointing()
            self.losses = []

        def training_step(self, batch, _):
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = create_optimizer_v2(self.model, 'adamw', lr=1e-3, weight_decay=.05, layer_decay=.8)
            scheduler, _ = create_scheduler_v2(optimizer, 'cosine', num_epochs=20)  # applies what layer decay noted
            return [optimizer], [scheduler]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.current_epoch)

    x = image(4)
    x[2:] += 1.
    module = Classifier()
    trainer = lightning.Trainer(
        accelerator='cpu', max_epochs=8, precision='bf16-mixed', logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(TensorDataset(x, torch.tensor([0, 0, 1, 1])), batch_size=4))
    assert len(module.losses) == 8 and module.losses[-1] < .7 * module.losses[0]
    rates = {id(p): group['lr'] for group in trainer.optimizers[0].param_groups for p in group['params']}
    first, *_, last = (rates[id(p)] for p in module.model.parameters())
    assert 0 < first < .5 * last


@pytest.mark.parametrize('name, attention', [(NAME, ['qkv']), ('cvt_ls_13', ['q', 'k', 'v'])])
def test_peft(name, attention):
    """LoRA on the linear layers: only its own parameters train, and the merged model equals the unmerged one."""
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(
        r=4, target_modules=[*attention, 'proj', 'fc1', 'fc2'], modules_to_save=['head'], init_lora_weights=False)
    base = create(name, num_classes=5)
    expected = base.eval()(image())
    model = peft.get_peft_model(copy.deepcopy(base), config)
    adapted = [key.split('.')[-3] for key, _ in model.named_parameters() if 'lora_A' in key]
    linear = sum(isinstance(module, torch.nn.Linear) for module in base.modules()) - 1
    dynamic = sum('dynamic_projection.weight' in key for key, _ in base.named_parameters())
    assert len(adapted) == linear - dynamic + len(base.stages), adapted  # and the convolutions of patch embeddings
    model(image()).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ('lora_' in key or 'modules_to_save' in key), key
    model.eval()
    unmerged = model(image())
    assert not torch.allclose(unmerged, expected, atol=1e-2)
    merged = model.merge_and_unload()
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in base.named_parameters()}
    torch.testing.assert_close(merged(image()), unmerged, rtol=1e-4, atol=1e-4)


def photos():
    """Photographs that other packages bring along, as images."""
    paths = []
    for package, pattern in (
            ('matplotlib', 'mpl-data/sample_data/grace_hopper.jpg'), ('sklearn', 'datasets/images/*.jpg'),
            ('skimage', 'data/[acimrh]*.[jp][pn]g')):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            paths.extend(sorted(Path(spec.origin).parent.glob(pattern)))
    return [Image.open(path).convert('RGB') for path in paths]


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
@pytest.mark.parametrize('size', [(64, 96), (300, 260)])
def test_accelerate_offload(monkeypatch, name, size):
    """Weights that come in when a module is called, and leave after: same values, in chunks of a large map too."""
    accelerate = pytest.importorskip('accelerate')
    monkeypatch.setattr(chunks, 'CPU_CHUNK_BYTES', 100_000)
    model, x = timm.create_model(name, pretrained=True).eval(), image(size=size)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device('cpu'))
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_torchao(name):
    """int8 weights: the classes that float32 gives to digits, training ones among them, and to photos, not square ones.

    The models have weights, which know digits only: what they see in a photo means nothing, but must stay the same.
    """
    torchao = pytest.importorskip('torchao.quantization')
    datasets = pytest.importorskip('sklearn.datasets')
    model = timm.create_model(name, pretrained=True).eval()
    quantized = copy.deepcopy(model)
    torchao.quantize_(quantized, torchao.Int8WeightOnlyConfig())
    linear = [module for module in quantized.modules() if isinstance(module, torch.nn.Linear)]
    assert all(type(module.weight) is not torch.nn.Parameter for module in linear)

    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    digits = [Image.fromarray((scan * 15.9).astype(np.uint8)).convert('RGB') for scan in datasets.load_digits().images]
    views = [photo.resize((128, 96)).crop(box) for photo in photos() for box in (
        (0, 0, 128, 96), (0, 0, 112, 64), (16, 32, 128, 96), (0, 32, 112, 96), (16, 0, 128, 64))]
    pixels = [torch.from_numpy(np.array(view.resize((128, 96)))).permute(2, 0, 1) / 127.5 - 1. for view in views]
    assert len(pixels) >= 50
    with torch.no_grad():
        for what, x in (('digits', torch.stack([transform(scan) for scan in digits[::8]])),
                        ('views of photos', torch.stack(pixels))):
            expected, actual = (torch.cat([m(part) for part in x.split(32)]) for m in (model, quantized))
            agreement = (actual.argmax(1) == expected.argmax(1)).float().mean().item()
            difference = ((actual - expected).abs().max() / expected.abs().max()).item()
            print(f'{name}, {len(x)} {what}: top-1 agreement {agreement:.1%}, largest difference {difference:.1e}')
            assert 0 < difference < .1
            assert agreement >= .95
    gradients = []
    for m in (model, quantized):
        photo = pixels[1].unsqueeze(0).requires_grad_()
        m(photo)[0, 1].backward()
        gradients.append(photo.grad.flatten())
    assert torch.cosine_similarity(*gradients, dim=0) > .98


@pytest.fixture
def run_timm_script(tmp_path):
    """Runs one of timm's scripts, of a clone of its repository: its distributions do not hold them."""
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip("timm's distributions do not hold its scripts: set TIMM_SCRIPTS to a clone of its repository")

    def run(name, *arguments, prefix=('-m', 'timm_ls', 'run')):
        script = shutil.copy(Path(os.environ['TIMM_SCRIPTS']) / name, tmp_path)  # apart from the clone's own timm
        result = subprocess.run(
            [sys.executable, *prefix, script, *map(str, arguments)],
            capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)))
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout + result.stderr

    return run


@pytest.fixture
def dark_and_light(tmp_path):
    """A folder of pictures, not square, in two classes that a glance tells apart."""
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for label, level in (('dark', 40), ('light', 200)):
            folder = tmp_path / 'pictures' / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                noise = rng.normal(level, 20, (64, 96, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(folder / f'{i}.png')
    return tmp_path / 'pictures'


SMALL_MODEL = [
    '--model', NAME, '--model-kwargs', 'embed_dims=(16,24,32,48)', 'depths=(1,1,2,1)', 'num_heads=(1,2,2,3)']
TWO_CLASSES = ['--input-size', 3, 64, 96, '--num-classes', 2, '--device', 'cpu']


@pytest.mark.parametrize('modules', [(), ('--device-modules', 'timm_ls')])
def test_timm_train_script(tmp_path, run_timm_script, dark_and_light, modules):
    """train.py, by `python -m timm_ls run` and by its own option; the checkpoint holds what it should."""
    printed = run_timm_script(
        'train.py', *modules, '--data-dir', dark_and_light, *TWO_CLASSES, '--epochs', 2, '--batch-size', 4,
        '--workers', 0, '--opt', 'adamw', '--lr', 1e-3, '--layer-decay', .8, '--model-ema',
        '--output', tmp_path / 'out', *SMALL_MODEL, prefix=() if modules else ('-m', 'timm_ls', 'run'))
    assert 'Best metric' in printed
    checkpoint = torch.load(next((tmp_path / 'out').rglob('last.pth.tar')), weights_only=False)
    assert 'stages.0.embed.proj.weight' in checkpoint['state_dict']
    assert {'state_dict_ema', 'optimizer'} <= checkpoint.keys()


def test_timm_validate_and_inference_scripts(tmp_path, run_timm_script, dark_and_light):
    """validate.py and inference.py, weights from a file: the accuracy and the probabilities that the model gives."""
    model = create(NAME, num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    common = [*TWO_CLASSES, '--batch-size', 4, '--workers', 0, '--checkpoint', tmp_path / 'weights.pth', *SMALL_MODEL]
    printed = run_timm_script('validate.py', '--data-dir', dark_and_light / 'validation', *common)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(dict(input_size=(3, 64, 96)), model=model))
    paths = sorted((dark_and_light / 'validation').rglob('*.png'))
    with torch.no_grad():
        probabilities = model.eval()(torch.stack([transform(Image.open(path)) for path in paths])).softmax(1)
    right = [(path.parent.name == 'light') == bool(row.argmax()) for path, row in zip(paths, probabilities)]
    assert f'"top1": {100 * sum(right) / len(right)}' in printed

    pytest.importorskip('pandas', reason='inference.py needs pandas')
    run_timm_script(
        'inference.py', '--data-dir', dark_and_light / 'validation', *common, '--topk', 2, '--fullname',
        '--label-type', 'none', '--include-index', '--results-format', 'json-split', '--results-file',
        tmp_path / 'results.json')
    result = json.loads((tmp_path / 'results.json').read_text())
    table = [dict(zip(result['columns'], row)) for row in result['data']]
    assert len(table) == len(paths)
    expected = dict(zip(paths, probabilities))
    for row in table:
        for index, probability in zip(row['index'], row['prob']):
            assert abs(expected[dark_and_light / 'validation' / row['filename']][index].item() - probability) < 1e-4


def test_timm_benchmark_script(run_timm_script):
    """benchmark.py times training and inference."""
    printed = run_timm_script(
        'benchmark.py', *TWO_CLASSES, '--batch-size', 2, '--num-warm-iter', 1, '--num-bench-iter', 5, '--bench', 'both',
        *SMALL_MODEL)
    assert '"train_samples_per_sec"' in printed and '"infer_samples_per_sec"' in printed


@pytest.mark.parametrize('exporter', [('--dynamo', '--dynamic-size'), ()])
def test_timm_onnx_export_script(tmp_path, run_timm_script, exporter):
    """onnx_export.py with both of torch's exporters, the newer one for any size: ONNX Runtime gives the same."""
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    run_timm_script(
        'onnx_export.py', tmp_path / 'model.onnx', '--model', 'test_vil_ls', '--batch-size', 2,
        '--check-forward', *exporter)
    session = runtime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    model = timm.create_model('test_vil_ls', pretrained=True).eval()
    for size in ((96, 128), (128, 96)) if exporter else ((96, 96),):
        x = image(2, size)
        out = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(out, model(x).detach(), rtol=0, atol=1e-4)
