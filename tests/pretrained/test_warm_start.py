"""Warm starts: what is taken and what is not, by name, and how close features come to those of the source model."""
from functools import cache

import numpy as np
import pytest
import reference_vil
import timm
import torch
from golden_fill import image, load_case
from reference_cvt import hugging_face_names

from timm_ls import warm_start
from timm_ls.cvt_ls import PLAIN_CVT


@cache
def cvt_weights():
    """CvT-13 filled by name."""
    return load_case('cvt_13_224')[1]


@cache
def vil_weights():
    """Plain ViL-small filled by name; the class token's projections are those that it shares with the patches."""
    weights = load_case('vil_small_224_names')[1]
    return {name: weights[name.replace('_global.', '.')] for name in weights}


def features(model, x):
    with torch.no_grad():
        return model.eval().forward_intermediates(x, intermediates_only=True)


def correlations(maps, others):
    return [np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1] for a, b in zip(maps, others, strict=True)]


def test_cvt_ls_from_cvt(tmp_path):
    """cvt_ls_13 from CvT-13: everything but the long-short layers; features like the source's, unlike a fresh model's.

    Reached: correlation 0.94, 0.89, 0.93 for the three stages; a fresh model's is below 0.05 in size.
    """
    weights = cvt_weights()
    x = torch.from_numpy(image(11, (1, 3, 224, 224)))
    source = timm.create_model('cvt_ls_13', **PLAIN_CVT)
    source.load_state_dict(weights)
    torch.manual_seed(0)
    model = timm.create_model('cvt_ls_13')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = features(source, x)
    random = correlations(features(model, x), expected)

    path = tmp_path / 'CvT-13-224x224-IN-1k.pth'
    torch.save(weights, path)
    report = warm_start(model, path)
    after = model.state_dict()
    warm = correlations(features(model, x), expected)
    print(report)
    print('random', np.round(random, 3), 'warm', np.round(warm, 3))
    assert min(warm) > .85
    assert np.abs(random).max() < .1

    assert report.source == 'CvT'
    assert report.unused == ('stage2.cls_token',)
    assert set(report.taken) | set(report.adapted) | set(report.fresh) == set(before)
    assert len(report.taken) + len(report.adapted) + len(report.fresh) == len(before)
    assert report.num_taken + report.num_fresh == sum(value.numel() for value in before.values())
    assert {name.split('.attn.')[1].split('.')[0] for name in report.fresh} == {
        'norm_kv', 'dynamic_projection', 'norm_landmarks'}
    for name in report.fresh:
        assert torch.equal(after[name], before[name]), name
    prefix = 'stages.1.blocks.1.attn.conv_qkv'
    for index, part in enumerate('qkv'):
        theirs = f'stage1.blocks.1.attn.conv_proj_{part}'
        assert torch.equal(after[f'{prefix}.depthwise.conv.weight'][index::3], weights[f'{theirs}.conv.weight'])
        for ours, bn in (('weight', 'weight'), ('bias', 'bias'), ('running_mean', 'running_mean')):
            assert torch.equal(after[f'{prefix}.depthwise.norm.{ours}'][index::3], weights[f'{theirs}.bn.{bn}'])
    assert torch.equal(after[f'{prefix}.k.weight'], weights['stage1.blocks.1.attn.proj_k.weight'])
    queries = weights['stage1.blocks.1.attn.proj_q.weight']
    assert torch.allclose(after[f'{prefix}.q.weight'] * 3 ** .5, queries)  # 3 heads
    assert set(report.adapted) == {name for name in after if '.conv_qkv.q.' in name and 'stages.0.' not in name}
    assert torch.equal(after['head.weight'], weights['head.weight'])

    same = timm.create_model('cvt_ls_13')
    assert warm_start(same, hugging_face_names(weights)).unused == ('cvt.encoder.stages.2.cls_token',)
    for name in (*report.taken, *report.adapted):
        assert torch.equal(same.state_dict()[name], after[name]) or name.endswith('num_batches_tracked'), name


def test_cvt_ls_with_the_logits_of_cvt():
    """Queries are scaled for another scale of logits only: divided by sqrt(channels), as in CvT, they are taken."""
    model = timm.create_model('cvt_ls_13', attn_scale='dim')
    assert not warm_start(model, cvt_weights()).adapted
    queries = model.stages[1].blocks[1].attn.conv_qkv.q.weight
    assert torch.equal(queries, cvt_weights()['stage1.blocks.1.attn.proj_q.weight'])


def test_cvt_ls_from_cvt_with_other_classes():
    model = timm.create_model('cvt_ls_13', num_classes=7, num_global_tokens=(0, 0, 1), global_pool='token')
    report = warm_start(model, cvt_weights())
    assert {'head.weight', 'head.bias'} <= set(report.fresh)
    assert set(report.unused) == {'head.weight', 'head.bias'}
    assert 'stages.2.global_tokens' in report.taken


def test_vil_ls_from_vil():
    """vil_ls_small from plain ViL-small: projections joined, window offsets in common, features like the source's.

    The source is a reading of the released layers (`reference_vil`), with weights filled by name. Reached: correlation
    0.99 for each of the four stages; a fresh model's is below 0.05 in size.
    """
    weights = vil_weights()
    x = torch.from_numpy(image(5, (1, 3, 224, 224)))
    with torch.no_grad():
        expected = reference_vil.stages(weights, x, window=7)
    torch.manual_seed(0)
    model = timm.create_model('vil_ls_small')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = correlations(features(model, x), expected)
    report = warm_start(model, weights)
    after = model.state_dict()
    warm = correlations(features(model, x), expected)
    print(report)
    print('random', np.round(random, 3), 'warm', np.round(warm, 3))
    assert min(warm) > .95
    assert np.abs(random).max() < .1

    assert set(report.taken) | set(report.adapted) | set(report.fresh) == set(before)
    assert {name.split('.attn.')[1].split('.')[0] for name in report.fresh} == {
        'norm_kv', 'dynamic_projection', 'norm_landmarks'}
    assert {name.rsplit('.attn.', 1)[1].split('.')[0] for name in report.unused} == {
        'query_global', 'kv_global', 'proj_global', 'g2l_relative_position_bias', 'g2g_relative_position_bias'}
    assert all(name.startswith(('layer1.', 'layer2.')) for name in report.unused)

    qkv = after['stages.1.blocks.1.attn.qkv.weight']
    assert torch.equal(qkv[:192], weights['layer2.3.attn.query.weight'])
    assert torch.equal(qkv[192:], weights['layer2.3.attn.kv.weight'])
    table = after['stages.1.blocks.1.attn.rel_pos.table']
    theirs = weights['layer2.3.attn.local_relative_position_bias_table'].reshape(27, 27, 3)
    assert table.shape == (3, 19, 19)
    for dy, dx in ((0, 0), (-9, 9), (3, -5)):
        assert torch.equal(table[:, dy + 9, dx + 9], theirs[dy + 13, dx + 13])
    full = after['stages.2.blocks.3.attn.rel_pos.table']
    theirs = weights['layer3.7.attn.local_relative_position_bias_table'].reshape(27, 27, 6)
    assert torch.equal(full, theirs.permute(2, 0, 1))


def test_vil_ls_of_other_windows_from_vil():
    """Long-short attention where the source's is full, over fewer offsets: those in common, the others fresh."""
    torch.manual_seed(0)
    model = timm.create_model('vil_ls_small_hires', window_size=8)
    name = 'stages.3.blocks.0.attn.rel_pos.table'
    before = model.state_dict()[name].clone()
    weights = vil_weights()
    report = warm_start(model, weights)
    assert name in report.adapted
    table = model.state_dict()[name]  # 23 offsets, of which the source has 13
    theirs = weights['layer4.1.attn.local_relative_position_bias_table'].reshape(13, 13, 12).permute(2, 0, 1)
    assert torch.equal(table[:, 5:18, 5:18], theirs)
    assert torch.equal(table[:, :5], before[:, :5]) and torch.equal(table[:, :, 18:], before[:, :, 18:])
    assert 'offsets in common' in str(report)


def test_hires_from_vil_ls():
    """Long-short attention in all stages from weights with full attention in two, and back; features like the source's.

    Reached: stages 1 and 2 equal, correlation 0.99 for stages 3 and 4, where the landmarks are fresh.
    """
    torch.manual_seed(0)
    source, x = timm.create_model('vil_ls_tiny'), torch.from_numpy(image(5, (1, 3, 224, 224)))
    for parameter in source.parameters():
        if parameter.ndim == 2:  # of order one, so that attention is far from uniform
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -.5)
    model = timm.create_model('vil_ls_tiny_hires')
    expected, weights = features(source, x), source.state_dict()
    random = correlations(features(model, x), expected)
    report = warm_start(model, weights)
    actual, after = features(model, x), model.state_dict()
    print(report)
    print('random', np.round(random, 3), 'warm', np.round(correlations(actual, expected), 3))
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert min(correlations(actual, expected)) > .95 and np.abs(random).max() < .1
    assert report.source == 'ViL-LS' and set(report.adapted.values()) == {'offsets in common'}
    assert set(report.taken) | set(report.adapted) | set(report.fresh) == set(after)
    assert {(name.split('.')[1], name.split('.attn.')[1].split('.')[0]) for name in report.fresh} == {
        (stage, part) for stage in '23' for part in ('norm_kv', 'dynamic_projection', 'norm_landmarks')}
    name = 'stages.2.blocks.3.attn.rel_pos.table'
    assert torch.equal(after[name], weights[name][:, 4:23, 4:23])  # 19 offsets of 27
    for name in report.taken:
        assert torch.equal(after[name], weights[name]), name

    back = timm.create_model('vil_ls_tiny', img_size=256)  # windows in two stages, larger grids in the others
    report = warm_start(back, after)
    assert {name.split('.')[-1] for name in report.fresh} == {'global_patch', 'global_global'}
    assert all(f'stages.{i}.blocks.0.attn.norm_kv.weight' in report.unused for i in (2, 3))
    assert torch.equal(back.state_dict()[name], after[name])
    report = warm_start(timm.create_model('vil_ls_tiny', rank=4, img_size=256), weights)
    assert {name.split('.')[-2] for name in report.fresh} == {'dynamic_projection'}
    assert set(report.adapted.values()) == {'resized'}


def test_refusals():
    """A model or checkpoint of another family or size: an error that says which, and nothing changed."""
    with pytest.raises(RuntimeError, match='not part of the model: stages.2.blocks.2'):
        warm_start(timm.create_model('cvt_ls_13', depths=(1, 2, 2)), cvt_weights())
    model = timm.create_model('vil_ls_tiny', depths=(1, 1, 1, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match='of another shape'):
        warm_start(model, vil_weights())
    with pytest.raises(RuntimeError, match='not part of the model'):
        warm_start(model, cvt_weights())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(TypeError, match='Expected a CvtLs or VilLs model, got Linear'):
        warm_start(torch.nn.Linear(2, 2), {})
    with pytest.raises(FileNotFoundError):
        warm_start(model, 'no/such/file.pth')
