"""RMSNorm of all of a token's queries as one, and of all its keys, in the fused qkv product (OLMo 2).
One program per token and span, as in rms_norm; where each head is normed by itself, rope_cache does it."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import on_its_device, require_same, resolve_impl, runs_directly
from orthrus_triton.ops.cpu.kernels import norm_spans_cpu
from orthrus_triton.ops.rms_norm import normed_row, rms_norm_config, rms_norm_reference, rms_norm_torch


def norm_spans(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    *,
    norm_offset: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Each row with its first numbers as their own RMSNorm, and the next ones as theirs.

    Args:
        qkv: [..., Q + K + rest], fp32, fp16 or bf16.
        q_weight: [Q], the dtype of `qkv`.
        k_weight: [K], the dtype of `qkv`.
        eps: added to the mean squares, in fp32.
        norm_offset: as in `rms_norm`.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        [..., Q + K + rest]; the rest as it is in `qkv`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.dim() != 1:
            raise ValueError(f"{name} must be a vector, but got shape {tuple(weight.shape)}")
        require_same(name, weight.dtype, qkv.dtype, "dtype")
    if qkv.dim() < 1 or qkv.shape[-1] < q_weight.numel() + k_weight.numel():
        raise ValueError(
            f"qkv must be [..., {q_weight.numel()} + {k_weight.numel()} + rest], but got shape {tuple(qkv.shape)}"
        )
    impl = resolve_impl(impl, qkv)
    if runs_directly(impl, qkv):
        return norm_spans_torch(qkv, q_weight, k_weight, eps, norm_offset)
    return torch.ops.orthrus_triton.norm_spans(qkv, q_weight, k_weight, eps, norm_offset, impl)


@triton.jit
def norm_spans_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, out_ptr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, WIDTH: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * WIDTH
    first, size, weight_ptr = 0, Q, q_weight_ptr
    span = tl.program_id(1)
    if span == 1:
        first, size, weight_ptr = Q, K, k_weight_ptr
    if span == 2:
        first, size = Q + K, WIDTH - Q - K
    cols = tl.arange(0, BLOCK)
    mask = cols < size
    # [BLOCK]
    x = tl.load(qkv_ptr + row + first + cols, mask=mask, other=0.0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    normed = normed_row(x.to(tl.float32), weight_ptr, dtype, cols, mask & (span < 2), EPS, OFFSET, size)
    tl.store(out_ptr + row + first + cols, tl.where(span < 2, normed, x), mask=mask)


@on_its_device
def launch_norm_spans(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, norm_offset: float
) -> torch.Tensor:
    qkv = qkv.contiguous()
    Q, K, width, out = q_weight.numel(), k_weight.numel(), qkv.shape[-1], torch.empty_like(qkv)
    block, num_warps = rms_norm_config(max(Q, K, width - Q - K))
    norm_spans_kernel[(qkv.numel() // width, 3 if width > Q + K else 2)](
        qkv, q_weight.contiguous(), k_weight.contiguous(), out, EPS=float(eps), OFFSET=float(norm_offset),
        WIDTH=width, Q=Q, K=K, BLOCK=block, num_warps=num_warps, **EXACT_LAUNCH,
    )  # fmt: skip
    return out


def norm_spans_torch(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, norm_offset: float
) -> torch.Tensor:
    """Any device."""
    if (of_c := norm_spans_cpu(qkv, q_weight, k_weight, eps, norm_offset)) is not None:
        return of_c
    q, k, rest = _spans(qkv, q_weight, k_weight)
    normed = (rms_norm_torch(span, weight, eps, norm_offset) for span, weight in ((q, q_weight), (k, k_weight)))
    return torch.cat((*normed, rest), dim=-1)


def _spans(qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    Q, K = q_weight.numel(), k_weight.numel()
    return qkv.split([Q, K, qkv.shape[-1] - Q - K], dim=-1)


@torch.library.custom_op(
    "orthrus_triton::norm_spans",
    mutates_args=(),
    schema="(Tensor qkv, Tensor q_weight, Tensor k_weight, float eps, float norm_offset, str impl) -> Tensor",
)
def _norm_spans_op(qkv, q_weight, k_weight, eps, norm_offset, impl):
    if impl == "triton":
        return launch_norm_spans(qkv, q_weight, k_weight, eps, norm_offset)
    if impl == "torch":
        return norm_spans_torch(qkv, q_weight, k_weight, eps, norm_offset)
    q, k, rest = _spans(qkv, q_weight, k_weight)
    normed = (rms_norm_reference(span, weight, eps, norm_offset) for span, weight in ((q, q_weight), (k, k_weight)))
    return torch.cat((*normed, rest.double()), dim=-1).to(qkv.dtype)


@_norm_spans_op.register_fake
def _(qkv, q_weight, k_weight, eps, norm_offset, impl):
    return qkv.new_empty(qkv.shape)
