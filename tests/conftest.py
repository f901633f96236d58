"""Workers of a parallel test run share the cores: each, with the processes that its tests start, takes its part."""
import os

import torch

if 'PYTEST_XDIST_WORKER_COUNT' in os.environ:
    threads = max(1, torch.get_num_threads() // int(os.environ['PYTEST_XDIST_WORKER_COUNT']))
    torch.set_num_threads(threads)
    os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = str(threads)
