"""The definition in fp64 with every logit in memory, differentiated by autograd: the oracle of the tests."""

from __future__ import annotations

import torch

from orthrus_triton.ops._dispatch import accumulate_dtype


def linear_kl_reference(
    hidden: torch.Tensor, weight: torch.Tensor, teacher: tuple, index: torch.Tensor, row_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Same arguments as `linear_kl`; returns loss, row_kl [R], choice [R] and the teacher's choice [R]."""
    dtype, weight = accumulate_dtype(hidden.dtype), weight.detach().double()
    logits = hidden.double() @ weight.T
    # a teacher's fields tell its kind: probabilities of listed tokens, hidden states, or labels alone
    if hasattr(teacher, "probs"):
        target = torch.zeros(len(teacher.ids), len(weight), dtype=torch.float64, device=hidden.device)
        target.scatter_(1, teacher.ids, teacher.probs.double())
    elif hasattr(teacher, "hidden"):
        target = torch.softmax(teacher.hidden.detach().double() @ weight.T, dim=-1)
    else:
        target = torch.nn.functional.one_hot(teacher.ids, len(weight)).double()
    target = target[index]
    row_kl = torch.nn.functional.kl_div(torch.log_softmax(logits, dim=-1), target, reduction="none").sum(dim=-1)
    total = row_weight.double().sum()
    loss = (row_kl * row_weight.double()).sum() / torch.where(total == 0, 1.0, total)
    return loss.to(dtype), row_kl.to(dtype), logits.argmax(dim=-1), target.argmax(dim=-1)
