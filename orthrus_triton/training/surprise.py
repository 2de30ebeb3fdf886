"""How unlikely the frozen model found each token of its own text. Drafts tend to fail at unlikely tokens, cycles end
there, and so anchors should stand there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.frozen_cache import FrozenCache

TOKENS_PER_PASS, TOKENS_PER_PASS_GPU = 4096, 65536  # of text
LOGIT_ROWS = 4096  # positions whose logits exist at a time


def surprise(cache: FrozenCache, rows: Sequence[TextRow]) -> list[np.ndarray]:
    """For each row [L]: 1 - the frozen model's probability of an answer token (0 outside the kept top k), 1 for the
    token before an answer, where its first block begins, and 0 elsewhere."""
    values = []
    for row, start in zip(rows, cache.starts):
        ids, unlikely = torch.tensor(row.ids), []
        for first, end in row.answers:
            before = slice(start + first - 1, start + end - 1)
            taken = cache.teacher_ids[before] == ids[first:end, None]
            unlikely.append(1 - (cache.teacher_probs[before] * taken).sum(dim=-1).double().numpy())
        values.append(_of_row(row, unlikely))
    return values


@torch.no_grad()
def read_surprise(model: OrthrusForCausalLM, rows: Sequence[TextRow]) -> list[np.ndarray]:
    """The same without a cache, by reading every row with the frozen view, rows of like length together."""
    values: list[np.ndarray] = [np.zeros(0)] * len(rows)
    most = TOKENS_PER_PASS_GPU if model.device.type == "cuda" else TOKENS_PER_PASS
    order = sorted(range(len(rows)), key=lambda n: len(rows[n].ids))
    while order:
        length = len(rows[order[-1]].ids)
        batch = [order.pop() for _ in range(min(len(order), max(most // length, 1)))]
        for n, unlikely in zip(batch, _read(model, [rows[n] for n in batch], length)):
            values[n] = unlikely
    return values


def _read(model: OrthrusForCausalLM, rows: Sequence[TextRow], length: int) -> list[np.ndarray]:
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row.ids)] = torch.tensor(row.ids)
    ids = ids.to(model.device)
    buffers = model.new_cache(len(rows), length, 1)
    buffers.prompt_len.copy_(torch.tensor([row.prompt_len for row in rows]))
    view_pass = buffers.view_pass("ar", length, linear_impl="library")
    hidden = model.forward_view(ids, buffers, view_pass)[:, :-1].flatten(0, 1)
    parts = zip(hidden.split(LOGIT_ROWS), ids[:, 1:].flatten().split(LOGIT_ROWS))
    likely = [model.compute_logits(part, "library").softmax(-1).gather(1, of[:, None]) for part, of in parts]
    unlikely = (1 - torch.cat(likely)).view(len(rows), length - 1).double().cpu().numpy()
    return [
        _of_row(row, [of_row[first - 1 : end - 1] for first, end in row.answers]) for row, of_row in zip(rows, unlikely)
    ]


def _of_row(row: TextRow, unlikely: Sequence[np.ndarray]) -> np.ndarray:
    """[L] from the values of each answer's tokens."""
    values = np.zeros(len(row.ids))
    for (first, end), of_answer in zip(row.answers, unlikely):
        values[first:end] = of_answer
        values[first - 1] = 1
    return values
