"""The end of a product whose depth is split, for kernels that go on with it: its partial sums, added in order."""

from __future__ import annotations

from orthrus_triton._triton import tl, triton


@triton.jit
def split_sum(
    partial_ptr, row, cols, mask, bias_ptr, M, N: tl.constexpr, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """`cols` of one row of an [M, N] product in SPLIT_K partial sums, with its bias, fp32: what `linear` rounds."""
    product = tl.zeros_like(cols).to(tl.float32)
    for split in tl.static_range(SPLIT_K):
        # as cols, splits in ascending order
        product += tl.load(partial_ptr + ((M * split).to(tl.int64) + row) * N + cols, mask=mask, other=0.0)
    if HAS_BIAS:
        product += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return product
