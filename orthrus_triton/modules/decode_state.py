"""The static device buffers of a run: everything a cycle reads or changes besides the KV cache.
They keep their addresses from run to run, so that a captured cycle can be replayed over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

from orthrus_triton import ops
from orthrus_triton.modules.sampling_params import Choosing
from orthrus_triton.modules.sampling_state import SamplingState

NO_TOKEN = -1  # fills unused places for EOS ids: no choice is ever equal to it


@dataclass
class DecodeState:
    """Buffers of B sequences ("slots") with blocks of at most W rows and at most L generated tokens.

    block [B, W] int64: anchor, then MASK; a cycle of K <= W rows uses its first K columns. output_ids [B, L] int64 and
    output_len [B] int32: committed tokens. prompt_ids [B, P] int64, P being L, or 0 where drafts do not look back.
    limit [B] int32: most tokens of each. finished [B] bool: a finished slot is an exact no-op in every further cycle.
    eos_ids [E] int64: VOID, the stop tokens, then -1. accepted_histogram [B, W] int32: cycles by accepted length.
    uncounted [B, W] int32 takes the counts of commits that end no cycle. report [B, 2 + R] int64: output_len, finished
    and the newest R committed tokens, for the host. sampling: parameters of the slots, None until a run is open for
    more than greedy decoding.
    """

    block: torch.Tensor
    output_ids: torch.Tensor
    output_len: torch.Tensor
    prompt_ids: torch.Tensor
    limit: torch.Tensor
    finished: torch.Tensor
    eos_ids: torch.Tensor
    accepted_histogram: torch.Tensor
    uncounted: torch.Tensor
    report: torch.Tensor
    report_columns: torch.Tensor
    mask_token_id: int
    sampling: SamplingState | None = None

    @classmethod
    def allocate(
        cls, batch_size: int, block_size: int, max_tokens: int, report_tokens: int, eos_slots: int, mask_token_id: int,
        device: torch.device, looks_back: bool = False,
    ) -> DecodeState:  # fmt: skip
        """Buffers in which every slot is free."""
        B, int64, int32 = batch_size, {"dtype": torch.int64, "device": device}, {"dtype": torch.int32, "device": device}
        return cls(
            block=torch.full((B, block_size), mask_token_id, **int64),
            output_ids=torch.zeros(B, max_tokens, **int64),
            output_len=torch.zeros(B, **int32),
            prompt_ids=torch.zeros(B, max_tokens if looks_back else 0, **int64),
            limit=torch.zeros(B, **int32),
            finished=torch.ones(B, dtype=torch.bool, device=device),
            eos_ids=torch.full((eos_slots,), NO_TOKEN, **int64),
            accepted_histogram=torch.zeros(B, block_size, **int32),
            uncounted=torch.zeros(B, block_size, **int32),
            report=torch.zeros(B, 2 + report_tokens, **int64),
            report_columns=torch.arange(-report_tokens, 0, **int64),
            mask_token_id=mask_token_id,
        )

    def reset(self, eos_ids: list[int], choosing: Choosing, vocab_size: int) -> None:
        """Free every slot, set the ids that stop a sequence, at most E - 1 of them, and be ready for `choosing`."""
        self.finished.fill_(True)
        self.output_len.zero_()
        self.accepted_histogram.zero_()
        stops = [ops.VOID, *eos_ids]
        padded = stops + [NO_TOKEN] * (self.eos_ids.numel() - len(stops))
        self.eos_ids.copy_(torch.tensor(padded, dtype=torch.int64))
        if any(choosing):
            self.sampling = self.sampling or SamplingState.allocate(self.block.shape[0], self.block.device)
            self.sampling.prepare(choosing, vocab_size)

    def slots(self, first: int, count: int) -> DecodeState:
        """The buffers of `count` sequences in a row, as views: what is written to them is written here."""
        shared = ("eos_ids", "report_columns", "mask_token_id")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sampling"}
        only = slice(first, first + count)
        views = {name: value if name in shared else value[only] for name, value in values.items()}
        return DecodeState(**views, sampling=None if self.sampling is None else self.sampling.slots(first, count))

    def next_block(self, block_size: int) -> torch.Tensor:
        """The next block [B, K]. A sequence that ended for want of a token has some token there: nobody looks."""
        return self.block[:, :block_size].contiguous()

    def start(self, limit: int, prompt: torch.Tensor) -> None:
        """Make this one slot live for a prompt [L], with nothing committed yet."""
        prompt = prompt[: self.prompt_ids.shape[1]]
        self.prompt_ids[0, : prompt.numel()].copy_(prompt)
        self.output_len.zero_()
        self.limit.fill_(limit)
        self.accepted_histogram.zero_()
        self.finished.fill_(False)

    def commit(
        self, candidate: torch.Tensor, choice: torch.Tensor, context_len: torch.Tensor, impl: str,
        histogram: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Consensus over one verified block: everything a cycle changes, in place."""
        ops.consensus_(
            candidate, choice, self.eos_ids, self.limit, self.mask_token_id, context_len=context_len,
            output_ids=self.output_ids, output_len=self.output_len, finished=self.finished, block=self.block,
            accepted_histogram=self.accepted_histogram if histogram is None else histogram, impl=impl,
        )  # fmt: skip

    def commit_anchor_choice(self, choice: torch.Tensor, context_len: torch.Tensor, impl: str) -> None:
        """Commit the token [B, 1] that the frozen view chose after the anchor while the rest of the block was drafted.
        A sequence that ends with it is not verified any more: its cycle counts here, with nothing accepted."""
        alive = ~self.finished
        self.commit(self.next_block(1), choice, context_len, impl, self.uncounted)
        self.accepted_histogram[:, 0] += alive & self.finished

    def write_report(self) -> None:
        """Pack what the host wants to know into one buffer, so that it takes one copy."""
        newest = (self.output_len[:, None] + self.report_columns).clamp(min=0)
        self.report[:, 0] = self.output_len
        self.report[:, 1] = self.finished
        self.report[:, 2:] = self.output_ids.gather(1, newest)

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Inside the context every slot counts as finished: cycles run in full and change nothing anyone reads."""
        finished = self.finished.clone()
        self.finished.fill_(True)
        try:
            yield
        finally:
            self.finished.copy_(finished)
