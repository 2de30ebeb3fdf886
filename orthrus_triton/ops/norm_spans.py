"""RMSNorm of all of a token's queries as one, and of all its keys, in place in the fused qkv product (OLMo 2).
One program per token and span, as in rms_norm; where each head is normed by itself, rope_cache does it."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import on_its_device, require_same, resolve_impl, runs_directly
from orthrus_triton.ops.cpu.kernels import norm_spans_cpu
from orthrus_triton.ops.rms_norm import normed_row, rms_norm_config, rms_norm_reference, rms_norm_torch


def norm_spans_(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, *, impl: str = "auto"
) -> torch.Tensor:
    """The first numbers of each row become their own RMSNorm, and so do the next ones; the rest stays.

    Args:
        qkv: [..., Q + K + rest], fp32, fp16 or bf16, contiguous; written in place.
        q_weight: [Q], the dtype of `qkv`.
        k_weight: [K], the dtype of `qkv`.
        eps: added to the mean squares, in fp32.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        `qkv`.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.dim() != 1:
            raise ValueError(f"{name} must be a vector, but got shape {tuple(weight.shape)}")
        require_same(name, weight.dtype, qkv.dtype, "dtype")
    if qkv.dim() < 1 or qkv.shape[-1] < q_weight.numel() + k_weight.numel():
        raise ValueError(
            f"qkv must be [..., {q_weight.numel()} + {k_weight.numel()} + rest], but got shape {tuple(qkv.shape)}"
        )
    if not qkv.is_contiguous():
        raise ValueError(f"qkv must be contiguous, but got strides {qkv.stride()}")
    impl = resolve_impl(impl, qkv)
    if runs_directly(impl, qkv):
        norm_spans_torch(qkv, q_weight, k_weight, eps)
    else:
        torch.ops.orthrus_triton.norm_spans_(qkv, q_weight, k_weight, eps, impl)
    return qkv


@triton.jit
def _norm_span(span_ptr, weight_ptr, EPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    mask = cols < SIZE
    # [BLOCK]
    x = tl.load(span_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    normed = normed_row(x, weight_ptr, span_ptr.dtype.element_ty, cols, mask, EPS, SIZE)
    tl.store(span_ptr + cols, normed, mask=mask)


@triton.jit
def norm_spans_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr,
    EPS: tl.constexpr, WIDTH: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_ptr = qkv_ptr + tl.program_id(0).to(tl.int64) * WIDTH
    if tl.program_id(1) == 0:
        _norm_span(row_ptr, q_weight_ptr, EPS, Q, BLOCK_Q)
    else:
        _norm_span(row_ptr + Q, k_weight_ptr, EPS, K, BLOCK_K)


@on_its_device
def launch_norm_spans(qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float) -> None:
    Q, K, width = q_weight.numel(), k_weight.numel(), qkv.shape[-1]
    (block_q, num_warps), (block_k, _) = rms_norm_config(max(Q, K)), rms_norm_config(K)
    norm_spans_kernel[(qkv.numel() // width, 2)](
        qkv, q_weight.contiguous(), k_weight.contiguous(), EPS=float(eps), WIDTH=width, Q=Q, K=K, BLOCK_Q=block_q,
        BLOCK_K=block_k, num_warps=num_warps, **EXACT_LAUNCH,
    )  # fmt: skip


def norm_spans_torch(qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float) -> None:
    """Any device."""
    if norm_spans_cpu(qkv, q_weight, k_weight, eps):
        return
    for span, weight in _spans(qkv, q_weight, k_weight):
        span.copy_(rms_norm_torch(span, weight, eps))


def _spans(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    Q, K = q_weight.numel(), k_weight.numel()
    return [(qkv[..., :Q], q_weight), (qkv[..., Q : Q + K], k_weight)]


@torch.library.custom_op(
    "orthrus_triton::norm_spans_",
    mutates_args=("qkv",),
    schema="(Tensor(a!) qkv, Tensor q_weight, Tensor k_weight, float eps, str impl) -> ()",
)
def _norm_spans_op(qkv, q_weight, k_weight, eps, impl):
    if impl == "triton":
        launch_norm_spans(qkv, q_weight, k_weight, eps)
    elif impl == "torch":
        norm_spans_torch(qkv, q_weight, k_weight, eps)
    else:
        for span, weight in _spans(qkv, q_weight, k_weight):
            span.copy_(rms_norm_reference(span, weight, eps))


@_norm_spans_op.register_fake
def _(qkv, q_weight, k_weight, eps, impl):
    return None
