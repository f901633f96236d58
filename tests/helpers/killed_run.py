"""`python killed_run.py STEP SCRIPT ARGS...` runs a script and ends it by SIGKILL in that step of training."""
import os
import runpy
import signal
import sys

from timm_ls.pyramid_transformer import PyramidTransformer


def kill_in_step(step):
    """Make the forward pass of this number, counted over all models in training mode, the process's last."""
    forward, calls = PyramidTransformer.forward, 0

    def counted(self, x):
        nonlocal calls
        calls += self.training
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, x)

    PyramidTransformer.forward = counted


if __name__ == '__main__':
    kill_in_step(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name='__main__')
