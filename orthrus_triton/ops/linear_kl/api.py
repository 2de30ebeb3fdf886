"""The public function and its types: check the arguments, choose the implementation, call the registered op."""

from __future__ import annotations

from typing import NamedTuple

import torch

from orthrus_triton.ops._dispatch import require_same, resolve_impl
from orthrus_triton.ops.linear_kl import schema  # noqa: F401  (registers the op)
from orthrus_triton.ops.linear_kl.reference import linear_kl_reference


class HiddenTeacher(NamedTuple):
    """The teacher's last hidden states [P, H], after its final norm: the same LM head turns them into logits, once
    for each position that some row refers to."""

    hidden: torch.Tensor


class TopKTeacher(NamedTuple):
    """Cached teacher probabilities: `ids` [P, k] int64, distinct in a row, and `probs` [P, k] fp32, which sum to 1."""

    ids: torch.Tensor
    probs: torch.Tensor


class LabelTeacher(NamedTuple):
    """Token ids [P] int64: all probability on one token, so the divergence is the cross-entropy."""

    ids: torch.Tensor


class LinearKL(NamedTuple):
    """loss: scalar, the only differentiable field. row_kl [R]: each row's divergence in nats, unweighted.
    choice [R] int64: the student's most probable token. agrees [R] bool: it is the teacher's, too."""

    loss: torch.Tensor
    row_kl: torch.Tensor
    choice: torch.Tensor
    agrees: torch.Tensor


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher: HiddenTeacher | TopKTeacher | LabelTeacher,
    index: torch.Tensor,
    row_weight: torch.Tensor,
    *,
    impl: str = "auto",
) -> LinearKL:
    """Weighted mean of KL(teacher || student) over rows, where student logits are `hidden @ weight.T`.

    The gradient of `hidden` is formed in the forward, chunk by chunk, as (p_student - p_teacher) @ weight, so that
    the backward only scales it. Softmax and sums are fp32 (fp64 for fp64 input). LM head and teacher are frozen: they
    get no gradient.

    Args:
        hidden: [R, H] student states after the final norm; fp32, fp16 or bf16, fp64 with "torch" and "reference".
        weight: [V, H] LM head, the dtype of `hidden`.
        teacher: what the rows should predict at P positions.
        index: [R] int64, the teacher's position of each row, in 0..P-1; any order, repeats allowed.
        row_weight: [R] fp32, >= 0. Their sum divides the loss; where it is 0, loss and gradient are 0.
        impl: "auto", "triton", "torch" or "reference" (fp64, all logits at once, differentiated by autograd).

    Returns:
        LinearKL. loss and row_kl are fp32 (fp64 for fp64 input).

    Raises:
        TypeError: a dtype or the kind of teacher is not the one expected.
        ValueError: shapes that do not agree.

    Sources: forward KL of Orthrus, arXiv 2605.12825; gradient in the forward as in Liger-Kernel, arXiv 2410.10989.
    """
    _validate(hidden, weight, teacher, index, row_weight)
    impl = resolve_impl(impl, hidden)
    if impl == "reference":
        loss, row_kl, choice, teacher_choice = linear_kl_reference(hidden, weight, teacher, index, row_weight)
    else:
        teacher_hidden, ids, probs = _as_tensors(teacher)
        with_grad = hidden.requires_grad and torch.is_grad_enabled()
        loss, row_kl, choice, teacher_choice, _grad_hidden = torch.ops.orthrus_triton.linear_kl(
            hidden, weight.detach(), index, row_weight, teacher_hidden, ids, probs, with_grad, impl
        )
    return LinearKL(loss, row_kl.detach(), choice, choice == teacher_choice)


def _as_tensors(teacher) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    if isinstance(teacher, HiddenTeacher):
        return teacher.hidden.detach(), None, None
    if isinstance(teacher, TopKTeacher):
        return None, teacher.ids, teacher.probs
    return None, teacher.ids[:, None], torch.ones_like(teacher.ids, dtype=torch.float32)[:, None]


def _validate(hidden, weight, teacher, index, row_weight) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [R, H] and weight [V, H], but got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    require_same("index", tuple(index.shape), (hidden.shape[0],), "shape")
    require_same("row_weight", tuple(row_weight.shape), (hidden.shape[0],), "shape")
    expected = [("weight", weight, hidden.dtype), ("index", index, torch.int64)]
    if isinstance(teacher, HiddenTeacher):
        require_same("teacher.hidden", tuple(teacher.hidden.shape[1:]), (hidden.shape[1],), "shape [P, H], H")
        expected.append(("teacher.hidden", teacher.hidden, hidden.dtype))
    elif isinstance(teacher, TopKTeacher):
        if teacher.ids.dim() != 2:
            raise ValueError(f"teacher.ids must be [P, k], but got shape {tuple(teacher.ids.shape)}")
        require_same("teacher.probs", tuple(teacher.probs.shape), tuple(teacher.ids.shape), "shape")
        expected.append(("teacher.ids", teacher.ids, torch.int64))
    elif isinstance(teacher, LabelTeacher):
        if teacher.ids.dim() != 1:
            raise ValueError(f"teacher.ids must be [P], but got shape {tuple(teacher.ids.shape)}")
        expected.append(("teacher.ids", teacher.ids, torch.int64))
    else:
        raise TypeError(f"teacher must be a HiddenTeacher, TopKTeacher or LabelTeacher, but got {type(teacher)}")
    for name, tensor, dtype in expected:
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, but got {tensor.dtype}")
