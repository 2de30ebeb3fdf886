"""The training loss: what the diffusion view proposes against what the frozen model says at the same positions."""

from __future__ import annotations

from typing import Literal

import torch

from orthrus_triton import ops

Loss = Literal["kl", "ce"]
Teacher = ops.HiddenTeacher | ops.TopKTeacher | ops.LabelTeacher


def position_weights(block_size: int, decay: float | None) -> torch.Tensor:
    """Weights [K-1] of a block's predictions: all 1 as in the paper, or exp(-i / decay), for a draft that is wrong
    early is wrong altogether."""
    steps = torch.arange(block_size - 1, dtype=torch.float32)
    return torch.ones_like(steps) if decay is None else torch.exp(-steps / decay)


def block_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher: Teacher,
    index: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    streak_focus: float = 0.0,
    in_streaks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence from the teacher, and where the draft is right.

    A draft behind a wrong one is never accepted, so it hardly matters what it says: with `streak_focus` f it has only
    1 - f of its weight. That follows the drafts as they are now; no gradient goes through which of them are right.

    The sum over all rows is divided by the weight that whole blocks have, whether or not a text ends inside one: a
    constant, so that the mean over accumulated steps or over processes is the loss of the whole batch.

    Args:
        hidden: [B, A, K-1, H], the rows of each block that predict.
        head: [V, H], the frozen LM head.
        teacher: see `orthrus_triton.ops.linear_kl`; with labels the loss is the cross-entropy.
        index: [B, A, K-1] int64, the teacher's position for each row.
        targets: [B, A, K-1], the text's own tokens, -1 beyond its end: such rows weigh nothing.
        weights: [K-1] of `position_weights`.
        streak_focus: in 0..1.
        in_streaks: [B, A] bool, the blocks that `streak_focus` is for; None for all of them.

    Returns:
        (loss, matches): fp32 scalar in nats; [B, A, K-1] bool, the draft is the text's token.
    """
    row_weight = (weights * (targets >= 0)).flatten()
    rows = hidden.flatten(0, 2).to(head.dtype)
    result = ops.linear_kl(rows, head, teacher, index.flatten(), row_weight.contiguous())
    whole_blocks = weights.sum() * (targets.shape[0] * targets.shape[1])
    loss = result.loss * (row_weight.sum() / whole_blocks)
    matches = result.choice.view(targets.shape) == targets
    if streak_focus:
        scale = _streak_scale(matches, streak_focus, in_streaks).flatten()
        if rows.requires_grad:  # a row's gradient comes from its own divergence alone
            rows.register_hook(lambda grad: grad * scale[:, None].to(grad.dtype))
        loss = loss + ((result.row_kl * row_weight * scale).sum() / whole_blocks - loss).detach()
    return loss, matches


def _streak_scale(matches: torch.Tensor, focus: float, in_streaks: torch.Tensor | None) -> torch.Tensor:
    """[B, A, K-1]: 1 behind right drafts alone, 1 - focus behind a wrong one."""
    right = matches.float()  # a block of two has one draft, and none behind it
    right = torch.cat((torch.ones_like(right[..., :1]), right[..., :-1]), dim=-1).cumprod(dim=-1)
    scale = 1 - focus + focus * right
    return scale if in_streaks is None else torch.where(in_streaks[..., None], scale, 1.0)
