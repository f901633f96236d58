"""Landmarks in Triton: the kernels that `landmarks.py` launches. Products and sums are in float32."""
import triton
import triton.language as tl

from .kernels import LOG2_E, dot_channels, head_at, load_channels, map_rows, matmul, store_channels, token_rows


@triton.jit(do_not_specialize=[
    'tokens', 'splits', 'tokens_per_split', 'weight_image', 'weight_token', 'kv_image', 'kv_token', 'kv_part'])
def landmark_kernel(
        logits, kv, partial, lse,
        tokens, splits, tokens_per_split, weight_image, weight_token, kv_image, kv_token, kv_part,
        RANK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Landmarks of runs of an image's tokens, [B, splits, rank, 2, C], and the log-sum-exp of the logits to base 2."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    split = tl.program_id(0) % splits
    image = (tl.program_id(0) // splits).to(tl.int64)
    zero = split * 0
    rank = tl.arange(0, BLOCK_K)
    highest = tl.full([BLOCK_K], -1e30, tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    k_sum0 = tl.zeros([BLOCK_K, D0], tl.float32)
    v_sum0 = tl.zeros([BLOCK_K, D0], tl.float32)
    k_sum1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else D0], tl.float32)
    v_sum1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else D0], tl.float32)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, tokens), BLOCK_Q):
        token = tl.arange(0, BLOCK_Q)
        valid = token < tl.minimum(first + tokens_per_split, tokens) - start
        rows = logits + image * weight_image + (zero + start).to(tl.int64) * weight_token + head * RANK
        scores = tl.load(
            rows + rank[:, None] + token[None, :] * weight_token, mask=(rank < RANK)[:, None] & valid[None, :],
            other=float('-inf')).to(tl.float32) * LOG2_E
        keys = map_rows(kv, image, zero, zero + start, zero, token, head, kv_image, 0, kv_token, D)
        k0, k1 = load_channels(keys, valid, D, D0, D1)
        v0, v1 = load_channels(head_at(keys, kv_part * D, D), valid, D, D0, D1)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        highest = new_highest
        total = total * shrink + tl.sum(weights, 1)
        k_sum0 = matmul(weights, k0.to(tl.float32), k_sum0 * shrink[:, None], False)
        v_sum0 = matmul(weights, v0.to(tl.float32), v_sum0 * shrink[:, None], False)
        if D1 > 0:
            k_sum1 = matmul(weights, k1.to(tl.float32), k_sum1 * shrink[:, None], False)
            v_sum1 = matmul(weights, v1.to(tl.float32), v_sum1 * shrink[:, None], False)
    share = (1 / total)[:, None]
    run = image * splits + split
    at = head_at(partial, (run * RANK * 2 * heads + head) * D, D) + rank * (2 * heads * D)
    store_channels(at, k_sum0 * share, k_sum1 * share, rank < RANK, D, D0, D1)
    store_channels(at + heads * D, v_sum0 * share, v_sum1 * share, rank < RANK, D, D0, D1)
    tl.store(lse + (run * heads + head) * RANK + rank, highest + tl.log2(total), mask=rank < RANK)


@triton.jit(do_not_specialize=['splits'])
def merge_kernel(
        partial, partial_lse, out, lse, splits,
        RANK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """Landmarks of all tokens, [B, rank, 2, C], from those of runs, each weighted by its share of the softmax.

    A program merges the keys or the values of one landmark for one head.
    """
    head, heads = tl.program_id(1), tl.num_programs(1)
    part = tl.program_id(0) % 2
    landmark = tl.program_id(0) // 2
    image, rank = (landmark // RANK).to(tl.int64), landmark % RANK
    highest, total = -1e30, 0.
    sum0 = tl.zeros([D0], tl.float32)
    sum1 = tl.zeros([D1 if D1 > 0 else D0], tl.float32)
    for start in range(0, splits, BLOCK_Q):
        split = start + tl.arange(0, BLOCK_Q)
        valid = split < splits
        run = image * splits + split
        run_lse = tl.load(partial_lse + (run * heads + head) * RANK + rank, mask=valid, other=float('-inf'))
        new_highest = tl.maximum(highest, tl.max(run_lse, 0))
        weight = tl.exp2(run_lse - new_highest)
        shrink = tl.exp2(highest - new_highest)
        highest = new_highest
        total = total * shrink + tl.sum(weight, 0)
        rows = head_at(partial, (((run * RANK + rank) * 2 + part) * heads + head) * D, D)
        x0, x1 = load_channels(rows, valid, D, D0, D1)
        sum0 = sum0 * shrink + tl.sum(x0 * weight[:, None], 0)
        if D1 > 0:
            sum1 = sum1 * shrink + tl.sum(x1 * weight[:, None], 0)
    at = out + (((image * RANK + rank) * 2 + part) * heads + head) * D
    channel = tl.arange(0, D0)
    tl.store(at + channel, sum0 / total, mask=channel < D)
    if D1 > 0:
        channel = D0 + tl.arange(0, D1)
        tl.store(at + channel, sum1 / total, mask=channel < D)
    tl.store(lse + (image * heads + head) * RANK + rank, highest + tl.log2(total), mask=part == 0)


@triton.jit(do_not_specialize=[
    'tokens', 'weight_image', 'weight_token', 'kv_image', 'kv_token', 'kv_part'])
def landmark_grad_kernel(
        logits, kv, out, lse, grad_out, grad_logits, grad_kv,
        tokens, weight_image, weight_token, kv_image, kv_token, kv_part,
        RANK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Gradients of the logits, [B, tokens, heads * rank], and of keys and values, [B, tokens, 2, C]."""
    blocks = tl.cdiv(tokens, BLOCK_Q)
    head, heads = tl.program_id(1), tl.num_programs(1)
    start = tl.program_id(0) % blocks * BLOCK_Q
    image = (tl.program_id(0) // blocks).to(tl.int64)
    zero = start * 0
    rank, token = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q)
    valid, is_rank = token < tokens - start, rank < RANK

    first = (image * RANK * 2 * heads + head) * D
    at = head_at(grad_out, first, D) + rank * (2 * heads * D)
    gk0, gk1 = load_channels(at, is_rank, D, D0, D1)
    gv0, gv1 = load_channels(at + heads * D, is_rank, D, D0, D1)
    at = head_at(out, first, D) + rank * (2 * heads * D)
    x0, x1 = load_channels(at, is_rank, D, D0, D1)
    y0, y1 = load_channels(at + heads * D, is_rank, D, D0, D1)
    row_sum = tl.sum(gk0 * x0 + gv0 * y0, 1)
    if D1 > 0:
        row_sum += tl.sum(gk1 * x1 + gv1 * y1, 1)

    mask = valid[:, None] & is_rank[None, :]
    rows = logits + image * weight_image + start.to(tl.int64) * weight_token + head * RANK
    scores = tl.load(rows + token[:, None] * weight_token + rank[None, :], mask=mask, other=float('-inf'))
    log_total = tl.load(lse + (image * heads + head) * RANK + rank, mask=is_rank, other=0.)
    weights = tl.exp2(scores.to(tl.float32) * LOG2_E - log_total[None, :])
    keys = map_rows(kv, image, zero, start, zero, token, head, kv_image, 0, kv_token, D)
    x0, x1 = load_channels(keys, valid, D, D0, D1)
    y0, y1 = load_channels(head_at(keys, kv_part * D, D), valid, D, D0, D1)
    grads = dot_channels(x0.to(tl.float32), x1.to(tl.float32), gk0, gk1, D1, False)
    grads += dot_channels(y0.to(tl.float32), y1.to(tl.float32), gv0, gv1, D1, False)
    grads = weights * (grads - row_sum[None, :])
    rows = grad_logits + ((image * tokens + start) * heads + head) * RANK
    tl.store(rows + token[:, None] * (heads * RANK) + rank[None, :], grads.to(grad_logits.dtype.element_ty), mask=mask)

    at = token_rows(grad_kv, image, zero, start, zero, token, head, 2 * heads, 1, tokens, D)
    x0 = matmul(weights, gk0, tl.zeros([BLOCK_Q, D0], tl.float32), False)
    y0 = matmul(weights, gv0, tl.zeros([BLOCK_Q, D0], tl.float32), False)
    x1, y1 = x0, y0
    if D1 > 0:
        x1 = matmul(weights, gk1, tl.zeros([BLOCK_Q, D1], tl.float32), False)
        y1 = matmul(weights, gv1, tl.zeros([BLOCK_Q, D1], tl.float32), False)
    store_channels(at, x0, x1, valid, D, D0, D1)
    store_channels(at + heads * D, y0, y1, valid, D, D0, D1)
