"""The ViL-LS family: exact to the released models, at any size, from any of their checkpoint files."""
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.fx
from golden_fill import fill, image, load_case
from macs import macs_by_hand
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import timm_ls
from timm_ls.attention.rel_pos import resize_bias_table
from timm_ls.complexity import count_macs, count_parameters
from timm_ls.pretrained.checkpoint import unwrap_state_dict
from timm_ls.vil_ls import RELEASED_ATTENTION_NAMES, RELEASED_MLP_NAMES, RELEASED_STAGE_NAMES, rename_released

NAMES = timm.list_models('vil_ls*')
# released parameters, and the bias rows that the dense window tables add: (offsets - aliased rows) * heads, per block
PARAMETERS = {
    'vil_ls_tiny': (6_721_078, (361 - 253) * (1 + 3)),
    'vil_ls_small': (24_666_529, (361 - 253) * (3 + 2 * 3)),
    'vil_ls_medium': (39_799_423, (361 - 253) * (3 + 4 * 3)),
    'vil_ls_base': (55_834_363, (361 - 253) * (3 + 8 * 3)),
    'vil_ls_medium_384': (39_947_653, (529 - 375) * (3 + 4 * 3)),
}
SMALL = dict(embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), num_classes=10)


@pytest.fixture(scope='module')
def tiny_checkpoint(tmp_path_factory):
    """The authors' format: wrapped, with buffers that are to be dropped."""
    _, weights, _ = load_case('vil_ls_tiny_224')
    buffers = {'layer1.1.attn.relative_position_index': torch.zeros(49, 169, dtype=torch.long)}
    path = tmp_path_factory.mktemp('released') / 'model_best.pth'
    torch.save({'net': dict(weights, **buffers), 'optimizer': {'state': {}}, 'epoch': 300}, path)
    return path


def small_model(**kwargs):
    """A small model whose parameters all matter."""
    torch.manual_seed(0)
    model = timm.create_model('vil_ls_tiny', **dict(SMALL, **kwargs))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(torch.from_numpy(np.asarray(fill(name, tuple(parameter.shape)))))
    return model.eval()


def difference(actual, expected):
    return abs(actual.detach().numpy() - expected).max() / abs(expected).max()


@pytest.mark.parametrize('case, name, kwargs', [
    ('vil_ls_tiny_224', 'vil_ls_tiny', {}),
    ('vil_ls_medium_224', 'vil_ls_medium', {}),
    ('vil_ls_tiny_allls_448', 'vil_ls_tiny_hires', dict(
        depths=(1, 1, 2, 1), num_global_tokens=(1, 1, 1, 1), global_pool='token')),
])
def test_released_outputs(tmp_path, case, name, kwargs):
    """Logits, maps and class tokens of every stage, through the authors' checkpoint format."""
    meta, weights, vectors = load_case(case)
    torch.save({'net': {f'module.{name}': value for name, value in weights.items()}}, tmp_path / 'model_best.pth')
    model = timm.create_model(name, checkpoint_path=tmp_path / 'model_best.pth', **kwargs).eval()

    tokens = {}
    for i, stage in enumerate(model.stages):
        if stage.num_global_tokens > 0:
            stage.blocks[-1].register_forward_hook(
                lambda _, __, out, i=i: tokens.update({f'stage{i + 1}_cls': out[:, :1]}))
    x = torch.from_numpy(image(meta['input']['seed'], tuple(meta['input']['shape'])))
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        results = {'logits': model.forward_head(features)}
    for i, level in enumerate(maps):
        results[f'stage{i + 1}'] = level[0, :8]
        results[f'stage{i + 1}_mean_std'] = torch.stack([level.mean(), level.std()])
    for key, value in tokens.items():
        results[key], results[f'{key}_mean_std'] = value[0, 0], torch.stack([value.mean(), value.std()])

    errors = {key: difference(results[key].reshape(vectors[key].shape), vectors[key]) for key in vectors.files}
    print(case, {key: f'{error:.1e}' for key, error in errors.items()})
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize('name', PARAMETERS)
def test_parameter_counts(name):
    """The released models' parameters, plus the rows of the dense window tables."""
    released, added = PARAMETERS[name]
    assert count_parameters(timm.create_model(name, device='meta')) == released + added


@pytest.mark.parametrize('name, size, gmacs', [
    ('vil_ls_medium', 224, 8.72), ('vil_ls_base', 224, 13.39), ('vil_ls_medium_384', 384, 28.74),
    ('vil_ls_small_hires', 448, None)])
def test_macs(name, size, gmacs):
    """Counted to the last one; with whole windows, as the authors count, those that were published."""
    model = timm.create_model(name, device='meta')
    assert count_macs(model, size) == macs_by_hand(model, size)
    assert gmacs is None or macs_by_hand(model, size, whole_windows=True) / 1e9 == pytest.approx(gmacs, rel=.01)


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
def test_macs_of_whole_windows(name):
    """What the masked form computes, at a size that windows do not divide."""
    model = timm.create_model(name, device='meta').eval()
    counter = FlopCounterMode(display=False)
    with timm_ls.attention_implementation('masked'), counter:
        model(torch.zeros(1, 3, 160, 160, device='meta'))
    assert counter.get_total_flops() == 2 * macs_by_hand(model, 160, whole_windows=True)


def test_macs_of_other_channels():
    """Three channels more cost three more in the first convolution: 4 x 4 pixels to 32 channels, 24 x 24 times."""
    one, four = (count_macs(timm.create_model('test_vil_ls', in_chans=n, device='meta'), 96) for n in (1, 4))
    assert four - one == 3 * 4 * 4 * 32 * 24 * 24


def test_hires_macs_are_linear():
    """Four times the pixels cost four times as much, and more with full attention."""
    for name, least, most in (('vil_ls_tiny_hires', 4, 4.06), ('vil_ls_tiny', 4.5, 16)):
        model = timm.create_model(name, device='meta')
        # above 4: fewer windows lie at the border
        assert least < count_macs(model, 896) / count_macs(model, 448) < most


def test_key_map_is_one_to_one():
    """Every parameter has one name in each world, and a name of neither is left alone."""
    names = {}
    for released, ours in RELEASED_STAGE_NAMES.items():
        names[f'layer2.0.{released}'] = f'stages.1.{ours}'
    for released, ours in RELEASED_ATTENTION_NAMES.items():
        names[f'layer2.5.{released}'] = f'stages.1.blocks.2.{ours}'
    for released, ours in RELEASED_MLP_NAMES.items():
        names[f'layer2.6.{released}'] = f'stages.1.blocks.2.{ours}'
    for released, ours in names.items():
        assert rename_released(released) == ours
        assert rename_released(f'{released}.weight') == f'{ours}.weight'
    assert len(set(names.values())) == len(names)
    for name in ('head.weight', 'norm.bias', 'layer1.1.attn.other.weight', 'stages.0.embed.proj.weight'):
        assert rename_released(name) == name


@pytest.mark.parametrize('form', ['net', 'bare', 'module', 'state_dict', 'own', 'safetensors', 'own safetensors'])
def test_checkpoint_forms(tmp_path, tiny_checkpoint, form):
    """All forms of the same weights give the same model."""
    expected = timm.create_model('vil_ls_tiny', checkpoint_path=tiny_checkpoint).state_dict()
    released = torch.load(tiny_checkpoint)['net']
    path = tmp_path / ('model.safetensors' if 'safetensors' in form else 'model_best.pth')
    if form == 'safetensors':
        save_file(released, path)
    elif form == 'own safetensors':
        save_file(expected, path)
    else:
        torch.save({
            'net': {'net': released},
            'bare': released,
            'module': {'net': {f'module.{name}': value for name, value in released.items()}},
            'state_dict': {'state_dict': released},
            'own': expected,
        }[form], path)
    for model in (
            timm.create_model('vil_ls_tiny', checkpoint_path=path),
            timm.create_model('vil_ls_tiny', pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
    ):
        weights = model.state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_unwrapped_weights():
    """As timm does: averaged weights rather than raw ones, and names without the prefixes of wrappers."""
    raw, averaged = {'w': torch.zeros(1)}, {'w': torch.ones(1)}
    for key in ('state_dict', 'model'):
        assert unwrap_state_dict({key: raw, f'{key}_ema': averaged}) == averaged
    assert unwrap_state_dict({'_orig_mod.module.w': raw['w']}) == raw


def test_bias_tables_follow_the_grid(tiny_checkpoint):
    """Weights of a 224 model in one for 320 x 448: tables resized, everything else as it was, and back to the same."""
    native = timm.create_model('vil_ls_tiny', checkpoint_path=tiny_checkpoint)
    other = timm.create_model('vil_ls_tiny', checkpoint_path=tiny_checkpoint, img_size=(320, 448))
    resized = 0
    for (name, ours), theirs in zip(native.state_dict().items(), other.state_dict().values()):
        if ours.shape != theirs.shape:
            assert '.rel_pos.table' in name and name.startswith(('stages.2', 'stages.3'))
            assert theirs.shape[1:] == ((39, 55) if name.startswith('stages.2') else (19, 27))
            resized += 1
        else:
            assert torch.equal(ours, theirs)
    assert resized == 10
    native.set_input_size((320, 448))
    for ours, theirs in zip(native.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)


def test_resized_on_the_way_equals_resized_before():
    """A model runs another size with the tables that it would be given for that size; at its own, untouched."""
    model = small_model()
    x = torch.from_numpy(image(0, (1, 3, 160, 256)))
    on_the_way = model(x)
    model.set_input_size((160, 256))
    torch.testing.assert_close(model(x), on_the_way, rtol=0, atol=1e-6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_input_size((160, 256))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize('attn_types', [('ls',) * 4, ('ls', 'ls', 'full', 'full'), ('full', 'ls', 'full', 'ls')])
@pytest.mark.parametrize('size', [(32, 32), (33, 47), (64, 224), (101, 67), (160, 96)])
def test_any_size(attn_types, size):
    """Sizes that nothing divides: levels of ceil(n / stride), both implementations alike, batch equal to single."""
    model = small_model(attn_types=attn_types)
    x = torch.from_numpy(image(1, (3, 3, *size)))
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        logits = model(x)
        with timm_ls.attention_implementation('masked'):
            masked = model(x)
        alone = torch.cat([model(x[b:b + 1]) for b in range(3)])
    for level, stride in zip(maps, (4, 8, 16, 32)):
        assert level.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))
    assert torch.equal(model.forward_head(features), logits)
    scale = logits.abs().max()
    assert (masked - logits).abs().max() < 1e-5 * scale
    assert (alone - logits).abs().max() < 1e-5 * scale


@pytest.mark.parametrize('implementation', ['tiled', 'masked'])
def test_empty_batch(implementation):
    """No images give no logits, and a backward pass."""
    model = small_model()
    x = torch.zeros(0, 3, 64, 96, requires_grad=True)
    with timm_ls.attention_implementation(implementation):
        logits = model(x)
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert x.grad.shape == x.shape


def test_padding_of_the_image_is_zeros():
    """An image whose sides the stride does not divide gives what it gives with zeros at the right and the bottom."""
    model = small_model()
    x = torch.from_numpy(image(2, (1, 3, 61, 45)))
    padded = torch.nn.functional.pad(x, (0, 3, 0, 3))
    assert torch.equal(model.stages[0](x), model.stages[0](padded))
    around = torch.full((1, 3, 80, 80), float('nan'))
    around[..., 5:66, 7:52] = x
    assert torch.equal(model(around[..., 5:66, 7:52]), model(x))


def test_training_reaches_every_parameter():
    """A step at a size that nothing divides gives each parameter a finite gradient."""
    model = small_model(drop_path_rate=.2, proj_drop_rate=.1, pos_drop_rate=.1, drop_rate=.1).train()
    torch.manual_seed(0)
    model(torch.from_numpy(image(3, (4, 3, 77, 110)))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_drop_path_drops_an_image_as_a_whole():
    """A block skips a branch for the map and the class token of an image alike."""
    block = small_model(drop_path_rate=.5, num_global_tokens=(1, 1, 1, 1)).stages[3].blocks[0].train()
    x = torch.randn(1, 1 + 2 * 2, 128).expand(64, -1, -1)
    with torch.no_grad():
        attention = block.attn(block.norm1(x[:1]), (2, 2))
        first = [x[:1], x[:1] + 2 * attention]  # a branch counts twice where it is not skipped
        expected = torch.cat([y + factor * block.mlp(block.norm2(y)) for y in first for factor in (0, 2)])
        torch.manual_seed(0)
        out = block(x, (2, 2))
    distance = (out[:, None] - expected).abs().amax((2, 3))
    assert (distance.amin(1) < 1e-4).all() and set(distance.argmin(1).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize('make, error, message', [
    (lambda: small_model()(torch.zeros(1, 3, 31, 64)), ValueError, 'at least 32 x 32 pixels, got 31 x 64'),
    (lambda: small_model()(torch.zeros(1, 3, 64, 31)), ValueError, 'at least 32 x 32 pixels, got 64 x 31'),
    (lambda: small_model()(torch.zeros(1, 1, 64, 64)), RuntimeError, 'to have 3 channels, but got 1 channels'),
    (lambda: small_model()(torch.zeros(3, 64, 64)), ValueError, r'got \[3, 64, 64\]'),
    (lambda: small_model(num_heads=(1, 2, 5, 4)), ValueError, 'dim=96 is not divisible by num_heads=5'),
    (lambda: small_model(attn_types=('ls', 'ls', 'ls', 'window')), ValueError, "attention 'window'.*'ls' or 'full'"),
    (lambda: small_model(attn_types=('ls',) * 3), ValueError, 'has 3 entries, but embed_dims has 4 stages'),
    (lambda: small_model(global_pool='token'), ValueError, "global_pool='token': this model has 'avg', 'max'"),
    (lambda: small_model(windows=7), TypeError, 'windows'),
])
def test_bad_input(make, error, message):
    """What was given and what is expected."""
    with pytest.raises(error, match=message):
        make()


def test_wrong_architecture(tiny_checkpoint):
    """One error that counts and names the first differences."""
    with pytest.raises(RuntimeError, match='does not fit VilLs') as error:
        timm.create_model('vil_ls_small', checkpoint_path=tiny_checkpoint)
    assert 'stages.0.embed.proj.weight (48, 3, 4, 4) instead of (96, 3, 4, 4)' in str(error.value)
    assert '19 missing: stages.1.blocks.1.norm1.weight' in str(error.value)
    assert len(str(error.value)) < 1500
    with pytest.raises(RuntimeError, match='not part of the model: .*norm_kv|missing: .*norm_kv'):
        timm.create_model('vil_ls_tiny_hires', checkpoint_path=tiny_checkpoint)


@pytest.mark.parametrize('damage, message', [
    (lambda data: data[:len(data) // 2], 'Could not read .*expected a complete'),
    (lambda data: b'', r'Could not read .*\(0 bytes\)'),
    (lambda data: b'<html>404</html>' * 100, 'Could not read'),
    (lambda data: data[:1000] + bytes(1000) + data[2000:], 'Could not read|Expected a dictionary'),
])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_damaged_files(tmp_path, tiny_checkpoint, damage, message, suffix):
    """A file that is cut short, empty, or something else: an error with its name, and the model as it was."""
    model = small_model()
    source = tmp_path / f'whole{suffix}'
    if suffix == '.pth':
        source.write_bytes(tiny_checkpoint.read_bytes())
    else:
        save_file(torch.load(tiny_checkpoint)['net'], source)
    path = tmp_path / f'damaged{suffix}'
    path.write_bytes(damage(source.read_bytes()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message) as error:
        timm_ls.load_checkpoint(model, path)
    assert path.name in str(error.value) or 'Expected' in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_checkpoint_of_timms_train_script(tmp_path):
    """It holds options in an `argparse.Namespace` beside the weights."""
    weights = small_model().state_dict()
    torch.save(dict(state_dict=weights, args=Namespace(lr=.1, model='x'), epoch=3), tmp_path / 'last.pth.tar')
    model = small_model()
    torch.nn.init.ones_(model.head.weight)
    timm_ls.load_checkpoint(model, tmp_path / 'last.pth.tar')
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_other_things_than_weights(tmp_path):
    """A missing file, a pickle with code in it, a dictionary of something else."""
    model = small_model()
    with pytest.raises(FileNotFoundError, match='nothing.pth'):
        timm_ls.load_checkpoint(model, tmp_path / 'nothing.pth')

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'canary',))

    torch.save({'net': Code()}, tmp_path / 'code.pth')
    with pytest.raises(RuntimeError, match='Could not read .*code.pth'):
        timm_ls.load_checkpoint(model, tmp_path / 'code.pth')
    assert not (tmp_path / 'canary').exists()
    for content, message in (
            ({'epoch': 3}, "from parameter names to tensors, got 'epoch': int"), ({}, 'holds no weights'),
            ([1, 2], 'Expected a dictionary of weights in the checkpoint, got list')):
        torch.save(content, tmp_path / 'other.pth')
        with pytest.raises(RuntimeError, match=f'other.pth: .*{message}'):
            timm_ls.load_checkpoint(model, tmp_path / 'other.pth')


def test_only_foreign_weights_are_converted():
    """What is not the authors' is torch's business: its errors, its report, its ways of loading, strict or not."""
    model = small_model()
    with pytest.raises(RuntimeError, match=r'Error\(s\) in loading state_dict for VilLs(.|\n)*Unexpected.*"epoch"'):
        model.load_state_dict({'epoch': 3})
    with pytest.raises(RuntimeError, match='Missing key'):
        model.load_state_dict({})
    report = model.load_state_dict({'head.weight': torch.ones(10, 128), 'x': 1}, strict=False)
    assert report.unexpected_keys == ['x'] and 'head.weight' not in report.missing_keys
    assert (model.head.weight == 1).all()
    ours = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(ours, assign=True)
    assert all(p.data_ptr() == ours[name].data_ptr() for name, p in model.named_parameters())
    with pytest.raises(RuntimeError, match=r'size mismatch for stages.2.blocks.0.attn.rel_pos.table.*\[2, 27, 27\]'):
        model.load_state_dict({**ours, 'stages.2.blocks.0.attn.rel_pos.table': torch.zeros(2, 27, 27)})


def test_tables_of_another_grid_are_resized():
    """By `load_state_dict` too, and nothing else is touched: timm's `--initial-checkpoint` goes this way."""
    model, other = small_model(img_size=64), small_model(img_size=(96, 160))
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    given = dict(weights)
    other.load_state_dict(weights)
    assert all(weights[name] is value for name, value in given.items())
    for name, value in other.state_dict().items():
        if name.startswith(('stages.2', 'stages.3')) and name.endswith('.rel_pos.table'):
            assert value.shape != weights[name].shape
            torch.testing.assert_close(value, resize_bias_table(weights[name], tuple(value.shape[1:])))
        else:
            assert torch.equal(value, weights[name]), name


def test_registry():
    """All names are there, under this module, and none of timm's own is taken."""
    assert NAMES == sorted(
        [f'vil_ls_{size}{suffix}' for size in ('tiny', 'small', 'medium', 'base') for suffix in ('', '_hires')]
        + ['vil_ls_medium_384'])
    assert set(NAMES) <= set(timm.list_models(module='vil_ls'))
    assert type(timm.create_model('vil_ls_tiny', device='meta')) is timm_ls.VilLs


def test_script_and_fx_without_gradients():
    """Captured graphs see maps whole, and give the same."""
    model = timm.create_model('vil_ls_tiny_hires', **SMALL).eval()
    x = torch.randn(1, 3, 64, 40)
    with torch.no_grad():
        expected = model(x)
        for captured in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
            torch.testing.assert_close(captured(x), expected, rtol=0, atol=1e-5)
