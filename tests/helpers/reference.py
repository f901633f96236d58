"""An independent oracle for window attention and the attention layers: one query at a time, explicit key lists.

Slow on purpose, and sharing no code with the package: plain tensor arithmetic in the dtype of its input, differentiable
by autograd. `params` are a layer's parameters by name.
"""
import math

import torch


def _linear(x, params, name):
    y = x @ params[f'{name}.weight'].T
    return y + params[f'{name}.bias'] if f'{name}.bias' in params else y


def _layer_norm(x, params, name, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * params[f'{name}.weight'] + params[f'{name}.bias']


def _softmax(logits, dim):
    weights = torch.exp(logits - logits.max(dim, keepdim=True).values)
    return weights / weights.sum(dim, keepdim=True)


def window_keys(y, x, height, width, window):
    """Positions that the query at (y, x) attends to: the window around it and its halo, as far as the map goes."""
    halo = window // 2
    top, left = y // window * window - halo, x // window * window - halo
    side = window + 2 * halo
    return [(i, j) for i in range(top, top + side) for j in range(left, left + side)
            if 0 <= i < height and 0 <= j < width]


def _attend_query(q, k, v, bias=0.):
    """One query [heads, d] over keys and values [n, heads, d], its bias [n, heads] added to the scaled logits."""
    weights = _softmax((k * q).sum(-1) / math.sqrt(q.shape[-1]) + bias, 0)
    return (weights[..., None] * v).sum(0)


def window_attention(q, kv, additional_kv, bias, window, num_heads, first_row=0):
    """The contract of the package's `window_attention`: q [B, rows, W, C] to the same shape."""
    height, width = kv.shape[1:3]
    halo = window // 2
    q, kv, additional_kv = (x.unflatten(-1, (num_heads, -1)) for x in (q, kv, additional_kv))
    outputs = []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for j in range(q.shape[2]):
                y = first_row + i
                ys, xs = zip(*window_keys(y, j, height, width, window))
                keys = torch.cat([additional_kv[b], kv[b, ys, xs]])  # [E + n, 2, heads, d]
                logits = 0.
                if bias is not None:
                    top, left = y // window * window - halo, j // window * window - halo
                    logits = bias[:, y % window, j % window, [k - top for k in ys], [k - left for k in xs]].T
                    logits = torch.cat([logits.new_zeros(additional_kv.shape[1], num_heads), logits])
                outputs.append(_attend_query(q[b, i, j], keys[:, 0], keys[:, 1], logits))
    return torch.stack(outputs).reshape(*q.shape[:3], -1) if outputs else q.flatten(3)


def long_short_attention(params, x, tokens, num_heads, window, rank, global_update='outputs'):
    """One image's long-short attention: x [H, W, C] and tokens [g, C] to the same shapes."""
    height, width, dim = x.shape
    d = dim // num_heads
    g = tokens.shape[0]
    reach = window + window // 2 - 1  # largest offset

    every = torch.cat([tokens, x.reshape(-1, dim)])
    q, k, v = _linear(every, params, 'qkv').split(dim, dim=-1)
    k, v = _layer_norm(k, params, 'norm_kv'), _layer_norm(v, params, 'norm_kv')
    flat = {(i, j): g + i * width + j for i in range(height) for j in range(width)}

    q, k, v = (part.reshape(-1, num_heads, d) for part in (q, k, v))
    landmark_k = landmark_v = k[:0]
    if rank:
        scores = _linear(x.reshape(-1, dim), params, 'dynamic_projection').reshape(-1, num_heads, rank)
        weights = _softmax(scores, 0)
        rows = [
            [(weights[:, :, index, None] * part[g:]).sum(0).reshape(dim) for index in range(rank)] for part in (k, v)]
        landmark_k, landmark_v = (
            _layer_norm(torch.stack(row), params, 'norm_landmarks').reshape(rank, num_heads, d) for row in rows)

    outputs = []
    for (i, j), row in flat.items():
        positions = window_keys(i, j, height, width, window)
        rows = [flat[position] for position in positions] + list(range(g))
        keys, values = torch.cat([landmark_k, k[rows]]), torch.cat([landmark_v, v[rows]])
        bias = 0.
        if 'rel_pos.table' in params:
            ys, xs = zip(*[(i - y + reach, j - z + reach) for y, z in positions])
            bias = params['rel_pos.table'][:, ys, xs].T
            bias = torch.cat([bias.new_zeros(rank, num_heads), bias, bias.new_zeros(g, num_heads)])
        outputs.append(_attend_query(q[row], keys, values, bias))
    out = torch.stack(outputs)

    token_outputs = []
    for t in range(g):
        keys, values = (out, out) if global_update == 'outputs' else (k[g:], v[g:])
        keys, values = torch.cat([k[:g], keys]), torch.cat([v[:g], values])
        token_outputs.append(_attend_query(q[t], keys, values).reshape(dim))
    map_out = _linear(out.reshape(-1, dim), params, 'proj').reshape(height, width, dim)
    return map_out, _linear(torch.stack(token_outputs), params, 'proj') if g else tokens


def _cubic_weights(t, a=-0.75):
    def kernel(s):
        s = abs(s)
        if s <= 1:
            return (a + 2) * s ** 3 - (a + 3) * s ** 2 + 1
        return a * s ** 3 - 5 * a * s ** 2 + 8 * a * s - 4 * a if s < 2 else 0.
    return [kernel(t + 1), kernel(t), kernel(1 - t), kernel(2 - t)]


def resize_matrix(old, new):
    """Bicubic interpolation of `old` samples to `new`, pixel centres aligned at the middle, as a [new, old] matrix."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        first = math.floor(centre)
        for n, weight in enumerate(_cubic_weights(centre - first)):
            matrix[i, min(max(first - 1 + n, 0), old - 1)] += weight
    return matrix


def full_attention(params, x, tokens, num_heads):
    """One image's full attention with relative position bias: x [H, W, C] and tokens [g, C] to the same shapes."""
    height, width, dim = x.shape
    d = dim // num_heads
    g = tokens.shape[0]
    every = torch.cat([tokens, x.reshape(-1, dim)])
    q, k, v = _linear(every, params, 'qkv').split(dim, dim=-1)
    places = [None] * g + [(i, j) for i in range(height) for j in range(width)]

    table = params.get('rel_pos.table')
    if table is not None:
        rows = resize_matrix(table.shape[1], 2 * height - 1).to(table.dtype)
        cols = resize_matrix(table.shape[2], 2 * width - 1).to(table.dtype)
        table = torch.stack([rows @ head @ cols.T for head in table])

    outputs = []
    for a, place in enumerate(places):
        heads = []
        for head in range(num_heads):
            channels = slice(head * d, (head + 1) * d)
            logits = k[:, channels] @ q[a, channels] / math.sqrt(d)
            if table is not None:
                bias = []
                for b, other in enumerate(places):
                    if place is None and other is None:
                        bias.append(params['rel_pos.global_global'][head, a, b])
                    elif place is None:
                        bias.append(params['rel_pos.global_patch'][0, head, a])
                    elif other is None:
                        bias.append(params['rel_pos.global_patch'][1, head, b])
                    else:
                        bias.append(table[head, place[0] - other[0] + height - 1, place[1] - other[1] + width - 1])
                logits = logits + torch.stack(bias)
            heads.append(_softmax(logits, 0) @ v[:, channels])
        outputs.append(torch.cat(heads))
    out = _linear(torch.stack(outputs), params, 'proj')
    return out[g:].reshape(height, width, dim), out[:g]
