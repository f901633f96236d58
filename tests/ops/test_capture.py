"""What the forward pass knows of those who capture it."""
import threading

import pytest
import torch

from timm_ls.ops import capture


@pytest.mark.parametrize('compiles', [
    pytest.param(True, marks=pytest.mark.skipif(
        not capture.COMPILES_CONTEXT_VARIABLES, reason='torch before 2.15 compiles no context variables')), False])
def test_context_setting(compiles, monkeypatch):
    """Compiled code, as one graph, follows what is set and reset; another thread has its own value in eager mode."""
    monkeypatch.setattr(capture, 'COMPILES_CONTEXT_VARIABLES', compiles)
    torch.compiler.reset()
    setting = capture.ContextSetting('number', 1.)
    compiled = torch.compile(lambda x: x * setting.get(), backend='eager', fullgraph=True)
    x, seen = torch.ones(1), []
    token = setting.set(2.)
    values = [compiled(x).item(), setting.get()]
    thread = threading.Thread(target=lambda: seen.append(setting.get()))
    thread.start()
    thread.join()
    setting.reset(token)
    assert [*values, compiled(x).item(), setting.get(), *seen] == [2., 2., 1., 1., 1.]


def test_compiled_not_exported():
    """Each knows what it is."""
    class Tell(torch.nn.Module):
        def forward(self, x):
            return x + (1 if capture.is_captured() else 0) + (2 if capture.is_compiled() else 0)

    x = torch.zeros(1)
    assert Tell()(x).item() == 0
    assert torch.compile(Tell(), backend='eager', fullgraph=True)(x).item() == 3
    for strict in (False, True):
        assert torch.export.export(Tell(), (x,), strict=strict).module()(x).item() == 1
