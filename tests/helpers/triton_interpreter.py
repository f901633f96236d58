"""Triton's kernels without a GPU: tests in a process of their own, where its interpreter takes the compiler's place."""
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from paths import ROOT

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cpu' if INTERPRETED else 'cuda'
NO_DEVICE = 'no CUDA device: tests/ops/test_triton.py runs this under the interpreter'
needs_device = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason=NO_DEVICE)
interpreted = pytest.mark.skipif(not INTERPRETED, reason=NO_DEVICE.replace('no CUDA device', 'for a CPU'))
not_interpreted = pytest.mark.skipif(INTERPRETED, reason='has nothing to do with the interpreter')


def run_interpreted(*arguments):
    """Run tests where Triton's kernels are interpreted; none of them may miss a device. Returns what pytest says."""
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-n', '0', '-p', 'no:cacheprovider', '-q', *arguments],
        capture_output=True, text=True, cwd=ROOT, env=dict(os.environ, TRITON_INTERPRET='1'))
    assert result.returncode == 0 and 'device' not in result.stdout, result.stdout[-5000:]
    return result.stdout


def accelerate():
    """Spare the interpreter what it does in vain: patching the language in every call, checks it drops."""
    from triton.runtime import interpreter
    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


if INTERPRETED:
    accelerate()
