"""The walk over chunks of rows that both implementations share: project, compare with the teacher, project back.
Rows are sorted by their teacher position, so that one chunk of teacher probabilities serves all of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from orthrus_triton._triton import cdiv
from orthrus_triton.ops._dispatch import accumulate_dtype, without_autocast

# Rows whose logits exist at a time. A GPU streams the whole LM head for each chunk and wants more rows for it.
CHUNK_ROWS = {"cpu": 256}
CHUNK_ROWS_GPU = 512


class Target(NamedTuple):
    """What n rows should predict: all probabilities [p, V] and each row's line in them [n], or the probabilities
    [n, k] of the tokens `ids` [n, k]."""

    probs: torch.Tensor
    line: torch.Tensor | None = None
    ids: torch.Tensor | None = None


# (logits [p, V], turned into probabilities in place) -> sum of p log p [p], most probable token [p]
TeacherPass = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# (student logits [n, V], overwritten, target, room for p_student - p_teacher [n, V] or None; it may be the logits)
# -> cross-entropy [n], most probable token [n]
RowPass = Callable[[torch.Tensor, Target, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]


@without_autocast
def linear_kl_chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    row_weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_ids: torch.Tensor | None,
    teacher_probs: torch.Tensor | None,
    with_grad: bool,
    teacher_pass: TeacherPass,
    row_pass: RowPass,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, row_kl [R], choice [R], the teacher's choice [R], and the gradient of hidden [R, H] (or [0, H])."""
    compute, size = accumulate_dtype(hidden.dtype), CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS_GPU)
    row_kl = hidden.new_empty(len(hidden), dtype=compute)
    choice, teacher_choice = torch.empty_like(index), torch.empty_like(index)
    grad_hidden = hidden.new_empty(hidden.shape if with_grad else (0, hidden.shape[1]), dtype=compute)
    total = row_weight.to(compute).sum()
    row_scale = row_weight.to(compute) / torch.where(total == 0, 1.0, total)
    # in half precision this holds the gradient, in the dtype it is multiplied in; else the logits, which turn into it
    buffer = hidden.new_empty(min(size, len(hidden)), len(weight))
    if teacher_hidden is not None:
        targets = _projected_targets(teacher_hidden, weight, index, size, teacher_pass)
    else:
        targets = _listed_targets(teacher_ids, teacher_probs.to(compute), index, size)
    for rows, target, negative_entropy, wanted in targets:
        logits = _matmul(hidden[rows], weight.T, buffer)
        grad = buffer[: len(rows)] if with_grad else None
        cross_entropy, choice[rows] = row_pass(logits, target, grad)
        row_kl[rows], teacher_choice[rows] = cross_entropy + negative_entropy, wanted
        if with_grad:
            # the rows' weights scale [n, H] numbers here instead of [n, V] before, and never underflow in fp16
            grad_hidden[rows] = _matmul(grad, weight, None) * row_scale[rows, None]
    return (row_kl * row_scale).sum(), row_kl, choice, teacher_choice, grad_hidden


Chunk = tuple[torch.Tensor, Target, torch.Tensor, torch.Tensor]


def _projected_targets(teacher_hidden, weight, index, size, teacher_pass) -> Iterator[Chunk]:
    """Chunks whose rows share at most `size` teacher positions; each position in use is projected once."""
    positions, line = torch.unique(index, return_inverse=True)
    order = torch.argsort(line, stable=True)
    first = torch.arange(0, len(positions) + size, size, device=index.device)
    # the one synchronisation with the host: how many rows each chunk of positions has
    edges = torch.searchsorted(line[order], first).tolist()
    whole = teacher_hidden.dtype == accumulate_dtype(teacher_hidden.dtype)
    buffer = teacher_hidden.new_empty(min(size, len(positions)), len(weight)) if whole else None
    for n, (start, end) in enumerate(zip(edges[:-1], edges[1:])):
        logits = _matmul(teacher_hidden[positions[n * size : (n + 1) * size]], weight.T, buffer)
        negative_entropy, choice = teacher_pass(logits)
        for rows in order[start:end].chunk(cdiv(end - start, size)):
            lines = line[rows] - n * size
            yield rows, Target(logits, line=lines), negative_entropy[lines], choice[lines]


def _listed_targets(ids, probs, index, size) -> Iterator[Chunk]:
    negative_entropy = torch.xlogy(probs, probs).sum(dim=-1)
    choice = ids.gather(1, probs.argmax(dim=-1, keepdim=True)).squeeze(1)
    for rows in torch.arange(len(index), device=index.device).split(size):
        at = index[rows]
        yield rows, Target(probs[at], ids=ids[at]), negative_entropy[at], choice[at]


def _matmul(left: torch.Tensor, right: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """left @ right, summed in fp32 or more and returned so: in the first lines of `buffer`, if it has that dtype."""
    if left.dtype == accumulate_dtype(left.dtype):
        return torch.mm(left, right, out=None if buffer is None else buffer[: len(left)])
    if left.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()  # rounded to half on the way: other libraries have no such product
