"""Attention layers with parameters that matter, and their values and gradients beside those of an oracle."""
import torch

from timm_ls import attention_implementation


def randomise(module, seed):
    """Give every parameter values that matter: scales near 1, everything else of order one; returns the generator."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim >= 2 and 'rel_pos' not in name:
            noise = 1.5 * noise / parameter.shape[-1] ** .5
        elif 'norm' in name and name.endswith('weight'):
            noise = 1 + .2 * noise
        parameter.data.copy_(noise)
    return generator


def draw_inputs(layer, seed, size, batch):
    """A map and global tokens for a layer, whose parameters are drawn as well."""
    generator = randomise(layer, seed)
    x = torch.randn(batch, *size, layer.dim, generator=generator, dtype=torch.float64)
    tokens = torch.randn(batch, layer.num_global_tokens, layer.dim, generator=generator, dtype=torch.float64)
    return x, tokens


def loss_of(y, tokens):
    """Of a map and global tokens; what has no tokens counts nothing."""
    return y.square().sum() + y.sum() + 2 * tokens.square().sum()


def run(layer, x, tokens, implementation='auto'):
    """Output and gradients of a layer, a list of each: of the map, the tokens, the inputs, the parameters."""
    x, tokens = x.detach().clone().requires_grad_(), tokens.detach().clone().requires_grad_()
    layer.zero_grad()
    with attention_implementation(implementation):
        y, t = layer(x, tokens if tokens.shape[1] > 0 else None)
    loss_of(y, tokens[:, :0] if t is None else t).backward()
    outputs = [y.detach()] + ([t.detach()] if t is not None else [])
    return outputs, [x.grad] + ([tokens.grad] if t is not None else []) + [p.grad for p in layer.parameters()]


def expect(layer, x, tokens, oracle):
    """The same by an oracle, image by image, gradients by autograd."""
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    x, tokens = x.detach().clone().requires_grad_(), tokens.detach().clone().requires_grad_()
    pairs = [oracle(params, x[b], tokens[b]) for b in range(x.shape[0])]
    y, t = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
    loss_of(y, t).backward()
    has_tokens = tokens.shape[1] > 0
    outputs = [y.detach()] + ([t.detach()] if has_tokens else [])
    return outputs, [x.grad] + ([tokens.grad] if has_tokens else []) + [p.grad for p in params.values()]


def worst(actual, expected):
    """Largest difference over all tensors, against the largest value among them."""
    scale = max(e.abs().max().item() for e in expected if e.numel())
    return max((a.double() - e.double()).abs().max().item() for a, e in zip(actual, expected) if e.numel()) / scale
