"""Several processes, started by torchrun on this machine's CPU, train as one does on the whole batch."""
import json
import os
import subprocess
import sys

import pytest
from paths import HELPERS, ROOT


@pytest.fixture(scope='module')
def reports():
    """What two processes find out about both families."""
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
        str(HELPERS / 'distributed_worker.py'), 'vil_ls_small', 'cvt_ls_13']
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-5000:]
    found = {}
    for line in result.stdout.splitlines():
        if line.startswith('report '):
            found.update(json.loads(line.removeprefix('report ')))
    print(json.dumps(found, indent=1))
    return found


@pytest.mark.parametrize('name', ['vil_ls_small', 'cvt_ls_13'])
@pytest.mark.parametrize('way', ['DDP', 'FSDP2', 'DDP, checkpointing', 'FSDP2, checkpointing'])
def test_gradients(reports, name, way):
    """Those of one process; CvT-LS with BatchNorm by its running statistics."""
    assert reports[name][way] < 1e-5


@pytest.mark.parametrize('name', ['vil_ls_small', 'cvt_ls_13'])
def test_fsdp2(reports, name):
    """Parameters are divided, bfloat16 computes other gradients but not very, and one file holds all of the model."""
    report = reports[name]
    assert report['parameters in shards']
    assert 1e-4 < report['FSDP2, bfloat16'] < .1
    assert report['full state dict'] and report['output']


@pytest.mark.parametrize('maker', ['torch', 'timm'])
def test_synchronized_batchnorm(reports, maker):
    """Both conversions reach every BatchNorm of CvT-LS and keep weights and outputs; torch trains it on GPUs only."""
    report = reports['cvt_ls_13']['SyncBatchNorm'][maker]
    assert report['layers'] == 4
    assert report['converted'] and report['same_weights'] and report['same_output']
    assert 'GPU' in report['trains_on_cpu']
