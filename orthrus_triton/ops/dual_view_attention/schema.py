"""torch.library registration: the op's schema, its fake, and the way to each implementation."""

from __future__ import annotations

from functools import partial

import torch

from orthrus_triton.ops.dual_view_attention.launch import launch
from orthrus_triton.ops.dual_view_attention.reference import attention_reference
from orthrus_triton.ops.dual_view_attention.torch_impl import attention_torch

IMPLEMENTATIONS = {
    "triton": launch,
    "torch": attention_torch,
    "library": partial(attention_torch, exact=False),
    "reference": attention_reference,
}


@torch.library.custom_op(
    "orthrus_triton::dual_view_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor key_limit, Tensor? k_block, Tensor? v_block, "
    "int? block_size, int? window, float scale, str impl) -> Tensor",
)
def _dual_view_attention_op(
    q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, impl
):  # fmt: skip
    return IMPLEMENTATIONS[impl](q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale)


@_dual_view_attention_op.register_fake
def _(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, impl):
    return q.new_empty(q.shape)
