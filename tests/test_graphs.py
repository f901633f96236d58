"""Captured graphs: TorchScript, FX, compile, export and ONNX give the values of eager mode at many image sizes."""
from functools import partial

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.dynamic_spec import ParamsSpec, ShapesSpec, ShapeVar, TensorSpec
from torch.fx.experimental.proxy_tensor import make_fx

import timm_ls

ATOL = 2e-5  # float32 logits of order 1: a graph may only round differently
SIZES = [(64, 96), (100, 130), (224, 224), (37, 200), (512, 320)]
TINY = dict(depths=(1, 1, 1, 1), embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4), num_classes=7)
CVT = dict(depths=(1, 1, 1), embed_dims=(16, 24, 32), num_heads=(1, 2, 2), num_classes=7)
TOKEN = dict(num_global_tokens=(1, 1, 1, 1), global_pool='token')
MODELS = [
    ('vil_ls_tiny', TINY), ('vil_ls_tiny_hires', TINY), ('vil_ls_tiny_hires', dict(TINY, **TOKEN)), ('cvt_ls_13', CVT)]
# two stages of the same total stride: symbolic sizes are nested less deeply, and graphs are captured sooner
SHORT = dict(
    depths=(1, 1), embed_dims=(32, 64), num_heads=(1, 2), patch_sizes=(4, 8), num_global_tokens=(1, 0), num_classes=7)
SHORT_CVT = dict(
    depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), patch_sizes=(7, 7), patch_strides=(4, 8),
    patch_paddings=(2, 1), attn_types=('ls', 'ls'), num_global_tokens=(0, 0), num_classes=7)
# the second one holds what the first one does: that is a slow test
SHORT_MODELS = [
    pytest.param('vil_ls_tiny', dict(SHORT, attn_types=('ls', 'ls')), id='ls-ls', marks=pytest.mark.slow),
    pytest.param('vil_ls_tiny', dict(SHORT, attn_types=('ls', 'full')), id='ls-full'),
    pytest.param('cvt_ls_13', SHORT_CVT, id='cvt'),
]
# two long-short blocks in a stage, with global tokens that reach the logits: no layer is left out of a graph
ALIVE = [
    pytest.param('vil_ls_tiny', dict(
        SHORT, depths=(2, 2), attn_types=('ls', 'ls'), num_global_tokens=(1, 2), global_pool='token'), id='alive'),
    pytest.param('cvt_ls_13', dict(
        SHORT_CVT, depths=(2, 2), num_global_tokens=(1, 2), global_pool='token'), id='alive-cvt'),
]
ONE_STAGE = dict(
    depths=(1,), embed_dims=(32,), num_heads=(2,), attn_types=('ls',), num_global_tokens=(2,), global_pool='token',
    num_classes=7)
every_short_model = pytest.mark.parametrize('name, kwargs', SHORT_MODELS)


def create(name='vil_ls_tiny', **kwargs):
    """A model in eval mode whose biases and norms are not at their trivial initial values."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def assert_same(graph, model, sizes=SIZES, batch=2):
    with torch.no_grad():
        for size in sizes:
            x = images(*size, batch=batch)
            torch.testing.assert_close(graph(x), model(x), atol=ATOL, rtol=1e-4)


@pytest.mark.parametrize('name, kwargs', MODELS)
def test_script(name, kwargs):
    model = create(name, **kwargs)
    script = torch.jit.script(model)
    assert_same(script, model)
    with pytest.raises(torch.jit.Error, match='at least 32 x 32'):
        script(images(31, 64))
    with pytest.raises(RuntimeError, match='to have 3 channels'):
        script(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize('name', ['vil_ls_tiny', 'vil_ls_small'])
def test_script_features(name):
    model = create(name, **TINY, features_only=True)
    assert_same(torch.jit.script(model), model, SIZES[:2])


def test_script_released_configuration():
    model = timm.create_model('vil_ls_tiny_hires').eval()
    assert_same(torch.jit.script(model), model, [(100, 130), (37, 200)], batch=1)


@pytest.mark.parametrize('name, kwargs', MODELS + ALIVE)
def test_jit_trace(name, kwargs):
    """A trace is right at other sizes and batches than the one it was made from."""
    model = create(name, **kwargs)
    trace = torch.jit.trace(model, images(100, 130), check_trace=False)
    assert_same(trace, model)
    assert_same(trace, model, SIZES[:2], batch=1)
    assert_same(trace, model, SIZES[:2], batch=3)


@pytest.mark.parametrize('mode', ['real', 'fake'])
@pytest.mark.parametrize('name, kwargs', ALIVE)
def test_make_fx(name, kwargs, mode):
    model = create(name, **kwargs)
    assert_same(made_by_fx(model, images(100, 130), mode), model, [(100, 130)])
    assert_same(model, create(name, **kwargs), SIZES[:2])  # what was traced is as it was


@pytest.mark.parametrize('name, kwargs', [
    pytest.param('vil_ls_tiny', dict(ONE_STAGE, patch_sizes=(8,)), id='vil'),
    pytest.param(
        'cvt_ls_13', dict(ONE_STAGE, patch_sizes=(7,), patch_strides=(8,), patch_paddings=(0,)), id='cvt',
        marks=pytest.mark.slow),
])
def test_make_fx_symbolic(name, kwargs):
    """One graph for all sizes and batches; traced with a batch that no other size equals, which torch would join."""
    model = create(name, **kwargs)
    graph = made_by_fx(model, images(100, 130, batch=5), 'symbolic')
    assert_same(graph, model)
    assert_same(graph, model, SIZES[:2], batch=1)


def made_by_fx(model, x, mode):
    """The graph of a model as a function of images."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())

    def call(tensors, x):
        return torch.func.functional_call(model, tensors, (x,))

    with torch.no_grad():
        return partial(make_fx(call, tracing_mode=mode)(tensors, x), tensors)


@pytest.mark.parametrize('name, kwargs', MODELS)
def test_symbolic_trace(name, kwargs):
    model = create(name, **kwargs)
    assert_same(torch.fx.symbolic_trace(model), model)


@pytest.mark.parametrize('name, kwargs', MODELS)
def test_timm_feature_extractor(name, kwargs):
    model = create(name, **kwargs)
    extractor = timm.models.create_feature_extractor(model, {'head': 'logits'})
    assert_same(lambda x: extractor(x)['logits'], model)
    script = torch.jit.script(extractor.eval())
    assert_same(lambda x: script(x)['logits'], model, SIZES[:2])
    extractor.train()(images(64, 96))['logits'].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_short_model
@pytest.mark.parametrize('train', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('implementation', ['auto', pytest.param('masked', marks=pytest.mark.slow)])
def test_compile_dynamic(name, kwargs, train, implementation):
    """On a CPU the graph holds the tiled attention as an operator, unless the masked one, that of GPUs, is forced."""
    with timm_ls.attention_implementation(implementation):
        graphs = check_compiled(create(name, **kwargs).train(train), 'aot_eager')
    operators = [node.target for graph in graphs for node in graph.graph.nodes]
    assert (torch.ops.timm_ls.tiled_attention.default in operators) == (implementation == 'auto')


@pytest.mark.slow
@pytest.mark.parametrize('name, kwargs, train', [
    ('vil_ls_tiny', dict(SHORT, attn_types=('ls', 'full')), False), ('cvt_ls_13', SHORT_CVT, False),
    ('vil_ls_tiny', dict(SHORT, attn_types=('ls', 'full')), True), ('cvt_ls_13', SHORT_CVT, True),
    ('vil_ls_tiny', TINY, False), ('cvt_ls_13', CVT, False),
])
def test_compile_inductor(name, kwargs, train):
    check_compiled(create(name, **kwargs).train(train), 'inductor')


def check_compiled(model, backend):
    """One graph, at most two compilations for five sizes, values of eager mode; in training mode the gradients too.

    Of inductor one for every side of its limits, and an attempt that it gives up. Returns the graphs.
    """
    counter = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    parameters = list(model.parameters())
    sizes = SIZES[:4] + [(320, 256)]
    for size in sizes:
        x = images(*size)
        if not model.training:
            assert_same(compiled, model, [size])
            continue
        out, expected = compiled(x), model(x)
        torch.testing.assert_close(out, expected, atol=ATOL, rtol=1e-4)
        grads = torch.autograd.grad(out.square().sum(), parameters)
        for grad, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
            torch.testing.assert_close(grad, wanted, atol=1e-4 * (1 + wanted.abs().max().item()), rtol=1e-3)
    most = 1 + len({sides(model, *size) for size in sizes}) if backend == 'inductor' else 2
    assert 1 <= counter.frame_count <= most
    return counter.graphs


def sides(model, height, width, batch=2, limit=4096):
    """On which side of inductor's limit the sums of a pass are: over a map, in training over all tokens of a batch too.

    Inductor writes other code for sums of more than 4,096 terms on a CPU (`need_use_acc_helper`) and guards on it. The
    attempt that it gives up, once, is its own as well (`TensorifyScalarRestartAnalysis`).
    """
    maps = [-(-height // stride) * -(-width // stride) for stride in model.reductions]
    batches = [batch * (stage.num_global_tokens + n) for stage, n in zip(model.stages, maps)] if model.training else []
    return tuple(n <= limit for n in maps + batches)


def dims(min_size):
    """Dynamic batch, height and width. Under `Dim`, torch fixes sizes that may be one: no 32 pixels at stride 32."""
    return ({0: Dim('batch'), 2: Dim('height', min=min_size, max=2048), 3: Dim('width', min=min_size, max=2048)},)


def shapes_spec(batch, min_size=32):
    """Dynamic height and width, and the batch as given: a number or a `ShapeVar`."""
    height, width = ShapeVar('height', min=min_size, max=2048), ShapeVar('width', min=min_size, max=2048)
    return ShapesSpec(params=ParamsSpec({'x': TensorSpec([batch, 3, height, width])}))


@every_short_model
@pytest.mark.parametrize('strict', [True, False])
def test_export_dim(name, kwargs, strict):
    model = create(name, **kwargs)
    program = torch.export.export(model, (images(256, 480),), dynamic_shapes=dims(33), strict=strict).module()
    assert_same(program, model)
    assert_same(program, model, SIZES[:1], batch=1)


@every_short_model
def test_export_shapes_spec_from_the_smallest_image(name, kwargs):
    model = create(name, **kwargs)
    shapes = shapes_spec(ShapeVar('batch', min=1, max=64))
    program = torch.export.export(model, (images(256, 480),), dynamic_shapes=shapes, strict=True).module()
    assert_same(program, model, SIZES + [(32, 32), (32, 500)])
    assert_same(program, model, [(32, 32), (64, 96)], batch=1)


@pytest.mark.parametrize('name, kwargs', SHORT_MODELS[1:])
def test_export_one_image(name, kwargs):
    """A batch of one as a constant, down to the smallest image, whose last level is one window."""
    model = create(name, **kwargs)
    program = torch.export.export(model, (images(256, 480, 1),), dynamic_shapes=shapes_spec(1), strict=True).module()
    assert_same(program, model, SIZES[:4] + [(32, 32)], batch=1)


class PlainPatches(torch.nn.Module):
    """Patches of 32 pixels and a norm, from torch alone."""

    def __init__(self):
        super().__init__()
        self.proj, self.norm = torch.nn.Conv2d(3, 8, 32, stride=32), torch.nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


@pytest.mark.parametrize('strict', [True, False])
def test_limit_of_dim_is_that_of_torch(strict):
    """Why 33: under `Dim`, torch exports no size of which anything may be one; `ShapesSpec` knows no such limit."""
    model = PlainPatches()
    with pytest.raises(torch._dynamo.exc.UserError, match='Constraints violated'):
        torch.export.export(model, (images(256, 480),), dynamic_shapes=dims(32), strict=strict)
    program = torch.export.export(model, (images(256, 480),), dynamic_shapes=shapes_spec(2), strict=strict).module()
    assert_same(program, model, [(32, 32), (64, 96)])


@pytest.mark.parametrize('dynamo, name, kwargs', [
    pytest.param(
        dynamo, *model.values, id=f'{dynamo}-{model.id}',
        marks=[*model.marks, *[pytest.mark.slow] * (dynamo and model in ALIVE)])  # half a minute each
    for dynamo in (True, False) for model in SHORT_MODELS + ALIVE])
def test_onnx(name, kwargs, dynamo, tmp_path):
    """Both exporters: right at other batches and rectangles than the one captured."""
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    model, path = create(name, **kwargs), tmp_path / 'model.onnx'
    if dynamo:
        program = torch.onnx.export(model, (images(96, 160),), dynamo=True, dynamic_shapes=dims(33), verbose=False)
        program.save(path)
    else:
        axes = {'image': {0: 'batch', 2: 'height', 3: 'width'}, 'logits': {0: 'batch'}}
        torch.onnx.export(
            model, (images(96, 160, 1),), path, dynamo=False, input_names=['image'], output_names=['logits'],
            dynamic_axes=axes, opset_version=17)
    assert_same(onnx_runtime(path), model, [(64, 96), (100, 130), (37, 300)])
    assert_same(onnx_runtime(path), model, [(64, 96), (100, 130)], batch=1)
    assert_same(onnx_runtime(path), model, [(37, 300)], batch=3)


@pytest.mark.parametrize('name', ['test_vil_ls', 'test_cvt_ls'])
@pytest.mark.parametrize('batch', [1, 2])
def test_timm_onnx_export(name, batch, tmp_path):
    """timm's exporter makes the batch dynamic, from one image or from two."""
    pytest.importorskip('onnx', reason='onnx is not installed')
    from timm.utils.onnx import onnx_export

    model, path = timm.create_model(name, pretrained=True, exportable=True), tmp_path / 'model.onnx'
    onnx_export(model, str(path), batch_size=batch, input_size=(3, 96, 96), dynamic_size=True)
    model.eval()
    for other in (1, 2, 4):
        assert_same(onnx_runtime(path), model, [(96, 96), (64, 160)], batch=other)


def onnx_runtime(path):
    """A function from images to logits that runs a file."""
    runtime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize('name', ['vil_ls_tiny', 'vil_ls_tiny_hires'])
def test_meta(name):
    model = timm.create_model(name, device='meta', **TINY)
    with torch.device('meta'):
        again = timm.create_model(name, **TINY)
    for built in (model, again):
        assert {tensor.device.type for tensor in built.state_dict().values()} == {'meta'}
        assert built(torch.zeros(2, 3, 100, 130, device='meta')).shape == (2, 7)


@pytest.mark.parametrize('implementation', ['tiled', 'masked'])
@pytest.mark.parametrize('name', ['vil_ls_tiny', 'vil_ls_tiny_hires'])
def test_bfloat16(name, implementation):
    reference, converted = create(name, **TINY), create(name, **TINY).to(torch.bfloat16)
    built = timm.create_model(name, dtype=torch.bfloat16, **TINY)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    x = images(100, 130)
    with timm_ls.attention_implementation(implementation):
        for model in (built, converted):
            out = model(x.to(torch.bfloat16))
            out.float().square().sum().backward()
            assert out.dtype == torch.bfloat16
            assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        torch.testing.assert_close(out.float(), reference(x), atol=0.1, rtol=0.1)
