"""Explanations say what the model computes: their weights give its outputs, and rollout is a product of matrices."""
import math
import random

import pytest
import timm
import torch
from small_models import perturbed

import timm_ls
from timm_ls import LongShortAttention2d
from timm_ls.attention import FullAttention, LongShortAttention
from timm_ls.attention.full import grid_bias
from timm_ls.visualize import (
    attention_rollout,
    landmark_maps,
    plot_landmarks,
    plot_query,
    plot_rollout,
    query_attention,
)

VARIANTS = {
    'vil_ls_tiny': {},
    'vil_ls_tiny_hires': dict(global_update='keys', num_global_tokens=(2, 1, 0, 3)),
    'vil_ls_tiny no landmarks': dict(rank=0, rel_pos_bias=False),
    'cvt_ls_13': dict(num_global_tokens=(1, 0, 2)),
    'cvt_ls_13 full': timm_ls.cvt_ls.PLAIN_CVT,
    'vil_ls_tiny without blocks in a stage': dict(depths=(1, 0, 2, 1)),
}


def build(variant: str):
    return perturbed(variant.split()[0], **VARIANTS[variant])


def inputs_and_outputs(model, image):
    """What each attention layer gets, and what it hands to its last linear layer."""
    calls, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (LongShortAttention, FullAttention)):
            calls[name] = dict(layer=module)
            handles.append(module.register_forward_pre_hook(
                lambda module, args, to=calls[name]: to.update(x=args[0], size=args[1])))
            handles.append(module.proj.register_forward_pre_hook(
                lambda module, args, to=calls[name]: to.update(out=args[0])))
    with torch.no_grad():
        model(image[None])
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize('variant', ['vil_ls_tiny', 'vil_ls_tiny_hires', 'vil_ls_tiny no landmarks', 'cvt_ls_13'])
def test_weights_give_the_outputs(variant):
    """Weights of a query, times the values that they are for, are that token's output; they add up to one."""
    rng = random.Random(variant)
    model, image = build(variant), torch.randn(3, 90, 62, dtype=torch.float64)
    maps = landmark_maps(model, image)
    calls = inputs_and_outputs(model, image)
    assert list(maps) == [name for name, call in calls.items() if isinstance(call['layer'], LongShortAttention)]
    for name, landmarks in maps.items():
        layer, x, (H, W), out = (calls[name][key] for key in ('layer', 'x', 'size', 'out'))
        h, g = layer.num_heads, layer.num_global_tokens
        assert landmarks.shape == (h, layer.rank, H, W)
        torch.testing.assert_close(landmarks.sum((2, 3)), torch.ones(h, layer.rank, dtype=x.dtype))
        with torch.no_grad():
            _, kv = layer.project(x, (H, W), g)
            own = kv[0, :g, 1].unflatten(-1, (h, -1))
            values = kv[0, g:, 1].unflatten(0, (H, W)).unflatten(-1, (h, -1))
            landmark_values = torch.einsum('hrij,ijhd->rhd', landmarks, values).flatten(1)
            landmark_values = layer.norm_landmarks(landmark_values).unflatten(-1, (h, -1))
            for position in [(0, 0), (H - 1, W - 1)] + [(rng.randrange(H), rng.randrange(W)) for _ in range(3)]:
                attention = query_attention(model, image, name, position)
                total = sum(part.flatten(1).sum(1) for part in attention)
                torch.testing.assert_close(total, torch.ones_like(total))
                expected = torch.einsum('hij,ijhd->hd', attention.window, values)
                expected += torch.einsum('hr,rhd->hd', attention.landmarks, landmark_values)
                expected += torch.einsum('hg,ghd->hd', attention.global_tokens, own)
                row = g + position[0] * W + position[1]
                torch.testing.assert_close(out[0, row], expected.flatten(), rtol=0, atol=1e-10)


def attention_matrix(model, image, name, call):
    """Weights [N, N] of one layer, averaged over heads, landmarks spread over what they were distilled from."""
    layer, x, (H, W) = call['layer'], call['x'], call['size']
    if isinstance(layer, LongShortAttention):
        maps = landmark_maps(model, image)[name]
        rows = [query_attention(model, image, name, (i, j)).over_map(maps).mean(0) for i in range(H) for j in range(W)]
        return torch.stack(rows).flatten(1)
    h, s, g = layer.num_heads, layer.kv_stride, layer.num_global_tokens
    with torch.no_grad():
        q, k, _ = (part[0].unflatten(-1, (h, -1)) for part in layer.project(x, (H, W), g))
        logits = torch.einsum('qhd,khd->hqk', q[g:], k) * (layer.dim // h) ** -.5
        if layer.rel_pos is not None:
            logits += grid_bias(layer.biases((H, W)), (H, W), 0, H, s)[0, :, g:]
    weights = logits.softmax(-1)[..., g:].mean(0)  # [N, keys]
    matrix = torch.zeros(H, W, H * W, dtype=x.dtype).permute(2, 0, 1)
    matrix[:, ::s, ::s] = weights.unflatten(1, matrix[:, ::s, ::s].shape[1:])
    return matrix.flatten(1)


@pytest.mark.parametrize('variant', VARIANTS)
def test_rollout(variant):
    """The product of all attention matrices and residuals, patches shared out between stages."""
    model, image = build(variant), torch.randn(3, 42, 36, dtype=torch.float64)
    calls = inputs_and_outputs(model, image)
    relevance, grid = None, None
    for name, call in reversed(calls.items()):
        H, W = call['size']
        if relevance is None:
            relevance, grid = torch.ones(H * W, dtype=torch.float64), (H, W)
        if grid != (H, W):
            factor = math.ceil(H / grid[0])
            fine = torch.zeros(H, W, dtype=torch.float64)
            for i in range(H):
                for j in range(W):
                    fine[i, j] = relevance.reshape(grid)[i // factor, j // factor] / factor ** 2
            relevance, grid = fine.flatten(), (H, W)
        relevance = relevance @ (torch.eye(H * W) + attention_matrix(model, image, name, call)) / 2
        relevance = relevance / relevance.sum()
    actual = attention_rollout(model, image)
    assert actual.shape == grid
    torch.testing.assert_close(actual.flatten(), relevance, rtol=1e-8, atol=0)


@pytest.mark.parametrize('g', [0, 2])
def test_layers_over_maps(g):
    """A layer that is called with a map and global tokens apart, in a model of one's own, says what its twin says."""
    layer = LongShortAttention2d(8, 2, window_size=3, num_global_tokens=g, dtype=torch.float64)
    twin = LongShortAttention(8, 2, window_size=3, num_global_tokens=g, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    tokens = torch.randn(1, g, 8, dtype=torch.float64)

    class Mine(torch.nn.Module):
        def __init__(self, attn):
            super().__init__()
            self.attn = attn

        def forward(self, x):
            x = x.permute(0, 2, 3, 1)
            if self.attn is layer:
                return self.attn(x, tokens) if g > 0 else self.attn(x)
            return self.attn(torch.cat([tokens, x.flatten(1, 2)], dim=1), x.shape[1:3])

    image = torch.randn(8, 5, 7, dtype=torch.float64)
    results = [
        [*query_attention(model, image, 'attn', (4, 2)), landmark_maps(model, image)['attn']]
        for model in (Mine(layer), Mine(twin))]
    assert all(map(torch.equal, *results)) and results[0][0].shape == (2, 5, 7)


def test_leaves_no_trace():
    """The model's mode, hooks, gradients and outputs are what they were."""
    model, image = build('vil_ls_tiny').train(), torch.randn(3, 64, 64, dtype=torch.float64)
    model.stages[1].eval()
    modes = [module.training for module in model.modules()]
    landmark_maps(model, image), attention_rollout(model, image)
    with pytest.raises(ValueError, match='position'):
        query_attention(model, image, 'stages.0.blocks.0.attn', (99, 0))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize('name, kwargs', [('test_cvt_ls', {}), ('test_vil_ls', dict(attn_drop_rate=.5))])
def test_as_in_evaluation(name, kwargs):
    """Neither dropout nor the batch has a say in training mode, statistics stay, and inference mode changes nothing."""
    model, image = timm.create_model(name, pretrained=True, **kwargs).eval(), torch.randn(3, 64, 64)

    def look():
        attention = query_attention(model, image, 'stages.0.blocks.0.attn', (3, 3))
        return [attention_rollout(model, image), *attention, *landmark_maps(model, image).values()]

    expected, before = look(), {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    actual = look()
    with torch.inference_mode():
        image = image.clone()
        actual += look()
    assert len(actual) == 2 * len(expected) and all(map(torch.equal, actual, expected * 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rollout_over_patches_that_do_not_fit():
    """Patches of 4 over 5 rows and 8 columns, the last of them one row high."""
    torch.manual_seed(0)
    model = timm_ls.VilLs(
        embed_dims=(16, 16), depths=(1, 1), num_heads=(1, 1), patch_sizes=(8, 4), attn_types=('ls', 'ls'),
        num_global_tokens=(0, 0), rank=0).eval()
    for block in (model.stages[0].blocks[0], model.stages[1].blocks[0]):
        torch.nn.init.zeros_(block.attn.qkv.weight)  # each token attends to all in its halo alike
        torch.nn.init.zeros_(block.attn.rel_pos.table)
    relevance = attention_rollout(model, torch.randn(3, 40, 64))
    assert relevance.shape == (5, 8)
    # before the first stage hands back: what each of 2 x 2 patches gives to the tokens in it, all the same
    uniform = torch.ones(5, 8) / 40
    matrix = torch.zeros(40, 40)
    for i in range(40):
        row, col = divmod(i, 8)
        keys = torch.zeros(5, 8)
        left = max(0, col // 7 * 7 - 3)
        keys[:, left:min(8, col // 7 * 7 + 10)] = 1.
        matrix[i] = (keys / keys.sum()).flatten()
    expected = uniform.flatten() @ (torch.eye(40) + matrix) / 2
    torch.testing.assert_close(relevance.flatten(), expected / expected.sum())


def test_bad_input():
    """What was given, and what there is."""
    model, image = build('vil_ls_tiny'), torch.randn(3, 64, 64, dtype=torch.float64)
    with pytest.raises(ValueError, match=r'Expected one image, .* got \[2, 3, 64, 64\]'):
        landmark_maps(model, torch.stack([image, image]))
    with pytest.raises(ValueError, match="named 'stages.2.blocks.0.attn': this model has stages.0.blocks.0.attn, stag"):
        query_attention(model, image, 'stages.2.blocks.0.attn', (0, 0))  # full attention
    with pytest.raises(ValueError, match=r'position=\(0, 16\): stages.0.blocks.0.attn has a map of 16 rows and 16 col'):
        query_attention(model, image, 'stages.0.blocks.0.attn', (0, 16))
    with pytest.raises(ValueError, match='Linear has no attention of timm_ls'):
        landmark_maps(torch.nn.Linear(2, 2), image)
    with pytest.raises(ValueError, match='no landmarks: rank=0'):
        plot_landmarks(image, torch.zeros(2, 0, 8, 8))


def test_figures():
    """Each figure shows what it was given: panels, titles, the maps' own values."""
    pytest.importorskip('matplotlib').use('agg')
    model, image = build('vil_ls_tiny'), torch.rand(3, 64, 48, dtype=torch.float64)
    name = 'stages.1.blocks.0.attn'
    maps = landmark_maps(model, image)[name]
    attention = query_attention(model, image, name, (3, 2))
    figure = plot_landmarks(image, maps)
    assert len(figure.axes) == maps.shape[0] * maps.shape[1]
    assert (figure.axes[5].images[1].get_array() == maps[1, 1].numpy()).all()
    assert figure.axes[5].get_title() == 'head 1, landmark 1'
    figure = plot_query(image, attention, maps, (3, 2))
    assert (figure.axes[3].images[1].get_array() == attention.window[1].numpy()).all()
    far = attention.over_map(maps)[1] - attention.window[1]
    assert (figure.axes[4].images[1].get_array() == far.numpy()).all()
    assert figure.axes[3].lines[0].get_xydata().tolist() == [[2.5 * 48 / 6, 3.5 * 64 / 8]]
    shares = [bar.get_height() for bar in figure.axes[5].patches]
    assert shares == pytest.approx([part[1].sum().item() for part in attention])
    relevance = attention_rollout(model, image)
    figure = plot_rollout(image, relevance)
    assert (figure.axes[1].images[1].get_array() == relevance.numpy()).all()
