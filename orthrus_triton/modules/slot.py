"""Slot and Progress: what the host knows of the sequences of a run, and what it has just learnt.
Plain Python; what the device knows is in `DecodeState`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Progress(NamedTuple):
    """Tokens that became known of one slot, and whether it stopped with them."""

    slot: int
    tokens: list[int]
    finished: bool


@dataclass
class Slot:
    """What the host knows of one sequence: late by the steps in flight, and never wrong.

    failed: there was no token to choose; see `NonFiniteLogitsError`.
    greedy: its tokens are the largest logits.
    prompt_hidden: [1, 1, H], by which the first token was chosen; None where prompts were read together.
    """

    prompt: torch.Tensor | None = None
    limit: int = 0
    tokens: list[int] = field(default_factory=list)
    finished: bool = True
    failed: bool = False
    greedy: bool = False
    cycles: Counter[int] = field(default_factory=Counter)
    prompt_hidden: torch.Tensor | None = None
    born: int = 0  # reports posted before this one are about the slot's previous sequence

    @property
    def cached(self) -> torch.Tensor:
        """Tokens [n] int64 whose K/V the slot's cache surely holds, from its first row on: all but the newest."""
        if self.prompt is None or self.failed:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        generated = torch.tensor(self.tokens, dtype=torch.int64, device="cpu")
        return torch.cat((self.prompt.cpu(), generated))[:-1]

    def holds_beginning_of(self, prompt: torch.Tensor) -> int:
        """How many of `prompt`'s first tokens are `cached`: at most all but the last."""
        cached = self.cached
        held, asked = (tokens[: min(len(cached), len(prompt) - 1)] for tokens in (cached, prompt.cpu()))
        differs = (held != asked).nonzero()
        return int(differs[0]) if len(differs) else len(held)
