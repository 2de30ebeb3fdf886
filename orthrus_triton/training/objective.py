"""Fused LM head and forward KL to the frozen model, in chunks: no [rows, vocabulary] tensor is kept or seen whole.
The gradient p_student - p_teacher is formed in the forward pass, while the logits are at hand."""

from __future__ import annotations

import torch

ROW_CHUNK = 128


class _TopKKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher_ids, teacher_probs, row_weight):
        grad = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.float32)
        choice = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        for start in range(0, hidden.shape[0], ROW_CHUNK):
            rows = slice(start, start + ROW_CHUNK)
            logits = (hidden[rows] @ weight.T).float()
            choice[rows] = logits.argmax(dim=-1)
            log_sum = torch.logsumexp(logits, dim=-1, keepdim=True)
            ids, probs = teacher_ids[rows].long(), teacher_probs[rows].float()
            student = logits.gather(1, ids) - log_sum
            divergence = (torch.xlogy(probs, probs) - probs * student).sum(dim=-1)
            loss += (row_weight[rows] * divergence).sum()
            # in place: the logits become the gradient
            logits.sub_(log_sum).exp_().scatter_add_(1, ids, -probs).mul_(row_weight[rows, None])
            grad[rows] = logits.to(weight.dtype) @ weight
        total = row_weight.sum().clamp(min=torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(grad / total.to(grad.dtype))
        ctx.mark_non_differentiable(choice)
        return loss / total, choice

    @staticmethod
    def backward(ctx, grad_loss, _):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None, None


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_ids: torch.Tensor,
    teacher_probs: torch.Tensor,
    row_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p_teacher || softmax(hidden @ weight.T)), weighted mean over rows.

    Args:
        hidden: [R, H], receives the gradient.
        weight: [V, H], the frozen LM head; it never gets one.
        teacher_ids: [R, k] token ids. With k = 1 and probability 1 this is the cross-entropy.
        teacher_probs: [R, k], each row summing to 1.
        row_weight: [R] fp32, >= 0; a row of weight 0 adds nothing.

    Returns:
        (loss, choice): fp32 scalar in nats; [R] int64, the student's own greedy choice.

    Source: Orthrus, arXiv 2605.12825 (forward KL to the AR view).
    """
    return _TopKKL.apply(hidden, weight, teacher_ids, teacher_probs, row_weight)
