"""Which free slot a request takes, and whose cache it begins with.
Conversations keep their slots while others come and go; a beginning that many share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from orthrus_triton.modules import DecodeRun

TEMPLATE_TAIL = 8  # tokens at a prompt's end that the next turn may lack: a template may open the answer's thoughts


class Place(NamedTuple):
    """A free slot, the slot whose cache holds most of the prompt's beginning, and how many tokens those are."""

    slot: int
    source: int
    cached: int


def find_place(run: DecodeRun, free: Sequence[int], prompt: torch.Tensor) -> Place:
    """Where `prompt` [L] int64 goes, of the slots in `free`, at least one: where its conversation was, or else where
    the text admitted longest ago lies. On a CPU, near those that decode: a step is of all slots between them."""
    held = [run.cached_prefix(b, prompt) for b in range(len(run.slots))]
    widths = {b: run.width_with(b) for b in free}
    narrowest = min(widths.values())
    near = [b for b in free if widths[b] == narrowest]
    going_on = [b for b in near if _goes_on(run, b, held[b])]
    if going_on:
        slot = max(going_on, key=held.__getitem__)
    else:  # one that holds nothing first
        slot = min(near, key=lambda b: (len(run.slots[b].cached) > 0, run.slots[b].born))
    source = max(range(len(held)), key=held.__getitem__)
    return Place(slot, source if held[source] > held[slot] else slot, held[source])


def _goes_on(run: DecodeRun, b: int, held: int) -> bool:
    """Whether a prompt that begins with `held` tokens of slot `b` has all but the end of that slot's own prompt: it is
    the next turn, or the same one again. Less may be no more than instructions that many prompts begin with."""
    own = run.slots[b].prompt
    return own is not None and own.numel() - 1 - held <= min(TEMPLATE_TAIL, held - 1)
