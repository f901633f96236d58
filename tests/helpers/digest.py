"""`python digest.py MODEL ...` prints a digest of all bits of each model's logits and gradients."""
import hashlib
import sys

import timm
import torch

import timm_ls  # noqa: F401 registers the models


def digest(name):
    """Of a training step at the model's own size, and of inference at another one."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    logits = model.train()(torch.randn(2, *model.pretrained_cfg['input_size']))
    logits.square().sum().backward()
    with torch.no_grad():
        inferred = model.eval()(torch.randn(1, 3, 330, 250))
    bits = hashlib.sha256()
    for tensor in (logits, inferred, *(parameter.grad for parameter in model.parameters())):
        assert tensor.isfinite().all()
        bits.update(tensor.detach().numpy().tobytes())
    return bits.hexdigest()


if __name__ == '__main__':
    for name in sys.argv[1:]:
        print(name, digest(name))
