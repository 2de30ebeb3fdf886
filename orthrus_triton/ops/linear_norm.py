"""A product, its residual and the norm after it. Where the product's depth is split, the kernel that adds the splits
does the rest too, which saves a launch and a round trip through memory."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.autotune.store import KernelConfig, lookup
from orthrus_triton.ops._dispatch import on_its_device, require_kernel, require_same, resolve_impl, runs_directly
from orthrus_triton.ops.linear import (
    check_product,
    launch_linear,
    launch_partial,
    linear_reference,
    linear_torch,
    row_runs,
)
from orthrus_triton.ops.rms_norm import add_rms_norm_torch, normed_row, rms_norm_config, rms_norm_reference
from orthrus_triton.ops.split_sum import split_sum


def linear_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    *,
    norm_offset: float = 0.0,
    impl: str = "auto",
    config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = x @ weight.T + bias + residual`, as `linear` rounds it, and its root-mean-square norm.

    The norm rounds where `rms_norm` does, but may add the squares of a row in another order: rows that must agree, such
    as those of both decoding modes, must come from the same one of the two.

    Args:
        x: [..., K], fp32, fp16 or bf16.
        weight: [N, K], the dtype of `x`, contiguous.
        bias: [N] or None, the dtype of `x`.
        residual: [..., N], the dtype of `x`.
        norm_weight: [N], the dtype of `x`.
        eps: added to the mean square, in fp32.
        norm_offset: as in `rms_norm`.
        impl: "auto", "triton", "torch" or "reference".
        config: kernel configuration, by default the one `linear` takes for this weight shape. Only with impl="triton".
        weight_scale, round_rows: [N] float, for a `weight` of int8, and what becomes of x then, as in `linear`.

    Returns:
        (norm [..., N], h [..., N]); h is the next residual.

    Raises:
        ValueError: shapes or dtypes that do not agree.
    """
    check_product(x, weight, bias, weight_scale)
    N = weight.shape[0]
    for name, tensor, shape in (("residual", residual, (*x.shape[:-1], N)), ("norm_weight", norm_weight, (N,))):
        require_same(name, tuple(tensor.shape), shape, "shape")
        require_same(name, tensor.dtype, x.dtype, "dtype")
    impl = resolve_impl(impl, x)
    require_kernel(config, impl, x, weight, bias, residual, norm_weight)
    norm = (norm_weight, eps, norm_offset)
    if config is not None:
        return launch_linear_norm(x, weight, bias, residual, *norm, config, weight_scale)
    if runs_directly(impl, x):
        return linear_norm_torch(x, weight, bias, residual, *norm, weight_scale, round_rows)
    return torch.ops.orthrus_triton.linear_norm(x, weight, bias, residual, *norm, impl, weight_scale, round_rows)


@triton.jit(do_not_specialize=["M", "run", "apart"])
def combine_norm_kernel(
    partial_ptr, bias_ptr, residual_ptr, weight_ptr, out_ptr, hidden_ptr, M, run, apart,
    EPS: tl.constexpr, OFFSET: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (rows). As in `linear_kernel`, the residual may be runs of rows."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    dtype = out_ptr.dtype.element_ty
    # [BLOCK] each
    product = split_sum(partial_ptr, row, cols, mask, bias_ptr, M, N, SPLIT_K, HAS_BIAS)
    residual_row = row // run * apart + row % run
    residual = tl.load(residual_ptr + residual_row * N + cols, mask=mask, other=0.0).to(tl.float32)
    hidden = (product.to(dtype).to(tl.float32) + residual).to(dtype)
    tl.store(hidden_ptr + row * N + cols, hidden, mask=mask)
    normed = normed_row(hidden.to(tl.float32), weight_ptr, dtype, cols, mask, EPS, OFFSET, N)
    tl.store(out_ptr + row * N + cols, normed, mask=mask)


@on_its_device
def launch_linear_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    norm_offset: float,
    config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernels with `linear`'s configuration of this weight shape."""
    N, K = weight.shape
    config = config or lookup("linear", x.dtype, x.device, N=N, K=K)
    split_k = config["SPLIT_K"]
    if split_k == 1 and weight_scale is None:  # a tile of the product has no whole row to norm
        product, bias = launch_linear(x, weight, bias, None, x.dtype, config), None
    else:
        product = launch_partial(x, weight, config, weight_scale)
    hidden = x.new_empty(*x.shape[:-1], N)
    out = torch.empty_like(hidden)
    residual, run, apart = row_runs(residual)
    M = x.numel() // K
    block, num_warps = rms_norm_config(N)
    combine_norm_kernel[(M,)](
        product, out if bias is None else bias.contiguous(), residual, norm_weight.contiguous(), out, hidden, M, run,
        apart,
        EPS=float(eps), OFFSET=float(norm_offset), N=N, BLOCK=block, SPLIT_K=split_k, HAS_BIAS=bias is not None,
        num_warps=num_warps, **EXACT_LAUNCH,
    )  # fmt: skip
    return out, hidden


def linear_norm_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    norm_offset: float,
    weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Any device."""
    product = linear_torch(x, weight, bias, None, x.dtype, weight_scale, round_rows)
    return add_rms_norm_torch(product, residual, norm_weight, eps, norm_offset)


@torch.library.custom_op(
    "orthrus_triton::linear_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, float eps, "
    "float norm_offset, str impl, Tensor? weight_scale=None, bool round_rows=False) -> (Tensor, Tensor)",
)
def _linear_norm_op(
    x, weight, bias, residual, norm_weight, eps, norm_offset, impl, weight_scale=None, round_rows=False
):
    norm = (norm_weight, eps, norm_offset)
    if impl == "triton":
        return launch_linear_norm(x, weight, bias, residual, *norm, weight_scale=weight_scale)
    if impl == "torch":
        return linear_norm_torch(x, weight, bias, residual, *norm, weight_scale, round_rows)
    hidden = linear_reference(x, weight, bias, weight_scale).to(x.dtype) + residual
    return rms_norm_reference(hidden, *norm).to(x.dtype), hidden


@_linear_norm_op.register_fake
def _(x, weight, bias, residual, norm_weight, eps, norm_offset, impl, weight_scale=None, round_rows=False):
    return x.new_empty(residual.shape), x.new_empty(residual.shape)
