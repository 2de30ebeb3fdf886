"""What a run carries from cycle to cycle, all of it on the device, and what it reports at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthrus_triton import ops


@dataclass
class DecodeState:
    """Static buffers of one run over B sequences with blocks of K rows.

    block [B, K] int64: anchor, then MASK. output_ids [B, L] int64 and output_len [B] int32: committed tokens.
    limit [B] int32: most tokens of each. finished [B] bool. eos_ids [E] int64. accepted_histogram [B, K] int32:
    cycles by accepted length.
    """

    block: torch.Tensor
    output_ids: torch.Tensor
    output_len: torch.Tensor
    limit: torch.Tensor
    finished: torch.Tensor
    eos_ids: torch.Tensor
    accepted_histogram: torch.Tensor
    mask_token_id: int

    @classmethod
    def allocate(
        cls, limits: list[int], block_size: int, eos_ids: list[int], mask_token_id: int, device: torch.device
    ) -> DecodeState:
        """Empty buffers: nothing committed, nobody finished."""
        B = len(limits)
        return cls(
            block=torch.full((B, block_size), mask_token_id, dtype=torch.int64, device=device),
            output_ids=torch.zeros(B, max(limits), dtype=torch.int64, device=device),
            output_len=torch.zeros(B, dtype=torch.int32, device=device),
            limit=torch.tensor(limits, dtype=torch.int32, device=device),
            finished=torch.zeros(B, dtype=torch.bool, device=device),
            eos_ids=torch.tensor(eos_ids, dtype=torch.int64, device=device),
            accepted_histogram=torch.zeros(B, block_size, dtype=torch.int32, device=device),
            mask_token_id=mask_token_id,
        )

    def commit(self, candidate: torch.Tensor, choice: torch.Tensor, context_len: torch.Tensor, impl: str) -> None:
        """Consensus over one verified block: everything a cycle changes, in place."""
        ops.consensus_(
            candidate, choice, self.eos_ids, self.limit, self.mask_token_id, context_len=context_len,
            output_ids=self.output_ids, output_len=self.output_len, finished=self.finished, block=self.block,
            accepted_histogram=self.accepted_histogram, impl=impl,
        )  # fmt: skip


@dataclass(frozen=True)
class DecodeStats:
    """What a run cost and gave. Counts are of the run; lists have one entry per sequence.

    tokens: generated tokens, EOS included.
    cycles: cycles the decoder ran (those of its longest-lived sequence). In AR mode a cycle is one pass.
    forward_passes: 1 prefill, then 2 per cycle (1 in AR mode).
    tokens_per_cycle: tokens committed per cycle a sequence was alive, bonus token included; at most K.
    tpf: tokens per forward pass, the paper's Eq. 9: tokens / (1 + 2 * cycles), token-weighted over sequences.
    accepted_histogram: accepted_histogram[a] cycles had their first `a` drafted tokens accepted.
    prefill_seconds, decode_seconds: wall-clock.
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

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over prefill and decode time."""
        seconds = self.prefill_seconds + self.decode_seconds
        return self.tokens / seconds if seconds else 0.0

    @classmethod
    def measure(
        cls, state: DecodeState, passes_per_cycle: int, prefill_seconds: float, decode_seconds: float
    ) -> DecodeStats:
        """Read the counters off the device."""
        tokens = state.output_len.tolist()
        histogram = state.accepted_histogram.tolist()
        cycles = [sum(row) for row in histogram]
        passes = [1 + passes_per_cycle * n for n in cycles]
        # the first token of each sequence is the prefill's
        committed = sum(tokens) - len(tokens)
        return cls(
            tokens=sum(tokens),
            cycles=max(cycles),
            forward_passes=max(passes),
            tokens_per_cycle=committed / sum(cycles) if sum(cycles) else 0.0,
            tpf=sum(tokens) / sum(passes),
            accepted_histogram=[sum(column) for column in zip(*histogram)],
            sequence_tokens=tokens,
            sequence_cycles=cycles,
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
        )


@dataclass(frozen=True)
class DecodeOutput:
    """`sequences`: B one-dimensional LongTensors, each the prompt without padding and what was generated, the EOS that
    stopped it included. `stats`: what it cost."""

    sequences: list[torch.Tensor]
    stats: DecodeStats
