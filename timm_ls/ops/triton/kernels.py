"""Window attention in Triton: the kernels that `attention.py` launches.

Queries are taken by tiles: a window, or, where windows are small, a few neighboring ones, so that a tile fills the rows
of a tensor core. The keys of a tile are the rectangle around it, its region, row by row, and then the additional ones.
A program takes up to 64 queries of a tile for one head, and its keys by blocks.

What decides the speed, as far as it can be told from the compiler's output:

- Nothing is gathered in memory: queries, keys and values are read where they lie. A block's keys are one load, through
  pointers that are selected between the map and the additional keys, and the pipeliner copies it to shared memory
  (cp.async) while the block before it is in the tensor cores.
- That needs pointers of which the compiler knows that 16 bytes follow each other. Strides therefore come in units of
  the head width D, a constant, and base pointers carry a hint. Offsets have 64 bits up to a tile, and 32 within it.
- The position bias is read from a table laid out as the kernel's blocks are (`table_kernel`), padded so that its rows
  are aligned too. It is zero for additional keys and minus infinity where a window of the tile does not see a key.
- Wide heads are two blocks of at most 64 channels, D0 and D1: 80 is 64 and 16, not padded to 128, and what a warp holds
  of a product never exceeds 64 columns.
- No gradient is added atomically. Each key's gradient is gathered by one program: tiles of keys lie half a window off
  those of queries, so that only the windows to their four corners see them. Gradients of the bias and of the
  additional keys are summed in registers over a run of tiles, and over the runs by the caller: the same bits each time.

float32 is multiplied as three products of TF32 ('tf32x3'), which is as accurate as float32, or as one if TF32 is set.
"""
import os

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware's exponential and logarithm have base 2
INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


@triton.jit
def head_at(x, offset, D: tl.constexpr):
    """Pointers to the first channels of heads, at multiples of 16 bytes where their width allows it."""
    pointers = x + offset
    if D % 8 == 0:  # a hint goes with an operation: on an argument it is lost
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def matmul(a, b, total, TF32: tl.constexpr):
    """`total + a @ b`, in float32."""
    if INTERPRETED:  # it multiplies bfloat16 as if its bits were a number
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision='tf32' if TF32 else 'tf32x3')


@triton.jit
def dot_channels(a0, a1, b0, b1, D1: tl.constexpr, TF32: tl.constexpr):
    """Products of the rows of `a` with those of `b` over all channels."""
    products = matmul(a0, tl.trans(b0), tl.zeros([a0.shape[0], b0.shape[0]], tl.float32), TF32)
    if D1 > 0:
        products = matmul(a1, tl.trans(b1), products, TF32)
    return products


@triton.jit
def channels(valid, FIRST: tl.constexpr, NUMBER: tl.constexpr, D: tl.constexpr):
    """Offsets of a block of channels, and which there are of each row."""
    channel = FIRST + tl.arange(0, NUMBER)[None, :]
    mask = valid[:, None]
    if FIRST + NUMBER > D:
        mask = mask & (channel < D)
    return channel, mask


@triton.jit
def load_channels(rows, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The channels at pointers `rows`, zeros where not `valid`: [rows, D0] and, if D1 > 0, [rows, D1]."""
    channel, mask = channels(valid, 0, D0, D)
    x0 = tl.load(rows[:, None] + channel, mask=mask, other=0.)
    x1 = x0
    if D1 > 0:
        channel, mask = channels(valid, D0, D1, D)
        x1 = tl.load(rows[:, None] + channel, mask=mask, other=0.)
    return x0, x1


@triton.jit
def store_channels(rows, x0, x1, valid, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """What `load_channels` reads."""
    dtype: tl.constexpr = rows.dtype.element_ty
    channel, mask = channels(valid, 0, D0, D)
    tl.store(rows[:, None] + channel, x0.to(dtype), mask=mask)
    if D1 > 0:
        channel, mask = channels(valid, D0, D1, D)
        tl.store(rows[:, None] + channel, x1.to(dtype), mask=mask)


@triton.jit
def locate_tile(index, rows, cols, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr):
    """Image (of 64 bits), first row and first column of a tile of images that are cut into tiles."""
    across, down = tl.cdiv(cols, TILE_COLS), tl.cdiv(rows, TILE_ROWS)
    line = index // across
    return (line // down).to(tl.int64), line % down * TILE_ROWS, (index - line * across) * TILE_COLS


@triton.jit
def map_rows(x, image, top, left, y, x_, head, image_stride, row_stride, col_stride, D: tl.constexpr):
    """Pointers to a head's channels of places (y, x_) of a tile at (top, left). Strides are in units of D."""
    corner = image * image_stride + top.to(tl.int64) * row_stride + left.to(tl.int64) * col_stride + head
    return head_at(x, corner * D, D) + (y * row_stride + x_ * col_stride) * D


@triton.jit
def token_rows(x, image, top, left, y, x_, head, heads, rows, cols, D: tl.constexpr):
    """`map_rows` of contiguous [images, rows, cols, heads, D]."""
    corner = ((image * rows + top) * cols + left) * heads + head
    return head_at(x, corner * D, D) + (y * cols + x_) * (heads * D)


@triton.jit
def statistics(x, image, top, left, y, x_, head, heads, rows, cols):
    """Pointers to places of a tile in [images, heads, rows, cols]."""
    return x + ((image * heads + head) * rows + top) * cols + left + (y * cols + x_)


@triton.jit
def table_rows(table, head, row, stride, ROWS: tl.constexpr):
    """Pointers to rows of a head's table: the next multiple of 64 from ROWS on, each of `stride` times 16 entries."""
    return tl.multiple_of(table + head * ((ROWS + 63) // 64 * 64) * stride * 16, 16) + row * (stride * 16)


@triton.jit
def tile_queries(rows, W, QUERY_ROWS: tl.constexpr, QUERY_COLS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Of this program: its image, the first row and column of its tile, its queries' numbers within the tile, their
    rows and columns, and which there are."""
    BLOCKS: tl.constexpr = (QUERY_ROWS * QUERY_COLS + BLOCK_Q - 1) // BLOCK_Q
    image, top, left = locate_tile(tl.program_id(0) // BLOCKS, rows, W, QUERY_ROWS, QUERY_COLS)
    query = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    y, x = query // QUERY_COLS, query % QUERY_COLS
    return image, top, left, query, y, x, (y < QUERY_ROWS) & is_inside(y, x, top, left, rows, W)


@triton.jit
def load_queries(
        q, grad_out, lse, row_sums, image, top, left, y, x, valid, head, heads, rows, W, q_image, q_row, q_col,
        D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):
    """Queries, gradients of their outputs, log-sum-exps and `row_sums`. One that is not there has no weights."""
    q_rows = map_rows(q, image, top, left, y, x, head, q_image, q_row, q_col, D)
    g_rows = token_rows(grad_out, image, top, left, y, x, head, heads, rows, W, D)
    q0, q1 = load_channels(q_rows, valid, D, D0, D1)
    g0, g1 = load_channels(g_rows, valid, D, D0, D1)
    log_total = tl.load(statistics(lse, image, top, left, y, x, head, heads, rows, W), mask=valid, other=float('inf'))
    row_sum = tl.load(statistics(row_sums, image, top, left, y, x, head, heads, rows, W), mask=valid, other=0.)
    return q0, q1, g0, g1, log_total, row_sum


@triton.jit
def is_inside(y, x, top, left, H, W):
    """Whether places of a rectangle at (top, left) lie in the map; as unsigned numbers, negative ones are large."""
    return ((y + top).to(tl.uint32) < H.to(tl.uint32)) & ((x + left).to(tl.uint32) < W.to(tl.uint32))


@triton.jit
def is_clipped(top, left, H, W, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether any of a rectangle at (top, left) lies outside the map, as 0 or 1."""
    return ((top < 0) | (left < 0) | (top + ROWS > H) | (left + COLS > W)).to(tl.int32)


@triton.jit
def region_rows(
        key, kv, additional, image, top, left, head, heads, H, W, E, kv_image, kv_row, kv_col, kv_part,
        KEY_ROWS: tl.constexpr, KEY_COLS: tl.constexpr, CLIPPED: tl.constexpr, D: tl.constexpr,
):
    """Pointers to keys and to values of a region at (top, left), then of the additional ones, and which there are."""
    y, x = key // KEY_COLS, key % KEY_COLS
    beyond = key - KEY_ROWS * KEY_COLS
    keys = map_rows(kv, image, top, left, y, x, head, kv_image, kv_row, kv_col, D)
    more = head_at(additional, (image * E * 2 * heads + head) * D, D) + beyond * (2 * heads * D)
    keys = tl.where(beyond < 0, keys, more)
    if D % 8 == 0:  # of what is selected, the compiler knows nothing else
        keys = tl.multiple_of(keys, 16)
    values = head_at(keys, tl.where(beyond < 0, kv_part, heads) * D, D)
    is_key = beyond < E
    if CLIPPED:
        is_key = is_key & ((beyond >= 0) | is_inside(y, x, top, left, H, W))
    return keys, values, is_key


@triton.jit
def block_logits(
        q0, q1, k0, k1, biases, key, is_key, scale,
        CLIPPED: tl.constexpr, HAS_TABLE: tl.constexpr, D1: tl.constexpr, TF32: tl.constexpr,
):
    """Logits of a block of keys, [queries, keys], minus infinity where there is no key."""
    logits = dot_channels(q0, q1, k0, k1, D1, TF32) * scale
    if HAS_TABLE:
        logits += tl.load(biases[:, None] + key[None, :])
    if CLIPPED or not HAS_TABLE:
        logits = tl.where(is_key[None, :], logits, float('-inf'))
    return logits


@triton.jit
def add_key_grads(
        grad_k0, grad_k1, grad_v0, grad_v1, k0, k1, v0, v1, q0, q1, g0, g1, logits, log_total, row_sum,
        D1: tl.constexpr, TF32: tl.constexpr,
):
    """What keys and values get from a block of queries, whose logits are [keys, queries], added to the gradients."""
    weights = tl.exp2(logits * LOG2_E - log_total[None, :])
    grad_logits = weights * (dot_channels(v0, v1, g0, g1, D1, TF32) - row_sum[None, :])
    weights, grad_logits = weights.to(g0.dtype), grad_logits.to(q0.dtype)
    grad_v0 = matmul(weights, g0, grad_v0, TF32)
    grad_k0 = matmul(grad_logits, q0, grad_k0, TF32)
    if D1 > 0:
        grad_v1 = matmul(weights, g1, grad_v1, TF32)
        grad_k1 = matmul(grad_logits, q1, grad_k1, TF32)
    return grad_k0, grad_k1, grad_v0, grad_v1


@triton.jit(do_not_specialize=['E', 'head_stride', 'query_stride', 'key_stride'])
def table_kernel(
        bias, table, E, head_stride, query_stride, key_stride,
        QUERIES: tl.constexpr, QUERY_COLS: tl.constexpr, KEYS: tl.constexpr, KEY_COLS: tl.constexpr, LEAD: tl.constexpr,
        WINDOW: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """What the kernels below add to their logits, for QUERIES places of a square and KEYS places of another one.

    Key (0, 0) lies LEAD rows and columns after the halo of the window that query (0, 0) belongs to.
    """
    HALO: tl.constexpr = WINDOW + WINDOW // 2 * 2
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    head = tl.program_id(2)
    query_y, query_x = query // QUERY_COLS, query % QUERY_COLS
    y = key // KEY_COLS + LEAD - query_y // WINDOW * WINDOW  # in the halo of the query's window
    x = key % KEY_COLS + LEAD - query_x // WINDOW * WINDOW
    seen = (query < QUERIES) & (key < KEYS) & (y >= 0) & (y < HALO) & (x >= 0) & (x < HALO)
    values = tl.where(seen | ((key >= KEYS) & (key < KEYS + E)), 0., float('-inf'))
    if HAS_BIAS:
        at = (((head * WINDOW + query_y % WINDOW) * WINDOW + query_x % WINDOW) * HALO + y) * HALO + x
        values += tl.load(bias + at, mask=seen, other=0.).to(tl.float32)
    at = head * head_stride + query * query_stride + key * key_stride
    tl.store(table + at, values.to(table.dtype.element_ty))


@triton.jit(do_not_specialize=[
    'H', 'W', 'E', 'rows', 'first_row', 'q_image', 'q_row', 'q_col', 'kv_image', 'kv_row', 'kv_col', 'kv_part',
    'table_stride'])
def forward_kernel(
        q, kv, additional, table, out, lse,
        H, W, E, rows, first_row, scale, q_image, q_row, q_col, kv_image, kv_row, kv_col, kv_part, table_stride,
        WINDOW: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, HAS_TABLE: tl.constexpr,
        SAVE_LSE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr,
):
    """Outputs, [B, rows, W, C], and the log-sum-exp of their logits to base 2, [B, heads, rows, W]."""
    P: tl.constexpr = WINDOW // 2
    QUERY_ROWS: tl.constexpr = TILE_Y * WINDOW
    QUERY_COLS: tl.constexpr = TILE_X * WINDOW
    KEY_ROWS: tl.constexpr = QUERY_ROWS + 2 * P
    KEY_COLS: tl.constexpr = QUERY_COLS + 2 * P
    head, heads = tl.program_id(1), tl.num_programs(1)
    image, top, left, query, y, x, valid = tile_queries(rows, W, QUERY_ROWS, QUERY_COLS, BLOCK_Q)
    q0, q1 = load_channels(map_rows(q, image, top, left, y, x, head, q_image, q_row, q_col, D), valid, D, D0, D1)
    biases = table_rows(table, head, query, table_stride, QUERY_ROWS * QUERY_COLS)

    highest = tl.full([BLOCK_Q], -1e30, tl.float32)  # finite: a block may hold no key at all
    total = tl.zeros([BLOCK_Q], tl.float32)
    sum0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    sum1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else D0], tl.float32)
    key_top, key_left = top + first_row - P, left - P
    clipped = is_clipped(key_top, key_left, H, W, KEY_ROWS, KEY_COLS)
    for CLIPPED in tl.static_range(2):  # one of the two loops runs
        for start in range(0, tl.where(clipped == CLIPPED, KEY_ROWS * KEY_COLS + E, 0), BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            keys, values, is_key = region_rows(
                key, kv, additional, image, key_top, key_left, head, heads, H, W, E, kv_image, kv_row, kv_col, kv_part,
                KEY_ROWS, KEY_COLS, CLIPPED, D)
            k0, k1 = load_channels(keys, is_key, D, D0, D1)
            v0, v1 = load_channels(values, is_key, D, D0, D1)
            logits = block_logits(q0, q1, k0, k1, biases, key, is_key, scale, CLIPPED, HAS_TABLE, D1, TF32)
            new_highest = tl.maximum(highest, tl.max(logits, 1))
            weights = tl.exp2(logits * LOG2_E - (new_highest * LOG2_E)[:, None])
            shrink = tl.exp2((highest - new_highest) * LOG2_E)
            highest = new_highest
            total = total * shrink + tl.sum(weights, 1)
            weights = weights.to(v0.dtype)
            sum0 = matmul(weights, v0, sum0 * shrink[:, None], TF32)
            if D1 > 0:
                sum1 = matmul(weights, v1, sum1 * shrink[:, None], TF32)

    share = (1 / total)[:, None]
    outs = token_rows(out, image, top, left, y, x, head, heads, rows, W, D)
    store_channels(outs, sum0 * share, sum1 * share, valid, D, D0, D1)
    if SAVE_LSE:
        log_total = highest * LOG2_E + tl.log2(total)
        tl.store(statistics(lse, image, top, left, y, x, head, heads, rows, W), log_total, mask=valid)


@triton.jit(do_not_specialize=[
    'H', 'W', 'E', 'rows', 'first_row', 'q_image', 'q_row', 'q_col', 'kv_image', 'kv_row', 'kv_col', 'kv_part',
    'table_stride'])
def query_grad_kernel(
        q, kv, additional, table, out, lse, grad_out, grad_q, row_sums,
        H, W, E, rows, first_row, scale, q_image, q_row, q_col, kv_image, kv_row, kv_col, kv_part, table_stride,
        WINDOW: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr, HAS_TABLE: tl.constexpr,
        D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr,
):
    """Gradients of the queries, and, for the kernels after it, outputs times their gradients, [B, heads, rows, W].

    The weights are recomputed from the log-sum-exp. A query that is not there has one of infinity, and no weights.
    """
    P: tl.constexpr = WINDOW // 2
    QUERY_ROWS: tl.constexpr = TILE_Y * WINDOW
    QUERY_COLS: tl.constexpr = TILE_X * WINDOW
    KEY_ROWS: tl.constexpr = QUERY_ROWS + 2 * P
    KEY_COLS: tl.constexpr = QUERY_COLS + 2 * P
    head, heads = tl.program_id(1), tl.num_programs(1)
    image, top, left, query, y, x, valid = tile_queries(rows, W, QUERY_ROWS, QUERY_COLS, BLOCK_Q)
    q0, q1 = load_channels(map_rows(q, image, top, left, y, x, head, q_image, q_row, q_col, D), valid, D, D0, D1)
    biases = table_rows(table, head, query, table_stride, QUERY_ROWS * QUERY_COLS)
    at = token_rows(grad_out, image, top, left, y, x, head, heads, rows, W, D)
    g0, g1 = load_channels(at, valid, D, D0, D1)
    at = token_rows(out, image, top, left, y, x, head, heads, rows, W, D)
    out0, out1 = load_channels(at, valid, D, D0, D1)
    row_sum = tl.sum(g0.to(tl.float32) * out0.to(tl.float32), 1)
    if D1 > 0:
        row_sum += tl.sum(g1.to(tl.float32) * out1.to(tl.float32), 1)
    tl.store(statistics(row_sums, image, top, left, y, x, head, heads, rows, W), row_sum, mask=valid)
    log_total = tl.load(statistics(lse, image, top, left, y, x, head, heads, rows, W), mask=valid, other=float('inf'))

    grad0 = tl.zeros([BLOCK_Q, D0], tl.float32)
    grad1 = tl.zeros([BLOCK_Q, D1 if D1 > 0 else D0], tl.float32)
    key_top, key_left = top + first_row - P, left - P
    clipped = is_clipped(key_top, key_left, H, W, KEY_ROWS, KEY_COLS)
    for CLIPPED in tl.static_range(2):  # one of the two loops runs
        for start in range(0, tl.where(clipped == CLIPPED, KEY_ROWS * KEY_COLS + E, 0), BLOCK_K):
            key = start + tl.arange(0, BLOCK_K)
            keys, values, is_key = region_rows(
                key, kv, additional, image, key_top, key_left, head, heads, H, W, E, kv_image, kv_row, kv_col, kv_part,
                KEY_ROWS, KEY_COLS, CLIPPED, D)
            k0, k1 = load_channels(keys, is_key, D, D0, D1)
            v0, v1 = load_channels(values, is_key, D, D0, D1)
            logits = block_logits(q0, q1, k0, k1, biases, key, is_key, scale, CLIPPED, HAS_TABLE, D1, TF32)
            weights = tl.exp2(logits * LOG2_E - log_total[:, None])
            grad_logits = weights * (dot_channels(g0, g1, v0, v1, D1, TF32) - row_sum[:, None])
            grad_logits = grad_logits.to(k0.dtype)
            grad0 = matmul(grad_logits, k0, grad0, TF32)
            if D1 > 0:
                grad1 = matmul(grad_logits, k1, grad1, TF32)
    at = token_rows(grad_q, image, top, left, y, x, head, heads, rows, W, D)
    store_channels(at, grad0 * scale, grad1 * scale, valid, D, D0, D1)


@triton.jit(do_not_specialize=[
    'H', 'W', 'rows', 'first_row', 'q_image', 'q_row', 'q_col', 'kv_image', 'kv_row', 'kv_col', 'kv_part',
    'table_stride'])
def key_grad_kernel(
        q, kv, table, lse, row_sums, grad_out, grad_kv,
        H, W, rows, first_row, scale, q_image, q_row, q_col, kv_image, kv_row, kv_col, kv_part, table_stride,
        WINDOW: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
        D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr,
):
    """Gradients of keys and values of the map, [B, H, W, 2, C].

    A tile of keys lies P rows and columns before one of queries, from the middle of a window to that of another. The
    windows that see any of it are those from one before the tile of queries on: one more along each axis.
    """
    P: tl.constexpr = WINDOW // 2
    BEFORE: tl.constexpr = WINDOW if P > 0 else 0
    KEY_ROWS: tl.constexpr = TILE_Y * WINDOW
    KEY_COLS: tl.constexpr = TILE_X * WINDOW
    QUERY_ROWS: tl.constexpr = KEY_ROWS + BEFORE
    QUERY_COLS: tl.constexpr = KEY_COLS + BEFORE
    BLOCKS: tl.constexpr = (KEY_ROWS * KEY_COLS + BLOCK_K - 1) // BLOCK_K
    head, heads = tl.program_id(1), tl.num_programs(1)
    image, top, left = locate_tile(tl.program_id(0) // BLOCKS, H + P, W + P, KEY_ROWS, KEY_COLS)
    query_top, query_left = top - BEFORE - first_row, left - BEFORE
    top, left = top - P, left - P
    key = tl.program_id(0) % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    y, x = key // KEY_COLS, key % KEY_COLS
    valid = (y < KEY_ROWS) & is_inside(y, x, top, left, H, W)
    at = map_rows(kv, image, top, left, y, x, head, kv_image, kv_row, kv_col, D)
    k0, k1 = load_channels(at, valid, D, D0, D1)
    v0, v1 = load_channels(at + kv_part * D, valid, D, D0, D1)
    biases = table_rows(table, head, key, table_stride, KEY_ROWS * KEY_COLS)

    grad_k0 = tl.zeros([BLOCK_K, D0], tl.float32)
    grad_v0 = tl.zeros([BLOCK_K, D0], tl.float32)
    grad_k1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else D0], tl.float32)
    grad_v1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else D0], tl.float32)
    for start in range(0, QUERY_ROWS * QUERY_COLS, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        query_y, query_x = query // QUERY_COLS, query % QUERY_COLS
        is_query = (query_y < QUERY_ROWS) & is_inside(query_y, query_x, query_top, query_left, rows, W)
        q0, q1, g0, g1, log_total, row_sum = load_queries(
            q, grad_out, lse, row_sums, image, query_top, query_left, query_y, query_x, is_query, head, heads, rows, W,
            q_image, q_row, q_col, D, D0, D1)
        logits = dot_channels(k0, k1, q0, q1, D1, TF32) * scale + tl.load(biases[:, None] + query[None, :])
        grad_k0, grad_k1, grad_v0, grad_v1 = add_key_grads(
            grad_k0, grad_k1, grad_v0, grad_v1, k0, k1, v0, v1, q0, q1, g0, g1, logits, log_total, row_sum, D1, TF32)
    at = token_rows(grad_kv, image, top, left, y, x, head, 2 * heads, H, W, D)
    store_channels(at, grad_k0 * scale, grad_k1 * scale, valid, D, D0, D1)
    store_channels(at + heads * D, grad_v0, grad_v1, valid, D, D0, D1)


@triton.jit(do_not_specialize=['E', 'tokens', 'splits', 'tokens_per_split', 'q_image', 'q_token'])
def additional_grad_kernel(
        q, additional, lse, row_sums, grad_out, partial,
        E, tokens, splits, tokens_per_split, scale, q_image, q_token,
        D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr,
):
    """Gradients of additional keys and values, summed over runs of an image's tokens, [B, splits, E, 2, C]."""
    head, heads = tl.program_id(1), tl.num_programs(1)
    split = tl.program_id(0) % splits
    image = (tl.program_id(0) // splits).to(tl.int64)
    key = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_key = key < E
    at = head_at(additional, (image * E * 2 * heads + head) * D, D) + key * (2 * heads * D)
    k0, k1 = load_channels(at, is_key, D, D0, D1)
    v0, v1 = load_channels(at + heads * D, is_key, D, D0, D1)

    grad_k0 = tl.zeros([BLOCK_K, D0], tl.float32)
    grad_v0 = tl.zeros([BLOCK_K, D0], tl.float32)
    grad_k1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else D0], tl.float32)
    grad_v1 = tl.zeros([BLOCK_K, D1 if D1 > 0 else D0], tl.float32)
    first = split * tokens_per_split
    end = tl.minimum(first + tokens_per_split, tokens)
    zero = split * 0  # a map of one row
    for start in range(first, end, BLOCK_Q):
        x = tl.arange(0, BLOCK_Q)
        q0, q1, g0, g1, log_total, row_sum = load_queries(
            q, grad_out, lse, row_sums, image, zero, zero + start, zero, x, x < end - start, head, heads, 1, tokens,
            q_image, 0, q_token, D, D0, D1)
        logits = dot_channels(k0, k1, q0, q1, D1, TF32) * scale
        grad_k0, grad_k1, grad_v0, grad_v1 = add_key_grads(
            grad_k0, grad_k1, grad_v0, grad_v1, k0, k1, v0, v1, q0, q1, g0, g1, logits, log_total, row_sum, D1, TF32)
    at = head_at(partial, ((image * splits + split) * E * 2 * heads + head) * D, D) + key * (2 * heads * D)
    store_channels(at, grad_k0 * scale, grad_k1 * scale, is_key, D, D0, D1)
    store_channels(at + heads * D, grad_v0, grad_v1, is_key, D, D0, D1)


@triton.jit(do_not_specialize=[
    'H', 'W', 'rows', 'first_row', 'tiles', 'tiles_per_split', 'q_image', 'q_row', 'q_col', 'kv_image', 'kv_row',
    'kv_col', 'kv_part', 'table_stride'])
def bias_grad_kernel(
        q, kv, table, lse, row_sums, grad_out, partial,
        H, W, rows, first_row, tiles, tiles_per_split, scale, q_image, q_row, q_col, kv_image, kv_row, kv_col, kv_part,
        table_stride,
        WINDOW: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
        D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TF32: tl.constexpr,
):
    """Gradients of the logits, summed over runs of tiles, [splits, heads, queries of a tile, keys of its region]."""
    P: tl.constexpr = WINDOW // 2
    QUERY_ROWS: tl.constexpr = TILE_Y * WINDOW
    QUERY_COLS: tl.constexpr = TILE_X * WINDOW
    KEY_ROWS: tl.constexpr = QUERY_ROWS + 2 * P
    KEY_COLS: tl.constexpr = QUERY_COLS + 2 * P
    BLOCKS: tl.constexpr = (QUERY_ROWS * QUERY_COLS + BLOCK_Q - 1) // BLOCK_Q
    head, heads = tl.program_id(1), tl.num_programs(1)
    query = tl.program_id(0) % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
    key = tl.program_id(0) // BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    y, x = query // QUERY_COLS, query % QUERY_COLS
    key_y, key_x = key // KEY_COLS, key % KEY_COLS
    biases = tl.load(table_rows(table, head, query, table_stride, QUERY_ROWS * QUERY_COLS)[:, None] + key[None, :])

    grads = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    first = tl.program_id(2) * tiles_per_split
    image, top, left = locate_tile(first, rows, W, QUERY_ROWS, QUERY_COLS)
    for _ in range(first, tl.minimum(first + tiles_per_split, tiles)):
        valid = (y < QUERY_ROWS) & is_inside(y, x, top, left, rows, W)
        q0, q1, g0, g1, log_total, row_sum = load_queries(
            q, grad_out, lse, row_sums, image, top, left, y, x, valid, head, heads, rows, W, q_image, q_row, q_col,
            D, D0, D1)
        key_top, key_left = top + first_row - P, left - P
        in_map = (key_y < KEY_ROWS) & is_inside(key_y, key_x, key_top, key_left, H, W)
        keys = map_rows(kv, image, key_top, key_left, key_y, key_x, head, kv_image, kv_row, kv_col, D)
        k0, k1 = load_channels(keys, in_map, D, D0, D1)
        v0, v1 = load_channels(keys + kv_part * D, in_map, D, D0, D1)
        logits = dot_channels(q0, q1, k0, k1, D1, TF32) * scale + biases.to(tl.float32)
        if is_clipped(key_top, key_left, H, W, KEY_ROWS, KEY_COLS) != 0:
            logits = tl.where(in_map[None, :], logits, float('-inf'))
        weights = tl.exp2(logits * LOG2_E - log_total[:, None])
        grads += weights * (dot_channels(g0, g1, v0, v1, D1, TF32) - row_sum[:, None])
        left += QUERY_COLS  # to the next tile: of the row, of the image, of the next image
        top = tl.where(left < W, top, top + QUERY_ROWS)
        left = tl.where(left < W, left, 0)
        image = tl.where(top < rows, image, image + 1)
        top = tl.where(top < rows, top, 0)
    rows = table_rows(partial, tl.program_id(2) * heads + head, query, table_stride, QUERY_ROWS * QUERY_COLS)
    tl.store(rows[:, None] + key[None, :], grads)
