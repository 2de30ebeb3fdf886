"""What a run gives back: the sequences, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class DecodeStats:
    """What a run cost and gave. Counts are of the run; lists have one entry per sequence.

    tokens: generated tokens, EOS included.
    cycles: cycles of the longest-lived sequence. In AR mode a cycle is one pass.
    forward_passes: 1 prefill, then 2 per cycle (1 per cycle of block size 1, which is AR).
    tokens_per_cycle: tokens committed per cycle a sequence was alive, bonus token included; at most K, and K + 1 where
        the frozen view reads the anchor.
    tpf: tokens per forward pass, token-weighted over sequences; with drafts in every cycle, the paper's Eq. 9:
        tokens / (1 + 2 * cycles).
    accepted_histogram: accepted_histogram[a] cycles had their first `a` drafted tokens accepted.
    prefill_seconds, decode_seconds: wall-clock.
    cycles_by_block_size: cycles of all sequences by the block size they ran with; 1 stands for AR.
    """

    tokens: int
    cycles: int
    forward_passes: int
    tokens_per_cycle: float
    tpf: float
    accepted_histogram: list[int]
    sequence_tokens: list[int]
    sequence_cycles: list[int]
    prefill_seconds: float
    decode_seconds: float
    cycles_by_block_size: dict[int, int] = field(default_factory=dict)

    @property
    def ttft(self) -> float:
        """Time to first token in seconds: every prompt of the call prefilled and its first token on the host."""
        return self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over prefill and decode time."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.tokens / seconds if seconds else 0.0

    @classmethod
    def measure(
        cls, tokens: list[int], cycles: list[dict[int, int]], histogram: list[list[int]], prefill_seconds: float,
        decode_seconds: float,
    ) -> DecodeStats:  # fmt: skip
        """From per-sequence counts: generated tokens, cycles by block size, cycles by accepted length."""
        passes = [1 + sum(n if size == 1 else 2 * n for size, n in counts.items()) for counts in cycles]
        totals = [sum(counts.values()) for counts in cycles]
        # the first token of each sequence is the prefill's
        committed = sum(tokens) - len(tokens)
        return cls(
            tokens=sum(tokens),
            cycles=max(totals),
            forward_passes=max(passes),
            tokens_per_cycle=committed / sum(totals) if sum(totals) else 0.0,
            tpf=sum(tokens) / sum(passes),
            accepted_histogram=[sum(column) for column in zip(*histogram)],
            sequence_tokens=tokens,
            sequence_cycles=totals,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            cycles_by_block_size={
                size: sum(counts.get(size, 0) for counts in cycles) for size in sorted(set().union(*cycles))
            },
        )


@dataclass(frozen=True)
class DecodeOutput:
    """`sequences`: B one-dimensional LongTensors, each the prompt without padding and what was generated, the EOS that
    stopped it included. `stats`: what it cost."""

    sequences: list[torch.Tensor]
    stats: DecodeStats


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first position where two answers part, the shorter one's end included; None where they are the same."""
    differing = (n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    return next(differing, None if len(ours) == len(theirs) else min(len(ours), len(theirs)))
