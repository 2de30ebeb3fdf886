"""The passes over logits in plain torch, a few rows at a time so that they stay in the processor's cache."""

from __future__ import annotations

import math

import torch

from orthrus_triton.ops.linear_kl.chunks import Target

ROW_TILE = 16
LOG2_E = math.log2(math.e)


def teacher_torch(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits [p, V] into probabilities in place; returns sum of p log p [p] and the most probable token [p]."""
    negative_entropy = logits.new_empty(len(logits))
    choice = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for start in range(0, len(logits), ROW_TILE):
        tile = slice(start, start + ROW_TILE)
        scores, choice[tile] = _scores_below_maximum(logits[tile])
        probs = torch.exp2(scores)
        total = probs.sum(dim=-1, keepdim=True)
        probs.div_(total)
        negative_entropy[tile] = _row_dot(probs, scores) / LOG2_E - total.squeeze(1).log()
        logits[tile] = probs
    return negative_entropy, choice


def rows_torch(logits: torch.Tensor, target: Target, grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy [n] and most probable token [n] of student logits [n, V]; p_student - p_teacher goes to `grad`."""
    cross_entropy = logits.new_empty(len(logits))
    choice = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for start in range(0, len(logits), ROW_TILE):
        tile = slice(start, start + ROW_TILE)
        scores, choice[tile] = _scores_below_maximum(logits[tile])
        if target.ids is None:
            probs = target.probs[target.line[tile]]
            expected = _row_dot(probs, scores)
        else:
            probs = target.probs[tile]
            expected = (probs * scores.gather(1, target.ids[tile])).sum(dim=-1)
        student = scores.exp2_()
        total = student.sum(dim=-1, keepdim=True)
        cross_entropy[tile] = total.squeeze(1).log() - expected / LOG2_E
        if grad is None:
            continue
        student.div_(total)
        if target.ids is None:
            student.sub_(probs)
        else:
            student.scatter_add_(1, target.ids[tile], -probs)
        grad[tile] = student
    return cross_entropy, choice


def _scores_below_maximum(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits - max) in base 2, whose exponential is quicker, in place; and where the maximum is."""
    maximum, choice = logits.max(dim=-1, keepdim=True)
    return logits.sub_(maximum).mul_(LOG2_E), choice.squeeze(1)


def _row_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a[:, None], b[:, :, None]).view(-1)
