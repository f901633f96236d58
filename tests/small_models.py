"""Every registered model, and each at a size that a test can run: its own kinds of layers, few and narrow."""
from functools import lru_cache

import timm

import timm_ls  # noqa: F401 registers the models

NAMES = [
    name for name in timm.list_models()
    if timm.models.model_entrypoint(name).__module__.startswith('timm_ls.')]


@lru_cache
def small_args(name: str) -> dict:
    """Arguments that shrink a model, as many stages as it has."""
    stages = len(timm.create_model(name, device='meta').feature_info)
    return dict(
        embed_dims=(16, 24, 32, 48)[:stages],
        depths=(1, 1, 2, 1)[:stages],
        num_heads=(1, 2, 2, 3)[:stages],
    )


def create(name: str, **kwargs):
    """The small version of a model, arguments on top."""
    return timm.create_model(name, **dict(small_args(name), **kwargs))
