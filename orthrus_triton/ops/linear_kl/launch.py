"""From tensors to launches of the row kernels. A row is one program, whatever the chunk it is in."""

from __future__ import annotations

import math

import torch

from orthrus_triton._triton import EXACT_LAUNCH, next_power_of_2
from orthrus_triton.ops._dispatch import on_its_device
from orthrus_triton.ops.linear_kl.chunks import Target
from orthrus_triton.ops.linear_kl.kernels import dense_rows_kernel, listed_rows_kernel, teacher_kernel

BLOCK_V = 4096
NUM_WARPS = 8


@on_its_device
def launch_teacher(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits [p, V] into probabilities in place; returns sum of p log p [p] and the most probable token [p]."""
    negative_entropy, choice = _row_results(logits)
    teacher_kernel[(len(logits),)](logits, negative_entropy, choice, **_shape(logits))
    return negative_entropy, choice


@on_its_device
def launch_rows(logits: torch.Tensor, target: Target, grad: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy [n] and most probable token [n] of student logits [n, V]; p_student - p_teacher goes to `grad`."""
    cross_entropy, choice = _row_results(logits)
    shape = {"WITH_GRAD": grad is not None, **_shape(logits)}
    grad = logits if grad is None else grad
    if target.ids is None:
        dense_rows_kernel[(len(logits),)](logits, target.probs, target.line, grad, cross_entropy, choice, **shape)
    else:
        num_ids = target.ids.shape[1]
        listed_rows_kernel[(len(logits),)](
            logits, target.ids, target.probs, grad, cross_entropy, choice, NUM_IDS=num_ids,
            BLOCK_K=next_power_of_2(num_ids), **shape,
        )  # fmt: skip
    return cross_entropy, choice


def _row_results(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(logits)
    return tuple(torch.empty(rows, dtype=dtype, device=logits.device) for dtype in (torch.float32, torch.int64))


def _shape(logits: torch.Tensor) -> dict:
    vocab = logits.shape[1]
    block = min(next_power_of_2(vocab), BLOCK_V)
    return {"VOCAB": vocab, "BLOCK_V": block, "LOG2_E": math.log2(math.e), "num_warps": NUM_WARPS, **EXACT_LAUNCH}
