"""ConsensusDecoder: draft with the diffusion view, verify with the frozen AR view, keep what they agree on.
The output is the AR view's own, token for token; a bad draft costs time, never a token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch

from orthrus_triton import ops
from orthrus_triton.modules.decode_state import DecodeOutput, DecodeState, DecodeStats
from orthrus_triton.modules.kv_cache import SharedKVCache, ViewPass
from orthrus_triton.modules.prompts import split_prompts
from orthrus_triton.ops._dispatch import IMPLS, resolve_impl

Mode = Literal["consensus", "ar"]


class DualViewModel(Protocol):
    """What the decoder needs of a model.

    block_size: the block the diffusion view was trained for, the largest one that may be asked for.
    mask_token_id: the token that stands for a position to be drafted.
    vocab_size: ids are 0..vocab_size-1.
    eos_token_ids: stop tokens when the caller names none; may be empty.
    """

    block_size: int
    mask_token_id: int
    vocab_size: int
    eos_token_ids: list[int]

    def new_cache(self, batch_size: int, max_len: int, block_size: int) -> SharedKVCache:
        """Static buffers for this model on its device."""
        ...

    def forward_view(self, input_ids: torch.Tensor, cache: SharedKVCache, view_pass: ViewPass) -> torch.Tensor:
        """input_ids [B, T] through one view -> final hidden states [B, T, H], normed."""
        ...

    def compute_logits(self, hidden: torch.Tensor, linear_impl: str = "auto") -> torch.Tensor:
        """hidden [B, T, H] -> logits [B, T, V], fp32."""
        ...


class ConsensusDecoder:
    """Generates from a dual-view model.

    Args:
        model: see `DualViewModel`.
        mode: "consensus" drafts and verifies; "ar" decodes with the AR view alone, the baseline it must equal.
        block_size: rows of a block, anchor included, 2..model.block_size; by default the trained one.
        impl: "auto", "triton" or "torch" for every op of a cycle.
        exact: in AR mode, use arithmetic whose bits equal the verify pass. Triton needs nothing for that. The torch
            implementation runs its AR pass with the verify pass's row count, because BLAS picks kernels by shape (so
            the two modes are compared at one block_size); exact=False gives it its cheapest pass instead, the fair
            baseline for wall-clock.
        max_cache_len: tokens the cache can hold, or None to size it to each call.
        prefill_chunk: prompt tokens per prefill step.

    Source: Orthrus, arXiv 2605.12825, section 3 (consensus between the two views).
    """

    def __init__(
        self,
        model: DualViewModel,
        *,
        mode: Mode = "consensus",
        block_size: int | None = None,
        impl: str = "auto",
        exact: bool = True,
        max_cache_len: int | None = None,
        prefill_chunk: int = 512,
    ) -> None:
        if mode not in ("consensus", "ar"):
            raise ValueError(f"mode must be 'consensus' or 'ar', but got {mode!r}")
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {IMPLS}, but got {impl!r}")
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be >= 1, but got {prefill_chunk}")
        self.model, self.mode, self.exact = model, mode, exact
        self.block_size = self._check_block_size(block_size)
        self.impl, self.max_cache_len, self.prefill_chunk = impl, max_cache_len, prefill_chunk
        self._cache: SharedKVCache | None = None

    @torch.no_grad()  # not inference_mode: callers may edit the sequences in place
    def generate(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | list[int] | None = None,
        block_size: int | None = None,
        streamer: Any | None = None,
    ) -> DecodeOutput:
        """Generate greedily for every prompt.

        Args:
            input_ids: [B, L] integers, or a list of 1-D prompts of any lengths.
            attention_mask: [B, L], left or right padding, or None.
            max_new_tokens: most tokens to generate per sequence, >= 1.
            eos_token_id: one or several ids that end a sequence (and are part of it); None takes the model's own, an
                empty list none.
            block_size: for this call, by default the decoder's.
            streamer: an object with transformers' `put(ids)` and `end()`; one sequence only.

        Returns:
            `sequences`, a list of B 1-D LongTensors (prompt without padding, then what was generated), and `stats`.

        Raises:
            ValueError: an argument out of range; it names the argument, what was expected and what came.
        """
        prompts = split_prompts(input_ids, attention_mask, self.model.vocab_size)
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be an integer >= 1, but got {max_new_tokens!r}")
        if streamer is not None and len(prompts) != 1:
            raise ValueError(f"streamer takes one sequence, but got {len(prompts)}")
        block_size = self.block_size if block_size is None else self._check_block_size(block_size)
        cache = self._cache_for(prompts, max_new_tokens, block_size)
        impl = resolve_impl(self.impl, cache.context_len)
        state = DecodeState.allocate(
            [max_new_tokens] * len(prompts), block_size, self._eos_ids(eos_token_id), self.model.mask_token_id,
            cache.context_len.device,
        )  # fmt: skip
        stream = _Stream(streamer, state)
        started = time.perf_counter()
        self._prefill(prompts, cache, state, impl)
        stream.start(prompts[0])
        prefilled = time.perf_counter()
        while not bool(state.finished.all()):
            self._cycle(cache, state, impl)
            stream.advance()
        lengths = state.output_len.tolist()
        finished = time.perf_counter()
        stream.end()
        sequences = [
            torch.cat((prompt, ids[:length].to(prompt.device)))
            for prompt, ids, length in zip(prompts, state.output_ids, lengths)
        ]
        passes_per_cycle = 2 if self.mode == "consensus" else 1
        return DecodeOutput(
            sequences, DecodeStats.measure(state, passes_per_cycle, prefilled - started, finished - prefilled)
        )

    def draft(self, cache: SharedKVCache, state: DecodeState, impl: str) -> torch.Tensor:
        """One bidirectional pass over [anchor, MASK x (K-1)] -> the block to verify, [B, K]: anchor and K - 1 drafts.

        Row i proposes the token at position context_len + i + 1, so the last row has nothing to propose.
        """
        K = state.block.shape[1]
        view_pass = cache.view_pass("diffusion", K, impl=impl)
        hidden = self.model.forward_view(state.block, cache, view_pass)
        logits = self.model.compute_logits(hidden[:, : K - 1], view_pass.linear_impl)
        return torch.cat((state.block[:, :1], ops.greedy_choice(logits, impl=impl)), dim=1)

    def verify(self, candidate: torch.Tensor, cache: SharedKVCache, impl: str) -> torch.Tensor:
        """One causal pass over the block -> the AR view's own choice in every row, [B, K]. Writes its K/V in place."""
        view_pass = cache.view_pass("ar", candidate.shape[1], impl=impl)
        hidden = self.model.forward_view(candidate, cache, view_pass)
        return ops.greedy_choice(self.model.compute_logits(hidden, view_pass.linear_impl), impl=impl)

    def _cycle(self, cache: SharedKVCache, state: DecodeState, impl: str) -> None:
        if self.mode == "consensus":
            candidate = self.draft(cache, state, impl)
            choice = self.verify(candidate, cache, impl)
        else:
            # one real row; the torch implementation keeps the verify pass's row count, for its bits
            rows = state.block.shape[1] if self.exact and impl != "triton" else 1
            choice = self.verify(state.block[:, :rows].contiguous(), cache, impl)[:, :1]
            candidate = state.block[:, :1]
        state.commit(candidate, choice, cache.context_len, impl)

    def _prefill(self, prompts: list[torch.Tensor], cache: SharedKVCache, state: DecodeState, impl: str) -> None:
        """Fill the cache chunk by chunk and commit the first token. Logits are computed for last positions only.

        Rows past a prompt's end compute garbage and write it past that prompt's length, where nobody looks.
        """
        device = cache.context_len.device
        lengths = torch.tensor([prompt.numel() for prompt in prompts], dtype=torch.int32, device=device)
        cache.prompt_len.copy_(lengths)
        longest = int(lengths.max())
        padded = torch.zeros(len(prompts), longest + self.prefill_chunk, dtype=torch.int64, device=device)
        for b, prompt in enumerate(prompts):
            padded[b, : prompt.numel()] = prompt.to(device)
        # prefill products have many rows: a library GEMM, the same one in both modes
        linear_impl = "torch" if impl == "triton" else impl
        last_hidden = None
        for start in range(0, longest, self.prefill_chunk):
            # at least 8 rows, in eights: below that BLAS switches to kernels of another order
            width = min(self.prefill_chunk, -(-(longest - start) // 8) * 8)
            begin = torch.full_like(lengths, start)
            view_pass = cache.view_pass("ar", width, begin, impl=impl, linear_impl=linear_impl)
            hidden = self.model.forward_view(padded[:, start : start + width], cache, view_pass)
            row = lengths.long() - 1 - start
            picked = hidden[torch.arange(len(prompts), device=device), row.clamp(0, width - 1)]
            ends_here = (row >= 0) & (row < width)
            last_hidden = picked if last_hidden is None else torch.where(ends_here[:, None], picked, last_hidden)
        logits = self.model.compute_logits(last_hidden[:, None], linear_impl)
        choice = ops.greedy_choice(logits, impl=impl)
        # the last prompt token is this step's anchor: commit advances past it
        cache.context_len.copy_(lengths - 1)
        state.commit(choice, choice, cache.context_len, impl)
        state.accepted_histogram.zero_()

    def _cache_for(self, prompts: list[torch.Tensor], max_new_tokens: int, block_size: int) -> SharedKVCache:
        # the newest token is never cached, hence - 1
        needed = max(prompt.numel() for prompt in prompts) + max_new_tokens - 1
        if self.max_cache_len is not None:
            if needed > self.max_cache_len:
                raise ValueError(
                    f"input_ids and max_new_tokens must fit max_cache_len={self.max_cache_len} tokens, "
                    f"but prompt + max_new_tokens - 1 is {needed}"
                )
            needed = self.max_cache_len
        cache = self._cache
        if (
            cache is None or cache.batch_size != len(prompts) or cache.capacity < needed
            or cache.block_size < block_size
        ):  # fmt: skip
            self._cache = cache = None  # free the old buffers before the new ones are made
            self._cache = cache = self.model.new_cache(len(prompts), needed, max(block_size, self.block_size))
        return cache

    def _check_block_size(self, block_size: int | None) -> int:
        if block_size is None:
            return self.model.block_size
        if not isinstance(block_size, int) or not 2 <= block_size <= self.model.block_size:
            raise ValueError(
                f"block_size must be in 2..{self.model.block_size}, the size the view was made for, "
                f"but got {block_size!r}"
            )
        return block_size

    def _eos_ids(self, eos_token_id: int | list[int] | None) -> list[int]:
        if eos_token_id is None:
            return list(self.model.eos_token_ids)
        ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        for token in ids:
            if not 0 <= token < self.model.vocab_size:
                raise ValueError(f"eos_token_id must be in 0..{self.model.vocab_size - 1}, but got {token}")
        return ids


class _Stream:
    """Hands committed tokens to a streamer as they come; does nothing, and never synchronises, without one."""

    def __init__(self, streamer: Any | None, state: DecodeState) -> None:
        self.streamer, self.state, self.sent = streamer, state, 0

    def start(self, prompt: torch.Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(prompt[None].cpu())
            self.advance()

    def advance(self) -> None:
        if self.streamer is not None:
            length = int(self.state.output_len[0])
            if length > self.sent:
                self.streamer.put(self.state.output_ids[0, self.sent : length].cpu())
            self.sent = length

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
