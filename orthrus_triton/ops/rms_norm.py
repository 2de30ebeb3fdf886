"""RMSNorm, optionally after adding a residual: one row per program, the whole row in one tile.
The block size depends on the hidden size alone, so a row has the same bits in any batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from orthrus_triton._triton import EXACT_LAUNCH, next_power_of_2, tl, triton
from orthrus_triton.ops._dispatch import (
    accumulate_dtype,
    on_its_device,
    require_same,
    resolve_impl,
    runs_directly,
)
from orthrus_triton.ops.cpu.kernels import rms_norm_cpu
from orthrus_triton.ops.swiglu import SHARED_FROM


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    norm_offset: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dimension: `y = h / sqrt(mean(h^2) + eps) * (norm_offset + weight)`.

    Args:
        x: [..., H], fp32, fp16 or bf16.
        weight: [H], the dtype of `x`.
        eps: added to the mean square, in fp32.
        residual: [..., H] or None. With it, `h = x + residual`, rounded to the dtype of `x`; without it, `h = x`.
        norm_offset: added to the weight in fp32 (Gemma: 1). With one, `y` is rounded once; without, before the weight,
            too.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        `y` [..., H]; with a residual `(y, h)`, so that `h` is the next residual.

    Raises:
        ValueError: shapes or dtypes that do not agree.
    """
    if x.dim() < 1 or tuple(weight.shape) != (x.shape[-1],):
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"x must be [..., H] and weight [H], but got shapes {shapes}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must have dtype {x.dtype}, that of x, but got {weight.dtype}")
    impl = resolve_impl(impl, x)
    direct = runs_directly(impl, x)
    if residual is None:
        if direct:
            return rms_norm_torch(x, weight, eps, norm_offset)
        return torch.ops.orthrus_triton.rms_norm(x, weight, eps, norm_offset, impl)
    require_same("residual", tuple(residual.shape), tuple(x.shape), "shape")
    require_same("residual", residual.dtype, x.dtype, "dtype")
    if direct:
        return add_rms_norm_torch(x, residual, weight, eps, norm_offset)
    return torch.ops.orthrus_triton.add_rms_norm(x, residual, weight, eps, norm_offset, impl)


@triton.jit
def normed_row(
    x, weight_ptr, dtype: tl.constexpr, cols, mask, EPS: tl.constexpr, OFFSET: tl.constexpr, HIDDEN: tl.constexpr
):
    """The norm of a row in fp32, as `dtype`."""
    mean_square = tl.sum(x * x, axis=0) / HIDDEN
    scale = 1.0 / tl.sqrt(mean_square + EPS)
    y = x * scale
    # [BLOCK]
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if OFFSET == 0:  # rounded before the weight, too, as in transformers' Llama; its Gemma rounds once
        y = y.to(dtype).to(tl.float32)
    else:
        weight += OFFSET
    return (y * weight).to(dtype)


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, hidden_ptr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    # [BLOCK]
    x = tl.load(x_ptr + row * HIDDEN + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        # rounded as an unfused add would be: the sum is also the next residual
        x = x + tl.load(residual_ptr + row * HIDDEN + cols, mask=mask, other=0.0).to(tl.float32)
        x = x.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + row * HIDDEN + cols, x, mask=mask)
        x = x.to(tl.float32)
    normed = normed_row(x, weight_ptr, out_ptr.dtype.element_ty, cols, mask, EPS, OFFSET, HIDDEN)
    tl.store(out_ptr + row * HIDDEN + cols, normed, mask=mask)


def rms_norm_config(hidden_size: int) -> tuple[int, int]:
    """(BLOCK, num_warps) for a row of `hidden_size`: a function of the weight's shape alone."""
    block = max(next_power_of_2(hidden_size), 16)
    return block, min(max(block // 512, 1), 16)


@on_its_device
def launch_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, norm_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    hidden = x.shape[-1]
    out = torch.empty_like(x)
    new_residual = torch.empty_like(x) if residual is not None else x
    block, num_warps = rms_norm_config(hidden)
    rms_norm_kernel[(x.numel() // hidden,)](
        x, x if residual is None else residual.contiguous(), weight, out, new_residual,
        EPS=float(eps), OFFSET=float(norm_offset), HIDDEN=hidden, BLOCK=block, HAS_RESIDUAL=residual is not None,
        num_warps=num_warps, **EXACT_LAUNCH,
    )  # fmt: skip
    return out, new_residual


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, norm_offset: float) -> torch.Tensor:
    """Any device; rounds where the Triton kernel rounds."""
    if (of_c := rms_norm_cpu(x, weight, eps, norm_offset)) is not None:
        return of_c[0]
    if x.is_cpu and x.numel() == x.shape[-1] >= SHARED_FROM:  # a row alone, all threads would sum it
        return rms_norm_torch(x.expand(2, *x.shape), weight, eps, norm_offset)[0]
    if norm_offset == 0:
        return F.rms_norm(x.contiguous(), weight.shape, eps=eps) * weight
    wide = accumulate_dtype(x.dtype)
    normed = F.rms_norm(x.contiguous().to(wide), weight.shape, eps=eps)
    return (normed * (weight.to(wide) + norm_offset)).to(x.dtype)


def add_rms_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, norm_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum."""
    if (of_c := rms_norm_cpu(x, weight, eps, norm_offset, residual)) is not None:
        return of_c
    hidden = x.contiguous() + residual.contiguous()
    return rms_norm_torch(hidden, weight, eps, norm_offset), hidden


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float, norm_offset: float) -> torch.Tensor:
    """The formula in fp64, no rounding in between."""
    h = x.contiguous().double()
    return h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + norm_offset)


@torch.library.custom_op(
    "orthrus_triton::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, float eps, float norm_offset, str impl) -> Tensor",
)
def _rms_norm_op(x, weight, eps, norm_offset, impl):
    if impl == "triton":
        return launch_rms_norm(x, None, weight, eps, norm_offset)[0]
    if impl == "torch":
        return rms_norm_torch(x, weight, eps, norm_offset)
    return rms_norm_reference(x, weight, eps, norm_offset).to(x.dtype)


@_rms_norm_op.register_fake
def _(x, weight, eps, norm_offset, impl):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "orthrus_triton::add_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, float norm_offset, str impl) -> (Tensor, Tensor)",
)
def _add_rms_norm_op(x, residual, weight, eps, norm_offset, impl):
    if impl == "triton":
        return launch_rms_norm(x, residual, weight, eps, norm_offset)
    if impl == "torch":
        return add_rms_norm_torch(x, residual, weight, eps, norm_offset)
    hidden = x.contiguous() + residual.contiguous()
    return rms_norm_reference(hidden, weight, eps, norm_offset).to(x.dtype), hidden


@_add_rms_norm_op.register_fake
def _(x, residual, weight, eps, norm_offset, impl):
    return x.new_empty(x.shape), x.new_empty(x.shape)
