"""Feature pyramids: the values of their levels, what trains, and the graphs that can be made of them."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.export import Dim
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

import timm_ls.pyramid
from timm_ls.fpn import FeaturePyramid, timm_fpn_backbone

VIL, CVT = 'test_vil_ls', 'test_cvt_ls'
TOKEN = dict(num_global_tokens=(1, 1, 1, 1), global_pool='token')  # timm takes features of these by another class


def test_first_name():
    """The module can be imported by the name that it had."""
    assert timm_ls.pyramid.FeaturePyramid is FeaturePyramid
    assert timm_ls.pyramid.timm_fpn_backbone is timm_fpn_backbone


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def image(size=(70, 100), batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(size[0] * size[1]))


def create(name, **kwargs):
    """A narrow pyramid whose parameters are not at their trivial initial values."""
    pyramid = timm_fpn_backbone(name, **dict(dict(out_channels=8), **kwargs))
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=.05)
    return pyramid


def gradients(pyramid, x):
    """By name, of a loss that all maps have a part in."""
    pyramid.zero_grad()
    torch.stack([(1 + i) * level.square().mean() for i, level in enumerate(pyramid(x).values())]).sum().backward()
    return {name: p.grad.clone() for name, p in pyramid.named_parameters() if p.grad is not None}


def normalised(x, norm):
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def enlarged(x, size):
    """Nearest neighbour, by its definition."""
    rows, columns = (torch.arange(n) * x.shape[2 + i] // n for i, n in enumerate(size))
    return x[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize('level_norm', [True, False])
@pytest.mark.parametrize('name', [VIL, CVT, 'resnet10t'])
def test_levels_by_hand(name, level_norm):
    """Normalised over channels, projected, summed from the coarsest down, convolved; extra levels from the last."""
    pyramid = create(name, level_norm=level_norm).eval()
    with torch.no_grad():
        levels = pyramid.body(image())[-4:] if name == 'resnet10t' else pyramid.body(image())
        if level_norm:
            levels = [normalised(level, norm) for level, norm in zip(levels, pyramid.norms, strict=True)]
        top, expected = None, []
        for i in reversed(range(len(levels))):
            lateral, output = pyramid.fpn.inner_blocks[i][0], pyramid.fpn.layer_blocks[i][0]
            x = F.conv2d(levels[i], lateral.weight, lateral.bias)
            top = x if top is None else x + enlarged(top, x.shape[2:])
            expected.insert(0, F.conv2d(top, output.weight, output.bias, padding=1))
        if name == CVT:
            p6 = F.conv2d(expected[-1], *pyramid.fpn.extra_blocks.p6.parameters(), stride=2, padding=1)
            p7 = F.conv2d(p6.relu(), *pyramid.fpn.extra_blocks.p7.parameters(), stride=2, padding=1)
            expected += [p6, p7]
        else:
            expected.append(expected[-1][:, :, ::2, ::2])
        maps = pyramid(image())
    assert list(maps) == pyramid.names
    for actual, wanted in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


class Quartered(ExtraFPNBlock):
    """A block of one's own: one level of stride 4 after the last."""

    def forward(self, results, x, names):
        return [*results, F.avg_pool2d(results[-1], 4, ceil_mode=True)], [*names, 'quarter']


@pytest.mark.parametrize('name, kwargs, names, strides', [
    (VIL, {}, '0 1 2 3 pool', [4, 8, 16, 32, 64]),
    (VIL, dict(extra_blocks='p6p7', min_stride=8), '0 1 2 p6 p7', [8, 16, 32, 64, 128]),
    (VIL, dict(extra_blocks=None, out_indices=(-3, 3)), '0 1', [8, 32]),
    (VIL, dict(out_indices=2), '0 1 pool', [16, 32, 64]),
    (VIL, dict(extra_blocks=Quartered()), '0 1 2 3 quarter', [4, 8, 16, 32, 128]),
    (VIL, dict(extra_blocks=LastLevelP6P7(128, 8), **TOKEN), '0 1 2 3 p6 p7', [4, 8, 16, 32, 64, 128]),
    (CVT, {}, '0 1 2 p6 p7', [4, 8, 16, 32, 64]),
    (CVT, dict(extra_blocks='pool'), '0 1 2 pool', [4, 8, 16, 32]),
    ('resnet10t', {}, '0 1 2 3 pool', [4, 8, 16, 32, 64]),
    ('resnet10t', dict(out_indices=(0, 2), extra_blocks='pool'), '0 1 pool', [2, 8, 16]),
    ('tf_mobilenetv3_small_minimal_100', dict(out_indices=(1, 2, 3)), '0 1 2 p6 p7', [4, 8, 16, 32, 64]),
])
def test_names_and_strides(name, kwargs, names, strides):
    pyramid = create(name, **kwargs).eval()
    assert pyramid.out_channels == 8 and pyramid.names == names.split() and pyramid.strides == strides
    with torch.no_grad():
        maps = pyramid(image((256, 384)))
    assert list(maps) == pyramid.names
    assert [tuple(x.shape) for x in maps.values()] == [(2, 8, 256 // stride, 384 // stride) for stride in strides]


def test_stages_after_the_last_level_are_not_built():
    names = [name for name, _ in create(VIL, out_indices=(0, 1)).body.named_children()]
    assert names == ['stages_0', 'stages_1']


@pytest.mark.parametrize('trainable_layers', range(6))
def test_trainable_layers_are_those_of_torchvision(trainable_layers):
    """The same parameters of a ResNet train. Only when all layers do has torchvision an exception, none here."""
    def trainable(backbone):
        return {name for name, p in backbone.body.named_parameters() if p.requires_grad}

    expected = trainable(
        resnet_fpn_backbone(backbone_name='resnet18', weights=None, trainable_layers=trainable_layers))
    actual = trainable(timm_fpn_backbone('resnet18', trainable_layers=trainable_layers))
    bn = ('.bn', 'bn1.', '.downsample.1.')  # torchvision's are buffers by default
    assert {name for name in actual if not any(part in name for part in bn)} == expected
    assert {name.split('.')[0] for name in actual} == {'layer4', 'layer3', 'layer2', 'layer1', 'conv1', 'bn1'} & (
        {name.split('.')[0] for name in expected} | ({'bn1'} if trainable_layers == 5 else set()))


@pytest.mark.parametrize('name, kwargs', [(VIL, {}), (VIL, TOKEN), (CVT, dict(num_global_tokens=(1, 1, 0)))])
def test_gradients_reach_the_layers_that_train(name, kwargs):
    """And no others; patch embedding and global tokens of a frozen stage are frozen with it."""
    pyramid = create(name, **kwargs)
    num_stages = len(pyramid.norms)
    for trainable_layers in (0, 2, num_stages):  # in a row: thawed again
        pyramid.set_trainable_layers(trainable_layers)
        moved = {n for n, grad in gradients(pyramid, image((64, 96))).items() if grad.abs().max() > 0}
        expected = set()
        for n, _ in pyramid.named_parameters():
            stages = [i for i in range(num_stages) if f'stages_{i}.' in n or f'stages.{i}.' in n]
            if not stages or stages[0] >= num_stages - trainable_layers:
                expected.add(n)
        assert any('global_tokens' in n for n in expected) == (trainable_layers > (name == VIL and not kwargs))
        # keys have no gradient through their bias where all of a query's keys share it
        assert expected - moved <= {n for n in expected if 'bias' in n or 'global' in n}, sorted(expected - moved)
        assert moved <= expected


def test_frozen_stages_stay_as_in_inference():
    """BatchNorm's statistics do not move, and nothing is dropped, in frozen stages only."""
    pyramid = create(CVT, trainable_layers=1, drop_path_rate=.5, proj_drop_rate=.2)
    before = {name: buffer.clone() for name, buffer in pyramid.named_buffers()}
    for mode in (True, False, True):
        pyramid.train(mode)
        for name, module in pyramid.named_modules():
            frozen = name.startswith(('body.stages_0', 'body.stages_1'))
            assert module.training == (mode and not frozen), name
    pyramid(image())
    moved = {name for name, buffer in pyramid.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith('body.stages_2')} != set()
    pyramid.set_trainable_layers(3)
    assert all(module.training for module in pyramid.modules())


def test_trainable_layers_by_default():
    """All without weights; with weights the last three, as in torchvision."""
    assert timm_fpn_backbone(VIL).trainable_layers == 4
    pyramid = timm_fpn_backbone(VIL, pretrained=True)  # weights that ship with the package
    assert pyramid.trainable_layers == 3 and not pyramid.body.stages_0.embed.proj.weight.requires_grad
    weights = timm.create_model(VIL, pretrained=True).state_dict()
    assert torch.equal(pyramid.body.stages_3.embed.proj.weight, weights['stages.3.embed.proj.weight'])
    assert timm_fpn_backbone(CVT, pretrained=True).trainable_layers == 3
    assert timm_fpn_backbone(CVT, pretrained=True, trainable_layers=1).trainable_layers == 1


@pytest.mark.parametrize('name, kwargs, part', [
    (VIL, dict(drop_path_rate=.3), 'blocks.0.mlp.fc1'), (VIL, TOKEN, 'blocks.0.mlp.fc1'),
    (CVT, {}, 'blocks.0.mlp.fc1'), ('resnet10t', {}, 'layer3.0.conv1')])
def test_grad_checkpointing(name, kwargs, part):
    """The same gradients from activations that are computed a second time."""
    pyramid = create(name, trainable_layers=2, **kwargs)
    calls, results = [], []
    module = next(module for n, module in reversed(list(pyramid.named_modules())) if n.endswith(part))
    module.register_forward_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        pyramid.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        results.append(gradients(pyramid, image()))
        calls.append(0)
    once = calls.index(0)
    assert calls == [1] * once + [0] + [1] * 2 * once + [0] and once > 0
    assert results[0].keys() == results[1].keys()
    for n in results[0]:
        torch.testing.assert_close(results[1][n], results[0][n], msg=n)
    assert timm_fpn_backbone(VIL, grad_checkpointing=True).body.stages_0.grad_checkpointing


@pytest.mark.parametrize('name', [VIL, CVT, 'resnet10t'])
def test_script(name):
    pyramid = create(name).eval()
    script = torch.jit.script(pyramid)
    with torch.no_grad():
        for size in ((70, 100), (64, 33)):
            actual, expected = script(image(size)), pyramid(image(size))
            assert list(actual) == list(expected)
            for level in expected:
                torch.testing.assert_close(actual[level], expected[level], atol=1e-5, rtol=1e-4)


VIL_OF_TWO = dict(
    depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), patch_sizes=(4, 8), num_global_tokens=(1, 0))
CVT_OF_TWO = dict(
    depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), patch_sizes=(7, 7), patch_strides=(4, 8),
    patch_paddings=(2, 1), attn_types=('ls', 'ls'), num_global_tokens=(0, 0))


@pytest.mark.parametrize('name, kwargs', [
    pytest.param('vil_ls_tiny', dict(VIL_OF_TWO, attn_types=('ls', 'full')), id='ls-full', marks=pytest.mark.slow),
    pytest.param('cvt_ls_13', CVT_OF_TWO, id='cvt')])
def test_onnx(name, kwargs, tmp_path):
    """Backbone and FPN as one graph for images of any batch and size. Two stages: captured sooner than four."""
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pyramid = create(name, **kwargs).eval()
    dims = ({0: Dim('batch'), 2: Dim('height', min=33, max=2048), 3: Dim('width', min=33, max=2048)},)
    program = torch.onnx.export(pyramid, (image((96, 160)),), dynamo=True, dynamic_shapes=dims, verbose=False)
    program.save(tmp_path / 'pyramid.onnx')
    session = runtime.InferenceSession(tmp_path / 'pyramid.onnx', providers=['CPUExecutionProvider'])
    for size, batch in (((64, 96), 1), ((100, 130), 2), ((37, 300), 3), ((256, 192), 1)):
        x = image(size, batch)
        with torch.no_grad():
            expected = pyramid(x)
        actual = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for out, wanted in zip(actual, expected.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(out), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize('kwargs, message', [
    (dict(trainable_layers=5), 'trainable_layers=5.* has 4, expected 0'),
    (dict(trainable_layers=-1), 'trainable_layers=-1'),
    (dict(out_indices=(1, 4)), r'out_indices=\(1, 4\): test_vil_ls has no such levels'),
    (dict(out_indices=(2, 1)), r'strides \[16, 8\].*increasing order'),
    (dict(out_indices=(1, 1)), r'strides \[8, 8\]'),
    (dict(min_stride=64), r'No level is left with min_stride=64.*\[4, 8, 16, 32\]'),
    (dict(extra_blocks='p5'), "Unknown extra_blocks='p5'.*'pool', 'p6p7'"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm_fpn_backbone(VIL, **kwargs)


@pytest.mark.parametrize('name, message', [
    ('swin_tiny_patch4_window7_224', 'returns NHWC maps: a pyramid needs NCHW'),
    ('vit_tiny_patch16_224', r'strides \[16, 16, 16\].*reduces resolution'),
])
def test_backbones_without_a_pyramid(name, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        FeaturePyramid(timm.create_model(name, features_only=True))
