"""`python killed_run.py STEP SCRIPT ARGS...` runs a script and ends it by SIGKILL in that step of training."""
import os
import runpy
import signal
import sys
from itertools import count

from torch.optim.optimizer import register_optimizer_step_pre_hook


def kill_in_step(step):
    """Make the process end before the optimizer takes the step of this number."""
    steps = count(1)

    def check(*_):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_pre_hook(check)


if __name__ == '__main__':
    kill_in_step(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name='__main__')
