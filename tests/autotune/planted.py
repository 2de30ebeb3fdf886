"""Ops for the tuner's tests: a row scale that is right, and a product whose depth tile depends on the row count."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, tl, triton
from orthrus_triton.autotune import KernelConfig, tunable


@triton.jit
def scale_kernel(x_ptr, weight_ptr, out_ptr, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < H
        x = tl.load(x_ptr + row * H + cols, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * H + cols, (x * weight).to(out_ptr.dtype.element_ty), mask=mask)


@tunable(
    "planted_scale",
    kernels=[scale_kernel],
    space={"BLOCK": (64, 128, 256), "num_warps": (1, 2)},
    default={"BLOCK": 128, "num_warps": 1},
    key={"H": lambda x, weight: weight.shape[0]},
    inputs=lambda key, rows, randn: (randn(rows, key["H"]), randn(key["H"])),
    reference=lambda x, weight: x * weight,
)
def scale(x: torch.Tensor, weight: torch.Tensor, config: KernelConfig) -> torch.Tensor:
    out = torch.empty_like(x)
    scale_kernel[(x.shape[0],)](
        x, weight, out, H=weight.shape[0], BLOCK=config["BLOCK"], **config.launch, **EXACT_LAUNCH
    )
    return out


@triton.jit
def product_kernel(
    x_ptr, weight_ptr, out_ptr, M, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols, depth = tl.arange(0, N), tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((BLOCK_M, N), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = (rows < M)[:, None] & (depth < K - k)[None, :]
        x = tl.load(x_ptr + rows[:, None] * K + k + depth[None, :], mask=mask, other=0.0)
        weight = tl.load(weight_ptr + cols[None, :] * K + k + depth[:, None], mask=(depth < K - k)[:, None], other=0.0)
        accumulator = tl.dot(x, weight, accumulator, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], accumulator, mask=(rows < M)[:, None])


@tunable(
    "planted_product",
    kernels=[product_kernel],
    # WIDE_FROM is the planted fault: from so many rows on, the depth tile is four times as wide
    space={"BLOCK_K": (32, 64), "WIDE_FROM": (8, 1000), "DROP": (1, 2)},
    default={"BLOCK_K": 32, "WIDE_FROM": 1000, "DROP": 1},
    key={"N": lambda x, weight: weight.shape[0], "K": lambda x, weight: weight.shape[1]},
    inputs=lambda key, rows, randn: (randn(rows, key["K"]), randn(key["N"], key["K"])),
    reference=lambda x, weight: x @ weight.T,
)
def product(x: torch.Tensor, weight: torch.Tensor, config: KernelConfig) -> torch.Tensor:
    (M, K), N = x.shape, weight.shape[0]
    block_k = config["BLOCK_K"] * (4 if M >= config["WIDE_FROM"] else 1)
    if config["DROP"] == 2:  # another fault: the last depth is left out
        x = x.clone()
        x[:, -1] = 0
    out = x.new_empty(M, N, dtype=torch.float32)
    product_kernel[(cdiv(M, 16),)](x, weight, out, M, N=N, K=K, BLOCK_M=16, BLOCK_K=block_k, **EXACT_LAUNCH)
    return out
