"""An independent oracle for convolutional projections and the attention behind them, a query at a time.

Slow on purpose, and sharing no code with the package: plain tensor arithmetic in the dtype of its input, differentiable
by autograd. `params` are a layer's parameters and buffers by name.
"""
import math

import torch


def depthwise(x, weight, stride):
    """3 x 3 convolution of maps [B, H, W, C], every channel with its own kernel [C, 3, 3], tap by tap."""
    B, height, width, C = x.shape
    canvas = x.new_zeros(B, height + 2, width + 2, C)
    canvas[:, 1:-1, 1:-1] = x
    taps = [(dy, dx) for dy in range(3) for dx in range(3)]
    return sum(canvas[:, dy:dy + height:stride, dx:dx + width:stride] * weight[:, dy, dx] for dy, dx in taps)


def batch_norm(x, params, name, channels, training, eps=1e-5):
    """BatchNorm of maps [B, H, W, C] with the parameters of some channels of the layer `name`."""
    if training:
        count = x.shape[0] * x.shape[1] * x.shape[2]
        mean = x.sum(dim=(0, 1, 2)) / count
        variance = ((x - mean) ** 2).sum(dim=(0, 1, 2)) / count
    else:
        mean, variance = params[f'{name}.running_mean'][channels], params[f'{name}.running_var'][channels]
    scale, shift = params[f'{name}.weight'][channels], params[f'{name}.bias'][channels]
    return (x - mean) / torch.sqrt(variance + eps) * scale + shift


def linear(x, params, name):
    y = x @ params[f'{name}.weight'].T
    return y + params[f'{name}.bias'] if f'{name}.bias' in params else y


def layer_norm(x, params, name, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * params[f'{name}.weight'] \
        + params[f'{name}.bias']


def projections(params, x, kv_stride, training):
    """Queries, keys and values of maps [B, H, W, C]: depthwise convolution, BatchNorm, linear, each on its own."""
    result = []
    for index, part in enumerate('qkv'):
        name, position, parts = 'conv_qkv.depthwise', index, 3
        if kv_stride > 1 and part == 'q':
            position, parts = 0, 1
        elif kv_stride > 1:
            name, position, parts = 'conv_qkv.depthwise_kv', index - 1, 2
        channels = slice(position, None, parts)
        maps = depthwise(x, params[f'{name}.conv.weight'][channels, 0], 1 if part == 'q' else kv_stride)
        maps = batch_norm(maps, params, f'{name}.norm', channels, training)
        result.append(linear(maps, params, f'conv_qkv.{part}'))
    return result


def attend(q, keys, values, scale, bias=None):
    """One query [h, d] over keys and values [K, h, d] with a bias [h, K], softmax by hand."""
    logits = torch.einsum('hd,khd->hk', q, keys) * scale
    if bias is not None:
        logits = logits + bias
    weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    return torch.einsum('hk,khd->hd', weights / weights.sum(dim=1, keepdim=True), values)


def long_short(params, x, num_heads, window, rank, training):
    """Long-short attention without bias and global tokens over maps [B, H, W, C]."""
    B, height, width, C = x.shape
    d, halo = C // num_heads, window // 2
    q, k, v = projections(params, x, 1, training)
    k, v = layer_norm(k, params, 'norm_kv'), layer_norm(v, params, 'norm_kv')
    outputs = []
    for b in range(B):
        landmarks = [x.new_zeros(0, num_heads, d), x.new_zeros(0, num_heads, d)]
        if rank > 0:
            scores = linear(x[b].reshape(-1, C), params, 'dynamic_projection').reshape(-1, num_heads, rank)
            shares = torch.exp(scores - scores.max(dim=0).values)
            shares = shares / shares.sum(dim=0)
            landmarks = []
            for tokens in (k[b], v[b]):
                sums = torch.einsum('nhr,nhd->rhd', shares, tokens.reshape(-1, num_heads, d)).reshape(rank, C)
                landmarks.append(layer_norm(sums, params, 'norm_landmarks').reshape(rank, num_heads, d))
        keys = torch.cat([k[b].reshape(-1, num_heads, d), landmarks[0]])
        values = torch.cat([v[b].reshape(-1, num_heads, d), landmarks[1]])
        for i in range(height):
            for j in range(width):
                top, left = i - i % window - halo, j - j % window - halo
                places = [
                    y * width + z
                    for y in range(top, top + window + 2 * halo) for z in range(left, left + window + 2 * halo)
                    if 0 <= y < height and 0 <= z < width]
                places += range(height * width, height * width + rank)  # landmarks
                outputs.append(attend(
                    q[b, i, j].reshape(num_heads, d), keys[places], values[places], 1 / math.sqrt(d)).reshape(C))
    return linear(torch.stack(outputs).reshape(B, height, width, C), params, 'proj')


def full(params, x, tokens, num_heads, kv_stride, scale, training):
    """Full attention of global tokens [B, g, C] and maps [B, H, W, C], to the same, with the bias if there is one."""
    B, height, width, C = x.shape
    d, g = C // num_heads, tokens.shape[1]
    q, k, v = projections(params, x, kv_stride, training)
    q_places = [None] * g + [(i, j) for i in range(height) for j in range(width)]
    k_places = [None] * g + [(i, j) for i in range(0, height, kv_stride) for j in range(0, width, kv_stride)]
    table = params.get('rel_pos.table')
    outputs = []
    for b in range(B):
        queries, keys, values = (
            torch.cat([linear(tokens[b], params, f'conv_qkv.{part}'), maps[b].reshape(-1, C)]).reshape(-1, num_heads, d)
            for part, maps in zip('qkv', (q, k, v), strict=True))
        for a, place in enumerate(q_places):
            bias = None
            if table is not None:
                bias = []
                for c, other in enumerate(k_places):
                    if place is None and other is None:
                        bias.append(params['rel_pos.global_global'][:, a, c])
                    elif place is None:
                        bias.append(params['rel_pos.global_patch'][0, :, a])
                    elif other is None:
                        bias.append(params['rel_pos.global_patch'][1, :, c])
                    else:
                        bias.append(table[:, place[0] - other[0] + height - 1, place[1] - other[1] + width - 1])
                bias = torch.stack(bias, dim=1)
            outputs.append(attend(queries[a], keys, values, scale, bias).reshape(C))
    out = linear(torch.stack(outputs).reshape(B, -1, C), params, 'proj')
    return out[:, g:].reshape(B, height, width, C), out[:, :g]


def hugging_face_names(weights):
    """Microsoft's names turned into those of transformers' CvtForImageClassification (5.23)."""
    table = [
        ('patch_embed.proj', 'embedding.convolution_embeddings.projection'),
        ('patch_embed.norm', 'embedding.convolution_embeddings.normalization'),
        ('attn.proj_q', 'attention.attention.projection_query'),
        ('attn.proj_k', 'attention.attention.projection_key'),
        ('attn.proj_v', 'attention.attention.projection_value'),
        ('attn.proj', 'attention.output.dense'),
        ('norm1', 'layernorm_before'),
        ('norm2', 'layernorm_after'),
        ('mlp.fc1', 'intermediate.dense'),
        ('mlp.fc2', 'output.dense'),
    ]
    for letter, word in (('q', 'query'), ('k', 'key'), ('v', 'value')):
        prefix = f'attention.attention.convolution_projection_{word}.convolution_projection'
        table.insert(0, (f'attn.conv_proj_{letter}.conv', f'{prefix}.convolution'))
        table.insert(0, (f'attn.conv_proj_{letter}.bn', f'{prefix}.normalization'))
    renamed = {}
    for name, value in weights.items():
        if name.startswith('stage'):
            for theirs, face in table:
                if f'{theirs}.' in name:
                    name = name.replace(theirs, face, 1)
                    break
            name = 'cvt.encoder.stages.' + name[len('stage'):].replace('.blocks.', '.layers.')
        else:
            name = name.replace('norm.', 'layernorm.').replace('head.', 'classifier.')
        renamed[name] = value
        if name.endswith('running_var'):
            renamed[name.replace('running_var', 'num_batches_tracked')] = torch.tensor(7)
    return renamed
