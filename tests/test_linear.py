"""Linear layers by oneDNN: the values of torch's own, in training too, and out of the way of everything else."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_models import create

import timm_ls.linear
from timm_ls import linear_implementation
from timm_ls.linear import OneDnnLinear

MODELS = ['vil_ls_small', 'vil_ls_small_hires', 'cvt_ls_13']
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='this torch has no oneDNN')


@pytest.fixture
def convolutions(monkeypatch):
    """The shapes of linear layers that were computed as convolutions."""
    shapes = []
    convolve = timm_ls.linear.convolve

    def record(x, *args):
        shapes.append(tuple(x.shape))
        return convolve(x, *args)

    monkeypatch.setattr(timm_ls.linear, 'convolve', record)
    return shapes


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def assert_close(actual, expected, tolerance=1e-5, what=''):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max() + 1e-12, what


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('shape', [(256, 96), (2, 21, 13, 96), (1, 331, 96), (3, 400, 96), (256, 80)])
@pytest.mark.parametrize('bias', [True, False])
def test_layer(shape, bias, threads):
    """Values, first and second derivatives; oneDNN really runs, with one thread too."""
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(40, shape[-1], requires_grad=True)
    b = torch.randn(40, requires_grad=True) if bias else None
    inputs = [t for t in (x, weight, b) if t is not None]

    def compute():
        y = F.linear(x, weight, b)
        grads = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        return y, *grads, *torch.autograd.grad(sum(grad.square().sum() for grad in grads), inputs)

    expected, previous = compute(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with OneDnnLinear():
            out = compute()
            with torch.profiler.profile() as profile:
                F.linear(x, weight, b)
    finally:
        torch.set_num_threads(previous)
    assert_close(out, expected)
    thin = shape == (1, 331, 96)  # a prime number: no map but a thin one, whose gradient is slow
    small = shape == (256, 80)  # a convolution of 20,480 elements is not oneDNN's
    functions = {event.key for event in profile.key_averages()}
    assert ('aten::mkldnn_convolution' in functions) != (thin or small)
    assert 'aten::conv2d' not in functions if thin or small else 'aten::linear' not in functions
    with OneDnnLinear(), torch.no_grad():
        assert_close([F.linear(x, weight, b)], expected[:1])


@pytest.mark.parametrize('name', MODELS)
def test_model(name, convolutions):
    """Logits and every gradient to 1e-5, in training, checkpointed, and in inference; the same modules."""
    model = create(name).double()  # so that what differs between the ways is rounding alone
    names = {key: type(module) for key, module in model.named_modules()}
    model = model.float()
    x = images(136, 170)

    def run():
        model.zero_grad()
        logits = model(x)
        logits.square().sum().backward()
        with torch.no_grad():
            return [logits.detach(), model(x), *(parameter.grad for parameter in model.parameters())]

    expected = run()
    assert not convolutions
    with linear_implementation('onednn'):
        for checkpointing in (False, True):
            model.set_grad_checkpointing(checkpointing)
            # the bias of a dynamic projection has no gradient but rounding
            keep = [True, True] + ['dynamic_projection.bias' not in key for key, _ in model.named_parameters()]
            pairs = [(a, e) for a, e, kept in zip(run(), expected, keep) if kept]
            assert_close(*zip(*pairs), tolerance=2e-5)
            assert convolutions
            convolutions.clear()
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    assert names == {key: type(module) for key, module in model.named_modules()}


def test_only_on_request(convolutions):
    """Nothing is measured or guessed: torch's own unless the user says so, for any model, within the context."""
    model, peer = create('vil_ls_small'), timm.create_model('test_vit', img_size=(144, 176))
    model(images(136, 170)), peer(images(144, 176))
    with linear_implementation('onednn'):
        with linear_implementation('default'):
            model(images(136, 170))
        assert not convolutions
        model(images(32, 40))  # too few tokens to gain
        assert not convolutions
        model(images(136, 170))
        assert convolutions
        convolutions.clear()
        peer(images(144, 176, batch=4))
        assert convolutions
    convolutions.clear()
    model(images(136, 170))
    assert not convolutions


@pytest.mark.parametrize('what', [
    'autocast', 'no oneDNN', 'float64', 'bfloat16', 'meta', 'less precision', 'less precision of convolutions',
    'subclass', 'sparse'])
def test_left_alone(what, convolutions):
    """What oneDNN would not compute as torch does stays with torch."""
    class Subclass(torch.Tensor):
        pass

    x, weight = torch.randn(16, 16, 96), torch.randn(40, 96)
    with OneDnnLinear():
        F.linear(x, weight)
    assert convolutions  # of these sizes
    convolutions.clear()
    context = linear_implementation('onednn')
    if what == 'autocast':
        context = torch.autocast('cpu', torch.bfloat16)
    elif what == 'no oneDNN':
        context = torch.backends.mkldnn.flags(enabled=False)
    elif what in ('float64', 'bfloat16'):
        x, weight = x.to(getattr(torch, what)), weight.to(getattr(torch, what))
    elif what == 'meta':
        x, weight = x.to('meta'), weight.to('meta')
    elif what == 'subclass':
        weight = weight.as_subclass(Subclass)
    elif what == 'sparse':
        weight = weight.to_sparse_csr()
    elif not hasattr(torch.backends.mkldnn, 'matmul'):
        pytest.skip('this torch does not tell the precision of its products')
    elif what == 'less precision':
        torch.set_float32_matmul_precision('medium')
    else:
        torch.backends.mkldnn.conv.fp32_precision = 'bf16'
    try:
        with context:
            expected = F.linear(x, weight)
            with linear_implementation('onednn'), OneDnnLinear():
                out = F.linear(x, weight)
    finally:
        torch.set_float32_matmul_precision('highest')
        if what == 'less precision of convolutions':
            torch.backends.mkldnn.conv.fp32_precision = 'none'
    assert not convolutions
    assert type(out) is type(expected) and out.dtype == expected.dtype
    assert what == 'meta' or torch.equal(out, expected)


def test_graphs_hold_linear_layers(convolutions):
    """Whatever is captured while oneDNN is forced is captured as ever."""
    model = create(
        'vil_ls_tiny', embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), patch_sizes=(4, 8),
        attn_types=('ls', 'full'), num_global_tokens=(1, 0)).eval()
    x = images(80, 72)
    with torch.no_grad():
        expected = model(x)
        with linear_implementation('onednn'):
            torch._dynamo.reset()
            graphs = {
                'script': torch.jit.script(model),
                'trace': torch.jit.trace(model, x),
                'fx': torch.fx.symbolic_trace(model),
                'compile': torch.compile(model, backend='aot_eager', fullgraph=True),
                'export': torch.export.export(model, (x,), strict=False).module(),
            }
            convolutions.clear()  # tracing checks itself against eager mode
            for kind in ('script', 'trace', 'compile', 'export'):
                assert_close([graphs[kind](x)], [expected], tolerance=3e-5, what=kind)
            assert not convolutions
        assert torch.equal(graphs['fx'](x), expected) and not convolutions  # modules in eager mode, like any other
    assert {type(module) for module in graphs['fx'].modules() if 'Linear' in type(module).__name__} == {nn.Linear}


def test_compiled_part(convolutions):
    """A compiled layer in a model in eager mode: the mode is active where it is called."""
    model = create('vil_ls_small_hires').eval()
    x = images(136, 170)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        block = model.stages[0].blocks[0]
        block.mlp = torch.compile(block.mlp, backend='aot_eager', fullgraph=True)
        with linear_implementation('onednn'):
            assert_close([model(x)], [expected])
    assert convolutions and (2, 34, 43, 64) not in convolutions


def test_replaced_layers(convolutions):
    """LoRA's layers, hooks and dynamically quantised layers keep their part; copies and pickles are as before."""
    peft = pytest.importorskip('peft', reason='peft is not installed')
    model = create('vil_ls_small').eval()
    x = images(136, 170)
    config = peft.LoraConfig(r=16, target_modules=['qkv', 'proj', 'fc1', 'fc2'], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    seen = []
    with torch.no_grad():
        expected = adapted(x)
        with linear_implementation('onednn'):
            assert_close([adapted(x)], [expected], tolerance=3e-5)
            assert any(shape[-1] == 16 for shape in convolutions)  # LoRA's own layers too
            handle = model.stages[0].blocks[0].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
            model(x)
            handle.remove()
            for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(clone(x), model(x))
    assert seen


def test_quantised_weights(convolutions):
    """torchao's int8 weights are not taken apart."""
    torchao = pytest.importorskip('torchao.quantization', reason='torchao is not installed')
    model = timm.create_model('test_vil_ls').eval()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    x = images(136, 170)
    with torch.no_grad():
        expected = model(x)
        with linear_implementation('onednn'):
            assert torch.equal(model(x), expected)
    assert not convolutions


def test_unknown_name():
    with pytest.raises(ValueError, match="'mkl': expected one of default, onednn"):
        with linear_implementation('mkl'):
            pass
