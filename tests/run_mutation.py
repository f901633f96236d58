"""Plant faults in the package, one at a time, and see whether the tests notice.

    python tests/run_mutation.py [--seed N] [--json FILE] [--only MODULE.py ...]

Needs `pip install cosmic-ray`, which finds the places and plants the faults. Works on a copy of the repository: nothing
here is changed, and several runs may go on at a time. Takes the better part of an hour on one core.
"""
import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import WorkItem

ROOT = Path(__file__).parent.parent
TIMEOUT = 3600  # seconds per fault, for slow machines; a loop that does not end counts as noticed

# Which tests answer for which modules, the quick ones first; and how many faults are drawn from each module
ATTENTION_TESTS = (
    'tests/test_attention.py -k "axis_spans or released or mixed or table or plain or mix or tile_size or outside"',
    'tests/test_attention.py --deselect tests/test_attention.py::test_oracle_sweep',
    'tests/test_attention.py::test_oracle_sweep tests/test_properties.py',
    'tests/test_streaming.py',
    'tests/test_graphs.py -k "test_script or test_symbolic_trace"',
)
MODEL_TESTS = (
    'tests/test_timm_contract.py -k "test_vil_ls or test_cvt_ls"',
    'tests/test_vil_ls.py tests/test_cvt_ls.py',
    'tests/test_graphs.py -k "test_script or test_symbolic_trace"',
)
LOADING_TESTS = ('tests/test_warm_start.py', 'tests/test_vil_ls.py tests/test_pretrained.py')
GROUPS = (
    (ATTENTION_TESTS, {'window.py': 14, 'rel_pos.py': 12, 'window_attention.py': 26, 'attention.py': 16}),
    (MODEL_TESTS, {'backbone.py': 4, 'vil_ls.py': 2, 'cvt_ls.py': 3, 'complexity.py': 1}),
    (LOADING_TESTS, {'checkpoint.py': 1, 'warm_start.py': 2, 'pretrained.py': 4}),
    (('tests/test_streaming.py',), {'streaming.py': 5}),
    (('tests/test_visualize.py',), {'visualize.py': 5}),
    (('tests/test_pyramid.py', 'tests/test_detection.py'), {'pyramid.py': 4, 'segmentation.py': 1, 'detection.py': 3}),
    (('tests/test_linear.py',), {'linear.py': 4}),
    (('tests/test_precision.py',), {'precision.py': 3}),
    (('tests/test_cli.py', 'tests/test_benchmark.py'), {'__main__.py': 3, 'cli.py': 1, 'benchmark.py': 5}),
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seed', type=int, default=0, help='of the sample of faults (default: %(default)s)')
    parser.add_argument('--json', metavar='FILE', help='write every fault and its fate')
    parser.add_argument('--only', nargs='+', metavar='MODULE.py', help='modules of timm_ls/ (default: all in the list)')
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / 'timm-ls'
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '__pycache__', '.*_cache', '.hypothesis'))
        os.chdir(copy)
        for tests, modules in GROUPS:
            command = test_command(tests)
            for module, count in modules.items():
                if args.only is None or module in args.only:
                    for fault in draw(Path('timm_ls', module), count, args.seed):
                        results.append(plant(fault, command))
                        print_fate(results[-1])
    print_summary(results)
    if args.json:
        (ROOT / args.json).write_text(json.dumps(results, indent=1) + '\n')


def test_command(tests: tuple) -> str:
    """A shell command that runs groups of tests until the first failure."""
    pytest = f"{sys.executable} -m pytest -o addopts= -m 'not slow' -x -q -p no:cacheprovider"
    steps = ' && '.join(f'{pytest} {group}' for group in tests).replace("'", "'\\''")
    return f"bash -c '{steps}'"


def draw(module: Path, count: int, seed: int) -> Iterator[WorkItem]:
    """Draw faults at different places: first the places, then one of the faults that are possible at each."""
    with tempfile.TemporaryDirectory() as directory:
        database = WorkDB(str(Path(directory) / 'faults.sqlite'), WorkDB.Mode.create)
        init([module], database, {})
        places = collections.defaultdict(list)
        for item in database.work_items:
            places[item.mutations[0].start_pos].append(item)
        database.close()
    generator = random.Random(f'{module.name} {seed}')
    for place in sorted(generator.sample(sorted(places), min(count, len(places)))):
        faults = sorted(places[place], key=lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence))
        yield generator.choice(faults)


def plant(fault: WorkItem, command: str) -> Dict[str, Any]:
    """Run the tests with a fault in place."""
    start = time.time()
    result = mutate_and_test(fault.mutations, command, TIMEOUT)
    mutation = fault.mutations[0]
    failed = [line for line in (result.output or '').splitlines() if line.startswith(('FAILED', 'ERROR'))]
    return dict(
        module=mutation.module_path.name,
        line=mutation.start_pos[0],
        operator=mutation.operator_name.removeprefix('core/'),
        caught=result.is_killed,
        by=(failed or (result.output or '').splitlines()[-1:] or [''])[0][:160],
        seconds=round(time.time() - start),
        change=[line for line in (result.diff or '').splitlines()
                if line[:1] in '+-' and not line.startswith(('---', '+++'))],
    )


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
