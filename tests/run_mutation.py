"""Plant faults in the package, one at a time, and see whether the tests notice.

    python tests/run_mutation.py [--seed N] [--json FILE] [--only PATH.py ...] [--count N]

Needs `pip install cosmic-ray`, which finds the places and plants the faults. Works on a copy of the repository: nothing
here is changed, and several runs may go on at a time. torch and the like are imported once: each fault is tried in a
fork. Takes the better part of an hour on one core.
"""
import argparse
import collections
import importlib
import json
import os
import random
import resource
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import cosmic_ray.plugins
import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).resolve().parent.parent
CPU_SECONDS = 900  # of a fault's tests, for slow machines; a loop that does not end counts as noticed
MEMORY = 12 * 2 ** 30  # bytes, for sizes that grow out of hand
IMPORTED_ONCE = ('torch', 'torch._dynamo', 'torch.export', 'torchvision', 'timm', 'hypothesis', 'numpy')

# Which tests answer for which modules, the quick ones first; and how many faults are drawn from each module
OPS, LAYERS = 'tests/ops/', 'tests/attention/test_long_short.py tests/attention/test_full.py'
CONTRACT = OPS + 'test_window_attention.py --deselect tests/ops/test_window_attention.py::test_oracle_sweep'
MERGE = OPS + 'test_merge.py -k "parts or few or pool_tokens or kernels or types or layer_norm"'
CHUNKED = 'tests/attention/test_chunked.py'
GRAPHS = 'tests/test_graphs.py -k "test_script or test_symbolic_trace or test_jit_trace or test_make_fx"'
MODELS = ('tests/test_timm_contract.py -k "test_vil_ls or test_cvt_ls"', 'tests/test_vil_ls.py tests/test_cvt_ls.py')
GROUPS: Tuple[Tuple[Sequence[str], Dict[str, int]], ...] = (
    ((OPS + 'test_windows.py', OPS + 'test_tiled.py', CONTRACT, LAYERS, CHUNKED), {'ops/windows.py': 12}),
    ((OPS + 'test_tiled.py', CONTRACT + ' -k tiled', CONTRACT, OPS + 'test_merge.py'), {'ops/tiled.py': 10}),
    ((CONTRACT + ' -k masked', CONTRACT, GRAPHS), {'ops/masked.py': 5}),
    ((CONTRACT + ' -k grouped', CONTRACT, GRAPHS), {'ops/grouped.py': 6}),
    ((MERGE, CHUNKED, OPS + 'test_merge.py', GRAPHS), {'ops/merge.py': 8}),
    ((CONTRACT, GRAPHS), {'ops/window_attention.py': 5}),
    ((OPS + 'test_indices.py', CONTRACT, GRAPHS), {'ops/indices.py': 1}),
    ((OPS + 'test_attend.py', MERGE, LAYERS, GRAPHS),
     {'ops/attend.py': 4, 'ops/derivatives.py': 1, 'ops/autocast.py': 1}),
    ((CHUNKED, OPS + 'test_tiled.py', CONTRACT, GRAPHS), {'ops/chunks.py': 2, 'ops/capture.py': 2}),
    ((LAYERS, MERGE, CHUNKED, *MODELS, GRAPHS), {'attention/long_short.py': 6, 'attention/full.py': 5}),
    ((CHUNKED,), {'attention/chunked.py': 6}),
    (('tests/attention/test_rel_pos.py', LAYERS, *MODELS, GRAPHS), {'attention/rel_pos.py': 5}),
    (('tests/attention/test_layers.py', LAYERS, MERGE), {'attention/layers.py': 4}),
    ((CONTRACT + ' -k explanation',), {'attention/explain.py': 2}),
    ((*MODELS, GRAPHS), {'pyramid_transformer.py': 5, 'vil_ls.py': 2, 'cvt_ls.py': 4, 'complexity.py': 1}),
    (('tests/pretrained/test_warm_start.py', 'tests/test_vil_ls.py', 'tests/pretrained/test_sources.py'),
     {'pretrained/checkpoint.py': 1, 'pretrained/warm_start.py': 2, 'pretrained/sources.py': 4}),
    (('tests/test_visualize.py',), {'visualize.py': 5}),
    (('tests/test_fpn.py', 'tests/test_detection.py'), {'fpn.py': 4, 'segmentation.py': 1, 'detection.py': 3}),
    (('tests/test_linear.py',), {'linear.py': 4}),
    (('tests/test_precision.py',), {'precision.py': 3}),
    (('tests/test_cli.py', 'tests/test_export.py', 'tests/test_benchmark.py'),
     {'__main__.py': 3, 'cli.py': 1, 'export.py': 3, 'benchmark.py': 5}),
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int, default=0, help='of the sample of faults (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write every fault and its fate')
    parser.add_argument('--only', nargs='+', metavar='PATH.py', help='modules of timm_ls/ (default: all in the list)')
    parser.add_argument('--count', type=int, metavar='N', help='faults of each module (default: as in the list)')
    args = parser.parse_args()
    for module in IMPORTED_ONCE:
        importlib.import_module(module)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / 'timm-ls'
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '__pycache__', '.*_cache', '.hypothesis'))
        os.chdir(copy)
        sound = set()
        for tests, modules in GROUPS:
            for module, count in modules.items():
                if args.only is None or module in args.only:
                    for group in sorted(set(tests) - sound):
                        failed, printed = run([group])
                        if failed:
                            raise SystemExit('\n'.join([*printed[-20:], f'Fails without a fault: {group}']))
                    sound.update(tests)
                    for fault in draw(module, args.count or count, args.seed):
                        results.append(plant(module, fault, tests))
                        print_fate(results[-1])
                        if args.json:
                            (ROOT / args.json).write_text(json.dumps(results, indent=1) + '\n')
    print_summary(results)


def draw(module: str, count: int, seed: int) -> Iterator[MutationSpec]:
    """Draw faults at different places: first the places, then one of the faults that are possible at each."""
    with tempfile.TemporaryDirectory() as directory:
        database = WorkDB(str(Path(directory) / 'faults.sqlite'), WorkDB.Mode.create)
        init([Path('timm_ls', module)], database, {})
        places = collections.defaultdict(list)
        for item in database.work_items:
            places[item.mutations[0].start_pos].append(item.mutations[0])
        database.close()
    generator = random.Random(f'{module} {seed}')
    for place in sorted(generator.sample(sorted(places), min(count, len(places)))):
        faults = sorted(places[place], key=lambda fault: (fault.operator_name, fault.occurrence))
        yield generator.choice(faults)


def plant(module: str, fault: MutationSpec, tests: Sequence[str]) -> Dict[str, Any]:
    """Run the tests with a fault in place."""
    operator = cosmic_ray.plugins.get_operator(fault.operator_name)(**fault.operator_args)
    start = time.time()
    with use_mutation(fault.module_path, operator, fault.occurrence) as (before, after):
        noticed, printed = run(tests)
    failed = [line for line in printed if line.startswith(('FAILED', 'ERROR'))]
    number = fault.start_pos[0] - 1
    return dict(
        module=module,
        line=number + 1,
        operator=fault.operator_name.removeprefix('core/'),
        caught=noticed,
        by=(failed or printed[-1:] or [''])[0][:160],
        seconds=round(time.time() - start),
        change=[f'- {before.splitlines()[number]}', f'+ {after.splitlines()[number]}'],
    )


def run(tests: Sequence[str]) -> Tuple[bool, List[str]]:
    """Run groups of tests in a fork until the first failure; whether there was one, and what was printed."""
    with tempfile.TemporaryFile('w+') as file:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                status = int(any(fails(group) for group in tests))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        return status != 0, file.read().splitlines()


def fails(group: str) -> bool:
    """Run a group of tests in this process, within limits."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.dont_write_bytecode = True  # a fault may be as long as what it replaces
    sys.path.insert(0, os.getcwd())
    os.environ.update(PYTHONDONTWRITEBYTECODE='1', PYTHONPATH=os.getcwd())
    options = ['-o', 'addopts=', '-m', 'not slow', '-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist']
    return pytest.main([*options, *shlex.split(group)]) != 0


def print_fate(result: Dict[str, Any]) -> None:
    """One line, and the change where nobody noticed it."""
    fate = 'caught' if result['caught'] else 'SURVIVED'
    print(f'{result["module"]}:{result["line"]} {result["operator"]}: {fate} in {result["seconds"]} s {result["by"]}')
    if not result['caught']:
        print('\n'.join(result['change']))
    sys.stdout.flush()


def print_summary(results: List[Dict[str, Any]]) -> None:
    """Shares per module and over all."""
    fates = collections.defaultdict(list)
    for result in results:
        fates[result['module']].append(result['caught'])
        fates['all'].append(result['caught'])
    print('| module | faults | caught |\n|---|---|---|')
    for module, caught in fates.items():
        print(f'| {module} | {len(caught)} | {sum(caught)} ({sum(caught) / len(caught):.0%}) |')


if __name__ == '__main__':
    main()
