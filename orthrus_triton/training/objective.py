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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence from the teacher, and where the draft is right.

    The sum over all rows is divided by the weight that whole blocks have, whether or not a text ends inside one: a
    constant, so that the mean over accumulated steps or over processes is the loss of the whole batch.

    Args:
        hidden: [B, A, K-1, H], the rows of each block that predict.
        head: [V, H], the frozen LM head.
        teacher: see `orthrus_triton.ops.linear_kl`; with labels the loss is the cross-entropy.
        index: [B, A, K-1] int64, the teacher's position for each row.
        targets: [B, A, K-1], the text's own tokens, -1 beyond its end: such rows weigh nothing.
        weights: [K-1] of `position_weights`.

    Returns:
        (loss, matches): fp32 scalar in nats; [B, A, K-1] bool, the draft is the text's token.
    """
    row_weight = (weights * (targets >= 0)).flatten()
    result = ops.linear_kl(hidden.flatten(0, 2).to(head.dtype), head, teacher, index.flatten(), row_weight.contiguous())
    whole_blocks = weights.sum() * (targets.shape[0] * targets.shape[1])
    loss = result.loss * (row_weight.sum() / whole_blocks)
    return loss, result.choice.view(targets.shape) == targets
