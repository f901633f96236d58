"""Two runs of the same are equal to the last bit, whatever else the machine does: nothing depends on a stopwatch."""
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from paths import HELPERS, ROOT, TESTS


@contextmanager
def busy_loops(number):
    """So many processes that do nothing, as fast as they can."""
    loops = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(number)]
    try:
        yield
        assert all(loop.poll() is None for loop in loops)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def start(*arguments):
    """Start Python with the package, as a user would."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT), PYTHONWARNINGS='ignore'))


def printed_by(process):
    printed = process.communicate()[0]
    assert process.returncode == 0, printed[-3000:]
    return printed


@pytest.mark.parametrize('pairs, loops, names', [
    (2, 1, ('test_vil_ls', 'test_cvt_ls')),
    pytest.param(10, 2, ('vil_ls_tiny', 'cvt_ls_13'), marks=pytest.mark.slow),
])
def test_processes_agree(pairs, loops, names):
    """Logits and gradients of pairs of processes, of which every second pair has busy loops beside it."""
    printed = []
    for i in range(pairs):
        with busy_loops(loops * (i % 2)):
            pair = [start(HELPERS / 'digest.py', *names) for _ in range(2)]
            printed += [printed_by(process) for process in pair]
    assert [line.split()[0] for line in printed[0].splitlines()] == list(names), printed[0]
    assert printed == printed[:1] * 2 * pairs


@pytest.mark.slow
def test_resumed_runs_end_as_whole_ones():
    """The recipes that are killed and resumed, ten times beside two busy loops."""
    with busy_loops(2):
        for _ in range(10):
            printed = printed_by(start(
                '-m', 'pytest', '-o', 'addopts=', '-q', '-m', 'not slow', '-p', 'no:cacheprovider', '-k',
                'test_killed_run_ends_with_the_same_weights', TESTS / 'test_recipes.py'))
            print(printed.splitlines()[-1])
            assert printed.splitlines()[-1].startswith('3 passed'), printed  # none was skipped
