"""The Triton kernels of training: a forward that keeps each row's log-sum-exp, and a backward that recomputes weights.
One program owns each result and walks its keys in a fixed order, without atomics: two runs have the same bits."""

from __future__ import annotations

from orthrus_triton._triton import tl, triton
from orthrus_triton.ops.dual_view_attention.kernels import _attend_split, _attend_tile


@triton.jit
def _tile_rows(
    key_limit_ptr, T, S, block_size, num_tiles,
    HKV: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile packs (token, head of the group), token-major. Returns of its rows: the token t, the index of
    (b, t, head) in [B, T, HQ], the first context key seen and the one after the last; and the tile's first packed row.
    Rows beyond T see nothing. The last tiles, whose anchors usually come last and see most, are started first."""
    first = (num_tiles - 1 - tl.program_id(0)) * BLOCK_M
    b = (tl.program_id(1) // HKV).to(tl.int64)
    packed = first + tl.arange(0, BLOCK_M)
    t = packed // GROUP
    row = (b * T + t) * (HKV * GROUP) + tl.program_id(1) % HKV * GROUP + packed % GROUP
    limit = tl.load(key_limit_ptr + b * T + t, mask=t < T, other=0)
    limit = tl.minimum(tl.maximum(limit, 0), S)
    lowest = tl.zeros_like(limit)
    if WINDOW > 0:
        lowest = tl.maximum(limit + t % block_size + 1 - WINDOW, 0)
    return t, row, lowest, limit, first


@triton.jit
def _load_keys(ptr, rows, stride, mask, dims, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_D, BLOCK_N]: keys or values as columns, 0 where the mask is off, so that 0 * NaN never happens."""
    mask = mask[None, :]
    if BLOCK_D != D:
        mask = mask & (dims < D)[:, None]
    return tl.load(ptr + rows.to(tl.int64)[None, :] * stride + dims[:, None], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["T", "S", "block_size", "num_tiles"])
def block_attention_forward_kernel(
    q_ptr, k_context_ptr, v_context_ptr, key_limit_ptr, k_block_ptr, v_block_ptr, out_ptr, lse_ptr,
    T, S, block_size, num_tiles, stride_k_b, stride_k_h, stride_k_s, stride_v_b, stride_v_h, stride_v_s,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALE_LOG2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * HKV): the context up to the tile's largest limit, then the blocks its rows belong to."""
    b, kv_head = (tl.program_id(1) // HKV).to(tl.int64), tl.program_id(1) % HKV
    t, row, lowest, limit, first = _tile_rows(
        key_limit_ptr, T, S, block_size, num_tiles, HKV, GROUP, WINDOW, BLOCK_M
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    offsets = row[:, None] * D + dims[None, :]
    mask = (t < T)[:, None] & (dims < D)[None, :]
    # [BLOCK_M, BLOCK_D]
    q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
    max_limit = tl.max(limit, axis=0)
    start = tl.min(tl.where(t < T, lowest, S), axis=0) // BLOCK_N * BLOCK_N
    running_max, running_sum, accumulator = _attend_split(
        q, k_context_ptr + b * stride_k_b + kv_head.to(tl.int64) * stride_k_h,
        v_context_ptr + b * stride_v_b + kv_head.to(tl.int64) * stride_v_h, stride_k_s, stride_v_s, start, max_limit,
        limit, lowest, max_limit, D, BLOCK_M, BLOCK_N, BLOCK_D, WINDOW > 0, SCALE_LOG2, PRECISION,
    )  # fmt: skip
    scratch = (b * T * HKV + kv_head) * D
    last_row = tl.minimum((first + BLOCK_M - 1) // GROUP, T - 1)
    for block in range(first // GROUP // block_size, last_row // block_size + 1):
        for tile in range(0, block_size, BLOCK_N):
            keys = tile + tl.arange(0, BLOCK_N)
            in_block = keys < block_size
            rows = block * block_size + keys
            k = _load_keys(k_block_ptr + scratch, rows, HKV * D, in_block, dims, D, BLOCK_D)
            v = tl.trans(_load_keys(v_block_ptr + scratch, rows, HKV * D, in_block, dims, D, BLOCK_D))
            visible = in_block[None, :] & (t // block_size == block)[:, None]
            running_max, running_sum, accumulator = _attend_tile(
                q, k, v, visible, running_max, running_sum, accumulator, SCALE_LOG2, PRECISION
            )
    running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)  # rows beyond T
    tl.store(out_ptr + offsets, (accumulator / running_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, running_max + tl.log2(running_sum), mask=t < T)


@triton.jit
def _grad_q_tile(
    q, grad_out, k, v, visible, lse, delta, grad_q, SCALE_LOG2: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Add what one tile of keys gives to the gradient of q / scale. k and v are [BLOCK_D, BLOCK_N]."""
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(q, k, input_precision=PRECISION) * SCALE_LOG2
    weights = tl.exp2(tl.where(visible, scores, float("-inf")) - lse[:, None])
    grad_scores = weights * (tl.dot(grad_out, v, input_precision=PRECISION) - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), tl.trans(k), grad_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "S", "block_size", "num_tiles"])
def block_attention_grad_q_kernel(
    grad_out_ptr, q_ptr, k_context_ptr, v_context_ptr, key_limit_ptr, k_block_ptr, v_block_ptr, out_ptr, lse_ptr,
    delta_ptr, grad_q_ptr, T, S, block_size, num_tiles,
    stride_k_b, stride_k_h, stride_k_s, stride_v_b, stride_v_h, stride_v_s,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALE: tl.constexpr, SCALE_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * HKV): the gradient of q, and delta (the sum of out * grad_out of each row) for the kernel
    below. The same keys as in the forward; nothing is written for the context."""
    b, kv_head = (tl.program_id(1) // HKV).to(tl.int64), tl.program_id(1) % HKV
    t, row, lowest, limit, first = _tile_rows(
        key_limit_ptr, T, S, block_size, num_tiles, HKV, GROUP, WINDOW, BLOCK_M
    )  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    offsets = row[:, None] * D + dims[None, :]
    mask = (t < T)[:, None] & (dims < D)[None, :]
    # [BLOCK_M, BLOCK_D]
    q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
    grad_out = tl.load(grad_out_ptr + offsets, mask=mask, other=0.0)
    out = tl.load(out_ptr + offsets, mask=mask, other=0.0)
    # [BLOCK_M]
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=t < T)
    lse = tl.load(lse_ptr + row, mask=t < T, other=0.0)
    grad_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    max_limit = tl.max(limit, axis=0)
    start = tl.min(tl.where(t < T, lowest, S), axis=0) // BLOCK_N * BLOCK_N
    k_context_ptr += b * stride_k_b + kv_head.to(tl.int64) * stride_k_h
    v_context_ptr += b * stride_v_b + kv_head.to(tl.int64) * stride_v_h
    for tile in range(start, max_limit, BLOCK_N):
        keys = tile + tl.arange(0, BLOCK_N)
        k = _load_keys(k_context_ptr, keys, stride_k_s, keys < max_limit, dims, D, BLOCK_D)
        v = _load_keys(v_context_ptr, keys, stride_v_s, keys < max_limit, dims, D, BLOCK_D)
        visible = keys[None, :] < limit[:, None]
        if WINDOW > 0:
            visible = visible & (keys[None, :] >= lowest[:, None])
        grad_q = _grad_q_tile(q, grad_out, k, v, visible, lse, delta, grad_q, SCALE_LOG2, PRECISION)
    scratch = (b * T * HKV + kv_head) * D
    last_row = tl.minimum((first + BLOCK_M - 1) // GROUP, T - 1)
    for block in range(first // GROUP // block_size, last_row // block_size + 1):
        for tile in range(0, block_size, BLOCK_N):
            keys = tile + tl.arange(0, BLOCK_N)
            in_block = keys < block_size
            rows = block * block_size + keys
            k = _load_keys(k_block_ptr + scratch, rows, HKV * D, in_block, dims, D, BLOCK_D)
            v = _load_keys(v_block_ptr + scratch, rows, HKV * D, in_block, dims, D, BLOCK_D)
            visible = in_block[None, :] & (t // block_size == block)[:, None]
            grad_q = _grad_q_tile(q, grad_out, k, v, visible, lse, delta, grad_q, SCALE_LOG2, PRECISION)
    tl.store(grad_q_ptr + offsets, (grad_q * SCALE).to(grad_q_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "block_size"])
def block_attention_grad_kv_kernel(
    grad_out_ptr, q_ptr, k_block_ptr, v_block_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, T, block_size,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SCALE: tl.constexpr, SCALE_LOG2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, key tiles of a block, B * HKV): the gradients of a block's own keys and values, summed over its
    rows and the heads of the group in the order of the packed rows."""
    b, kv_head = (tl.program_id(2) // HKV).to(tl.int64), tl.program_id(2) % HKV
    first_token = tl.program_id(0) * block_size
    keys = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    key_offsets = ((b * T + first_token + keys) * HKV + kv_head)[:, None] * D + dims[None, :]
    key_mask = (keys < block_size)[:, None] & (dims < D)[None, :]
    # [BLOCK_N, BLOCK_D]
    k = tl.load(k_block_ptr + key_offsets, mask=key_mask, other=0.0)
    v = tl.load(v_block_ptr + key_offsets, mask=key_mask, other=0.0)
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for tile in range(0, block_size * GROUP, BLOCK_M):
        packed = tile + tl.arange(0, BLOCK_M)
        row_mask = packed < block_size * GROUP
        row = (b * T + first_token + packed // GROUP) * (HKV * GROUP) + kv_head * GROUP + packed % GROUP
        offsets = row[:, None] * D + dims[None, :]
        mask = row_mask[:, None] & (dims < D)[None, :]
        # [BLOCK_M, BLOCK_D]
        q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
        grad_out = tl.load(grad_out_ptr + offsets, mask=mask, other=0.0)
        lse = tl.load(lse_ptr + row, mask=row_mask, other=0.0)
        delta = tl.load(delta_ptr + row, mask=row_mask, other=0.0)
        # [BLOCK_N, BLOCK_M]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE_LOG2
        visible = (keys < block_size)[:, None] & row_mask[None, :]
        weights = tl.exp2(tl.where(visible, scores, float("-inf")) - lse[None, :])
        grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_scores = weights * (tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
        grad_k = tl.dot(grad_scores.to(k.dtype), q, grad_k, input_precision=PRECISION)
    tl.store(grad_k_ptr + key_offsets, (grad_k * SCALE).to(grad_k_ptr.dtype.element_ty), mask=key_mask)
    tl.store(grad_v_ptr + key_offsets, grad_v.to(grad_v_ptr.dtype.element_ty), mask=key_mask)
