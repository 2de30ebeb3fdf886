"""SwiGLU in the epilogue of the gate/up product: `swiglu(linear(x, weight, bias))`, the same bits with a launch and a
round trip through memory less. A column tile is half gate, half up, side by side, so each thread holds both."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, tl, triton
from orthrus_triton.autotune.store import KernelConfig, lookup
from orthrus_triton.ops._dispatch import accumulate_dtype, on_its_device, require_kernel, resolve_impl, runs_directly
from orthrus_triton.ops.linear import (
    COMBINE_BLOCK_N,
    COMBINE_WARPS,
    check_product,
    launch_partial,
    linear_reference,
    linear_torch,
)
from orthrus_triton.ops.product_tile import product_tile
from orthrus_triton.ops.row_tiles import tiles_for_rows
from orthrus_triton.ops.swiglu import silu_times, swiglu_formula


def linear_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    impl: str = "auto",
    config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, both products rounded to the dtype of `x` first, as if unfused.

    Args:
        x: [..., K], fp32, fp16 or bf16.
        weight: [2 * I, K], the rows of gate, then those of up; the dtype of `x`, contiguous.
        bias: [2 * I] or None, the dtype of `x`.
        impl: "auto", "triton", "torch" or "reference".
        config: kernel configuration, by default the one `linear` takes for this weight shape. Only with impl="triton".
        weight_scale, round_rows: [2 * I] float, for a `weight` of int8, and what becomes of x then, as in `linear`.

    Returns:
        [..., I].

    Raises:
        ValueError: shapes or dtypes that do not agree.
    """
    check_product(x, weight, bias, weight_scale)
    if weight.shape[0] % 2:
        raise ValueError(f"weight must have an even number of rows, gate and up, but got shape {tuple(weight.shape)}")
    impl = resolve_impl(impl, x)
    require_kernel(config, impl, x, weight, bias)
    if config is not None:
        return launch_linear_swiglu(x, weight, bias, config, weight_scale)
    if runs_directly(impl, x):
        return linear_swiglu_torch(x, weight, bias, weight_scale, round_rows)
    return torch.ops.orthrus_triton.linear_swiglu(x, weight, bias, impl, weight_scale, round_rows)


@triton.jit
def _rounded(accumulator, bias_ptr, out_ptr, cols, col_mask, HAS_BIAS: tl.constexpr):
    """What the unfused product would store, back in fp32."""
    if HAS_BIAS:
        # [BLOCK_N]
        accumulator += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    return accumulator.to(out_ptr.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def linear_swiglu_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M,
    INTERMEDIATE: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    HALF: tl.constexpr = BLOCK_N // 2
    # gate and up columns alternate
    lanes = tl.arange(0, BLOCK_N)
    own = tl.program_id(1) * HALF + lanes // 2
    cols = own + lanes % 2 * INTERMEDIATE
    row_mask = rows < M
    col_mask = own < INTERMEDIATE
    accumulator = product_tile(
        x_ptr, weight_ptr, rows, cols, row_mask, col_mask, 0, K, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    product = _rounded(accumulator, bias_ptr, out_ptr, cols, col_mask, HAS_BIAS)
    # [BLOCK_M, HALF] each
    gate, up = tl.split(tl.reshape(product, (BLOCK_M, HALF, 2)))
    out_cols = tl.program_id(1) * HALF + tl.arange(0, HALF)
    mask = row_mask[:, None] & (out_cols < INTERMEDIATE)[None, :]
    offsets = rows.to(tl.int64)[:, None] * INTERMEDIATE + out_cols[None, :]
    tl.store(out_ptr + offsets, silu_times(gate, up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def combine_swiglu_kernel(
    partial_ptr, bias_ptr, out_ptr, M,
    INTERMEDIATE: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < INTERMEDIATE
    gate = tl.zeros((1, BLOCK_N), tl.float32)
    up = tl.zeros((1, BLOCK_N), tl.float32)
    for split in tl.static_range(SPLIT_K):
        # [1, BLOCK_N] each, splits in ascending order
        offsets = ((M * split).to(tl.int64) + row) * (2 * INTERMEDIATE) + cols[None, :]
        gate += tl.load(partial_ptr + offsets, mask=mask[None, :], other=0.0)
        up += tl.load(partial_ptr + offsets + INTERMEDIATE, mask=mask[None, :], other=0.0)
    gate = _rounded(gate, bias_ptr, out_ptr, cols, mask, HAS_BIAS)
    up = _rounded(up, bias_ptr + INTERMEDIATE, out_ptr, cols, mask, HAS_BIAS)
    out = silu_times(gate, up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * INTERMEDIATE + cols[None, :], out, mask=mask[None, :])


@on_its_device
def launch_linear_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernels with `linear`'s configuration of this weight shape."""
    (N, K), intermediate = weight.shape, weight.shape[0] // 2
    config = config or lookup("linear", x.dtype, x.device, N=N, K=K)
    split_k, has_bias = config["SPLIT_K"], bias is not None
    M = x.numel() // K
    out = x.new_empty(*x.shape[:-1], intermediate)
    bias = out if bias is None else bias.contiguous()
    if split_k > 1 or weight_scale is not None:
        partial = launch_partial(x, weight, config, weight_scale)
        combine_swiglu_kernel[(M, cdiv(intermediate, COMBINE_BLOCK_N))](
            partial, bias, out, M, INTERMEDIATE=intermediate, BLOCK_N=COMBINE_BLOCK_N, SPLIT_K=split_k,
            HAS_BIAS=has_bias, num_warps=COMBINE_WARPS, **EXACT_LAUNCH,
        )  # fmt: skip
        return out
    config = tiles_for_rows(config, M, weight)
    tiles = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    linear_swiglu_kernel[(cdiv(M, config["BLOCK_M"]), cdiv(intermediate, config["BLOCK_N"] // 2))](
        x.contiguous(), weight, bias, out, M, INTERMEDIATE=intermediate, K=K, HAS_BIAS=has_bias, PRECISION="ieee",
        **tiles, **config.launch, **EXACT_LAUNCH,
    )  # fmt: skip
    return out


def linear_swiglu_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Any device."""
    gate_up = linear_torch(x, weight, bias, None, x.dtype, weight_scale, round_rows)
    return swiglu_formula(gate_up, accumulate_dtype(x.dtype))


@torch.library.custom_op(
    "orthrus_triton::linear_swiglu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, str impl, Tensor? weight_scale=None, bool round_rows=False) "
    "-> Tensor",
)
def _linear_swiglu_op(x, weight, bias, impl, weight_scale=None, round_rows=False):
    if impl == "triton":
        return launch_linear_swiglu(x, weight, bias, weight_scale=weight_scale)
    if impl == "torch":
        return linear_swiglu_torch(x, weight, bias, weight_scale, round_rows)
    return swiglu_formula(linear_reference(x, weight, bias, weight_scale), torch.float64).to(x.dtype)


@_linear_swiglu_op.register_fake
def _(x, weight, bias, impl, weight_scale=None, round_rows=False):
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
