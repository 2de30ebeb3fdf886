"""The fused qkv product and `rope_cache` on it: the same bits. Where the product's depth is split, the kernel that
rotates adds the splits itself, which saves a launch and a round trip through memory."""

from __future__ import annotations

import torch

from orthrus_triton.autotune.store import KernelConfig, lookup
from orthrus_triton.ops._dispatch import accumulate_dtype, require_kernel, resolve_impl, runs_directly
from orthrus_triton.ops.linear import check_product, launch_linear, launch_partial, linear_reference, linear_torch
from orthrus_triton.ops.rope_cache import check_rope_cache, launch_rope_cache
from orthrus_triton.ops.rope_cache_torch import rope_cache_torch


def qkv_rope_cache(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
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
    config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor:
    """`rope_cache(linear(x, weight, bias), cos, sin, k_out, ...)`.

    Args:
        x: [B, T, K], fp32, fp16 or bf16.
        weight: [(HQ + 2 * HKV) * D, K]: queries, then keys, then values; the dtype of `x`, contiguous.
        bias: [(HQ + 2 * HKV) * D] or None, the dtype of `x`.
        cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset: as in `rope_cache`.
        impl: "auto", "triton", "torch" or "reference".
        config: kernel configuration, by default the one `linear` takes for this weight shape. Only with impl="triton".
        weight_scale, round_rows: [(HQ + 2 * HKV) * D] float, for a `weight` of int8, and what becomes of x then, as
            in `linear`.

    Returns:
        q: [B, T, HQ, D].

    Raises:
        ValueError: shapes or dtypes that do not agree.
    """
    check_product(x, weight, bias, weight_scale)
    check_rope_cache((*x.shape[:-1], weight.shape[0]), x.dtype, cos, sin, k_out, v_out, slots, q_norm, k_norm)
    impl = resolve_impl(impl, x)
    rope = (cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset)
    require_kernel(config, impl, x, weight, bias, q_norm, k_norm)
    if config is not None:
        return launch_qkv_rope_cache(x, weight, bias, *rope, config, weight_scale)
    if runs_directly(impl, x):
        qkv = linear_torch(x, weight, bias, None, x.dtype, weight_scale, round_rows)
        return rope_cache_torch(qkv, *rope, accumulate_dtype(x.dtype), x.dtype, keep=True)
    return torch.ops.orthrus_triton.qkv_rope_cache(x, weight, bias, *rope, impl, weight_scale, round_rows)


def launch_qkv_rope_cache(
    x, weight, bias, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset,
    config: KernelConfig | None = None, weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Run the kernels with `linear`'s configuration of this weight shape."""
    N, K = weight.shape
    config = config or lookup("linear", x.dtype, x.device, N=N, K=K)
    rope = (cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset)
    if config["SPLIT_K"] == 1 and weight_scale is None:  # a tile of the product is no whole number of heads
        return launch_rope_cache(launch_linear(x, weight, bias, None, x.dtype, config), *rope)
    return launch_rope_cache(launch_partial(x, weight, config, weight_scale), *rope, bias, config["SPLIT_K"])


@torch.library.custom_op(
    "orthrus_triton::qkv_rope_cache",
    mutates_args=("k_out", "v_out"),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? cos, Tensor? sin, Tensor(a!) k_out, Tensor(b!) v_out, "
    "Tensor slots, Tensor? q_norm, Tensor? k_norm, float eps, float norm_offset, str impl, "
    "Tensor? weight_scale=None, bool round_rows=False) -> Tensor",
)
def _qkv_rope_cache_op(
    x, weight, bias, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset, impl, weight_scale=None,
    round_rows=False,
):  # fmt: skip
    rope = (cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset)
    if impl == "triton":
        return launch_qkv_rope_cache(x, weight, bias, *rope, weight_scale=weight_scale)
    if impl == "torch":
        qkv = linear_torch(x, weight, bias, None, x.dtype, weight_scale, round_rows)
        return rope_cache_torch(qkv, *rope, accumulate_dtype(x.dtype), x.dtype).contiguous()
    qkv = linear_reference(x, weight, bias, weight_scale).to(x.dtype)
    return rope_cache_torch(qkv, *rope, torch.float64, torch.float64).contiguous()


@_qkv_rope_cache_op.register_fake
def _(
    x, weight, bias, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset, impl, weight_scale=None,
    round_rows=False,
):  # fmt: skip
    HKV, D = k_out.shape[1], k_out.shape[3]
    return x.new_empty(*x.shape[:-1], weight.shape[0] // D - 2 * HKV, D)
