"""Coupled sampling in torch, for any device: the ids of the Triton kernels. Noise is dear on a CPU, so it is computed
for a row's largest logits where the filters leave no others, else for all, and made a score only where that can win."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from orthrus_triton.ops.cpu.token_kernels import sample_choice_cpu
from orthrus_triton.ops.gumbel import exponential_torch, noise_words_torch, row_key_torch
from orthrus_triton.ops.logits_filter import LARGEST, divided_torch, mass_of_torch
from orthrus_triton.ops.portable_math import portable_exp_torch, portable_log_torch
from orthrus_triton.ops.sample import greedy_choice_torch
from orthrus_triton.ops.void_rows import VOID

LISTED = 128  # largest logits of a row that are sorted out


class _Rows(NamedTuple):
    """R rows that sample: tensors [R], but logits [R, V] fp32 without NaN. z_max is the largest scaled logit, which the
    token top_id has."""

    logits: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    key0: torch.Tensor
    key1: torch.Tensor
    top_id: torch.Tensor
    z_max: torch.Tensor

    def pick(self, which: torch.Tensor) -> _Rows:
        return _Rows(*(tensor[which] for tensor in self))


def sample_choice_torch(
    logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream
) -> torch.Tensor:  # fmt: skip
    """Arguments and result as in `sample_choice`. Looks at values on the host, where it is not in C."""
    arguments = (logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream)
    if (choice := sample_choice_cpu(*arguments, VOID)) is not None:
        return choice
    B, T, V = logits.shape
    flat = logits.reshape(B * T, V).to(torch.float32)
    highest = flat.amax(dim=-1)
    if highest.isnan().any():
        flat = flat.masked_fill(flat.isnan(), -torch.inf)
        highest = flat.amax(dim=-1)
    choice = greedy_choice_torch(flat)
    temperature, *filters = (values.repeat_interleave(T) for values in (temperature, top_k, top_p, min_p))
    keys = (key.flatten() for key in row_key_torch(seed[:, None], sequence[:, None], positions, stream))
    top_id, divisor = choice.clamp(min=0), torch.where(temperature > 0, temperature, 1.0)
    z_max = divided_torch(flat.gather(-1, top_id[:, None])[:, 0], divisor)
    rows = _Rows(flat, divisor, *filters, *keys, top_id, z_max)
    choice[z_max == -torch.inf] = VOID
    sampling = (temperature > 0) & (choice != VOID)
    if (highest > LARGEST).any():  # among such, greedy rows do not distinguish
        choice = torch.where(temperature > 0, choice, greedy_choice_torch(flat.clamp(max=LARGEST)))
    if sampling.any():
        choice[sampling] = _sample(rows if sampling.all() else rows.pick(sampling))
    return choice.view(B, T)


def _sample(rows: _Rows) -> torch.Tensor:
    """Ids [R]: from the list of the largest logits where it holds all that the filters leave."""
    V = rows.logits.shape[-1]
    values, ids = rows.logits.topk(min(LISTED, V))
    # in the order of ids: argmax gives the first of equals
    ids, order = ids.sort(dim=-1)
    # [R, n] each
    z = divided_torch(values.gather(-1, order), rows.temperature[:, None])
    weight = portable_exp_torch(z - rows.z_max[:, None])
    last, in_order = z.amin(dim=-1), z.sort(dim=-1, descending=True).values
    limited = (rows.top_k > 0) & (rows.top_k < V)
    at = (rows.top_k.long() - 1).clamp(0, z.shape[-1] - 1)[:, None]
    z_k = torch.where(limited & (rows.top_k <= z.shape[-1]), in_order.gather(-1, at)[:, 0], -torch.inf)
    masses = torch.where(z >= z_k[:, None], mass_of_torch(weight), 0)
    total, whole = masses.sum(dim=-1), (last < z_k) | (z.shape[-1] == V)
    for r in ((rows.top_p < 1.0) & ~whole & ~limited).nonzero()[:, 0].tolist():
        total[r] = mass_of_torch(portable_exp_torch(_scaled_row(rows, r) - rows.z_max[r])).sum()
    enough = rows.top_p * total.to(torch.float32)
    dropped = torch.where(z > last[:, None], masses, 0).sum(dim=-1).to(torch.float32) >= enough
    dropped &= last < rows.z_max  # the likeliest are always kept
    # one thousandth: what exp may be off by, times many
    dropped = ((rows.top_p < 1.0) & dropped) | (weight.amin(dim=-1) * 1.001 < rows.min_p)
    listed = whole | (dropped & ~limited)
    score = z - portable_log_torch(exponential_torch(*noise_words_torch(ids, rows.key0, rows.key1)))
    score = torch.where((z >= z_k[:, None]) & (weight >= rows.min_p[:, None]), score, -torch.inf)
    choice, looking = score.argmax(dim=-1), listed & (rows.top_p < 1.0)
    while bool(looking.any()):
        above = z > z.gather(-1, choice[:, None])
        likelier = torch.where(above, masses, 0).sum(dim=-1).to(torch.float32)
        best, found = torch.where(above, score, -torch.inf).max(dim=-1)
        looking = looking & (best > -torch.inf) & (likelier >= enough)
        choice = torch.where(looking, found, choice)
    chosen = ids.gather(-1, choice[:, None])[:, 0]
    for r in (~listed).nonzero()[:, 0].tolist():
        chosen[r] = _search_all(rows, r)
    return chosen


def _scaled_row(rows: _Rows, r: int) -> torch.Tensor:
    """Scaled logits [V] of row r. One row at a time stays in a CPU core's own cache."""
    return divided_torch(rows.logits[r], rows.temperature[r, None])


@lru_cache(maxsize=64)
def _upper_words(key0: int, key1: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Upper noise words [V] of a row as fractions, fp32. A draft, its verify pass and the next draft share them."""
    ids = torch.arange(vocab_size, device=device)
    keys = (torch.tensor(key, device=device) for key in (key0, key1))
    return noise_words_torch(ids, *keys)[0].to(torch.float32) * 2.0**-32


def _search_all(rows: _Rows, r: int) -> torch.Tensor:
    """The id that row r chooses among all tokens, as `best_above` finds it."""
    z, z_max, key0, key1 = _scaled_row(rows, r), rows.z_max[r], rows.key0[r], rows.key1[r]
    V, top_k, top_p = len(z), int(rows.top_k[r]), rows.top_p[r]
    luck = exponential_torch(*noise_words_torch(rows.top_id[r, None], key0, key1)) * 1.01
    if z_max.abs() >= 1024.0:
        luck = LARGEST
    hopeful = _upper_words(int(key0), int(key1), V, z.device) <= (z - z_max).exp_().mul_(luck)
    z_k = z.topk(top_k).values[-1] if 0 < top_k < V else -torch.inf
    ids = (hopeful & (z >= z_k)).nonzero()[:, 0]
    ids = ids[portable_exp_torch(z[ids] - z_max) >= rows.min_p[r]]
    score = z[ids] - portable_log_torch(exponential_torch(*noise_words_torch(ids, key0, key1)))
    choice = ids[score.argmax()]
    if top_p < 1.0:
        masses = torch.where(z >= z_k, mass_of_torch(portable_exp_torch(z - z_max)), 0)
        enough = top_p * masses.sum().to(torch.float32)
        while (z[ids] > z[choice]).any() and masses[z > z[choice]].sum().to(torch.float32) >= enough:
            choice = ids[torch.where(z[ids] > z[choice], score, -torch.inf).argmax()]
    return choice
