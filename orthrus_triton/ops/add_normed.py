"""The residual stream of layers that norm what they add to it: `hidden + norm(x)`, and the norm of that sum.
One row per program, as in rms_norm."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import (
    on_its_device,
    require_both_or_neither,
    require_same,
    resolve_impl,
    runs_directly,
)
from orthrus_triton.ops.cpu.kernels import add_normed_cpu
from orthrus_triton.ops.rms_norm import normed_row, rms_norm_config, rms_norm_reference, rms_norm_torch


def add_normed(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    next_weight: torch.Tensor | None = None,
    next_eps: float | None = None,
    *,
    norm_offset: float = 0.0,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = residual + rms_norm(x, weight, eps)`, and `rms_norm(h, next_weight, next_eps)`, with their roundings.

    Args:
        x: [..., H], fp32, fp16 or bf16: what attention or an MLP gives.
        residual: [..., H], the dtype of `x`.
        weight: [H], the dtype of `x`.
        eps: added to the mean square, in fp32.
        next_weight, next_eps: of the norm that reads the sum; None, both, where what comes next reads the sum itself.
        norm_offset: of both norms, as in `rms_norm`.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        (the norm of h, h), [..., H] each; (h, h) without `next_weight`.

    Raises:
        ValueError: shapes or dtypes that do not agree, or one of `next_weight` and `next_eps` alone.
    """
    require_both_or_neither("next_weight", next_weight, "next_eps", next_eps)
    next_eps = next_eps or 0.0
    if x.dim() < 1:
        raise ValueError(f"x must be [..., H], but got shape {tuple(x.shape)}")
    require_same("residual", tuple(residual.shape), tuple(x.shape), "shape")
    weights = {"weight": weight} if next_weight is None else {"weight": weight, "next_weight": next_weight}
    for name, tensor in weights.items():
        require_same(name, tuple(tensor.shape), tuple(x.shape[-1:]), "shape")
    for name, tensor in {"residual": residual, **weights}.items():
        require_same(name, tensor.dtype, x.dtype, "dtype")
    impl = resolve_impl(impl, x)
    if runs_directly(impl, x):
        return add_normed_torch(x, residual, weight, eps, next_weight, next_eps, norm_offset)
    out, hidden = torch.ops.orthrus_triton.add_normed(
        x, residual, weight, eps, next_weight, next_eps, norm_offset, impl
    )
    return (hidden if next_weight is None else out), hidden


@triton.jit
def add_normed_kernel(
    x_ptr, residual_ptr, weight_ptr, next_weight_ptr, out_ptr, hidden_ptr,
    EPS: tl.constexpr, NEXT_EPS: tl.constexpr, OFFSET: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
    HAS_NEXT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    # [BLOCK] each
    x = tl.load(x_ptr + row * HIDDEN + cols, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * HIDDEN + cols, mask=mask, other=0.0).to(tl.float32)
    normed = normed_row(x, weight_ptr, x_ptr.dtype.element_ty, cols, mask, EPS, OFFSET, HIDDEN)
    hidden = (residual + normed.to(tl.float32)).to(hidden_ptr.dtype.element_ty)
    tl.store(hidden_ptr + row * HIDDEN + cols, hidden, mask=mask)
    if HAS_NEXT:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        normed = normed_row(hidden.to(tl.float32), next_weight_ptr, dtype, cols, mask, NEXT_EPS, OFFSET, HIDDEN)
        tl.store(out_ptr + row * HIDDEN + cols, normed, mask=mask)


@on_its_device
def launch_add_normed(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, next_weight: torch.Tensor | None,
    next_eps: float, norm_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    x, weight, has_next = x.contiguous(), weight.contiguous(), next_weight is not None
    H, hidden = x.shape[-1], torch.empty_like(x)
    # no output of an op may be another one, or an input
    out = torch.empty_like(x) if has_next else x.new_empty(0)
    block, num_warps = rms_norm_config(H)
    add_normed_kernel[(x.numel() // H,)](
        x, residual.contiguous(), weight, next_weight.contiguous() if has_next else weight, out, hidden,
        EPS=float(eps), NEXT_EPS=float(next_eps), OFFSET=float(norm_offset), HIDDEN=H, BLOCK=block, HAS_NEXT=has_next,
        num_warps=num_warps, **EXACT_LAUNCH,
    )  # fmt: skip
    return out, hidden


def add_normed_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, next_weight: torch.Tensor | None,
    next_eps: float, norm_offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Any device; (h, h) without `next_weight`."""
    if (of_c := add_normed_cpu(x, residual, weight, eps, next_weight, next_eps, norm_offset)) is not None:
        return of_c
    hidden = residual.contiguous() + rms_norm_torch(x, weight, eps, norm_offset)
    return (hidden if next_weight is None else rms_norm_torch(hidden, next_weight, next_eps, norm_offset)), hidden


@torch.library.custom_op(
    "orthrus_triton::add_normed",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, Tensor? next_weight, float next_eps, "
    "float norm_offset, str impl) -> (Tensor, Tensor)",
)
def _add_normed_op(x, residual, weight, eps, next_weight, next_eps, norm_offset, impl):
    if impl == "triton":
        return launch_add_normed(x, residual, weight, eps, next_weight, next_eps, norm_offset)
    if impl == "torch":
        out, hidden = add_normed_torch(x, residual, weight, eps, next_weight, next_eps, norm_offset)
    else:
        hidden = (residual.contiguous().double() + rms_norm_reference(x, weight, eps, norm_offset)).to(x.dtype)
        out = hidden
        if next_weight is not None:
            out = rms_norm_reference(hidden, next_weight, next_eps, norm_offset).to(x.dtype)
    return (x.new_empty(0) if next_weight is None else out), hidden


@_add_normed_op.register_fake
def _(x, residual, weight, eps, next_weight, next_eps, norm_offset, impl):
    return x.new_empty(0 if next_weight is None else x.shape), x.new_empty(x.shape)
