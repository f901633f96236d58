"""Plain Vision Longformer (ViL), evaluated from its weights by their released names: a source model for warm starts.

From the paper (arXiv 2103.15358) and the released layers' behaviour: the map is cut into w x w chunks, a patch attends
to its own chunk, the eight around it as far as they lie inside the map, and the class token; the class token attends to
all. Logits are scaled by 1 / sqrt(channels per head) and biased by offset. Shares no code with the package.
"""
import torch
import torch.nn.functional as F


def _heads(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def _linear(x, weights, name):
    return F.linear(x, weights[f'{name}.weight'], weights[f'{name}.bias'])


def _norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f'{name}.weight'], weights[f'{name}.bias'], 1e-6)


def _offset_bias(table, q_places, k_places, reach):
    """Bias [heads, Q, K] of a table [(2 * reach + 1) ** 2, heads] by the offset of query minus key."""
    offsets = q_places[:, None] - k_places[None] + reach
    return table[offsets[..., 0] * (2 * reach + 1) + offsets[..., 1]].permute(2, 0, 1)


def _attention(x, weights, name, g, height, width, window):
    """One attention layer over tokens [g + height * width, C]: chunked where it has a `query`, else full."""
    chunked = f'{name}.query.weight' in weights
    table = weights[f'{name}.local_relative_position_bias_table']
    num_heads = table.shape[1]
    if chunked:
        q = _linear(x, weights, f'{name}.query')
        k, v = _linear(x, weights, f'{name}.kv').chunk(2, dim=-1)
    else:
        q, k, v = _linear(x, weights, f'{name}.qkv').chunk(3, dim=-1)
    q, k, v = _heads(q, num_heads) * (x.shape[-1] // num_heads) ** -.5, _heads(k, num_heads), _heads(v, num_heads)
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    places = torch.stack([rows.flatten(), cols.flatten()], dim=1)
    from_global = to_global = None
    if g > 0:
        from_global, to_global = weights[f'{name}.g2l_relative_position_bias']
    out = torch.empty_like(q)

    chunks = places // window if chunked else torch.zeros_like(places)
    for chunk in chunks.unique(dim=0):
        mine = (chunks == chunk).all(1).nonzero()[:, 0]
        seen = ((chunks - chunk).abs() <= 1).all(1).nonzero()[:, 0]
        reach = 2 * window - 1 if chunked else height - 1
        bias = _offset_bias(table, places[mine], places[seen], reach)
        keys = torch.cat([torch.arange(g), g + seen])
        if g > 0:
            bias = torch.cat([to_global[:, None].expand(-1, len(mine), -1), bias], dim=-1)
        weight = (q[:, g + mine] @ k[:, keys].transpose(1, 2) + bias).softmax(-1)
        out[:, g + mine] = weight @ v[:, keys]
    if g > 0:
        among = weights[f'{name}.g2g_relative_position_bias']
        bias = torch.cat([among, from_global[..., None].expand(-1, -1, height * width)], dim=-1)
        out[:, :g] = (q[:, :g] @ k.transpose(1, 2) + bias).softmax(-1) @ v
    return _linear(out.transpose(0, 1).flatten(1), weights, f'{name}.proj')


def stages(weights, images, window):
    """Maps [B, C, H, W] after each stage, its class token left out; `*_global` projections are the shared ones."""
    result, x = [], images
    for stage in range(1, 5):
        prefix = f'layer{stage}'
        kernel = weights[f'{prefix}.0.proj.weight']
        x = F.conv2d(x, kernel, weights[f'{prefix}.0.proj.bias'], stride=kernel.shape[-1])
        B, C, height, width = x.shape
        x = _norm(x.flatten(2).transpose(1, 2), weights, f'{prefix}.0.norm_embed')
        g = 0
        if f'{prefix}.0.cls_token' in weights:
            g = 1
            x = torch.cat([weights[f'{prefix}.0.cls_token'].expand(B, -1, -1), x], dim=1)
        index = 1
        while f'{prefix}.{index}.norm.weight' in weights:
            normed = _norm(x, weights, f'{prefix}.{index}.norm')
            x = x + torch.stack([
                _attention(image, weights, f'{prefix}.{index}.attn', g, height, width, window) for image in normed])
            normed = _norm(x, weights, f'{prefix}.{index + 1}.norm')
            hidden = F.gelu(_linear(normed, weights, f'{prefix}.{index + 1}.mlp.fc1'))
            x = x + _linear(hidden, weights, f'{prefix}.{index + 1}.mlp.fc2')
            index += 2
        x = x[:, g:].transpose(1, 2).unflatten(2, (height, width))
        result.append(x)
    return result
