"""The libraries that build on timm backbones, with ours in them: forward and backward at sizes that are not square.

A test is skipped only where its library is not installed: `pip install 'timm-ls[clients]'`, and those that bring many
others along, `pip install 'timm-ls[more-clients]'`.
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

from timm_ls.complexity import count_macs
from timm_ls.ops import chunks

NAME = 'vil_ls_small'

both_families = pytest.mark.parametrize('name', [NAME, 'cvt_ls_13'])  # of four levels, and of three


def image(batch=2, size=(64, 96), seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def need(library, extra='clients'):
    return pytest.importorskip(library, reason=f"{library} is not installed: pip install 'timm-ls[{extra}]'")


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
    # no dropout, statistics as they are, so that both see the same; and float64: in float32 rounding decides on which
    # side of a ReLU's corner a value lies, and gradients jump, those of ResNet-18 in Unet by 8e-3 of the largest
    model = segmenter(decoder, name).eval().double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    counter = CompileCounterWithBackend('inductor')
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    # inductor makes the sizes that adaptive pooling sees numbers, in any model: UPerNet's decoder is compiled for each
    for size in ((64, 96), (96, 64), (128, 160))[:2 if decoder == 'UPerNet' else 3]:
        x = image(2, size).double()
        expected, masks = model(x), compiled(x)
        torch.testing.assert_close(masks, expected, rtol=1e-10, atol=1e-10)
        wanted = torch.autograd.grad(expected.square().mean(), parameters)
        for grad, eager in zip(torch.autograd.grad(masks.square().mean(), parameters), wanted, strict=True):
            torch.testing.assert_close(grad, eager, rtol=1e-8, atol=1e-8 * (1e-3 + eager.abs().max().item()))
    # one for each side of 4,096 terms, of which inductor makes sums in another way (here, BatchNorms of the decoder),
    # and one that it gives up and begins again
    assert 1 <= counter.frame_count <= 3


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


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_lightning_with_an_example(tmp_path, capsys, name):
    """The summary that `Trainer.fit` prints by default runs the example, counts operations, and leaves no trace."""
    lightning = need('lightning')

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model(name)
            self.example_input_array = image(1)

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    module = Classifier()
    before = copy.deepcopy(module.model.state_dict())
    trainer = lightning.Trainer(accelerator='cpu', max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, DataLoader(TensorDataset(image(4), torch.tensor([0, 1, 2, 3])), batch_size=2))
    assert trainer.global_step == 2
    assert any(not torch.equal(value, before[key]) for key, value in module.model.state_dict().items())
    summary = lightning.pytorch.utilities.model_summary.summarize(module)
    assert summary.total_flops == 2 * count_macs(module.model, (64, 96))
    assert summary.in_sizes == [[1, 3, 64, 96]] and summary.out_sizes == [[1, 10]]


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


def captured(model, how):
    """A model as OpenVINO takes it, for images of any number and size."""
    openvino = need('openvino')
    if how == 'example_input':
        return openvino.convert_model(model, example_input=image(2, (96, 128)))
    dims = {0: torch.export.Dim('batch'), 2: torch.export.Dim('height', min=33), 3: torch.export.Dim('width', min=33)}
    return openvino.convert_model(torch.export.export(model, (image(2, (96, 128)),), dynamic_shapes=(dims,)))


@pytest.mark.parametrize('name, how', [
    ('test_vil_ls', 'example_input'), ('test_cvt_ls', 'example_input'), ('test_cvt_ls', 'export'),
    pytest.param('test_vil_ls', 'export', marks=pytest.mark.slow)])
def test_openvino(name, how):
    """Converted once, by an example or from `torch.export`: other batches and rectangles give the same in float32."""
    openvino = need('openvino')
    model = timm.create_model(name, pretrained=True).eval()
    converted = openvino.Core().compile_model(captured(model, how), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for batch, size in ((2, (96, 128)), (1, (96, 128)), (3, (64, 100)), (1, (130, 70))):
        x = image(batch, size)
        with torch.no_grad():
            expected = model(x)
        out = torch.from_numpy(converted(x.numpy())[0])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
@pytest.mark.parametrize('i, j', [(0, 0), (2, 1)])
def test_grad_cam(name, i, j):
    """On a norm of a block, reshaped as for any vision transformer: Grad-CAM worked out by hand."""
    grad_cam = need('pytorch_grad_cam')
    targets = [grad_cam.utils.model_targets.ClassifierOutputTarget(3)] * 2
    model, x = timm.create_model(name, pretrained=True).eval(), image()
    rows, cols, g = 64 >> i + 2, 96 >> i + 2, model.stages[i].num_global_tokens

    def reshape_transform(tokens):
        return tokens[:, g:].reshape(tokens.shape[0], rows, cols, tokens.shape[2]).permute(0, 3, 1, 2)

    with grad_cam.GradCAM(
            model=model, target_layers=[model.stages[i].blocks[j].norm1], reshape_transform=reshape_transform) as cam:
        maps = torch.from_numpy(cam(input_tensor=x, targets=targets))

    stage = model.stages[i]
    with torch.no_grad():
        tokens = stage.embed(model.stages[:i](x)).flatten(1, 2)
        if g > 0:
            tokens = torch.cat([stage.global_tokens.expand(2, -1, -1), tokens], dim=1)
        for block in stage.blocks[:j]:
            tokens = block(tokens, (rows, cols))
        block = stage.blocks[j]
        normed = block.norm1(tokens)
    normed.requires_grad_()
    tokens = tokens + block.attn(normed, (rows, cols))
    tokens = tokens + block.mlp(block.norm2(tokens))
    for block in stage.blocks[j + 1:]:
        tokens = block(tokens, (rows, cols))
    level = tokens[:, g:].reshape(2, rows, cols, -1).permute(0, 3, 1, 2)
    logits = model.forward_head(model.forward_norm(model.stages[i + 1:](level)))
    grad, = torch.autograd.grad(logits[:, 3].sum(), normed)
    relevance = (grad[:, g:].mean(dim=1, keepdim=True) * normed[:, g:]).sum(dim=2).relu().detach()
    relevance = relevance.reshape(2, 1, rows, cols)
    expected = torch.nn.functional.interpolate(relevance, (64, 96), mode='bilinear')[:, 0]
    expected = expected - expected.amin(dim=(1, 2), keepdim=True)
    expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    assert expected.std() > .05
    torch.testing.assert_close(maps, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_captum(name):
    """Integrated gradients of pixels add up to what the logit changes; a layer's Grad-CAM has the layer's size."""
    attr = need('captum.attr')
    model, x = timm.create_model(name, pretrained=True).eval(), image()
    pixels = attr.IntegratedGradients(model).attribute(x, target=3, n_steps=64, internal_batch_size=16)
    change = (model(x) - model(torch.zeros_like(x)))[:, 3]
    assert change.abs().min() > .1
    torch.testing.assert_close(pixels.sum(dim=(1, 2, 3)).float(), change.detach(), rtol=1e-3, atol=1e-3)
    assert attr.LayerGradCam(model, model.stages[1]).attribute(x, target=3).shape == (2, 1, 8, 12)


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_open_clip(tmp_path, name):
    """The image tower of a CLIP by a configuration: a training step, embeddings of images that are not square."""
    open_clip = need('open_clip')
    tower = dict(timm_model_name=name, timm_pool='avg', timm_proj='linear', image_size=[64, 96])
    text = dict(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    (tmp_path / f'clip-{name}.json').write_text(json.dumps(dict(embed_dim=32, vision_cfg=tower, text_cfg=text)))
    open_clip.add_model_config(tmp_path)
    model, _, transform = open_clip.create_model_and_transforms(f'clip-{name}')
    images = torch.stack([transform(Image.new('RGB', (120, 80), color)) for color in ('red', 'white', 'navy')])
    assert images.shape == (3, 3, 64, 96)
    embeddings, texts, scale = model(images, torch.randint(1, 63, (3, 8)))
    assert embeddings.shape == (3, 32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    assert_trains(model.visual.trunk, open_clip.ClipLoss()(embeddings, texts, scale))


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_lightly(name):
    """SimCLR on features without a classifier: a few steps on two views of the same pictures, and the loss falls."""
    need('lightly')
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    backbone = timm.create_model(name, num_classes=0)
    model = torch.nn.Sequential(backbone, SimCLRProjectionHead(backbone.num_features, 32, 16))
    transform = SimCLRTransform(input_size=64)
    pictures = [Image.new('RGB', (96, 80), color) for color in ('red', 'white', 'navy', 'green')]
    first, second = (torch.stack(views) for views in zip(*map(transform, pictures)))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = NTXentLoss()(model(first), model(second))
        assert_trains(backbone, loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .9 * losses[0]


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_fastai(name, dark_and_light):
    """`vision_learner` by name, with weights: its head is cut off, frozen, fine-tuned, and tells the classes apart."""
    need('fastai', 'more-clients')
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, vision_learner
    data = ImageDataLoaders.from_folder(
        dark_and_light, train='train', valid='validation', item_tfms=Resize((64, 96)), bs=8, num_workers=0,
        device=torch.device('cpu'))
    learner = vision_learner(data, name, metrics=accuracy, path=dark_and_light)
    body = learner.model[0].model
    expected = timm.create_model(name, pretrained=True, num_classes=0)
    assert all(torch.equal(value, body.state_dict()[key]) for key, value in expected.state_dict().items())
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(3, base_lr=5e-3)
    assert learner.recorder.values[-1][-1] == 1.
    assert any(not torch.equal(value, body.state_dict()[key]) for key, value in expected.state_dict().items())


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_anomalib(tmp_path, name, dark_and_light):
    """Patchcore on two levels: pictures of the other class are anomalies."""
    need('anomalib', 'more-clients')
    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import Patchcore
    data = Folder(
        name='pictures', root=dark_and_light, normal_dir='train/dark', abnormal_dir='validation/light',
        normal_test_dir='validation/dark', train_batch_size=4, eval_batch_size=4, num_workers=0)
    model = Patchcore(
        backbone=name, layers=['stages.0', 'stages.1'], pre_trained=True,
        pre_processor=Patchcore.configure_pre_processor(image_size=(64, 96)))
    engine = Engine(default_root_dir=tmp_path, accelerator='cpu', devices=1, logger=False)
    engine.fit(model, datamodule=data)
    channels = sum(timm.create_model(name, device='meta').feature_info[i]['num_chs'] for i in range(2))
    assert model.model.memory_bank.shape[1] == channels
    assert engine.test(model, datamodule=data)[0]['image_AUROC'] == 1.


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_torchgeo(name):
    """A classifier of images of 13 bands, which are not square, trained by its task."""
    need('torchgeo', 'more-clients')
    import lightning
    from torchgeo.trainers import ClassificationTask
    task = ClassificationTask(model=name, weights=None, in_channels=13, num_classes=3)
    before = copy.deepcopy(task.model.state_dict())
    samples = [dict(image=torch.randn(13, 64, 96), label=torch.tensor(i % 3)) for i in range(6)]
    trainer = lightning.Trainer(
        accelerator='cpu', max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(task, DataLoader(samples, 3), DataLoader(samples, 3))
    assert task.model.in_chans == 13 and 'val_loss' in trainer.callback_metrics
    assert sum(not torch.equal(value, before[key]) for key, value in task.model.state_dict().items()) > 20
    assert task(torch.randn(2, 13, 64, 96)).shape == (2, 3)


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
