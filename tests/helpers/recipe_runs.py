"""What tests of recipes share: pictures to train on, runs in this process, in others, and to a violent end."""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import HELPERS, ROOT
from PIL import Image
from safetensors.torch import load_file


def draw_pictures(folder):
    """Dark and light noise, 24 images for training in two classes and 6 others, not square; returns their folder."""
    rng = np.random.default_rng(0)
    for split, number in (('train', 12), ('val', 3)):
        for label, level in (('dark', 80), ('light', 170)):
            (folder / split / label).mkdir(parents=True)
            for i in range(number):
                noise = rng.normal(level, 60, (64, 80, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(noise).save(folder / split / label / f'{i}.png')
    return folder


def alone():
    """What torchrun sets, for one process."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    return dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost', MASTER_PORT=str(port))


def run(recipe, *arguments):
    """Run a recipe in this process."""
    with pytest.MonkeyPatch.context() as patch:
        if recipe.__name__ == 'fsdp':
            for name, value in alone().items():
                patch.setenv(name, value)
        recipe.main(list(map(str, arguments)))


def environment():
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')


def run_killed(step, script, *arguments):
    """Run a script that is killed in a step of training."""
    command = [sys.executable, HELPERS / 'killed_run.py', step, script, *arguments]
    env = dict(environment(), **alone() if Path(script).stem == 'fsdp' else {})
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env)
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]


def run_in_processes(number, script, *arguments):
    """Run a script by torchrun on this machine; returns what it printed."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', number, script]
    result = subprocess.run(list(map(str, [*command, *arguments])), capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout


def assert_same_weights(actual, expected):
    actual, expected = load_file(actual / 'weights.safetensors'), load_file(expected / 'weights.safetensors')
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f'{name}: {(actual[name] - value).abs().max()}'
