"""The inner loop of every product: rows of x times rows of a weight, in one order along K.
Every kernel that multiplies takes its products from here, so that fused and unfused results have the same bits."""

from __future__ import annotations

from orthrus_triton._triton import tl, triton


@triton.jit
def product_tile(
    x_ptr, weight_ptr, rows, cols, row_mask, col_mask, start, end,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[rows] @ weight[cols].T over the depths start..end-1, in fp32 and in ascending tiles of BLOCK_K."""
    depth = tl.arange(0, BLOCK_K)
    x_tile_ptr = x_ptr + rows.to(tl.int64)[:, None] * K + depth[None, :]
    weight_tile_ptr = weight_ptr + cols.to(tl.int64)[None, :] * K + depth[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, end, BLOCK_K):
        if K % BLOCK_K == 0:
            # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
            x = tl.load(x_tile_ptr + k, mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_tile_ptr + k, mask=col_mask[None, :], other=0.0)
        else:
            in_range = depth < K - k
            x = tl.load(x_tile_ptr + k, mask=row_mask[:, None] & in_range[None, :], other=0.0)
            weight = tl.load(weight_tile_ptr + k, mask=col_mask[None, :] & in_range[:, None], other=0.0)
        # an int8 weight's values are numbers of fp16 and of bf16, too
        accumulator = tl.dot(x, weight.to(x.dtype), accumulator, input_precision=PRECISION)
    return accumulator
