"""torch.library registration: the gradient leaves the forward as an output, and the backward scales it."""

from __future__ import annotations

import torch

from orthrus_triton.ops._dispatch import accumulate_dtype
from orthrus_triton.ops.linear_kl.chunks import linear_kl_chunked
from orthrus_triton.ops.linear_kl.launch import launch_rows, launch_teacher
from orthrus_triton.ops.linear_kl.torch_impl import rows_torch, teacher_torch


@torch.library.custom_op(
    "orthrus_triton::linear_kl",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor index, Tensor row_weight, Tensor? teacher_hidden, "
    "Tensor? teacher_ids, Tensor? teacher_probs, bool with_grad, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_kl_op(
    hidden, weight, index, row_weight, teacher_hidden, teacher_ids, teacher_probs, with_grad, impl
):  # fmt: skip
    teacher_pass, row_pass = (launch_teacher, launch_rows) if impl == "triton" else (teacher_torch, rows_torch)
    return linear_kl_chunked(
        hidden, weight, index, row_weight, teacher_hidden, teacher_ids, teacher_probs, with_grad, teacher_pass, row_pass
    )


@_linear_kl_op.register_fake
def _(hidden, weight, index, row_weight, teacher_hidden, teacher_ids, teacher_probs, with_grad, impl):
    compute, rows = accumulate_dtype(hidden.dtype), hidden.shape[0]
    return (
        hidden.new_empty((), dtype=compute),
        hidden.new_empty(rows, dtype=compute),
        index.new_empty(rows),
        index.new_empty(rows),
        hidden.new_empty(hidden.shape if with_grad else (0, hidden.shape[1]), dtype=compute),
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[4])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad_loss, *_):
    (grad_hidden,) = ctx.saved_tensors
    return (grad_hidden * grad_loss).to(ctx.dtype), *(None,) * 8


_linear_kl_op.register_autograd(_backward, setup_context=_setup_context)
