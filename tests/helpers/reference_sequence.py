"""An independent oracle for the attention layers over sequences: one sequence, one query at a time, explicit key lists.

Slow on purpose, and sharing no code with the package: plain tensor arithmetic in the dtype of its input, differentiable
by autograd. `params` are a layer's parameters by name.
"""
import math

import torch
from reference import _layer_norm, _linear, _softmax


def _attend(query, keys, values, extra_logits=None):
    """One query [heads, d] to lists of keys and values [heads, d]; extra logits are lists as well, [heads]."""
    logits = (torch.stack(keys) * query).sum(-1) / math.sqrt(query.shape[-1])
    if extra_logits is not None:
        logits = logits + torch.stack(extra_logits)
    return (_softmax(logits, 0)[..., None] * torch.stack(values)).sum(0)


def _distill(scores, values):
    """For each rank index, the sum of values [N, heads, d] weighted by softmax of scores [N, heads, rank]."""
    weights = _softmax(scores, 0)
    return [(weights[:, :, index, None] * values).sum(0) for index in range(scores.shape[-1])]


def bidirectional(params, x, keep, tokens, num_heads, window, rank):
    """One sequence x [N, C], of which the tokens in the list `keep` count, and global tokens [g, C].

    Returns the outputs of those that count, [len(keep), C], and of the global tokens.
    """
    dim = x.shape[1]
    heads = (num_heads, dim // num_heads)
    reach = max(window // 2, 1)
    q, k, v = _linear(x[keep], params, 'qkv').split(dim, dim=-1)
    k, v = _layer_norm(k, params, 'norm_kv'), _layer_norm(v, params, 'norm_kv')
    tokens_q, tokens_k, tokens_v = _linear(tokens, params, 'qkv').split(dim, dim=-1)

    extra_k, extra_v = list(tokens_k), list(tokens_v)
    if rank and keep:
        scores = _linear(x[keep], params, 'dynamic_projection').reshape(-1, num_heads, rank)
        extra_k += [row.reshape(dim) for row in _distill(scores, k.reshape(-1, *heads))]
        extra_v += [row.reshape(dim) for row in _distill(scores, v.reshape(-1, *heads))]
    extra_k = [_layer_norm(row, params, 'norm_landmarks').reshape(heads) for row in extra_k]
    extra_v = [_layer_norm(row, params, 'norm_landmarks').reshape(heads) for row in extra_v]

    out = []
    for row, position in enumerate(keep):
        start = position // window * window
        seen = [i for i, other in enumerate(keep) if start - reach <= other < start + window + reach]
        keys, values = [k[i].reshape(heads) for i in seen], [v[i].reshape(heads) for i in seen]
        out.append(_attend(q[row].reshape(heads), extra_k + keys, extra_v + values))

    tokens_out = []
    for query in tokens_q:
        keys = [key.reshape(heads) for key in tokens_k] + out
        values = [value.reshape(heads) for value in tokens_v] + out
        tokens_out.append(_attend(query.reshape(heads), keys, values).reshape(dim))
    y = torch.stack([row.reshape(dim) for row in out]) if out else x[:0]
    return _linear(y, params, 'proj'), _linear(torch.stack(tokens_out), params, 'proj') if tokens_out else tokens


def _encoded(distance, dim, like):
    """Sines, then cosines, of a distance."""
    angles = [distance / 10000 ** (i / dim) for i in range(0, dim, 2)]
    return like.new_tensor([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def causal(params, x, memory, num_heads, window, segment, rank, max_segments=None):
    """One sequence x [N, C] after a memory [M, C] of whole segments; returns [N, C]."""
    length, dim = x.shape
    heads = (num_heads, dim // num_heads)
    past = memory.shape[0]
    every = torch.cat([memory, x])
    q, raw_k, raw_v = _linear(every, params, 'qkv').split(dim, dim=-1)
    k, v = _layer_norm(raw_k, params, 'norm_kv'), _layer_norm(raw_v, params, 'norm_kv')

    landmarks = []  # per finished segment, a list of pairs of key and value
    for start in range(0, (past + length) // segment * segment if rank else 0, segment):
        rows = slice(start, start + segment)
        scores = _linear(every[rows], params, 'dynamic_projection').reshape(-1, num_heads, rank)
        if start < past:  # of hidden states, projected then
            hidden = [row.reshape(dim) for row in _distill(scores, every[rows].reshape(-1, *heads))]
            pairs = [_linear(row, params, 'qkv').split(dim, dim=-1)[1:] for row in hidden]
        else:
            pairs = zip(*[[row.reshape(dim) for row in _distill(scores, part[rows].reshape(-1, *heads))]
                          for part in (raw_k, raw_v)])
        landmarks.append([
            [_layer_norm(row, params, 'norm_landmarks').reshape(heads) for row in pair] for pair in pairs])

    def term(distance, name):
        return _linear(_encoded(distance, dim, x), params, name).reshape(heads)

    far_terms = [term(distance, 'segment_position') for distance in range(len(landmarks) * rank)]
    near_terms = [term(distance, 'window_position') for distance in range(window)]
    out = []
    for t in range(past, past + length):
        query = q[t].reshape(heads)
        scaled = query / math.sqrt(heads[1])
        finished = landmarks[:t // segment]
        if max_segments is not None:
            finished = finished[-max_segments:]
        seen = [pair for pairs in finished for pair in pairs]
        keys, values, extra = [pair[0] for pair in seen], [pair[1] for pair in seen], []
        for distance in reversed(range(len(seen))):
            extra.append((scaled * far_terms[distance]).sum(-1))
        for i in range(max(0, t - window + 1), t + 1):
            keys.append(k[i].reshape(heads))
            values.append(v[i].reshape(heads))
            extra.append((params['content_bias'] * keys[-1]).sum(-1)
                         + ((scaled + params['position_bias']) * near_terms[t - i]).sum(-1))
        out.append(_attend(query, keys, values, extra).reshape(dim))
    return _linear(torch.stack(out), params, 'proj')
