"""The data and the models of notebooks/long_range.py."""
import numpy as np
import pytest
import torch
from paths import ROOT

for package in ('sklearn', 'skimage'):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'timm-ls[notebooks]'")


@pytest.fixture
def long_range(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'notebooks'))
    import long_range
    return long_range


def marks(images, places, half=7):
    """What lies at the places, [images * places, 2 * half, 2 * half]."""
    return torch.stack([
        image[0, row - half:row + half, col - half:col + half]
        for image, at in zip(images, places) for row, col in at.tolist()])


@pytest.mark.parametrize('task, distance', [('pairs', 32), ('pairs', 90), ('counting', 64), ('counting', 128)])
def test_answers(long_range, task, distance):
    """Stripes are those of the answer, marks lie as far apart as asked; the other question is about the others."""
    run = long_range.Run(task=task, size=128)
    images, places, targets = long_range.batch_of(run, 'held_out', 8, np.random.default_rng(0), distance)
    own, others = targets.unbind(-1)
    expected = torch.stack([torch.from_numpy(long_range.stripes(kind)) for kind in own.flatten().tolist()])
    torch.testing.assert_close(marks(images, places), expected, rtol=0, atol=0)
    extent = (places.amax(1) - places.amin(1)).float()
    if task == 'pairs':
        assert torch.equal(others, own.flip(1))
        assert ((extent.norm(dim=-1) - distance).abs() < 8 * 2 ** .5).all()  # places are multiples of 8 pixels
    else:
        assert torch.equal(others, (own[:, :, None] == own[:, None]).sum(-1) - 1)
        assert (extent < distance).all() and all(len(set(kinds)) == 2 for kinds in own.tolist())


def test_held_out_images_are_of_other_photographs(long_range):
    import shapes
    assert not set(shapes.PHOTOS['train']) & set(shapes.PHOTOS['held_out'])
    assert not torch.equal(long_range.backgrounds('train', 64, 4), long_range.backgrounds('held_out', 64, 4))


def test_answers_are_read_where_the_marks_are(long_range):
    """From the token that holds a mark's center, shrunk or not."""
    for shrunk in (False, True):
        run = long_range.Run(size=256, shrunk=shrunk)
        tokens = run.side // long_range.STRIDE
        grid = torch.arange(tokens * tokens).view(1, tokens, tokens, 1, 1)
        places = torch.tensor([[[7, 7], [100, 250], [200, 39]]])
        read = long_range.answers(lambda images, grid=grid: grid, run, torch.zeros(1, 3, 256, 256), places)
        expected = [int(row * run.side / 256 / 16) * tokens + int(col * run.side / 256 / 16)
                    for row, col in places[0].tolist()]
        assert read.flatten().tolist() == expected


def test_ablations(long_range):
    """No norms; a projection that the image does not change, resized for larger images."""
    torch.manual_seed(0)
    run = long_range.Run(size=128)
    attn = long_range.TokenClassifier(long_range.Run(size=128, dual_norm=False)).body.stages[0].blocks[0].attn
    x = torch.randn(2, 5, 32)
    assert attn.norm_kv(x) is x and attn.norm_landmarks(x) is x
    fixed = long_range.Run(size=128, model='fixed')
    small = long_range.TokenClassifier(fixed)
    large = long_range.TokenClassifier(long_range.Run(size=256, model='fixed'))
    long_range.load_smaller(large, small.state_dict())
    old, new = (model.body.stages[1].blocks[0].attn.dynamic_projection for model in (small, large))
    tokens = torch.randn(2, new.logits.shape[0], 64)
    torch.testing.assert_close(new(tokens)[0], new(tokens)[1], rtol=0, atol=0)
    torch.testing.assert_close(new.logits[0], old.logits[0], rtol=0, atol=0)  # of the global token
    torch.testing.assert_close(new.logits[1:].mean(0), old.logits[1:].mean(0), rtol=0, atol=.05)
    dynamic = long_range.TokenClassifier(run).body.stages[1].blocks[0].attn.dynamic_projection
    assert not torch.equal(dynamic(tokens)[0], dynamic(tokens)[1])


@pytest.mark.parametrize('model, far', [('long-short', True), ('window', False), ('swin', False)])
def test_what_is_far_away(long_range, model, far):
    """One corner of 1024 x 1024 pixels says nothing of the other one, but for landmarks and global tokens."""
    torch.manual_seed(0)
    model = long_range.TokenClassifier(long_range.Run(size=1024, model=model)).eval()
    image = torch.rand(1, 3, 1024, 1024)
    other = image.clone()
    other[..., -64:, -64:] = 0.
    with torch.no_grad():
        x, y = model(image), model(other)
    assert not torch.equal(x[0, -1, -1], y[0, -1, -1])
    assert torch.equal(x[0, 0, 0], y[0, 0, 0]) != far


def test_runs_start_from_smaller_images(long_range):
    """In order of size, each once."""
    run = long_range.Run(size=1024)
    runs = long_range.with_starts([run, long_range.Run(size=256), run])
    assert [run.size for run in runs] == [128, 256, 512, 1024]


def test_results_are_kept(long_range, tmp_path, monkeypatch):
    """What a folder holds is not trained again."""
    monkeypatch.setattr(long_range, 'BUDGET', {128: (2, 2)})
    run = long_range.Run(size=128, share=.5)
    kept = long_range.result(run, tmp_path)
    assert len(kept['losses']) == 1 and {'32', '64', '96', 'own'} == set(kept['correct'])
    monkeypatch.setattr(long_range, 'train', None)
    assert long_range.result(run, tmp_path)['losses'] == kept['losses']
    model = long_range.load(run, tmp_path)
    assert all(torch.equal(value, kept['weights'][name]) for name, value in model.state_dict().items())
