"""When `generate` ends a sequence before its limit: its time is up, a stop string is there, or a criterion says so.
Sequences get ahead of each other here; criteria see them as in transformers, where all have equally many tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from typing import Any

import torch

from orthrus_triton.models.stop_strings import StopStrings


class Stopping:
    """`stop` of `ConsensusDecoder.generate`, called with a sequence's new tokens after each of them.

    Args:
        prompts: [B, L] integers, padded as they came.
        eos_token_ids: those that end one.
        pad_token_id: what criteria see behind a sequence's end.
        criteria: of transformers, called with the ids [B, L + n] of the first n new tokens of each and without scores;
            a bool is about all sequences, a tensor [B] about each.
        strings: None, or those of each sequence.
        max_time: None, or seconds from now.
    """

    def __init__(
        self, prompts: torch.Tensor, eos_token_ids: Set[int], pad_token_id: int, *,
        criteria: Sequence[Any] = (), strings: list[StopStrings] | None = None, max_time: float | None = None,
    ) -> None:  # fmt: skip
        self.eos_token_ids, self.pad_token_id = eos_token_ids, pad_token_id
        self.criteria, self.strings = criteria, strings
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self.ids, self.asked = prompts, 0  # [B, L + asked], what criteria have seen
        self.new: list[list[int]] = [[] for _ in prompts]
        self.ends: list[int | None] = [None for _ in prompts]  # new tokens of those that have ended

    def __call__(self, b: int, new: list[int]) -> dict[int, int]:
        """Which sequences end now, and with how many new tokens, which can be fewer than they have."""
        self.new[b] = new
        if new[-1] in self.eos_token_ids:
            self.ends[b] = len(new)
        late = self.deadline is not None and time.monotonic() > self.deadline
        ended = {}
        if late or (self.strings is not None and self.strings[b](new)):
            ended[b] = self.ends[b] = len(new)
        if self.criteria:
            ended |= self._criteria()
        return ended

    def end(self, b: int, new: list[int]) -> dict[int, int]:
        """Sequence `b` ends with these tokens, as it cannot go on. Which others end now, as in a call."""
        self.new[b], self.ends[b] = new, len(new)
        return self._criteria() if self.criteria else {}

    def _criteria(self) -> dict[int, int]:
        """Ask about every further token that all sequences have by now."""
        ended = {}
        while (column := self._next_column()) is not None:
            self.ids = torch.cat((self.ids, self.ids.new_tensor(column)[:, None]), dim=1)
            self.asked += 1
            done = torch.zeros(len(column), dtype=torch.bool)
            for criterion in self.criteria:
                done |= _ended(criterion, self.ids)
            for b in done.nonzero().flatten().tolist():
                if self._goes_on(b):
                    ended[b] = self.ends[b] = self.asked
        return ended

    def _next_column(self) -> list[int] | None:
        """The next token of each sequence, padding for those that have ended; None while one lacks it, or all have."""
        going_on = [self._goes_on(b) for b in range(len(self.ends))]
        if not any(going_on) or any(len(self.new[b]) <= self.asked for b, goes_on in enumerate(going_on) if goes_on):
            return None
        return [new[self.asked] if goes_on else self.pad_token_id for new, goes_on in zip(self.new, going_on)]

    def _goes_on(self, b: int) -> bool:
        """Whether sequence `b` has tokens, or will have some, behind those that were asked about."""
        end = self.ends[b]
        return end is None or end > self.asked


def _ended(criterion: Any, ids: torch.Tensor) -> torch.Tensor:
    """[B] bool: which sequences a criterion of the caller's own ends, or a ValueError if it says something else."""
    said = criterion(ids, None)
    if isinstance(said, bool) or (isinstance(said, torch.Tensor) and said.shape in ((), ids.shape[:1])):
        return torch.as_tensor(said).cpu().bool().expand(len(ids))
    got = f"shape {tuple(said.shape)}" if isinstance(said, torch.Tensor) else repr(said)
    raise ValueError(f"stopping_criteria must return a bool or a tensor [{len(ids)}], but {criterion!r} returned {got}")
