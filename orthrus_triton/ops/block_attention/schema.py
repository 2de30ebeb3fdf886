"""torch.library registration of the forward and the backward, and the autograd formula that joins them."""

from __future__ import annotations

import torch

from orthrus_triton.ops._dispatch import accumulate_dtype
from orthrus_triton.ops.block_attention.launch import launch_backward, launch_forward
from orthrus_triton.ops.block_attention.torch_impl import attention_backward_torch, attention_forward_torch

_ARGUMENTS = "Tensor q, Tensor k_context, Tensor v_context, Tensor key_limit, Tensor k_block, Tensor v_block"
_OPTIONS = "int block_size, int? window, float scale, str impl"


@torch.library.custom_op(
    "orthrus_triton::block_attention",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _block_attention_op(
    q, k_context, v_context, key_limit, k_block, v_block, block_size, window, scale, impl
):  # fmt: skip
    run = {"triton": launch_forward, "torch": attention_forward_torch}[impl]
    return run(q, k_context, v_context, key_limit, k_block, v_block, block_size, window, scale)


@_block_attention_op.register_fake
def _(q, k_context, v_context, key_limit, k_block, v_block, block_size, window, scale, impl):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op(
    "orthrus_triton::block_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, {_ARGUMENTS}, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _block_attention_backward_op(
    grad_out, q, k_context, v_context, key_limit, k_block, v_block, out, lse, block_size, window, scale, impl
):  # fmt: skip
    run = {"triton": launch_backward, "torch": attention_backward_torch}[impl]
    return run(grad_out, q, k_context, v_context, key_limit, k_block, v_block, out, lse, block_size, window, scale)


@_block_attention_backward_op.register_fake
def _(grad_out, q, k_context, v_context, key_limit, k_block, v_block, out, lse, block_size, window, scale, impl):
    return q.new_empty(q.shape), k_block.new_empty(k_block.shape), v_block.new_empty(v_block.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.block_size, ctx.window, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, _grad_lse):
    grad_q, grad_k, grad_v = torch.ops.orthrus_triton.block_attention_backward(
        grad_out, *ctx.saved_tensors, ctx.block_size, ctx.window, ctx.scale, ctx.impl
    )
    # the context is frozen: no gradient for it is ever computed
    return grad_q, None, None, None, grad_k, grad_v, None, None, None, None


_block_attention_op.register_autograd(_backward, setup_context=_setup_context)
