"""Products with a weight in int8 and one scale per row: half of bf16's bytes, and rows as independent as `linear`'s.
Partial sums leave the kernel in fp32, for the kernels that add up those of `linear`."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, tl, triton
from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.ops._dispatch import on_its_device
from orthrus_triton.ops.product_tile import product_tile
from orthrus_triton.ops.row_tiles import depth_per_split

LARGEST = 127  # of either sign


@torch.no_grad()
def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` [N, K], any float dtype, as (values [N, K] int8, weight_scale [N] fp32): the nearest multiples of a
    127th of each row's largest entry.

    Raises:
        ValueError: not a matrix, or an entry is not finite.
    """
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], but has shape {tuple(weight.shape)}")
    largest = weight.abs().amax(dim=1).float()
    if not weight.is_meta and not largest.isfinite().all():
        raise ValueError("weight must be finite to be kept in int8")
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)  # contiguous, as products want it
    for start in range(0, len(weight), 4096):  # a head in fp32 is some gigabytes
        rows = slice(start, start + 4096)
        values[rows] = (weight[rows].float() / scale[rows, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return values, scale


def dequantize_rows(values: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantize_rows` stands for, [N, K], in `dtype`."""
    scale = weight_scale[:, None].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return (values * scale).to(dtype)


@triton.jit(do_not_specialize=["M", "run", "apart"])
def int8_product_kernel(
    x_ptr, values_ptr, scale_ptr, partial_ptr, M, run, apart,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, K_PER_SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column tiles, SPLIT_K). As in `linear_kernel`, x may be runs of rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row_mask = rows < M
    col_mask = cols < N
    x_rows = rows // run * apart + rows % run
    accumulator = product_tile(
        x_ptr, values_ptr, x_rows, cols, row_mask, col_mask,
        split * K_PER_SPLIT, tl.minimum((split + 1) * K_PER_SPLIT, K), K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    # [BLOCK_N]
    accumulator *= tl.load(scale_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    out_offsets = (M * split + rows).to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(partial_ptr + out_offsets, accumulator, mask=row_mask[:, None] & col_mask[None, :])


@on_its_device
def launch_int8_product(
    x: torch.Tensor, run: int, apart: int, values: torch.Tensor, weight_scale: torch.Tensor, partial: torch.Tensor,
    config: KernelConfig,
) -> None:  # fmt: skip
    """Fill `partial` [SPLIT_K, M, N] fp32 from `row_runs` of x, with `linear`'s configuration of this weight shape, for
    any number of rows: converted from int8, Hopper's small tiles add along K in another order than its large ones."""
    (N, K), M = values.shape, partial.shape[1]
    grid = (cdiv(M, config["BLOCK_M"]), cdiv(N, config["BLOCK_N"]), config["SPLIT_K"])
    int8_product_kernel[grid](
        x, values, weight_scale.contiguous(), partial, M, run, apart, N=N, K=K,
        K_PER_SPLIT=depth_per_split(config, K), PRECISION="ieee", **config.constants, **config.launch, **EXACT_LAUNCH,
    )  # fmt: skip
