"""Pretrained weights: every source, damaged and hostile files, processes that die, adaptation to other models."""
import copy
import functools
import io
import json
import os
import pickle
import random
import resource
import runpy
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from golden_fill import load_case
from hub_server import TOKEN, Hub
from paths import ROOT
from safetensors.torch import load_file, save, save_file

import timm_ls
from timm_ls.pretrained import sources
from timm_ls.pretrained.checkpoint import read_checkpoint
from timm_ls.pretrained.sources import catalogue, file_sha256, filter_and_check, structure_digest
from timm_ls.vil_ls import (
    RELEASED_ATTENTION_NAMES,
    RELEASED_MLP_NAMES,
    RELEASED_STAGE_NAMES,
    VilLs,
    checkpoint_filter_fn,
)

MODEL = 'test_vil_ls'
NAME = f'{MODEL}.digits'
RELEASED = ['vil_ls_medium.ls_in1k', 'vil_ls_base.ls_in1k', 'vil_ls_medium_384.ls_in1k']


def released_name(name: str) -> str:
    """The authors' name of one of our parameters."""
    parts = name.split('.')
    if parts[0] != 'stages':
        return name
    layer, rest = f'layer{int(parts[1]) + 1}', parts[2:]
    if rest[0] == 'blocks':
        index, rest = int(rest[1]), '.'.join(rest[2:])
        for names, offset in ((RELEASED_ATTENTION_NAMES, 1), (RELEASED_MLP_NAMES, 2)):
            for theirs, ours in names.items():
                if rest == ours or rest.startswith(ours + '.'):
                    return f'{layer}.{2 * index + offset}.{theirs}{rest[len(ours):]}'
    rest = '.'.join(rest)
    for theirs, ours in RELEASED_STAGE_NAMES.items():
        if rest == ours or rest.startswith(ours + '.'):
            return f'{layer}.0.{theirs}{rest[len(ours):]}'
    raise KeyError(name)


def released_checkpoint(model: torch.nn.Module, seed: int) -> dict:
    """A checkpoint with everything that the authors' training code saves, and random weights of the model's shapes."""
    generator = torch.Generator().manual_seed(seed)
    net = {}
    for name, value in model.state_dict().items():
        shape = tuple(value.shape)
        if name.endswith('rel_pos.table'):
            heads, side = shape[0], shape[1]
            rows = side * side
            if name.replace('rel_pos.table', 'norm_kv.weight') in model.state_dict():
                w = next(w for w in range(1, 65) if 2 * (w + w // 2) - 1 == side)
                p = w // 2
                rows = 2 * (w + p - 1) * (w + 2 * p + 1) + 1
            shape = (rows, heads)
            net['module.' + released_name(name)[:-len('_bias_table')] + '_index'] = torch.zeros(4, 4, dtype=torch.long)
        net['module.' + released_name(name)] = torch.randn(shape, generator=generator) * .02
    index = {key: value for key, value in net.items() if key.endswith('_index')}
    for key in index:  # as released: `relative_position_index`
        net[key.rsplit('.', 1)[0] + '.relative_position_index'] = net.pop(key)
    return {
        'net': net, 'arch': 'msvit', 'epoch': 300, 'best_acc': 83.816,
        'optimizer': {
            'state': {0: {'step': 3, 'exp_avg': torch.zeros(3)}}, 'param_groups': [{'lr': 1e-3, 'params': [0]}]},
        'scheduler': {'max_iter': 10, 'base_lrs': [1e-3], 'last_epoch': 3, 'warmup_method': 'linear', 'verbose': False},
    }


def file_bytes(checkpoint: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def same(model: torch.nn.Module, weights: dict) -> bool:
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], value) for name, value in weights.items())


def converted(checkpoint: dict, model: torch.nn.Module) -> dict:
    return checkpoint_filter_fn(copy.deepcopy(checkpoint), model)


class FileServer:
    """Files over loopback HTTP, by path, some of them badly."""

    def __init__(self):
        self.files, self.hits = {}, []
        self.cut_next = 0  # how many replies to break off in the middle
        self.delay = 0.  # seconds between pieces of 256 KiB
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                path = self.path.split('?')[0]
                outer.hits.append(path)
                content = outer.files.get(path)
                if content is None:
                    self.send_error(404)
                    return
                start = 0
                if self.headers.get('Range'):
                    start = int(self.headers['Range'].removeprefix('bytes=').split('-')[0])
                    self.send_response(206)
                    self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
                else:
                    self.send_response(200)
                self.send_header('Content-Length', str(len(content) - start))
                self.end_headers()
                end = len(content)
                if outer.cut_next > 0:
                    outer.cut_next -= 1
                    end = (start + end) // 2
                try:
                    for i in range(start, end, 1 << 18):
                        self.wfile.write(content[i:min(i + (1 << 18), end)])
                        time.sleep(outer.delay)
                except OSError:  # the client was killed
                    pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str) -> str:
        return f'http://127.0.0.1:{self.server.server_port}{path}?dl=1'


@pytest.fixture
def server():
    server = FileServer()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches; returns the folder that downloads go to."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    return tmp_path / 'torch' / 'hub' / 'checkpoints'


@functools.cache
def shipped() -> dict:
    return load_file(sources.SHIPPED_DIR / f'{NAME}.safetensors')


def leftovers(folder: Path) -> list:
    return [path.name for path in folder.glob('**/*') if '.partial' in path.name] if folder.is_dir() else []


def from_url(server: FileServer, path: str = '/model_best.pth', model: str = MODEL, **kwargs):
    return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=dict(url=server.url(path)), **kwargs)


# What is published

def test_catalogue_describes_the_models():
    for name, entry in catalogue().items():
        assert name == f'{entry["architecture"]}.{entry["tag"]}'
        cfg = timm.get_pretrained_cfg(name)
        model = timm.create_model(name, device='meta')
        assert sum(p.numel() for p in model.parameters()) == entry['parameters'], name
        assert structure_digest(model.state_dict()) == entry['structure'], name
        assert cfg.license == entry['license'] and cfg.input_size[1:] == (entry['image_size'],) * 2
        assert (cfg.url[0] if cfg.url else None) == entry['url']
        assert bool(cfg.file) == bool(entry['file'])
        assert (entry['url'] or entry['file']) and timm.models.is_model_pretrained(entry['architecture'])
    assert (ROOT / 'weights' / 'catalogue.json').samefile(ROOT / 'timm_ls' / 'pretrained' / 'catalogue.json')


def test_lists_tell_the_truth():
    listed = set(timm.list_pretrained('*_ls*'))
    assert listed <= catalogue().keys()
    assert {*RELEASED, NAME, 'test_cvt_ls.digits'} <= listed
    assert not timm.models.is_model_pretrained('vil_ls_tiny')
    with pytest.raises(RuntimeError, match='No pretrained weights exist for vil_ls_tiny'):
        timm.create_model('vil_ls_tiny', pretrained=True)


@pytest.mark.parametrize('name', [*RELEASED, *timm.list_models('cvt_ls*')])
def test_configs_are_complete(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.crop_pct, cfg.interpolation, cfg.num_classes) == (.875, 'bicubic', 1000)
    assert cfg.mean == (.485, .456, .406) and cfg.std == (.229, .224, .225) and cfg.paper_ids == 'arXiv:2107.02192'
    if name in RELEASED:
        assert cfg.license == 'mit' and cfg.origin_url == 'https://github.com/NVIDIA/transformer-ls'
        assert timm.get_pretrained_cfg(name.split('.')[0]).tag == 'ls_in1k'


def test_digest_is_that_of_the_authors_names_and_shapes():
    description, _, _ = load_case('vil_ls_medium_224')
    model = timm.create_model('vil_ls_medium', device='meta')
    weights = {name: torch.empty(shape, device='meta') for name, shape in description['params'].items()}
    weights = checkpoint_filter_fn(weights, model)
    assert structure_digest(weights) == catalogue()['vil_ls_medium.ls_in1k']['structure']


def test_import_and_shipped_weights_need_no_network():
    code = (
        'import socket\n'
        'def refuse(*a, **k): raise AssertionError("network")\n'
        'socket.socket.connect = socket.getaddrinfo = refuse\n'
        'import timm, timm_ls\n'
        f'timm.create_model("{MODEL}", pretrained=True)\n')
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize('model', ['test_vil_ls', 'test_cvt_ls'])
def test_shipped_weights(model):
    name = f'{model}.digits'
    path = sources.SHIPPED_DIR / f'{name}.safetensors'
    built, weights = timm.create_model(model, pretrained=True).state_dict(), load_file(path)
    assert built.keys() == weights.keys() and all(torch.equal(built[key], weights[key]) for key in weights)
    assert path.stat().st_size < 4_000_000 and file_sha256(path) == catalogue()[name]['sha256']
    assert catalogue()[name]['parameters'] < 1_000_000
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.crop_pct, cfg.origin_url) == (1., None)  # trained here, on whole images


@pytest.mark.parametrize('model', ['test_vil_ls', 'test_cvt_ls'])
def test_shipped_weights_tell_digits_apart(model):
    pytest.importorskip('sklearn')
    result = subprocess.run(
        [sys.executable, str(ROOT / 'weights' / 'train_test_model.py'), '--model', model, '--evaluate'],
        check=True, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), timeout=170)
    result = json.loads(result.stdout)
    measured = catalogue()[f'{model}.digits']['measured']
    assert result['held_out_images'] == measured['held_out_images']
    assert abs(result['held_out_top1'] - measured['top1']) < .3  # one image of 450


# The authors' files

def test_url_is_downloaded_and_read_once(server, caches):
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    server.files['/model_best.pth'] = file_bytes(checkpoint)
    first = from_url(server)
    expected = converted(checkpoint, first)
    assert same(first, expected)
    next(caches.glob('*.original.pth')).unlink()
    assert same(from_url(server), expected)  # from the conversion
    assert len(server.hits) == 1 and not leftovers(caches)


def test_same_basename_twice(server):
    model = timm.create_model(MODEL)
    checkpoints = {f'/{seed}/model_best.pth': released_checkpoint(model, seed) for seed in range(2)}
    for _ in range(2):
        for path, checkpoint in checkpoints.items():
            server.files[path] = file_bytes(checkpoint)
            assert same(from_url(server, path), converted(checkpoint, model)), path


def publish_at(monkeypatch, name, **changes):
    """Pretend that weights are published elsewhere, until the test ends."""
    monkeypatch.setitem(catalogue(), name, {**catalogue()[name], **changes})
    published = sources.published_sources(name)
    cfg = timm.models._registry._model_pretrained_cfgs[name]
    for key in ('file', 'hf_hub_id', 'url'):
        monkeypatch.setattr(cfg, key, published.get(key))


@pytest.mark.slow
def test_released_models_in_a_row(server, monkeypatch, caches):
    """Medium at 224 and at 384 have the same names: another's file would be resized without a word."""
    checkpoints = {}
    for seed, name in enumerate(('vil_ls_medium.ls_in1k', 'vil_ls_medium_384.ls_in1k')):
        checkpoints[name] = released_checkpoint(timm.create_model(name), seed)
        server.files[f'/{seed}/model_best.pth'] = file_bytes(checkpoints[name])
        publish_at(monkeypatch, name, url=server.url(f'/{seed}/model_best.pth'))
    for _ in range(2):
        for name, checkpoint in checkpoints.items():
            model = timm.create_model(name, pretrained=True)
            assert same(model, converted(checkpoint, model)), name
    assert len(server.hits) == 2
    for path in caches.glob('vil_ls_*.safetensors'):  # what convert.py publishes is what was cached
        assert structure_digest(load_file(path)) in {catalogue()[name]['structure'] for name in checkpoints}


def test_timm_cannot_cache_released_files_by_basename():
    model = timm.create_model('vil_ls_medium', device='meta')
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'decode'"):  # its URL is a pair
        timm.models.load_pretrained(model, timm.get_pretrained_cfg('vil_ls_medium').to_dict())


def test_named_source_is_the_only_one(server, tmp_path):
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    (tmp_path / 'mine.pth').write_bytes(file_bytes(checkpoint))
    overlay = dict(file=str(tmp_path / 'mine.pth'))
    model = timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay)
    assert same(model, converted(checkpoint, model))
    with pytest.raises(RuntimeError, match=r'(?s)Tried:\n- http://127.*404') as error:
        from_url(server, '/missing.pth')  # the shipped weights exist, but are not what was asked for
    assert 'shipped_weights' not in str(error.value) and 'pretrained_cfg_overlay' in str(error.value)


def test_file_and_state_dict_as_timm_does(server, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='No checkpoint file at .*nowhere.pth'):
        timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'nowhere.pth')))
    weights = {name: value + 1 for name, value in shipped().items()}
    overlay = dict(state_dict=weights)
    publish_at(monkeypatch, NAME, file=None, sha256=None, url=server.url('/model_best.pth'))
    assert same(timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay), weights)
    assert not server.hits
    own_format = dict(file=str(tmp_path / 'weights.npz'), custom_load=True)  # the model reads it, not we
    assert sources.find_weights(MODEL, own_format, checkpoint_filter_fn) is None


def test_broken_connection_is_taken_up_again(server, caches):
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    server.files['/model_best.pth'] = file_bytes(checkpoint)
    server.cut_next = 2
    model = from_url(server)
    assert same(model, converted(checkpoint, model)) and len(server.hits) == 3


@pytest.mark.parametrize('damage', ['truncated', 'html', 'empty'])
def test_bad_download_leaves_nothing_and_is_repeated(server, caches, damage):
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    good = file_bytes(checkpoint)
    bad = {'truncated': good[:-1000], 'html': b'<!DOCTYPE html>' * 100, 'empty': b''}
    server.files['/model_best.pth'] = bad[damage]
    with pytest.raises(RuntimeError, match='Could not get the pretrained weights test_vil_ls.digits'):
        from_url(server)
    assert not list(caches.glob('*.pth')) and not list(caches.glob('*.safetensors')) and not leftovers(caches)
    server.files['/model_best.pth'] = good
    model = from_url(server)
    assert same(model, converted(checkpoint, model))


def test_wrong_checksum(server, monkeypatch, caches):
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    server.files['/model_best.pth'] = file_bytes(checkpoint)
    source = dict(file=None, url=server.url('/model_best.pth'), sha256=None)
    publish_at(monkeypatch, NAME, **source, url_sha256='0' * 64)
    with pytest.raises(RuntimeError, match='The checksum of .* expected 0000'):
        timm.create_model(MODEL, pretrained=True)
    assert not list(caches.glob('*.pth')) and not list(caches.glob('*.safetensors'))
    publish_at(monkeypatch, NAME, **source, url_sha256=None)
    model = timm.create_model(MODEL, pretrained=True)
    assert same(model, converted(checkpoint, model))
    publish_at(monkeypatch, NAME, **{**source, 'sha256': file_sha256(next(caches.glob('*.safetensors')))})
    timm.create_model(MODEL, pretrained=True)
    assert len(server.hits) == 2
    publish_at(monkeypatch, NAME, **{**source, 'sha256': '0' * 64})
    with pytest.raises(RuntimeError, match='not the file that the catalogue describes'):
        timm.create_model(MODEL, pretrained=True)


@pytest.mark.parametrize('damage', ['cut', 'zeros', 'other'])
def test_damaged_cache_is_made_again(server, caches, monkeypatch, damage):
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    server.files['/model_best.pth'] = file_bytes(checkpoint)
    publish_at(monkeypatch, NAME, file=None, sha256=None, url=server.url('/model_best.pth'))
    timm.create_model(MODEL, pretrained=True)
    cached = next(caches.glob('*.safetensors'))
    content = cached.read_bytes()
    if damage == 'other':
        save_file({'head.weight': torch.zeros(3)}, cached)
    else:
        cached.write_bytes(content[:-7] if damage == 'cut' else bytes(len(content)))
    model = timm.create_model(MODEL, pretrained=True)
    assert same(model, converted(checkpoint, model)) and cached.read_bytes() == content and len(server.hits) == 1


def test_offline(server, monkeypatch):
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    server.files['/model_best.pth'] = file_bytes(checkpoint)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(RuntimeError, match='HF_HUB_OFFLINE forbids downloading it'):
        from_url(server)
    assert not server.hits
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    from_url(server)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    model = from_url(server)
    assert same(model, converted(checkpoint, model))


@pytest.mark.parametrize('phase', ['download', 'conversion'])
def test_full_disk(server, caches, phase):
    """A limit on the size of files fails like a full disk: the write of a byte too many raises an OSError."""
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    server.files['/model_best.pth'] = file_bytes(checkpoint)
    if phase == 'conversion':
        from_url(server)
        next(path for path in caches.glob('*.safetensors')).unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(RuntimeError, match='room in the cache') as error:
            from_url(server)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'File too large' in str(error.value)
    assert not list(caches.glob('*.safetensors')) and not leftovers(caches)
    model = from_url(server)
    assert same(model, converted(checkpoint, model)) and len(server.hits) == (1 if phase == 'conversion' else 2)


def test_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(RuntimeError, match='Set TORCH_HOME or cache_dir'):
        from_url(server, cache_dir=tmp_path / 'file' / 'cache')


def test_url_of_safetensors(server):
    weights = {name: value + 1 for name, value in timm.create_model(MODEL).state_dict().items()}
    server.files['/model.safetensors'] = save(weights)
    assert same(from_url(server, '/model.safetensors'), weights)


def test_cache_dir(server, tmp_path, caches):
    server.files['/model_best.pth'] = file_bytes(released_checkpoint(timm.create_model(MODEL), 0))
    from_url(server, cache_dir=tmp_path / 'mine')
    assert list((tmp_path / 'mine').glob('*.safetensors')) and not caches.exists()


# Processes that die, processes that meet

WORKER = '''
import os, signal, sys, time
from pathlib import Path
import timm, timm_ls
model_name, url, folder, mode = sys.argv[1:5]
folder = Path(folder)

def load():
    timm.create_model(model_name, pretrained=True, pretrained_cfg_overlay=dict(url=url), cache_dir=folder)

def spawn():
    pid = os.fork()
    if pid == 0:
        try:
            load()
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def names():
    return sorted(path.name.split('.', 2)[-1] for path in folder.glob('*'))

def clear():
    for path in folder.glob('*'):
        path.unlink()

folder.mkdir(exist_ok=True)
if mode == 'together':
    print([wait(pid) for pid in [spawn(), spawn(), spawn()]])
else:
    size = int(sys.argv[5])
    for moment in range(1, 6):  # in mid-download
        clear()
        pid = spawn()
        while sum(path.stat().st_size for path in folder.glob('*.original.pth.partial')) < size * moment / 6:
            time.sleep(.001)
        os.kill(pid, signal.SIGKILL)
        killed, left = wait(pid), names()
        print('download', killed, left, wait(spawn()), names())
    original = next(folder.glob('*.original.pth'))

    def conversion():
        for path in folder.glob('*.safetensors*'):
            path.unlink()
        return spawn()

    start = time.time()
    assert wait(conversion()) == 0
    span = time.time() - start
    for moment in range(1, 6):  # in mid-conversion
        pid = conversion()
        if moment < 4:
            time.sleep(span * moment / 5)
        else:  # while it is written
            least = (1, 8_000_000)[moment - 4]
            while sum(path.stat().st_size for path in folder.glob('*.safetensors.partial')) < least:
                pass
        os.kill(pid, signal.SIGKILL)
        killed, left = wait(pid), names()
        print('conversion', killed, left, wait(spawn()), names())
'''


def run_worker(server, folder, model, mode, *args):
    result = subprocess.run(
        [sys.executable, '-c', WORKER, model, server.url('/model_best.pth'), str(folder), mode, *args],
        capture_output=True, text=True, cwd=ROOT, timeout=300, env=dict(os.environ, OMP_NUM_THREADS='1'))
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_killed_at_ten_moments(server, tmp_path):
    checkpoint = released_checkpoint(timm.create_model('vil_ls_tiny'), 0)
    content = server.files['/model_best.pth'] = file_bytes(checkpoint)
    server.delay = .01
    lines = run_worker(server, tmp_path / 'cache', 'vil_ls_tiny', 'kill', str(len(content)))
    assert [line.split()[0] for line in lines] == ['download'] * 5 + ['conversion'] * 5
    for line in lines:
        phase, killed, rest = line.split(' ', 2)
        assert killed == '-9', line
        assert '] 0 [' in rest, line  # the next run succeeds
        assert 'partial' not in rest.split('] 0 [')[1], line
    model = timm.create_model('vil_ls_tiny', pretrained=True, cache_dir=tmp_path / 'cache',
                              pretrained_cfg_overlay=dict(url=server.url('/model_best.pth')))
    assert same(model, converted(checkpoint, model))


def test_processes_together_download_once(server, tmp_path):
    server.files['/model_best.pth'] = file_bytes(released_checkpoint(timm.create_model(MODEL), 0))
    server.delay = .05
    assert run_worker(server, tmp_path / 'cache', MODEL, 'together') == ['[0, 0, 0]']
    assert len(server.hits) == 1 and not leftovers(tmp_path / 'cache')


# Hostile and damaged files

class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('place', ['top', 'weights', 'optimizer', 'pickle'])
def test_pickle_that_runs_code_does_not(server, tmp_path, caches, place, legacy):
    canary = tmp_path / 'canary'
    checkpoint = released_checkpoint(timm.create_model(MODEL), 0)
    if place == 'top':
        checkpoint = Canary(canary)
    elif place == 'weights':
        checkpoint['net']['module.head.bias'] = Canary(canary)
    else:
        checkpoint['optimizer']['state'] = Canary(canary)
    path = tmp_path / 'folder' / 'model.pth'
    path.parent.mkdir()
    if place == 'pickle':
        path.write_bytes(pickle.dumps({'net': {'head.bias': torch.zeros(3)}, 'optimizer': Canary(canary)}))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    cfg = timm.get_pretrained_cfg(MODEL).to_dict(remove_source=True)
    config = {'architecture': MODEL, 'num_classes': 10, 'pretrained_cfg': cfg}
    (path.parent / 'config.json').write_text(json.dumps(config))
    server.files['/model_best.pth'] = path.read_bytes()
    assert not canary.exists()
    for load in (
            lambda: timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
            lambda: from_url(server),
            lambda: timm.create_model(f'local-dir:{path.parent}', pretrained=True),
            lambda: timm_ls.load_checkpoint(timm.create_model(MODEL), path),
    ):
        with pytest.raises(RuntimeError):
            load()
        assert not canary.exists()
    assert not list(caches.glob('*.pth'))
    (pickle.loads(path.read_bytes()) if place == 'pickle' else torch.load(path, weights_only=False))
    assert canary.exists()  # the trap was armed


CLEAN = (RuntimeError, ValueError)


def small_model() -> VilLs:
    return VilLs(num_classes=4, img_size=32, embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 2), patch_sizes=(4, 2),
                 attn_types=('ls', 'full'), num_global_tokens=(1, 0), window_size=3, rank=2)


def mutate(content: bytes, rng: random.Random) -> bytes:
    content = bytearray(content)
    kind = rng.randrange(6)
    # half of the mutations near the start, where the header is, or the end, where the zip directory is
    where = rng.choice((0, len(content) - 2000, rng.randrange(len(content))))
    for _ in range(rng.choice((1, 1, 4, 64))):
        i = min(max(where + rng.randrange(3000), 0), len(content) - 1)
        if kind == 0:
            content[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[i] = rng.randrange(256)
        elif kind == 2:
            del content[i:i + rng.randrange(1, 9)]
            content = content or bytearray(1)
        elif kind == 3:
            content[i:i] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            content = content[:max(i, 1)]
            break
        else:
            j, n = rng.randrange(len(content)), rng.randrange(1, 64)
            content[i:i + n] = content[j:j + n]
    return bytes(content)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('suffix, count', [('.safetensors', 2000), ('.pth', 500)])
def test_mutated_files_fail_cleanly(tmp_path, suffix, count):
    model = small_model()
    model.pretrained_cfg = dict(classifier='head', first_conv='stages.0.embed.proj')
    path = tmp_path / f'file{suffix}'
    if suffix == '.pth':
        torch.save(released_checkpoint(model, 0), path)
    else:
        save_file(model.state_dict(), path)
    content = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for i in range(count):
        mutated = mutate(content, rng)
        path.write_bytes(mutated)
        try:
            weights = filter_and_check(checkpoint_filter_fn, read_checkpoint(path), model)
            model.load_state_dict(weights)
        except CLEAN as error:
            refused += 1
            assert str(error), i
    assert refused > count / 4  # others change a weight, or what no one reads
    print(f'{count} mutations of {suffix}: {refused} refused')


@pytest.mark.parametrize('damage', ['missing', 'extra', 'shape', 'not weights'])
@pytest.mark.parametrize('through', ['file', 'url'])
@pytest.mark.parametrize('num_classes', [10, 7])
def test_weights_that_do_not_fit(server, tmp_path, damage, through, num_classes):
    weights = dict(shipped())
    name = 'stages.1.blocks.0.mlp.fc1.weight'
    if damage == 'missing':
        del weights[name]
    elif damage == 'extra':
        weights['stages.9.weight'] = torch.zeros(3)
    elif damage == 'shape':
        weights[name] = weights[name][:-1]
    else:
        weights = {'head': 3}
    expected = {'missing': f'1 missing: {name}', 'extra': '1 not part of the model: stages.9.weight',
                'shape': f'1 of another shape: {name}', 'not weights': 'Expected a dictionary'}[damage]
    content = file_bytes({'net': weights})
    if through == 'url':
        server.files['/model_best.pth'] = content
        overlay = dict(url=server.url('/model_best.pth'))
    else:
        (tmp_path / 'model.pth').write_bytes(content)
        overlay = dict(file=str(tmp_path / 'model.pth'))
    with pytest.raises(RuntimeError, match=expected):
        timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)


@pytest.mark.parametrize('change', [torch.Tensor.to_sparse, torch.Tensor.long])
def test_only_dense_floats_are_converted(change):
    weights = {**shipped(), 'head.weight': change(shipped()['head.weight'])}
    cfg = timm.get_pretrained_cfg(NAME).to_dict()
    with pytest.raises(RuntimeError, match='head.weight is .*: expected dense torch.float32'):
        sources.convert_checkpoint(weights, MODEL, cfg, checkpoint_filter_fn)


def test_nan_gives_a_warning_that_names_the_tensor(tmp_path):
    weights = {**shipped(), 'stages.0.blocks.0.norm1.weight': torch.full((32,), float('nan'))}
    save_file(weights, tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'))
    with pytest.warns(UserWarning, match=r'1 of .* not finite.*stages\.0\.blocks\.0\.norm1\.weight'):
        timm.create_model(MODEL, pretrained=True, pretrained_cfg_overlay=overlay)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        timm.create_model(MODEL, pretrained=True)


def test_type_error_in_a_filter_is_not_hidden():
    def broken(state_dict, model=None):
        if model is None:
            return state_dict
        raise TypeError('a mistake in the filter')
    with pytest.raises(RuntimeError, match='a mistake in the filter'):
        sources.build_model(VilLs, MODEL, True, broken)


# Adaptation

def changed(model: torch.nn.Module, reference: dict) -> set:
    """Names of the tensors that are not those of the reference."""
    own = model.state_dict()
    return {name for name in own.keys() | reference.keys()
            if name not in own or name not in reference or not torch.equal(own[name], reference[name])}


TABLES = {f'{block}.attn.rel_pos.table' for block in ('stages.2.blocks.0', 'stages.2.blocks.1', 'stages.3.blocks.0')}


@pytest.mark.parametrize('kwargs, expected', [
    (dict(), set()),
    (dict(in_chans=1), {'stages.0.embed.proj.weight'}),
    (dict(in_chans=4), {'stages.0.embed.proj.weight'}),
    (dict(num_classes=7), {'head.weight', 'head.bias'}),
    (dict(num_classes=0), {'head.weight', 'head.bias'}),
    (dict(img_size=384), TABLES),
    (dict(img_size=(320, 512)), TABLES),
    (dict(drop_path_rate=.2, global_pool='max'), set()),
], ids=lambda value: str(sorted(value) if isinstance(value, set) else value))
def test_adapts_what_it_should_and_nothing_else(kwargs, expected):
    model = timm.create_model(MODEL, pretrained=True, **kwargs).eval()
    assert changed(model, shipped()) == expected
    size = kwargs.get('img_size', 96)
    size = (size, size) if isinstance(size, int) else size
    x = torch.rand(1, kwargs.get('in_chans', 3), *size)
    with torch.inference_mode():
        out = model(x)
    assert out.shape == (1, kwargs.get('num_classes', 10) or 128) and out.isfinite().all()
    weight = model.state_dict()['stages.0.embed.proj.weight']
    if kwargs.get('in_chans') == 1:  # timm's rule: a grey image gives what it gave as three equal channels
        torch.testing.assert_close(weight, shipped()['stages.0.embed.proj.weight'].sum(1, keepdim=True))
    if kwargs.get('img_size') is not None:
        table = model.stages[2].blocks[0].attn.rel_pos.table
        assert table.shape[1:] == (2 * (size[0] // 16) - 1, 2 * (size[1] // 16) - 1)


def test_url_of_ones_own_is_for_the_model_asked_for(server):
    """Its file may be of other options than the model's name says: values bit for bit, and nothing resized twice."""
    torch.manual_seed(0)
    for path, kwargs in (('/large.pth', dict(img_size=192)), ('/linear.pth', dict(attn_types=('ls',) * 4))):
        weights = timm.create_model(MODEL, **kwargs).state_dict()
        server.files[path] = file_bytes(weights)
        assert same(from_url(server, path, **kwargs), weights)
        assert same(from_url(server, path, **kwargs), weights) and server.hits.count(path) == 1  # kept


def test_from_1000_classes_only_the_head_is_fresh(tmp_path):
    reference = timm.create_model('vil_ls_tiny').state_dict()
    save_file(reference, tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'))
    for num_classes in (10, 0):
        model = timm.create_model(
            'vil_ls_tiny', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes)
        assert changed(model, reference) == {'head.weight', 'head.bias'}


def test_features_only():
    model = timm.create_model(MODEL, pretrained=True, features_only=True)
    reference = timm.create_model(MODEL, pretrained=True)
    x = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        maps = reference.eval().forward_intermediates(x, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(model.eval()(x), maps, strict=True))


# The hub

HUB_SCRIPT = '''
import json, os, sys, tempfile
import timm, timm_ls, torch
import huggingface_hub.constants as constants
from timm_ls.pretrained import sources
torch.manual_seed(0)
x = torch.rand(1, 3, 96, 96)
revision, mine = sys.argv[1:3]

def logits(name, **kwargs):
    with torch.inference_mode():
        return timm.create_model(name, pretrained=True, **kwargs).eval()(x)

def error(**kwargs):
    try:
        timm.create_model(kwargs.pop('name', 'test_vil_ls'), pretrained=True, **kwargs)
    except Exception as e:
        return f'{type(e).__name__}: {e}'
    return None

def published(hub_id, revision=None, **changes):
    entry = {**sources.catalogue()['test_vil_ls.digits'], 'file': None, 'hf_hub_id': hub_id,
             'hf_hub_revision': revision, 'url': None, 'sha256': None, **changes}
    sources.catalogue()['test_vil_ls.digits'] = entry
    cfg = timm.models._registry._model_pretrained_cfgs['test_vil_ls.digits']
    cfg.file, cfg.hf_hub_id, cfg.url = [
        sources.published_sources('test_vil_ls.digits').get(key) for key in ('file', 'hf_hub_id', 'url')]

expected = torch.load(mine, weights_only=True)
results = {
    'hf-hub': torch.equal(logits('hf-hub:owner/digits'), expected),
    'hf-hub@revision': torch.equal(logits('hf-hub:owner/digits@' + revision), expected),
    'hf_hub_id named': torch.equal(
        logits('test_vil_ls', pretrained_cfg_overlay=dict(hf_hub_id='owner/digits')), expected),
    'only a pickle': error(name='hf-hub:owner/pickle'),
    'pickle by name': error(pretrained_cfg_overlay=dict(hf_hub_id='owner/pickle', hf_hub_filename='pytorch_model.bin')),
    'missing repository': error(pretrained_cfg_overlay=dict(hf_hub_id='owner/nothing')),
    'missing revision': error(pretrained_cfg_overlay=dict(hf_hub_id='owner/digits@nowhere')),
}
published('owner/digits', revision)
results['published, pinned'] = torch.equal(logits('test_vil_ls'), expected)
published('owner/digits', revision, sha256=sys.argv[3])
results['published, checksum'] = torch.equal(logits('test_vil_ls'), expected)
published('owner/digits', revision, sha256='0' * 64)
results['published, wrong checksum'] = error()
published('owner/nothing', None, url=sys.argv[4])
results['repository gone, the original instead'] = torch.equal(logits('test_vil_ls'), expected)
results['cached conversion before the hub'] = torch.equal(logits('test_vil_ls'), expected)
constants.HF_HUB_OFFLINE = True
published('owner/digits', revision)
results['offline, cached'] = torch.equal(logits('test_vil_ls'), expected)
published('owner/other', None)
results['offline, not cached'] = error()
results['cache'] = str(constants.HF_HUB_CACHE)
print(json.dumps(results))
'''


def run_script(script, *args, env):
    return subprocess.run([sys.executable, *([str(script)] if isinstance(script, Path) else ['-c', script]), *args],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_hub_round_trip(tmp_path, server, monkeypatch, capsys):
    """Convert, publish and load through the real client, in processes of their own; bit-equal logits throughout."""
    folder = tmp_path / 'digits'
    torch.manual_seed(0)
    x = torch.rand(1, 3, 96, 96)
    checkpoint = released_checkpoint(timm.create_model(MODEL), 1)
    model = timm.create_model(MODEL)
    model.load_state_dict(copy.deepcopy(checkpoint))
    with torch.inference_mode():
        torch.save(model.eval()(x), tmp_path / 'logits.pth')
    original = tmp_path / 'model_best.pth'
    original.write_bytes(file_bytes(checkpoint))
    server.files['/model_best.pth'] = original.read_bytes()

    with Hub() as hub:
        env = {key: value for key, value in os.environ.items() if key != 'HF_TOKEN'}
        env.update(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / 'hf'), PYTHONPATH=str(ROOT), HF_HUB_DISABLE_XET='1')
        # the catalogue knows the checksum of the weights that ship, not of these
        monkeypatch.setitem(catalogue(), NAME, {**catalogue()[NAME], 'sha256': None})
        convert = runpy.run_path(str(ROOT / 'weights' / 'convert.py'))['convert']
        publish = runpy.run_path(str(ROOT / 'weights' / 'publish.py'))['main']

        sha256 = convert(NAME, folder, original)
        assert sorted(path.name for path in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
        config = json.loads((folder / 'config.json').read_text())
        assert config['num_classes'] == 10 and 'num_classes' not in config.get('model_args', {})
        card = (folder / 'README.md').read_text()
        assert 'license: mit' in card and sha256 in card and '{{' not in card
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
        with torch.inference_mode():
            assert torch.equal(loaded.eval()(x), torch.load(tmp_path / 'logits.pth'))

        args = [NAME, '--folder', str(folder), '--repo', 'owner/digits']
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        monkeypatch.setattr(sys, 'argv', ['publish.py', *args])
        publish()
        assert 'dry run' in capsys.readouterr().out
        monkeypatch.delenv('HF_TOKEN')
        monkeypatch.setattr(sys, 'argv', ['publish.py', *args, '--upload'])
        with pytest.raises(SystemExit, match='HF_TOKEN is not set'):
            publish()
        assert not hub.repos
        upload = ('import runpy, sys; from timm_ls.pretrained.sources import catalogue;'
                  f"catalogue()['{NAME}']['sha256'] = None;"
                  'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")')
        result = run_script(
            upload, str(ROOT / 'weights' / 'publish.py'), *args, '--upload', env=dict(env, HF_TOKEN=TOKEN))
        assert result.returncode == 0, result.stderr
        revision = json.loads(result.stdout)['hf_hub_revision']
        tree = hub.find('owner/digits', revision)[1]
        assert tree['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
        assert ('PUT', f'/lfs/{sha256}') in hub.log

        canary = tmp_path / 'canary'
        hub.commit(
            'owner/pickle', {'pytorch_model.bin': file_bytes(Canary(canary)), 'config.json': tree['config.json']})
        hub.log.clear()
        result = run_script(
            HUB_SCRIPT, revision, str(tmp_path / 'logits.pth'), sha256, server.url('/model_best.pth'), env=env)
        assert result.returncode == 0, result.stderr
        results = json.loads(result.stdout)
        assert not canary.exists() and not any(path.endswith('.bin') for _, path in hub.log)
        assert results.pop('cache').startswith(str(tmp_path / 'hf'))
        assert 'has no model.safetensors. Pickles are not read from a hub' in results.pop('only a pickle')
        assert "'pytorch_model.bin' is not safetensors" in results.pop('pickle by name')
        assert 'Could not download model.safetensors from owner/nothing' in results.pop('missing repository')
        assert 'nowhere' in results.pop('missing revision')
        assert 'not the file that the catalogue describes' in results.pop('published, wrong checksum')
        offline = results.pop('offline, not cached')
        assert 'owner/other' in offline and 'not in the local cache' in offline
        assert len(results) == 8 and all(value is True for value in results.values()), results
        assert len(server.hits) == 1


def test_converted_folder_in_transformers(tmp_path):
    transformers = pytest.importorskip('transformers')
    convert = runpy.run_path(str(ROOT / 'weights' / 'convert.py'))['convert']
    assert convert(NAME, tmp_path / 'digits') == catalogue()[NAME]['sha256']  # the shipped file, byte for byte
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'digits').eval()
    x = torch.rand(1, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(theirs(x).logits, timm.create_model(MODEL, pretrained=True).eval()(x))


def test_damaged_hub_download_is_repeated(tmp_path):
    with Hub() as hub:
        hub.commit('owner/digits', {'model.safetensors': (sources.SHIPPED_DIR / f'{NAME}.safetensors').read_bytes()})
        hub.corrupt_next = 1
        code = ('import timm, timm_ls; from timm_ls.pretrained.sources import from_hub, is_intact;'
                'path = from_hub("owner/digits"); print(is_intact(path))')
        env = dict(os.environ, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / 'hf'))
        result = run_script(code, env=env)
        assert result.stdout.strip() == 'True', result.stderr
        assert hub.corrupt_next == 0 and sum(method == 'GET' for method, path in hub.log if 'resolve' in path) == 2
