"""What timm and its users expect of a backbone, for every registered model, by value wherever there is a value.

Most of it is tested on small versions. Models that differ in width and depth only have the same small version: one of
them stands for all.
"""
import collections
import copy
import io
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import timm
import torch
from macs import macs_by_hand
from paths import TESTS
from small_models import NAMES, create, one_of_each_kind, small_args
from timm.models import save_for_hf
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import timm_ls
from timm_ls.complexity import count_macs

SIZE = (72, 104)

every_model = pytest.mark.parametrize('name', NAMES)
every_kind = pytest.mark.parametrize('name', one_of_each_kind())


def image(batch=2, in_chans=3, size=SIZE, seed=0):
    return torch.randn(batch, in_chans, *size, generator=torch.Generator().manual_seed(seed))


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def same_weights(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@every_model
def test_unknown_argument(name):
    """A mistyped argument is an error, not ignored."""
    with pytest.raises(TypeError, match='drop_path_ratio'):
        timm.create_model(name, drop_path_ratio=.1, device='meta')


@every_kind
def test_constructor_arguments(name):
    """The usual arguments reach the layers they are about."""
    model = create(
        name, in_chans=4, num_classes=7, global_pool='max', img_size=(64, 96), drop_rate=.1, pos_drop_rate=.2,
        proj_drop_rate=.3, attn_drop_rate=.4, drop_path_rate=.5, norm_layer='rmsnorm', act_layer='silu')
    assert model.in_chans == 4 and model.get_submodule('stages.0.embed.proj').in_channels == 4
    assert model.head.out_features == model.num_classes == 7
    assert model.global_pool == 'max' and model.head_drop.p == .1
    last = model.stages[-1].blocks[-1]
    assert model.stages[0].pos_drop.p == .2
    assert last.attn.proj_drop.p == last.mlp.drop1.p == .3
    assert last.attn.attn_drop.p == .4
    assert last.drop_path1.drop_prob == last.drop_path2.drop_prob == .5
    assert isinstance(model.stages[0].blocks[0].drop_path1, torch.nn.Identity)
    assert type(last.norm1).__name__ == 'RmsNorm' and type(last.mlp.act).__name__ == 'SiLU'
    model.train()(image(in_chans=4)).sum().backward()


@pytest.mark.parametrize('name, attn_types', [('vil_ls_tiny', ('ls', 'full') * 2), ('cvt_ls_13', ('ls', 'full', 'ls'))])
@pytest.mark.parametrize('learned', [False, True])
def test_arguments_of_blocks(name, attn_types, learned):
    """What only the families' own attention knows, and the width of the MLP, reach every block."""
    model = timm.create_model(
        name, attn_types=attn_types, qkv_bias=learned, rel_pos_bias=learned, mlp_ratio=2. + learned,
        window_size=5 + learned, rank=3 + learned, global_update='outputs' if learned else 'keys', device='meta')
    for stage, attn_type in zip(model.stages, attn_types, strict=True):
        for block in stage.blocks:
            assert block.mlp.fc1.out_features == (2 + learned) * block.mlp.fc1.in_features
            assert (block.attn.rel_pos is not None) == learned
            linear = {n: m for n, m in block.attn.named_modules() if isinstance(m, torch.nn.Linear)}
            unbiased = {n for n, m in linear.items() if m.bias is None}
            assert unbiased == (set() if learned else {n for n in linear if 'qkv' in n})
            if attn_type == 'ls':
                assert (block.attn.window_size, block.attn.rank) == (5 + learned, 3 + learned)
                assert block.attn.update_from_outputs == learned


def test_drop_path_rises_along_the_depth():
    """Linearly over the blocks of all stages, from 0 to the given rate."""
    model = timm.create_model('vil_ls_tiny', depths=(2, 1, 3, 2), drop_path_rate=.7, device='meta')
    blocks = [block for stage in model.stages for block in stage.blocks]
    for drop_paths in ([block.drop_path1 for block in blocks], [block.drop_path2 for block in blocks]):
        rates = [getattr(drop_path, 'drop_prob', 0.) for drop_path in drop_paths]
        assert rates == pytest.approx([.1 * i for i in range(8)])


@every_kind
def test_every_dropout_is_applied(name):
    """To all tokens of its stage, global ones included, once; to what is pooled."""
    model = create(name).train()
    seen = {}
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and not key.endswith('attn_drop'):  # which attention reads
            seen[key] = 0
            module.register_forward_hook(
                lambda module, args, out, key=key: seen.update({key: seen[key] + args[0].shape[:-1].numel()}))
    model(image())
    expected = {'head_drop': 2}
    for i, (stage, info) in enumerate(zip(model.stages, model.feature_info)):
        rows, cols = (-(-side // info['reduction']) for side in SIZE)
        num_global_tokens = 0 if stage.global_tokens is None else stage.global_tokens.shape[1]
        expected.update({key: 2 * (rows * cols + num_global_tokens) for key in seen if key.startswith(f'stages.{i}.')})
    assert seen == expected
    num_blocks = sum(len(stage.blocks) for stage in model.stages)
    assert len(seen) == 1 + len(model.stages) + 3 * num_blocks  # of a block, one after attention and two in the MLP


MODES = {
    'training': (True, torch.enable_grad), 'evaluation': (False, torch.enable_grad), 'no_grad': (False, torch.no_grad),
    'inference': (False, torch.inference_mode)}
# all that the registered models are, and CvT-LS with full attention and global tokens
KINDS_OF_LAYERS = [*((name, {}) for name in one_of_each_kind()), ('cvt_ls_13', dict(
    attn_types=('ls', 'full', 'full'), num_global_tokens=(2, 1, 1), rel_pos_bias=True, global_pool='token'))]


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name, kwargs', KINDS_OF_LAYERS)
def test_hooks_see_every_module_once(name, kwargs, mode):
    """And a tensor for an output of blocks, attention and all that is in them, for tools that hook or count calls."""
    training, context = MODES[mode]
    model = create(name, **kwargs).train(training)
    calls, outputs = collections.Counter(), {}

    def hook(key, module, args, out):
        calls[key] += 1
        outputs[key] = out

    for key, module in model.named_modules():
        module.register_forward_hook(partial(hook, key))
    with context():
        model(image())
    idle = {key for key, module in model.named_modules()
            if isinstance(module, torch.nn.ModuleList) or key.endswith('attn_drop')  # whose rate attention reads
            or key.startswith('pool') and model.num_global_tokens > 0}
    assert calls == {key: 1 for key, _ in model.named_modules() if key not in idle}
    for i, (stage, info) in enumerate(zip(model.stages, model.feature_info, strict=True)):
        rows, cols = (-(-side // info['reduction']) for side in SIZE)
        for key, out in outputs.items():
            if re.fullmatch(rf'stages\.{i}\.blocks\.\d+(\.attn|\.mlp|\.norm\d|\.attn\.proj|\.mlp\.fc2)?', key):
                assert type(out) is torch.Tensor
                assert out.shape == (2, stage.num_global_tokens + rows * cols, info['num_chs']), key


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_operations_are_counted(name, mode):
    """torch's counter follows a forward pass in every mode, to the last multiply-add."""
    training, context = MODES[mode]
    model = timm.create_model(name).train(training)
    with context(), FlopCounterMode(display=False) as counter:
        model(image(1, size=(80, 80)))
    assert counter.get_total_flops() == 2 * macs_by_hand(model, 80)
    counts = counter.get_flop_counts()
    assert sum(counts[f'{type(model).__name__}.stages'].values()) == 2 * (
        macs_by_hand(model, 80) - model.num_features * model.num_classes)


@every_kind
def test_fake_tensors_leave_nothing_behind(name):
    """Forward passes without values, on devices that are not there, then one with values that is right."""
    model, size = create(name).eval(), (113, 87)  # not a size that anything was made for
    weights = model.state_dict()
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(image(size=size))).shape == (2, model.num_classes)
        for device in ('cpu', 'cuda', 'cuda'):  # what was kept of one mode, another would refuse
            with FakeTensorMode() as mode:
                fake = {key: mode.from_tensor(value).to(device) for key, value in weights.items()}
                out = torch.func.functional_call(model, fake, torch.empty(2, 3, *size, device=device))
                assert out.shape == (2, model.num_classes) and out.device.type == device
        actual = model(image(size=size))
        with timm_ls.attention_implementation('masked'):
            expected = model.double()(image(size=size).double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_first_layer_of_other_channels(name):
    """In the place of the first convolution: it decides what images the model takes, and torch says what it refuses."""
    model = timm.create_model(name, pretrained=True).eval()
    expected = model(image())
    first = model.stages[0].embed.proj
    model.stages[0].embed.proj = torch.nn.Conv2d(
        6, first.out_channels, first.kernel_size, stride=first.stride, padding=first.padding)
    model.stages[0].embed.proj.load_state_dict(dict(
        weight=torch.cat([first.weight / 2, first.weight / 2], dim=1), bias=first.bias))
    six = image().repeat(1, 2, 1, 1)
    for out in (model(six), model.forward_head(model.forward_intermediates(six)[0])):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match='to have 6 channels, but got 3 channels'):
        model(image())


def omega(*sides):
    """What configurations of OmegaConf and Hydra hold for a list."""
    return pytest.importorskip('omegaconf', reason='omegaconf is not installed').OmegaConf.create(list(sides))


@pytest.mark.parametrize('img_size, expected', [
    (np.int64(256), (256, 256)), (np.int32(96), (96, 96)), (np.uint8(200), (200, 200)), (np.array(64), (64, 64)),
    ((np.int64(96), np.int64(160)), (96, 160)), (np.array([96, 160]), (96, 160)), ([96, 160], (96, 160)),
    (torch.Size([96, 160]), (96, 160)), (torch.tensor([96, 160]), (96, 160)), (lambda: omega(96, 160), (96, 160)),
])
@pytest.mark.parametrize('name, kwargs', [
    ('test_vil_ls', {}), ('test_cvt_ls', dict(attn_types=('ls', 'full', 'full'), rel_pos_bias=True))])
def test_image_sizes_of_any_integers(tmp_path, name, kwargs, img_size, expected):
    """As they come from configurations, wherever a size is taken; what is kept of it is plain."""
    img_size = img_size() if callable(img_size) else img_size

    def shapes(model):
        return {key: value.shape for key, value in model.state_dict().items()}

    wanted = shapes(timm.create_model(name, img_size=expected, **kwargs))
    assert shapes(timm.create_model(name, img_size=img_size, **kwargs)) == wanted
    model = timm.create_model(name, img_size=32, **kwargs)
    assert shapes(model) != wanted
    model.set_input_size(img_size)
    assert shapes(model) == wanted
    assert model(image(1, size=expected)).isfinite().all()
    for kept in (model, timm.create_model(name, img_size=img_size, **kwargs)):
        save_for_hf(kept, tmp_path)
        assert json.loads((tmp_path / 'config.json').read_text())['model_args']['img_size'] == list(expected)
        assert timm.models.get_model_input_config(kept)['input_size'] == (3, *expected)
    assert count_macs(model, img_size) == count_macs(model, expected)


@pytest.mark.parametrize('img_size', [96., (96, 160.), '96', np.float32(96), (96, 96, 96), np.array([0, 96])])
def test_image_sizes_that_are_none(img_size):
    for take in (timm.create_model('test_vil_ls').set_input_size, lambda size: timm.create_model(
            'test_vil_ls', img_size=size), lambda size: count_macs(timm.create_model('test_vil_ls'), size)):
        with pytest.raises(ValueError, match='expected a side, or height and width, in pixels'):
            take(img_size)


@every_kind
def test_exportable(name):
    """Attention in plain operators where timm's `exportable` asks for them, and fused otherwise."""
    for exportable in (False, True):
        model = create(name, exportable=exportable, device='meta')
        assert {m.fused_attn for m in model.modules() if hasattr(m, 'fused_attn')} == {not exportable}


@every_model
def test_attributes(name):
    """What clients read before they run anything."""
    model = timm.create_model(name, device='meta')
    cfg = model.pretrained_cfg
    assert cfg['architecture'] == name and cfg['paper_ids'] and cfg['paper_name']
    assert (model.in_chans, model.num_classes) == (cfg['input_size'][0], cfg['num_classes'])
    assert model.global_pool == 'avg'
    assert model.num_features == model.head_hidden_size == model.feature_info[-1]['num_chs']
    assert model.grad_checkpointing is False
    assert [info['reduction'] for info in model.feature_info] == [4, 8, 16, 32][:len(model.feature_info)]
    for info in model.feature_info:
        assert isinstance(model.get_submodule(info['module']), torch.nn.Module)
    assert model.get_classifier() is model.get_submodule(cfg['classifier'])
    x = torch.zeros(1, *cfg['input_size'], device='meta')
    assert model.forward_features(x).shape == (1, model.num_features, *cfg['pool_size'])
    assert timm.get_pretrained_cfg_value(name, 'min_input_size') == (3, 32, 32)


@every_model
def test_weights_have_the_names_and_shapes_of_the_release(name):
    """So that weights saved by release 0.1.0 load, and the other way round."""
    released = json.loads((TESTS / 'golden' / 'state_dicts.json').read_text())
    assert released.keys() == set(NAMES)
    expected = []
    for key, shape in released[name]['shapes'].items():
        stage = re.match(r'stages\.(\d+)\.blocks\.\*', key)
        depth = released[name]['depths'][int(stage[1])] if stage else 1
        expected += [(key.replace('*', str(block)), shape) for block in range(depth)]
    state_dict = timm.create_model(name, device='meta').state_dict()
    assert {key: list(value.shape) for key, value in state_dict.items()} == dict(expected)
    assert len(expected) == len(state_dict)


@every_kind
def test_reset_classifier(name):
    """Pooling kept, turned off, changed; device, dtype, mode and frozen parameters kept."""
    model = create(name, num_classes=10, global_pool='max', dtype=torch.float64).eval()
    x = image().double()
    features = model.forward_features(x)
    pooled = features.amax((2, 3))
    model.requires_grad_(False)
    model.reset_classifier(5)
    assert model.num_classes == 5 and model.global_pool == 'max' and not model.head.training
    assert model.head.weight.dtype == torch.float64 and model.head.weight.requires_grad
    assert 0 < model.head.weight.std() < .1 and not model.head.bias.any()
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith('head.'))
    torch.testing.assert_close(model(x), model.head(pooled))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    torch.testing.assert_close(model(x), pooled)
    model.reset_classifier(0, 'avg')
    torch.testing.assert_close(model(x), features.mean((2, 3)))
    model.reset_classifier(0, 'avgmax')
    torch.testing.assert_close(model(x), .5 * (features.mean((2, 3)) + pooled))
    model.reset_classifier(3, 'catavgmax')
    both = torch.cat([features.mean((2, 3)), pooled], dim=1)
    torch.testing.assert_close(model(x), model.head(both))
    assert model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(x), features)
    assert model.head_hidden_size == model.num_features
    model.reset_classifier(3)
    assert model.global_pool == '' and model(x).shape == (2, 3, *features.shape[2:])
    model.to('meta').train().reset_classifier(4, 'avg')
    assert model.head.weight.is_meta and all(module.training for module in model.modules())


@every_kind
def test_forward_is_its_parts(name):
    """`forward` is `forward_head` of `forward_features`; the head is what `get_classifier` says."""
    model = create(name, num_classes=10).eval()
    x = image()
    features = model.forward_features(x)
    assert torch.equal(model(x), model.forward_head(features))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size)
    assert torch.equal(model(x), model.get_classifier()(pre_logits))


@every_kind
def test_all_ways_to_features_agree(name):
    """`forward_intermediates`, and `features_only` by lists, hooks and the getter, give the same maps."""
    model = create(name).eval()
    x = image()
    final, expected = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    for info, level in zip(model.feature_info, expected):
        rows, cols = (-(-side // info['reduction']) for side in SIZE)
        assert level.shape == (2, info['num_chs'], rows, cols)
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], final) and not torch.equal(expected[-1], final)
    assert_equal(normed[:-1], expected[:-1])
    for feature_cls, kind in ((None, FeatureListNet), ('getter', FeatureGetterNet), ('hook', FeatureHookNet)):
        features = create(name, features_only=True, **(dict(feature_cls=feature_cls) if feature_cls else {})).eval()
        assert isinstance(features, kind)
        assert features.feature_info.channels() == [info['num_chs'] for info in model.feature_info]
        assert features.feature_info.reduction() == [info['reduction'] for info in model.feature_info]
        target = features.model if feature_cls == 'getter' else features
        weights = {key if feature_cls == 'getter' else key.replace('stages.', 'stages_', 1): value
                   for key, value in model.state_dict().items()}
        target.load_state_dict({key: weights[key] for key in target.state_dict()})
        assert_equal(features(x), expected)


@every_kind
def test_choice_of_levels(name):
    """Positive, negative, and a number of levels; anything else is a clear error."""
    model = create(name).eval()
    x = image(1)
    expected = model.forward_intermediates(x, intermediates_only=True)
    n = len(expected)
    for indices in ([0], [-1], [1, -1], (0, n - 1), 1, 2, n):
        chosen = expected[-indices:] if isinstance(indices, int) else [expected[i] for i in indices]
        assert_equal(model.forward_intermediates(x, indices, intermediates_only=True), chosen)
        assert_equal(model.forward_intermediates(x, indices, intermediates_only=True, stop_early=True), chosen)
        out_indices = range(n - indices, n) if isinstance(indices, int) else indices
        features = create(name, features_only=True, out_indices=indices, device='meta')
        assert features.feature_info.channels() == [model.feature_info[i]['num_chs'] for i in out_indices]
    stopped, _ = model.forward_intermediates(x, [0], stop_early=True)
    assert torch.equal(stopped, expected[0])
    for indices in ([n], [-n - 1], n + 1, 0):
        with pytest.raises(AssertionError, match='out of range'):
            model.forward_intermediates(x, indices)
        if indices != 0:  # no level at all, for timm
            with pytest.raises((AssertionError, IndexError), match='out of range'):
                create(name, features_only=True, out_indices=indices, device='meta')
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt='NHWC')


@every_kind
def test_pruning(name):
    """What remains gives the same maps, has no parameter without a use, and a head of the right width fits on it."""
    full = create(name, num_classes=10).eval()
    x = image()
    expected = full.forward_intermediates(x, intermediates_only=True)
    n = len(expected)
    for index in range(n):
        assert copy.deepcopy(full).prune_intermediate_layers([index - n]) == [index]
        for prune_norm in (False, True):
            model = copy.deepcopy(full)
            assert model.prune_intermediate_layers([index], prune_norm=prune_norm) == [index]
            assert len(model.feature_info) == len(model.stages) == index + 1
            assert model.num_features == model.head_hidden_size == expected[index].shape[1]
            final, maps = model.forward_intermediates(x, [index])
            assert torch.equal(maps[0], expected[index])
            assert torch.equal(model.forward_features(x), final) and torch.equal(model(x), final)
            if prune_norm or index < n - 1:  # features end where the level is taken
                assert torch.equal(final, maps[0])
            model.forward_intermediates(x, [index], norm=not prune_norm)[1][0].square().sum().backward()
            assert [p for p, value in model.named_parameters() if value.grad is None] == []
            model.reset_classifier(4, 'avg')
            assert model(x).shape == (2, 4)
    model = copy.deepcopy(full)
    assert model.prune_intermediate_layers(1, prune_head=False) == [n - 1]
    assert torch.equal(model(x), full(x))


@every_model
def test_layer_decay_groups(name):
    """Layers count up along the depth: embedding, blocks in order, norm and head last; coarse groups are stages."""
    model = timm.create_model(name, device='meta')
    layers = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    depths = [len(stage.blocks) for stage in model.stages]
    along = []
    for i, depth in enumerate(depths):
        along.append({layers[key] for key in layers if key.startswith((f'stages.{i}.embed', f'stages.{i}.global'))})
        along.extend({layers[key] for key in layers if key.startswith(f'stages.{i}.blocks.{j}.')} for j in range(depth))
    assert all(len(group) == 1 for group in along)
    along = [group.pop() for group in along]
    assert along == sorted(along) and along[0] == 0 and len(set(along)) >= sum(depths)
    assert max(along) <= layers['norm.weight'] <= layers['head.weight'] == max(layers.values())
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) in (len(depths) + 1, len(depths) + 2)
    groups = param_groups_layer_decay(model, layer_decay=.5)
    assert len({group['lr_scale'] for group in groups}) == max(layers.values()) + 1


@every_model
def test_no_weight_decay(name):
    """Names of real parameters: all that tell positions or are tokens, none of the matrices."""
    model = timm.create_model(name, device='meta')
    names = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert names <= parameters.keys()
    assert names == {key for key in parameters if 'rel_pos' in key or 'token' in key}
    decayed = param_groups_weight_decay(model, no_weight_decay_list=names)[1]['params']
    matrices = [p for key, p in parameters.items() if p.ndim > 1 and key not in names]
    assert {id(p) for p in decayed} == {id(p) for p in matrices}


@every_kind
@pytest.mark.parametrize('features_only', [False, True])
def test_grad_checkpointing(name, features_only):
    """Blocks run again in the backward pass, and nothing changes: outputs and gradients equal."""
    results, calls = [], []
    for enable in (False, True):
        torch.manual_seed(0)
        model = create(name, features_only=features_only).train()
        model.set_grad_checkpointing(enable)
        counted = []
        block = model.get_submodule('stages_1.blocks.0' if features_only else 'stages.0.blocks.0')
        block.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        outputs = model(image())
        outputs = outputs if features_only else [outputs]
        sum(output.square().mean() for output in outputs).backward()
        calls.append(len(counted))
        results.append([output.detach() for output in outputs] + [
            p.grad for p in model.parameters() if p.grad is not None])
    assert calls == [1, 2]
    assert len(results[0]) > 10
    assert_equal(*results)


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_checkpointing_remembers_the_implementation(name):
    """A block is computed again as it was, though what was forced then no longer is, and in another thread."""
    model = timm.create_model(name)
    model.set_grad_checkpointing()
    with timm_ls.attention_implementation('masked'), timm_ls.linear_implementation('onednn'):
        loss = model(image()).sum()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(loss.backward).result()
    expected = timm.create_model(name)
    expected.load_state_dict(model.state_dict())
    expected(image()).sum().backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert len(grads) > 10
    for key, p in expected.named_parameters():
        if key in grads and 'dynamic_projection.bias' not in key:  # whose gradient is zero
            torch.testing.assert_close(grads[key], p.grad, rtol=0, atol=1e-4 * p.grad.abs().max().item())


@every_kind
def test_norm_layer_keeps_its_eps(name):
    """The family's own is for those that bring none."""
    own = {module.eps for module in create(name).modules() if isinstance(module, torch.nn.LayerNorm)}
    given = partial(torch.nn.LayerNorm, eps=1e-3)
    model = create(name, norm_layer=given)
    assert {model.norm.eps, model.stages[0].embed.norm.eps, model.stages[0].blocks[0].norm1.eps} == {1e-3}
    assert 1e-3 not in own and create(name, norm_layer=torch.nn.LayerNorm).norm.eps == create(name).norm.eps


@every_kind
def test_refusals_change_nothing(name):
    """A pooling or a size that does not exist: an error that says so, and the model as it was."""
    model = create(name, num_classes=10)
    with pytest.raises(ValueError, match="Unknown global_pool='nonsense'"):
        model.reset_classifier(7, 'nonsense')
    assert model.num_classes == 10 == model.head.out_features and model.global_pool == 'avg'
    for size in (0, (3, 224, 224), (64, -1)):
        with pytest.raises(ValueError, match='expected a side, or height and width, in pixels'):
            model.set_input_size(size)
    assert not model.load_state_dict({}, strict=False).unexpected_keys  # as torch does
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({})


@every_kind
def test_initial_scale(name):
    """Matrices and position biases start as released, with a standard deviation of 0.02."""
    torch.manual_seed(0)
    for key, value in create(name).named_parameters():
        if value.numel() > 500 and (value.ndim == 2 or '.rel_pos.' in key):  # fewer draws tell little
            assert value.std().item() == pytest.approx(.02, rel=.15), key


@every_kind
@pytest.mark.parametrize('by', ['argument', 'context'])
def test_meta_construction_and_initialisation(name, by):
    """Built without memory, then filled: statistics of a fresh model, whichever of the two methods fills."""
    torch.manual_seed(0)
    fresh = create(name)
    for initialise in ('init_weights', 'reset_parameters'):
        if by == 'argument':
            model = create(name, device='meta', dtype=torch.float64)
            assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
        else:
            with torch.device('meta'):
                model = create(name)
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        model.to_empty(device='cpu')
        for tensor in model.state_dict().values():
            tensor.fill_(float('nan') if tensor.is_floating_point() else -1)
        getattr(model, initialise)()
        for (key, value), expected in zip(model.state_dict().items(), fresh.state_dict().values()):
            value = value.float() if value.is_floating_point() else value
            if expected.numel() > 1 and expected.float().std() == 0:
                assert torch.equal(value, expected), key
            elif expected.numel() < 32:  # too few draws for statistics; counters and biases
                assert value.isfinite().all() and value.abs().max() < .2, key
            else:
                # standard errors of mean and deviation of that many draws
                error = 6 * expected.std() * expected.numel() ** -.5
                assert (value.mean() - expected.mean()).abs() < 1.5 * error, key
                assert (value.std() - expected.std()).abs() < 1.5 * error, key
        assert model.float().eval()(image()).isfinite().all()
    for assign in (False, True):
        with torch.device('meta'):
            transplanted = create(name)
        if not assign:
            transplanted.to_empty(device='cpu')
        transplanted.load_state_dict(fresh.state_dict(), assign=assign)
        assert not any(tensor.is_meta for tensor in transplanted.state_dict().values())
        assert torch.equal(transplanted.eval()(image()), fresh.eval()(image()))


@every_kind
@pytest.mark.parametrize('in_chans', [1, 4])
@pytest.mark.parametrize('num_classes', [0, 10])
def test_other_channels_and_classes(tmp_path, name, in_chans, num_classes):
    """Weights of 3 channels and other classes adapt: the first layer as timm converts it, the head new or gone."""
    source = create(name, num_classes=5)
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    cfg = dict(file=str(tmp_path / 'weights.pth'), num_classes=5)
    model = create(name, pretrained=True, pretrained_cfg_overlay=cfg, in_chans=in_chans, num_classes=num_classes).eval()
    first = source.get_submodule('stages.0.embed.proj').weight
    expected = timm.models.adapt_input_conv(in_chans, first)
    torch.testing.assert_close(model.get_submodule('stages.0.embed.proj').weight, expected)
    for key, value in source.state_dict().items():
        if not key.startswith(('head', 'stages.0.embed.proj.weight')):
            assert torch.equal(model.state_dict()[key], value), key
    assert model(image(in_chans=in_chans)).shape == (2, num_classes or model.num_features)
    features = create(name, pretrained=True, pretrained_cfg_overlay=cfg, in_chans=in_chans, features_only=True)
    assert len(features(image(in_chans=in_chans))) == len(model.feature_info)


@every_kind
def test_set_input_size(name):
    """A resized model equals one made for that size with the same weights, frozen or not, in any dtype."""
    model = create(name, num_classes=5).eval()
    weights = copy.deepcopy(model.state_dict())
    model.requires_grad_(False).to(torch.bfloat16)
    model.set_input_size((96, 160))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert not any(tensor.requires_grad for tensor in model.parameters())
    made = create(name, num_classes=5, img_size=(96, 160)).eval()
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()}
    made.load_state_dict(made.convert_state_dict(weights))  # resizes tables
    model = create(name, num_classes=5).eval()
    model.load_state_dict(weights)
    model.set_input_size(img_size=(96, 160))
    torch.testing.assert_close(model(image(size=(96, 160))), made(image(size=(96, 160))), rtol=1e-5, atol=1e-5)
    assert timm.models.get_model_input_config(model)['input_size'] == (3, 96, 160)
    model.set_input_size(128)
    assert timm.models.get_model_input_config(model)['input_size'] == (3, 128, 128)


@every_kind
def test_copies(name):
    """Deep copies and pickles compute the same and share nothing."""
    model = create(name).eval()
    x = image()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), expected)
        torch.nn.init.zeros_(other.norm.weight)
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated')
@every_kind
def test_dynamic_quantization(tmp_path, name):
    """Quantized, saved, and loaded into a model that is quantized in its turn: the same, bit by bit."""
    model = create(name).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    torch.save(quantized.state_dict(), tmp_path / 'quantized.pth')
    weights = torch.load(tmp_path / 'quantized.pth')
    assert any(not isinstance(value, torch.Tensor) for value in weights.values())
    restored = torch.ao.quantization.quantize_dynamic(create(name).eval(), {torch.nn.Linear})
    x = image()
    assert not torch.equal(restored(x), quantized(x))
    restored.load_state_dict(weights)
    assert torch.equal(restored(x), quantized(x))
    expected = model(x)
    assert 0 < (quantized(x) - expected).abs().max() < .1 * expected.abs().max()


@every_kind
@pytest.mark.parametrize('change', ['nothing', 'classifier', 'size'])
def test_save_for_hf(tmp_path, name, change):
    """A folder saved for the hub holds the model as it is now, bit by bit, at the size and with the head it has."""
    model = create(name, num_classes=7, in_chans=4).eval()
    if change == 'classifier':
        model.reset_classifier(3, 'max')
    elif change == 'size':
        model.set_input_size((64, 96))
    save_for_hf(model, tmp_path, safe_serialization=True)
    restored = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert same_weights(restored, model)
    assert (restored.global_pool, restored.num_classes) == (model.global_pool, model.num_classes)
    x = image(in_chans=4, size=(64, 96))
    assert torch.equal(restored(x), model(x))
    sizes = [timm.models.get_model_input_config(m)['input_size'] for m in (restored, model)]
    assert sizes[0] == sizes[1] and (change != 'size' or sizes[0] == (4, 64, 96))


@every_kind
def test_change_of_type_after_a_forward(name):
    """Nothing computed earlier is kept: bfloat16 in, bfloat16 out, and back."""
    model = create(name).eval()
    expected = model(image())
    model.to(torch.bfloat16)
    output = model(image().to(torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert {level.dtype for level in model.forward_intermediates(image().to(torch.bfloat16))[1]} == {torch.bfloat16}
    assert (output.float() - expected).abs().max() < .1 * expected.abs().max()
    assert model.float()(image()).dtype == torch.float32


def outputs_and_gradients(model, x, dtype=None, autocast=True):
    """Logits, then every gradient, of a loss that weighs the classes differently."""
    model.zero_grad()
    if dtype is not None and not autocast:
        model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    with torch.autocast('cpu', dtype, enabled=dtype is not None and autocast):
        logits = model(x)
    (logits.float() * torch.linspace(-1, 1, logits.shape[1])).sum().backward()
    return [logits.detach().float()] + [p.grad.float() for p in model.parameters()]


def error(results, expected):
    """Root mean square difference of the logits, and of the gradients, against their size."""
    parts = []
    for part in (slice(0, 1), slice(1, None)):
        difference = sum((r - e).square().sum() for r, e in zip(results[part], expected[part]))
        parts.append((difference / sum(e.square().sum() for e in expected[part])).sqrt().item())
    return parts


@every_kind
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('autocast', [True, False])
def test_half_precision(name, dtype, autocast):
    """Finite, and no more than twice as far from float32 as the plain path, by one mask and no fused kernel."""
    torch.manual_seed(0)
    model = create(name, num_classes=10).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # so large that what attention adds counts
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -.5)
    x = image()
    expected = outputs_and_gradients(model, x)
    results = outputs_and_gradients(model, x, dtype, autocast)
    assert all(result.isfinite().all() for result in results)
    assert not torch.equal(results[0], expected[0])
    for module in model.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
    with timm_ls.attention_implementation('masked'):
        plain = outputs_and_gradients(model, x, dtype, autocast)
    for ours, theirs in zip(error(results, expected), error(plain, expected)):
        print(f'{name} {dtype} autocast={autocast}: {ours:.1e}, plain path {theirs:.1e}')
        assert ours <= 2 * theirs


def test_small_models_are_of_the_same_kind():
    """The stand-ins used here differ from the models in width and depth only."""
    for name in NAMES:
        model, small = timm.create_model(name, device='meta'), create(name, device='meta')
        assert model.attn_types == small.attn_types
        for i in range(len(model.stages)):
            attn, small_attn = model.stages[i].blocks[0].attn, small.stages[i].blocks[0].attn
            assert type(attn) is type(small_attn)
            assert getattr(attn, 'window_size', None) == getattr(small_attn, 'window_size', None)
        assert small_args(name).keys() == {'embed_dims', 'depths', 'num_heads'}
    kinds = one_of_each_kind()
    assert {'vil_ls_medium_384', 'test_vil_ls', 'test_cvt_ls'} < set(kinds) and len(kinds) == 6
