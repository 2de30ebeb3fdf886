"""From the fused qkv product to attention's inputs: optional q/k RMSNorm, rotary embedding, and the K/V write.
One program per token and head; keys and values go straight to their rows of the cache or of the scratch block."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, next_power_of_2, tl, triton
from orthrus_triton.ops._dispatch import (
    accumulate_dtype,
    on_its_device,
    require_both_or_neither,
    require_same,
    resolve_impl,
    runs_directly,
)
from orthrus_triton.ops.rope_cache_torch import rope_cache_torch
from orthrus_triton.ops.split_sum import split_sum


def rope_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm_offset: float = 0.0,
    impl: str = "auto",
) -> torch.Tensor:
    """Normalise and rotate q and k, write k and v, return q.

    Args:
        qkv: [B, T, (HQ + 2 * HKV) * D], the product of the fused projection: queries, then keys, then values.
        cos, sin: [B, T, D // 2] fp32, one angle per pair (i, i + D // 2): the half-rotation of Llama and Qwen. None,
            both, in a layer without one (every fourth of SmolLM3).
        k_out, v_out: [B, HKV, S, D], written in place at row `slots[b, t]`. In the KV cache rows are positions; in the
            scratch block of a draft with a sliding window, rows of the block. Any strides, last dimension contiguous.
        slots: [B, T] int32. A slot outside 0..S-1 is not written: rows past the end of the cache are dropped.
        q_norm, k_norm: [D] RMSNorm weights applied per head before the rotation (Qwen3), both or neither.
        eps, norm_offset: of those norms, as in `rms_norm`.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        q: [B, T, HQ, D].

    In Triton a value that is not finite is written as 0, and all of its key as NaN: a row that sees it is NaN all the
    same, and one that does not is none the worse.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    check_rope_cache(tuple(qkv.shape), qkv.dtype, cos, sin, k_out, v_out, slots, q_norm, k_norm)
    impl = resolve_impl(impl, qkv)
    rope = (cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset)
    if runs_directly(impl, qkv):
        compute = accumulate_dtype(qkv.dtype)
        return rope_cache_torch(qkv, *rope, compute, qkv.dtype, keep=True)
    return torch.ops.orthrus_triton.rope_cache(qkv, *rope, impl)


def check_rope_cache(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> None:
    """Raise what is wrong with the arguments beside a qkv of this shape [B, T, W] and dtype, by name."""
    B, T, width = shape
    HKV, D = k_out.shape[1], k_out.shape[3]
    if width % D or width // D <= 2 * HKV:
        raise ValueError(f"qkv must have (HQ + 2 * {HKV}) * {D} columns with HQ >= 1, but got {width}")
    if D % 2:
        raise ValueError(f"head_dim must be even to be rotated by halves, but got {D}")
    require_both_or_neither("cos", cos, "sin", sin)
    for name, tensor in (("cos", cos), ("sin", sin)) if cos is not None else ():
        require_same(name, tuple(tensor.shape), (B, T, D // 2), "shape")
        require_same(name, tensor.dtype, torch.float32, "dtype")
    require_same("slots", tuple(slots.shape), (B, T), "shape")
    require_same("slots", slots.dtype, torch.int32, "dtype")
    require_same("v_out", tuple(v_out.shape), tuple(k_out.shape), "shape")
    require_same("k_out", k_out.shape[0], B, "batch size")
    require_same("k_out", k_out.dtype, dtype, "dtype")
    require_same("v_out", v_out.dtype, dtype, "dtype")
    for name, out in (("k_out", k_out), ("v_out", v_out)):
        if out.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, but has strides {out.stride()}")
    require_both_or_neither("q_norm", q_norm, "k_norm", k_norm)
    if q_norm is not None:
        require_same("q_norm", tuple(q_norm.shape), (D,), "shape")
        require_same("k_norm", tuple(k_norm.shape), (D,), "shape")


@triton.jit
def _norm_weight(q_norm_ptr, k_norm_ptr, offsets, mask, is_query):
    of_query = tl.load(q_norm_ptr + offsets, mask=mask & is_query, other=0.0)
    of_key = tl.load(k_norm_ptr + offsets, mask=mask & (is_query == 0), other=0.0)
    return tl.where(is_query, of_query, of_key).to(tl.float32)


@triton.jit
def _normed_half(numbers, weight, dtype: tl.constexpr, OFFSET: tl.constexpr):
    if OFFSET == 0:
        numbers = numbers.to(dtype).to(tl.float32)
    else:
        weight += OFFSET
    return (numbers * weight).to(dtype).to(tl.float32)


@triton.jit
def _half_head(qkv_ptr, bias_ptr, token, cols, mask, rows, dtype: tl.constexpr, WIDTH: tl.constexpr,
               SPLIT_K: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """`cols` of a token's product, rounded to `dtype`, in fp32: SPLIT_K partial sums are added up, 0 is the product."""
    if SPLIT_K == 0:
        return tl.load(qkv_ptr + token * WIDTH + cols, mask=mask, other=0.0).to(tl.float32)
    return split_sum(qkv_ptr, token, cols, mask, bias_ptr, rows, WIDTH, SPLIT_K, HAS_BIAS).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "T", "S", "stride_angle_b"])
def rope_cache_kernel(
    qkv_ptr, bias_ptr, cos_ptr, sin_ptr, slots_ptr, q_norm_ptr, k_norm_ptr, q_out_ptr, k_out_ptr, v_out_ptr, rows, T, S,
    stride_angle_b, stride_k_b, stride_k_h, stride_k_s, stride_v_b, stride_v_h, stride_v_s,
    EPS: tl.constexpr, OFFSET: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    BLOCK_HALF: tl.constexpr, HAS_NORM: tl.constexpr, ROTATES: tl.constexpr, SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # b * T + t
    head = tl.program_id(1)  # queries, then keys, then values
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, BLOCK_HALF)
    mask = half < HALF
    dtype = q_out_ptr.dtype.element_ty
    WIDTH: tl.constexpr = (HQ + 2 * HKV) * D
    # [BLOCK_HALF] each: the two halves of one head
    cols = head * D + half
    low = _half_head(qkv_ptr, bias_ptr, token, cols, mask, rows, dtype, WIDTH, SPLIT_K, HAS_BIAS)
    high = _half_head(qkv_ptr, bias_ptr, token, HALF + cols, mask, rows, dtype, WIDTH, SPLIT_K, HAS_BIAS)
    if head < HQ + HKV:
        if HAS_NORM:
            mean_square = (tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0)) / D
            scale = 1.0 / tl.sqrt(mean_square + EPS)
            # [BLOCK_HALF] each; a choice between values, not between pointers, which Triton 3.6 cannot compile for AMD
            # and by a block: to Triton 3.9's interpreter, a mask & a scalar is no mask
            is_query = head + tl.zeros_like(half) < HQ
            low_weight = _norm_weight(q_norm_ptr, k_norm_ptr, half, mask, is_query)
            high_weight = _norm_weight(q_norm_ptr, k_norm_ptr, HALF + half, mask, is_query)
            # rounded as the norm itself, and before the rotation
            low = _normed_half(low * scale, low_weight, dtype, OFFSET)
            high = _normed_half(high * scale, high_weight, dtype, OFFSET)
        if ROTATES:
            # [BLOCK_HALF]
            angle = token // T * stride_angle_b + token % T * HALF + half
            cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
            rotated_low = low * cos - high * sin
            rotated_high = high * cos + low * sin
            low, high = rotated_low, rotated_high
    if head < HQ:
        q_row_ptr = q_out_ptr + (token * HQ + head) * D
        tl.store(q_row_ptr + half, low.to(dtype), mask=mask)
        tl.store(q_row_ptr + HALF + half, high.to(dtype), mask=mask)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        # a slot outside the cache is not written
        writable = half < tl.where(slot < 0, 0, tl.where(slot < S, HALF, 0))
        b = token // T
        # A mask hides a score, but 0 times a value that is not finite is NaN, in every row of attention's tile. So such
        # a value is written as 0 and its key as NaN: rows that see the key get NaN as before, the others nothing.
        if head < HQ + HKV:
            value_low = _half_head(
                qkv_ptr, bias_ptr, token, HKV * D + cols, mask, rows, dtype, WIDTH, SPLIT_K, HAS_BIAS
            )
            value_high = _half_head(
                qkv_ptr, bias_ptr, token, HKV * D + HALF + cols, mask, rows, dtype, WIDTH, SPLIT_K, HAS_BIAS
            )
            # NaN fails every comparison
            finite = (tl.abs(value_low) < float("inf")) & (tl.abs(value_high) < float("inf"))
            whole = tl.min(finite.to(tl.int32), axis=0) == 1
            low = tl.where(whole, low, float("nan"))
            high = tl.where(whole, high, float("nan"))
            k_row_ptr = k_out_ptr + b * stride_k_b + (head - HQ) * stride_k_h + slot * stride_k_s
            tl.store(k_row_ptr + half, low.to(dtype), mask=writable)
            tl.store(k_row_ptr + HALF + half, high.to(dtype), mask=writable)
        else:
            low = tl.where(tl.abs(low) < float("inf"), low, 0.0)
            high = tl.where(tl.abs(high) < float("inf"), high, 0.0)
            v_row_ptr = v_out_ptr + b * stride_v_b + (head - HQ - HKV) * stride_v_h + slot * stride_v_s
            tl.store(v_row_ptr + half, low.to(dtype), mask=writable)
            tl.store(v_row_ptr + HALF + half, high.to(dtype), mask=writable)


NUM_WARPS = 1


@on_its_device
def launch_rope_cache(
    qkv, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset, bias=None, split_k: int = 0
) -> torch.Tensor:  # fmt: skip
    """qkv is [B, T, W]; or, with split_k, partial sums [split_k, B * T, W] fp32 of a product that lacks `bias`."""
    (B, T), (HKV, S, D) = slots.shape, k_out.shape[1:]
    HQ = qkv.shape[-1] // D - 2 * HKV
    q = k_out.new_empty(B, T, HQ, D)
    if cos is not None and (cos.stride()[1:] != (D // 2, 1) or sin.stride() != cos.stride()):
        cos, sin = cos.contiguous(), sin.contiguous()
    rope_cache_kernel[(B * T, HQ + 2 * HKV)](
        qkv.contiguous(), q if bias is None else bias.contiguous(), *((slots, slots) if cos is None else (cos, sin)),
        slots.contiguous(), *(q if norm is None else norm.contiguous() for norm in (q_norm, k_norm)), q, k_out, v_out,
        B * T, T, S, 0 if cos is None else cos.stride(0),
        *k_out.stride()[:3], *v_out.stride()[:3],
        EPS=float(eps), OFFSET=float(norm_offset), HQ=HQ, HKV=HKV, D=D, BLOCK_HALF=max(next_power_of_2(D // 2), 16),
        HAS_NORM=q_norm is not None, ROTATES=cos is not None, SPLIT_K=split_k, HAS_BIAS=bias is not None,
        num_warps=NUM_WARPS, **EXACT_LAUNCH,
    )  # fmt: skip
    return q


@torch.library.custom_op(
    "orthrus_triton::rope_cache",
    mutates_args=("k_out", "v_out"),
    schema="(Tensor qkv, Tensor? cos, Tensor? sin, Tensor(a!) k_out, Tensor(b!) v_out, Tensor slots, "
    "Tensor? q_norm, Tensor? k_norm, float eps, float norm_offset, str impl) -> Tensor",
)
def _rope_cache_op(qkv, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset, impl):
    rope = (cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset)
    if impl == "triton":
        return launch_rope_cache(qkv, *rope)
    reference = impl == "reference"
    compute = torch.float64 if reference else accumulate_dtype(qkv.dtype)
    rounding = torch.float64 if reference else qkv.dtype
    return rope_cache_torch(qkv, *rope, compute, rounding).contiguous()


@_rope_cache_op.register_fake
def _(qkv, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset, impl):
    B, T, width = qkv.shape
    HKV, D = k_out.shape[1], k_out.shape[3]
    return qkv.new_empty(B, T, width // D - 2 * HKV, D)
