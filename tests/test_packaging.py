"""What is shipped and promised beside the numbers: registry, types, style, the package as it is built and installed."""
import ast
import graphlib
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from paths import ROOT


def call(*command, cwd=ROOT, timeout=550, **env):
    """Run a command and return what it printed; fails with all that it said if it fails."""
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, **{name: str(value) for name, value in env.items()}})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


REGISTRY = """
import timm, timm.models._registry as registry
names = timm.list_models()
assert timm.list_models(module='vil_ls') == timm.list_models(module='cvt_ls') == []
entrypoints = {name: timm.models.model_entrypoint(name) for name in names}
configs = {name: timm.models.get_pretrained_cfg(name) for name in timm.list_models(include_tags=True, pretrained=True)}
import timm_ls
assert {name: timm.models.model_entrypoint(name) for name in names} == entrypoints
assert {name: timm.models.get_pretrained_cfg(name) for name in configs} == configs
added = set(timm.list_models()) - set(names)
assert all(timm.models.model_entrypoint(name).__module__ in ('timm_ls.vil_ls', 'timm_ls.cvt_ls') for name in added)
for module in ('vil_ls', 'cvt_ls'):
    print(*timm.list_models(module=module))
assert added == set(timm.list_models(module='vil_ls') + timm.list_models(module='cvt_ls'))
"""


def test_registry():
    """Importing adds our names, under our modules, and changes nothing of timm's."""
    vil, cvt = call(sys.executable, '-W', 'error:Overwriting', '-c', REGISTRY).splitlines()
    assert 'vil_ls_medium' in vil.split() and 'test_vil_ls' in vil.split()
    assert cvt.split() == ['cvt_ls_13', 'cvt_ls_17', 'cvt_ls_21', 'cvt_ls_21s', 'test_cvt_ls']


def test_ruff():
    """The style that pyproject.toml asks for."""
    call(sys.executable, '-m', 'ruff', 'check', '.')


def imports(module, path, modules):
    """The modules of the package that a module imports as it is imported, but for packages."""
    package = module if path.name == '__init__.py' else module.rpartition('.')[0]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            parents = package.split('.')
            base = '.'.join([*parents[:len(parents) - node.level + 1], *filter(None, [node.module])])
            found |= {f'{base}.{name.name}' if f'{base}.{name.name}' in modules else base for name in node.names}
    return {name for name in found - {module} if modules[name].name != '__init__.py'}


def test_imports_run_one_way():
    """In no circle; and from the families down to `ops`."""
    root = ROOT / 'timm_ls'
    modules = {}
    for path in root.rglob('*.py'):
        parts = path.relative_to(ROOT).with_suffix('').parts
        modules['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    graph = {module: imports(module, path, modules) for module, path in modules.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)  # or it raises an error
    levels = (('timm_ls.vil_ls', 'timm_ls.cvt_ls'), 'timm_ls.pyramid_transformer', 'timm_ls.attention', 'timm_ls.ops')

    def level(module):
        return next((n for n, names in enumerate(levels) if module.startswith(names)), -1)

    upward = {
        (module, other) for module, others in graph.items() for other in others if -1 < level(other) < level(module)}
    assert graph['timm_ls.vil_ls'] > {'timm_ls.pyramid_transformer'} and upward == set()


USER_SCRIPT = """
from typing import Optional, Tuple
import torch
import timm_ls

layer = timm_ls.LongShortAttention2d(dim=96, num_heads=3, window_size=7, rank=8)
reveal_type(layer.forward)
reveal_type(timm_ls.VilLs(img_size=(224, 320)))
reveal_type(timm_ls.warm_start(timm_ls.CvtLs(), 'weights.pth'))
model = timm_ls.fuse_conv_bn(timm_ls.CvtLs().eval())
with timm_ls.attention_implementation('masked'):
    pass
"""


@pytest.mark.slow
def test_types(tmp_path):
    """mypy finds nothing in the package, and a user's script sees its types and is told of a wrong one."""
    call(sys.executable, '-m', 'mypy', '--cache-dir', tmp_path / 'cache')
    script = tmp_path / 'script.py'
    script.write_text(USER_SCRIPT)
    mypy = (sys.executable, '-m', 'mypy', '--strict', '--config-file', os.devnull, '--ignore-missing-imports',
            '--follow-imports', 'silent', '--cache-dir', tmp_path / 'cache', script)
    printed = call(*mypy, cwd=tmp_path, MYPYPATH=ROOT)
    for seen in ('torch._tensor.Tensor', 'timm_ls.vil_ls.VilLs', 'timm_ls.pretrained.warm_start.WarmStart'):
        assert seen in printed
    script.write_text(USER_SCRIPT + "timm_ls.LongShortAttention2d(dim='96')\n")
    result = subprocess.run(
        mypy, cwd=tmp_path, env={**os.environ, 'MYPYPATH': str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 1 and 'incompatible type "str"; expected "int"' in result.stdout


@pytest.mark.slow
def test_installed_versions_agree():
    """`pip check`: every requirement of every installed package is met."""
    call(sys.executable, '-m', 'pip', 'check')


@pytest.mark.slow
def test_built_package(tmp_path):
    """Wheel and source distribution hold what they should, and each runs the README's command where it is installed."""
    copy = tmp_path / 'source'
    tracked = call('git', 'ls-files').splitlines()
    for name in tracked:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    call(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path / 'dist', copy)
    wheel, = (tmp_path / 'dist').glob('*.whl')
    source, = (tmp_path / 'dist').glob('*.tar.gz')

    package = {name for name in tracked if name.startswith('timm_ls/') and not name.endswith('.md')}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    assert held == package
    with tarfile.open(source) as archive:
        held = {name.partition('/')[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert package | {'pyproject.toml', 'README.md', 'LICENSE'} <= held
    stray = {name for name in held - set(tracked) if not name.startswith('timm_ls.egg-info/')}
    assert stray <= {'PKG-INFO', 'setup.cfg'}

    for distribution in (wheel, source):
        installed, empty = tmp_path / distribution.suffix, tmp_path / f'empty{distribution.suffix}'
        empty.mkdir()
        call(sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '--target',
             installed, distribution)
        origin = call(sys.executable, '-c', 'import timm_ls; print(timm_ls.__file__)', cwd=empty, PYTHONPATH=installed)
        assert Path(origin.strip()).is_relative_to(installed)
        printed = call(sys.executable, '-m', 'timm_ls', cwd=empty, PYTHONPATH=installed)
        assert 'stages.3: stride 32, [1, 768, 7, 7]' in printed
        assert [path.name for path in empty.iterdir()] == ['pyramid.png']
