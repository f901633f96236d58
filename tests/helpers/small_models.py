"""Every registered model, and each at a size that a test can run: its own kinds of layers, few and narrow."""
import timm
import torch

import timm_ls  # noqa: F401 registers the models

NAMES = [
    name for name in timm.list_models()
    if timm.models.model_entrypoint(name).__module__.startswith('timm_ls.')]


def small_args(name: str) -> dict:
    """Arguments that shrink a model, as many stages as it has."""
    stages = 3 if timm.models.model_entrypoint(name).__module__ == 'timm_ls.cvt_ls' else 4
    return dict(
        embed_dims=(16, 24, 32, 48)[:stages],
        depths=(1, 1, 2, 1)[:stages],
        num_heads=(1, 2, 2, 3)[:stages],
    )


def create(name: str, **kwargs):
    """The small version of a model, arguments on top."""
    return timm.create_model(name, **dict(small_args(name), **kwargs))


def kind(name: str) -> tuple:
    """All that tells small models of two names apart."""
    model = create(name, device='meta')
    settings = {
        f'{key}.{name}': value for key, module in model.named_modules() for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple, list))}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return type(model), repr(model), settings, shapes


def one_of_each_kind() -> list:
    """Names whose small models stand for all others: models that differ in width and depth only shrink to the same."""
    kinds = {}
    for name in NAMES:
        of_name = kind(name)
        if of_name not in kinds.values():
            kinds[name] = of_name
    return list(kinds)


def perturbed(name: str, dtype: torch.dtype = torch.float64, **kwargs):
    """A narrow model in eval mode whose biases, norms and tokens are not at their initial values."""
    stages = len(small_args(name)['depths'])
    args = dict(
        embed_dims=(12, 24, 36, 48)[:stages],
        depths=(1, 1, 2, 1)[:stages],
        num_heads=(1, 2, 3, 3)[:stages],
        window_size=3,
        rank=4,
        num_classes=5,
    )
    torch.manual_seed(0)
    model = timm.create_model(name, **dict(args, **kwargs)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += .1 * torch.randn_like(parameter)
    return model
