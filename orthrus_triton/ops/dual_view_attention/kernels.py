"""The Triton kernels: one program attends a tile of packed rows over one KV split, a second kernel merges the splits.
Splits and tiles lie at absolute positions and merge in order; what is masked changes nothing."""

from __future__ import annotations

from orthrus_triton._triton import tl, triton


@triton.jit
def split_start(split, SPLIT_SIZE: tl.constexpr):
    """Where a split of the keys begins: at an absolute position, whatever the context. Splits grow with it (8 of
    SPLIT_SIZE, 14 four times as long, then eight times), for a short context must be shared among many programs, and a
    long one has programs enough and would drown in partial results."""
    near = split * SPLIT_SIZE
    middle = 8 * SPLIT_SIZE + (split - 8) * (4 * SPLIT_SIZE)
    far = 64 * SPLIT_SIZE + (split - 22) * (8 * SPLIT_SIZE)
    return tl.where(split < 8, near, tl.where(split < 22, middle, far))


@triton.jit
def splits_of(length, SPLIT_SIZE: tl.constexpr):
    """How many splits the first `length` keys lie in."""
    near = tl.cdiv(length, SPLIT_SIZE)
    middle = 8 + tl.cdiv(length - 8 * SPLIT_SIZE, 4 * SPLIT_SIZE)
    far = 22 + tl.cdiv(length - 64 * SPLIT_SIZE, 8 * SPLIT_SIZE)
    return tl.where(length <= 8 * SPLIT_SIZE, near, tl.where(length <= 64 * SPLIT_SIZE, middle, far))


@triton.jit
def _attend_tile(
    q, k, v, visible, running_max, running_sum, accumulator, SCALE_LOG2: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Merge one tile of keys into the online softmax, in fp32 and base 2. A row that sees nothing of the tile keeps
    its maximum, so its state is multiplied by exactly 1 and gets exactly 0 added."""
    # [BLOCK_M, BLOCK_N]
    scores = tl.dot(q, k, input_precision=PRECISION) * SCALE_LOG2
    scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, axis=1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - finite_max[:, None])
    correction = tl.exp2(running_max - finite_max)
    running_sum = running_sum * correction + tl.sum(weights, axis=1)
    accumulator = accumulator * correction[:, None]
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision=PRECISION)
    return new_max, running_sum, accumulator


@triton.jit
def _merge_slot(
    partial_ptr, partial_max_ptr, partial_sum_ptr, slot, dims, mask, total_max, total_sum, total, D: tl.constexpr
):  # fmt: skip
    """Add one slot of the workspace to a row's running state. An empty slot changes nothing, exactly."""
    split_max = tl.load(partial_max_ptr + slot)
    split_sum = tl.load(partial_sum_ptr + slot)
    # [BLOCK_D]
    accumulator = tl.load(partial_ptr + slot * D + dims, mask=mask, other=0.0)
    new_max = tl.maximum(total_max, split_max)
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    keep = tl.exp2(total_max - finite_max)
    add = tl.exp2(split_max - finite_max)
    return new_max, total_sum * keep + split_sum * add, total * keep + accumulator * add


@triton.jit
def _attend_split(
    q, k_ptr, v_ptr, stride_k_s, stride_v_s, start, end, limit, lowest, max_limit,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr,
    SCALE_LOG2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over cache rows start..end-1, from an empty state. start is a multiple of BLOCK_N."""
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dims = tl.arange(0, BLOCK_D)
    for tile_start in range(start, end, BLOCK_N):
        keys = tile_start + tl.arange(0, BLOCK_N)
        in_range = keys < max_limit
        k_mask = in_range[None, :]
        v_mask = in_range[:, None]
        if BLOCK_D != D:
            k_mask = k_mask & (dims < D)[:, None]
            v_mask = v_mask & (dims < D)[None, :]
        rows = keys.to(tl.int64)
        # [BLOCK_D, BLOCK_N], [BLOCK_N, BLOCK_D]; rows nobody may see read as 0, so that 0 * NaN never happens
        k = tl.load(k_ptr + rows[None, :] * stride_k_s + dims[:, None], mask=k_mask, other=0.0)
        v = tl.load(v_ptr + rows[:, None] * stride_v_s + dims[None, :], mask=v_mask, other=0.0)
        visible = keys[None, :] < limit[:, None]
        if HAS_WINDOW:
            visible = visible & (keys[None, :] >= lowest[:, None])
        running_max, running_sum, accumulator = _attend_tile(
            q, k, v, visible, running_max, running_sum, accumulator, SCALE_LOG2, PRECISION
        )
    return running_max, running_sum, accumulator


@triton.jit
def _attend_own_block(
    q, k_block_ptr, v_block_ptr, row_block, first_block, last_block, block_size,
    HKV: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SCALE_LOG2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of each row over the scratch keys of its own block, whole, in both directions.
    Blocks are taken one by one and tiled from their first row: a block alone has the bits it has among others."""
    running_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dims = tl.arange(0, BLOCK_D)
    for block in range(first_block, last_block + 1):
        for tile_start in range(0, block_size, BLOCK_N):
            offsets = tile_start + tl.arange(0, BLOCK_N)
            in_block = offsets < block_size
            k_mask = in_block[None, :]
            v_mask = in_block[:, None]
            if BLOCK_D != D:
                k_mask = k_mask & (dims < D)[:, None]
                v_mask = v_mask & (dims < D)[None, :]
            rows = (block * block_size + offsets).to(tl.int64) * (HKV * D)
            # [BLOCK_D, BLOCK_N], [BLOCK_N, BLOCK_D]
            k = tl.load(k_block_ptr + rows[None, :] + dims[:, None], mask=k_mask, other=0.0)
            v = tl.load(v_block_ptr + rows[:, None] + dims[None, :], mask=v_mask, other=0.0)
            visible = in_block[None, :] & (row_block == block)[:, None]
            running_max, running_sum, accumulator = _attend_tile(
                q, k, v, visible, running_max, running_sum, accumulator, SCALE_LOG2, PRECISION
            )
    return running_max, running_sum, accumulator


@triton.jit(do_not_specialize=["T", "S", "num_splits", "block_size"], do_not_specialize_on_alignment=["key_limit_ptr"])
def dual_view_attention_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, key_limit_ptr, k_block_ptr, v_block_ptr,
    partial_ptr, partial_max_ptr, partial_sum_ptr, T, S, num_splits, block_size,
    stride_k_b, stride_k_h, stride_k_s, stride_v_b, stride_v_h, stride_v_s,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, HAS_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, SCALE_LOG2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B * HKV, splits + HAS_BLOCK): the M tile packs (token, head of the group), token-major. Each
    program leaves the unnormalised state of one split in the workspace; slot num_splits holds the own block's."""
    b = (tl.program_id(1) // HKV).to(tl.int64)
    kv_head = tl.program_id(1) % HKV
    packed = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = packed // GROUP
    row_mask = t < T
    dims = tl.arange(0, BLOCK_D)
    HQ: tl.constexpr = HKV * GROUP
    # [BLOCK_M]: index of (b, t, head) in [B, T, HQ]
    row = (b * T + t) * HQ + kv_head * GROUP + packed % GROUP
    row_dim_mask = row_mask[:, None] & (dims < D)[None, :]
    # [BLOCK_M, BLOCK_D]
    q = tl.load(q_ptr + row[:, None] * D + dims[None, :], mask=row_dim_mask, other=0.0)
    # [BLOCK_M]
    limit = tl.load(key_limit_ptr + b * T + t, mask=row_mask, other=0)
    limit = tl.minimum(tl.maximum(limit, 0), S)
    max_limit = tl.max(limit, axis=0)
    lowest = tl.zeros_like(limit)
    if WINDOW > 0:
        position = limit - 1
        if HAS_BLOCK:
            position = limit + t % block_size
        lowest = tl.maximum(position + 1 - WINDOW, 0)
    min_lowest = tl.min(tl.where(row_mask, lowest, S), axis=0)
    k_ptr = k_cache_ptr + b * stride_k_b + kv_head.to(tl.int64) * stride_k_h
    v_ptr = v_cache_ptr + b * stride_v_b + kv_head.to(tl.int64) * stride_v_h
    split = tl.num_programs(2) - 1 - tl.program_id(2)  # the longest begin first
    if split < num_splits:
        start = tl.maximum(split_start(split, SPLIT_SIZE), min_lowest // BLOCK_N * BLOCK_N)
        end = tl.minimum(split_start(split + 1, SPLIT_SIZE), max_limit)
        if start >= end:
            return
        running_max, running_sum, accumulator = _attend_split(
            q, k_ptr, v_ptr, stride_k_s, stride_v_s, start, end, limit, lowest, max_limit,
            D, BLOCK_M, BLOCK_N, BLOCK_D, WINDOW > 0, SCALE_LOG2, PRECISION,
        )  # fmt: skip
    else:
        scratch_offset = (b * T * HKV + kv_head) * D
        first_block = tl.program_id(0) * BLOCK_M // GROUP // block_size
        last_row = tl.minimum(((tl.program_id(0) + 1) * BLOCK_M - 1) // GROUP, T - 1)
        running_max, running_sum, accumulator = _attend_own_block(
            q, k_block_ptr + scratch_offset, v_block_ptr + scratch_offset, t // block_size, first_block,
            last_row // block_size, block_size, HKV, D, BLOCK_M, BLOCK_N, BLOCK_D, SCALE_LOG2, PRECISION,
        )  # fmt: skip
    slot = row * (num_splits + HAS_BLOCK) + split
    tl.store(partial_max_ptr + slot, running_max, mask=row_mask)
    tl.store(partial_sum_ptr + slot, running_sum, mask=row_mask)
    tl.store(partial_ptr + slot[:, None] * D + dims[None, :], accumulator, mask=row_dim_mask)


@triton.jit(do_not_specialize=["T", "S", "num_splits", "block_size"], do_not_specialize_on_alignment=["key_limit_ptr"])
def combine_splits_kernel(
    partial_ptr, partial_max_ptr, partial_sum_ptr, key_limit_ptr, out_ptr, T, S, num_splits, block_size,
    HQ: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, HAS_BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT_SIZE: tl.constexpr,
):  # fmt: skip
    """Grid (B * T * HQ): merge one row's splits, lowest position first, its own block last."""
    row = tl.program_id(0).to(tl.int64)
    token = row // HQ  # b * T + t
    dims = tl.arange(0, BLOCK_D)
    mask = dims < D
    limit = tl.load(key_limit_ptr + token)
    limit = tl.minimum(tl.maximum(limit, 0), S)
    lowest = tl.zeros_like(limit)
    if WINDOW > 0:
        position = limit - 1
        if HAS_BLOCK:
            position = limit + (token % T).to(tl.int32) % block_size
        lowest = tl.maximum(position + 1 - WINDOW, 0)
    # a split outside this row's keys holds nothing for it (and may not have been written): leaving it out is exact
    total_max = tl.full((), float("-inf"), tl.float32)
    total_sum = tl.full((), 0.0, tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    first_slot = row * (num_splits + HAS_BLOCK)
    # where the window reaches no further than the row's own block, none of its splits need have been written
    end = tl.where(lowest < limit, splits_of(limit, SPLIT_SIZE), 0)
    for split in range(splits_of(lowest + 1, SPLIT_SIZE) - 1, end):
        total_max, total_sum, total = _merge_slot(
            partial_ptr, partial_max_ptr, partial_sum_ptr, first_slot + split, dims, mask,
            total_max, total_sum, total, D,
        )  # fmt: skip
    if HAS_BLOCK:
        total_max, total_sum, total = _merge_slot(
            partial_ptr, partial_max_ptr, partial_sum_ptr, first_slot + num_splits, dims, mask,
            total_max, total_sum, total, D,
        )  # fmt: skip
    total_sum = tl.where(total_sum == 0.0, 1.0, total_sum)
    tl.store(out_ptr + row * D + dims, (total / total_sum).to(out_ptr.dtype.element_ty), mask=mask)
