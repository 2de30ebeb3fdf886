"""y = x @ weight.T for few rows, with row bits that do not depend on the row count.
Tiles, the K order and the K split are functions of the weight's shape alone; partial sums are combined in order."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, tl, triton
from orthrus_triton.autotune.store import KernelConfig, lookup
from orthrus_triton.ops._cpu_product import library_product, tiled_product
from orthrus_triton.ops._dispatch import (
    on_its_device,
    require_kernel,
    require_same,
    resolve_impl,
    runs_directly,
    without_autocast,
)
from orthrus_triton.ops.int8_product import dequantize_rows, launch_int8_product
from orthrus_triton.ops.product_tile import product_tile
from orthrus_triton.ops.row_tiles import depth_per_split, tiles_for_rows


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
    config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor:
    """`x @ weight.T + bias`, accumulated in fp32, plus `residual` in the output's dtype.

    Args:
        x: [..., K], fp32, fp16 or bf16. Tier A holds for any number of rows; the kernel is built for few (1..512).
        weight: [N, K], the dtype of `x`, contiguous.
        bias: [N] or None, the dtype of `x`.
        residual: [..., N] or None, the output's dtype. The product is rounded before it is added, as if unfused.
        out_dtype: dtype of the result, by default that of `x`; fp32 keeps Triton's accumulator (the LM head asks for
            that). The torch implementation rounds to the dtype of `x` first, as products of libraries do.
        impl: "auto", "triton", "torch" or "reference"; or "library", the vendor's product (cuBLAS, BLAS) for many rows
            at once, whose row bits may depend on the row count.
        config: kernel configuration, by default the one looked up for this weight shape. Only with impl="triton".
        weight_scale: [N] float, for a `weight` of int8 whose row n counts `weight_scale[n]` (`quantize_rows`). Every
            integer is multiplied as it is, and sums are scaled.
        round_rows: with a `weight` of int8, CPUs that multiply integers faster round x to int8, too, in groups of up to
            64 numbers of a row with one scale each: for drafts, and for models that shall be fast rather than close.

    Returns:
        [..., N].

    Raises:
        ValueError: shapes or dtypes that do not agree, or a weight that is not contiguous.
    """
    check_product(x, weight, bias, weight_scale)
    out_dtype = out_dtype or x.dtype
    if residual is not None:
        require_same("residual", tuple(residual.shape), (*x.shape[:-1], weight.shape[0]), "shape")
        require_same("residual", residual.dtype, out_dtype, "dtype")
    impl = impl if impl == "library" else resolve_impl(impl, x)
    require_kernel(config, impl, x, weight, bias, residual)
    if config is not None:
        return launch_linear(x, weight, bias, residual, out_dtype, config, weight_scale)
    if impl == "library" and runs_directly("torch", x):
        return linear_library(x, weight, bias, residual, out_dtype, weight_scale, round_rows)
    if runs_directly(impl, x):
        return linear_torch(x, weight, bias, residual, out_dtype, weight_scale, round_rows)
    return torch.ops.orthrus_triton.linear(x, weight, bias, residual, out_dtype, impl, weight_scale, round_rows)


def check_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None = None
) -> None:
    """Raise what is wrong with the factors [..., K] and [N, K] of a product, its bias [N] and scales [N], by name."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"the rows must be [..., K] and weight [N, K], but got shapes {shapes}")
    if weight_scale is not None:
        require_same("weight", weight.dtype, torch.int8, "dtype")
        require_same("weight_scale", tuple(weight_scale.shape), (weight.shape[0],), "shape")
    elif weight.dtype != x.dtype:
        raise ValueError(f"weight must have dtype {x.dtype}, that of the rows, but got {weight.dtype}")
    if not weight.is_contiguous():  # kernels would read other numbers, and a copy in every call would be dear
        raise ValueError(f"weight must be contiguous, but has strides {weight.stride()}")
    if bias is not None:
        require_same("bias", tuple(bias.shape), (weight.shape[0],), "shape")
        require_same("bias", bias.dtype, x.dtype, "dtype")


@triton.jit
def _epilogue(
    accumulator, bias_ptr, residual_ptr, out_ptr, row_offsets, cols, mask, col_mask,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bias in fp32, one rounding to the output's dtype, then the residual as a separate addition would add it."""
    if HAS_BIAS:
        # [BLOCK_N]
        accumulator += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    out = accumulator.to(out_ptr.dtype.element_ty)
    offsets = row_offsets[:, None] + cols[None, :]
    if HAS_RESIDUAL:
        # [BLOCK_M, BLOCK_N]
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        out = (out.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=mask)


@triton.jit(do_not_specialize=["M", "run", "apart"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, partial_ptr, M, run, apart,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, K_PER_SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # row tiles vary fastest, so that the programs that share a weight tile run side by side
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    row_mask = rows < M
    col_mask = cols < N
    # x may be runs of rows, the beginnings of which lie `apart`: one part of every sequence's rows
    x_rows = rows // run * apart + rows % run
    accumulator = product_tile(
        x_ptr, weight_ptr, x_rows, cols, row_mask, col_mask,
        split * K_PER_SPLIT, tl.minimum((split + 1) * K_PER_SPLIT, K), K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    row_offsets = rows.to(tl.int64) * N
    mask = row_mask[:, None] & col_mask[None, :]
    if SPLIT_K == 1:
        _epilogue(
            accumulator, bias_ptr, residual_ptr, out_ptr, row_offsets, cols, mask, col_mask, HAS_BIAS, HAS_RESIDUAL
        )  # fmt: skip
    else:
        partial_ptr += split.to(tl.int64) * M * N
        tl.store(partial_ptr + row_offsets[:, None] + cols[None, :], accumulator, mask=mask)


@triton.jit(do_not_specialize=["M"])
def combine_splits_kernel(
    partial_ptr, bias_ptr, residual_ptr, out_ptr, M,
    N: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) + tl.arange(0, 1)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < N
    mask = (rows < M)[:, None] & col_mask[None, :]
    row_offsets = rows.to(tl.int64) * N
    accumulator = tl.zeros((1, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLIT_K):
        # [1, BLOCK_N], splits in ascending order
        offsets = (M * split).to(tl.int64) * N + row_offsets[:, None] + cols[None, :]
        accumulator += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
    _epilogue(accumulator, bias_ptr, residual_ptr, out_ptr, row_offsets, cols, mask, col_mask, HAS_BIAS, HAS_RESIDUAL)


COMBINE_BLOCK_N = 512
COMBINE_WARPS = 4


@on_its_device
def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernel. The row count M reaches the grid, the masks and the tiles of rows and columns, never the order
    along K."""
    N, K = weight.shape
    config = config or lookup("linear", x.dtype, x.device, N=N, K=K)
    split_k = config["SPLIT_K"]
    out = x.new_empty(*x.shape[:-1], N, dtype=out_dtype)
    residual = residual.contiguous() if residual is not None else None
    flags = {"HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None}
    bias_arg = out if bias is None else bias.contiguous()
    residual_arg = out if residual is None else residual
    if split_k == 1 and weight_scale is None:
        _launch_product(x, weight, config, bias_arg, residual_arg, out, out, flags)
        return out
    partial = launch_partial(x, weight, config, weight_scale)
    M = partial.shape[1]
    combine_splits_kernel[(M, cdiv(N, COMBINE_BLOCK_N))](
        partial, bias_arg, residual_arg, out, M, N=N, BLOCK_N=COMBINE_BLOCK_N, SPLIT_K=split_k,
        num_warps=COMBINE_WARPS, **flags, **EXACT_LAUNCH,
    )  # fmt: skip
    return out


def launch_partial(
    x: torch.Tensor, weight: torch.Tensor, config: KernelConfig, weight_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Partial sums [SPLIT_K, M, N] fp32 of a product whose depth is split, or whose weight is in int8, for a kernel
    that adds them in order."""
    N, K = weight.shape
    partial = x.new_empty(config["SPLIT_K"], x.numel() // K, N, dtype=torch.float32)
    if weight_scale is not None:
        launch_int8_product(*row_runs(x), weight, weight_scale, partial, config)
        return partial
    flags = {"HAS_BIAS": False, "HAS_RESIDUAL": False}
    _launch_product(x, weight, config, partial, partial, partial, partial, flags)
    return partial


@on_its_device
def _launch_product(x, weight, config, bias, residual, out, partial, flags) -> None:
    N, K = weight.shape
    x, run, apart = row_runs(x)
    M = x.numel() // K
    tiles = tiles_for_rows(config, M, weight)
    linear_kernel[(cdiv(M, tiles["BLOCK_M"]), cdiv(N, tiles["BLOCK_N"]), tiles["SPLIT_K"])](
        x, weight, bias, residual, out, partial, M, run, apart, N=N, K=K, K_PER_SPLIT=depth_per_split(config, K),
        PRECISION="ieee", **flags, **tiles.constants, **tiles.launch, **EXACT_LAUNCH,
    )  # fmt: skip


def row_runs(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """x [..., K], how many rows lie together, and how many rows lie between the beginnings of such runs: x[:, i:j] of
    a [B, T, K] is taken as it is, anything else that is not contiguous is copied."""
    K = x.shape[-1]
    if x.dim() == 3 and x.stride()[1:] == (K, 1) and x.stride(0) % K == 0:
        return x, x.shape[1], x.stride(0) // K
    return x.contiguous(), max(x.numel() // K, 1), 0


@without_autocast
def linear_library(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor:
    """The vendor's product over all rows at once, on any device."""
    out = library_product(x, weight, bias, weight_scale, round_rows).to(out_dtype)
    return out if residual is None else out + residual


@without_autocast
def linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
    weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor:
    """Any device. On the CPU a row's bits are those it would have alone (`tiled_product`)."""
    if x.device.type != "cpu":
        return linear_library(x, weight, bias, residual, out_dtype, weight_scale)
    out = tiled_product(x, weight, bias, weight_scale, round_rows)
    if out.dtype != out_dtype:
        out = out.to(out_dtype)
    return out if residual is None else out + residual


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The product in fp64."""
    wide = weight.double() if weight_scale is None else dequantize_rows(weight, weight_scale, torch.float64)
    out = x.double() @ wide.T
    return out if bias is None else out + bias.double()


@torch.library.custom_op(
    "orthrus_triton::linear",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, ScalarType out_dtype, str impl, "
    "Tensor? weight_scale=None, bool round_rows=False) -> Tensor",
)
def _linear_op(x, weight, bias, residual, out_dtype, impl, weight_scale=None, round_rows=False):
    if impl == "triton":
        return launch_linear(x, weight, bias, residual, out_dtype, weight_scale=weight_scale)
    if impl == "torch":
        return linear_torch(x, weight, bias, residual, out_dtype, weight_scale, round_rows)
    if impl == "library":
        return linear_library(x, weight, bias, residual, out_dtype, weight_scale, round_rows)
    out = linear_reference(x, weight, bias, weight_scale).to(out_dtype)
    return out if residual is None else out + residual


@_linear_op.register_fake
def _(x, weight, bias, residual, out_dtype, impl, weight_scale=None, round_rows=False):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype)
