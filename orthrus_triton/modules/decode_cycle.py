"""DecodeCycle: what decoding does on the device, on buffers that are there: draft, verify, consensus, prefill.
A cycle reads no value on the host, so that it can be captured; when to run what, `DecodeRun` says."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orthrus_triton import ops
from orthrus_triton.modules.adaptive_block import AR
from orthrus_triton.modules.choose import choose_drafts, choose_logits, choose_tokens
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.dual_view_model import DualViewModel, run_view
from orthrus_triton.modules.kv_cache import SharedKVCache, ViewPass
from orthrus_triton.modules.prefill import CPU_CHUNK, GPU_CHUNK, prefill, prefill_chunk
from orthrus_triton.modules.reread import ROWS
from orthrus_triton.modules.sampling_params import Choosing, SamplingParams
from orthrus_triton.ops.gumbel import DRAFT

OnLogits = Callable[[torch.Tensor], None]  # takes [rows, V] fp32


class DecodeCycle:
    """The passes of a dual-view model, and how they become tokens.

    Args:
        model: see `DualViewModel`.
        exact, prefill_chunk, batch_invariant_prefill: as in `ConsensusDecoder`.

    Attributes:
        anchor_rows: 1 where the frozen view reads a block's anchor, else 0.
        choosing: what the sequences of the current run may ask for.
    """

    def __init__(
        self, model: DualViewModel, exact: bool, prefill_chunk: int | None, batch_invariant_prefill: bool
    ) -> None:
        self.model, self.exact = model, exact
        self.prefill_chunk, self.batch_invariant_prefill = prefill_chunk, batch_invariant_prefill
        self.anchor_rows: int = getattr(model, "anchor_rows", 0)
        self.choosing = Choosing()

    def cycle(self, cache: SharedKVCache, state: DecodeState, block_size: int, impl: str) -> None:
        """Draft, verify, consensus over all slots; with block size 1, one pass of the AR view. Device work only."""
        if self.choosing.processed:
            state.sampling.absorb(state.output_ids, state.output_len, state.block.shape[1])
        if block_size == AR:
            linear_impl = "library" if not self.exact and impl != "triton" else None
            candidate = choice = self.verify(state.next_block(1), cache, state, impl, linear_impl)
        elif self.choosing.rejection:
            candidate, choice = self.draft_and_judge(cache, state, block_size, impl)
        else:
            candidate = self.draft(cache, state, block_size, impl)
            choice = self.verify(candidate, cache, state, impl)
        state.commit(candidate, choice, cache.context_len, impl)

    def draft(self, cache: SharedKVCache, state: DecodeState, block_size: int, impl: str) -> torch.Tensor:
        """One pass over [anchor, MASK x (K-1)] -> the block to verify, [B, K]: its anchor and K - 1 drafts.

        Row i proposes the token at position context_len + i + 1. Where the diffusion view reads the anchor, the last
        row has nothing to propose. Where the frozen view does, row 0's token is committed at once and is the anchor of
        the block to verify, which ends one token later.
        """
        block, hidden, view_pass = self._draft_pass(cache, state, block_size, impl)
        drafted = choose_drafts(self, hidden, block[:, 0], state, view_pass)
        return self.block_to_verify(block, drafted, hidden, cache, state, impl)

    def verify(
        self, candidate: torch.Tensor, cache: SharedKVCache, state: DecodeState, impl: str,
        linear_impl: str | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """One causal pass over the block -> the AR view's own choice in every row, [B, K]. Writes its K/V in place."""
        view_pass = cache.view_pass("ar", candidate.shape[1], impl=impl, linear_impl=linear_impl)
        hidden = run_view(self.model, candidate, cache, view_pass)
        return ops.void_rows(self.choose(hidden, state, view_pass, candidate), hidden, impl=impl)

    def draft_and_judge(
        self, cache: SharedKVCache, state: DecodeState, block_size: int, impl: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft and verify, for rejection sampling -> the block [B, K]; in every row its draft, or what replaces it."""
        block, hidden, view_pass = self._draft_pass(cache, state, block_size, impl)
        drafted, draft_logits = choose_tokens(
            self.model, hidden, state, view_pass, self.choosing, None, stream=DRAFT
        )  # fmt: skip
        candidate = self.block_to_verify(block, drafted, hidden, cache, state, impl)
        draft_logits = draft_logits[:, self.anchor_rows :].contiguous()
        view_pass = cache.view_pass("ar", block_size, impl=impl)
        hidden = run_view(self.model, candidate, cache, view_pass)
        logits = choose_logits(self.model, hidden, state, view_pass, self.choosing, candidate)
        choice = ops.rejection_choice(
            logits, draft_logits, candidate, view_pass.positions + 1, state.sampling.sampling, impl=impl
        )
        return candidate, ops.void_rows(choice, hidden, impl=impl)

    def _draft_pass(
        self, cache: SharedKVCache, state: DecodeState, block_size: int, impl: str
    ) -> tuple[torch.Tensor, torch.Tensor, ViewPass]:
        """The block [B, K], the hidden states of its rows that have something to propose, and the pass."""
        view_pass = cache.draft_pass(block_size, self.anchor_rows, impl=impl)
        block = state.next_block(block_size)
        hidden = run_view(self.model, block, cache, view_pass)
        return block, hidden[:, : block_size - 1 + self.anchor_rows], view_pass

    def choose(
        self, hidden: torch.Tensor, state: DecodeState, view_pass: ViewPass, candidate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The one place where hidden states become tokens that are said, and, without a chain, drafts.

        hidden [B, T, H], T rows from the first of `view_pass` on; row t's token stands at position
        `view_pass.positions[b, t] + 1`. `candidate` [B, T] is what the rows read; a draft has none. Returns [B, T]
        int64. A row's token must depend on that row, its history and that position alone, or the two modes part.
        """
        return choose_tokens(self.model, hidden, state, view_pass, self.choosing, candidate)[0]

    def block_to_verify(
        self, block: torch.Tensor, drafted: torch.Tensor, hidden: torch.Tensor, cache: SharedKVCache,
        state: DecodeState, impl: str,
    ) -> torch.Tensor:  # fmt: skip
        """[B, K] from a drafted `block` and what its rows say; where the frozen view read the anchor, row 0's token is
        its own choice: it is committed here, and the block begins with it."""
        if self.anchor_rows:
            choice = ops.void_rows(drafted[:, :1].contiguous(), hidden[:, :1].contiguous(), impl=impl)
            state.commit_anchor_choice(choice, cache.context_len, impl)
            if self.choosing.processed:
                state.sampling.absorb(state.output_ids, state.output_len, 1)
        else:
            drafted = torch.cat((block[:, :1], drafted), dim=1)
        # where the draft has no token it proposes some token: verify says what is to be said
        return drafted.clamp(min=0)

    def prefill(
        self, prompt: torch.Tensor, cache: SharedKVCache, state: DecodeState, max_new_tokens: int, impl: str,
        params: SamplingParams, cached: int, hidden: torch.Tensor | None = None, on_logits: OnLogits | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Fill one sequence's cache from its prompt [L] and commit its first token; both buffers are of one slot. Gives
        the hidden state [1, 1, H] by which that was chosen; with it given, the cache holds all of the prompt.
        `on_logits` takes what every token that is read says of the next one, some rows at a time."""
        state.start(max_new_tokens, prompt)
        if state.sampling is not None:
            state.sampling.start(params, prompt)
        if hidden is None:
            chunk, linear_impl = self._chunk(cache), self._prefill_linear(impl)
            # a copy: of what it is cut out of, one row is kept
            tell = self._tell(on_logits, impl)
            hidden = prefill(self.model, prompt, cache, chunk, impl, linear_impl, cached, tell).clone()
        cache.prompt_len.fill_(prompt.numel())
        cache.context_len.fill_(prompt.numel() - 1)
        view_pass = cache.view_pass("ar", 1, impl=impl)
        choice = ops.void_rows(self.choose(hidden, state, view_pass), hidden, impl=impl)
        state.commit(choice, choice, cache.context_len, impl)
        state.accepted_histogram.zero_()
        return hidden

    def prefill_ahead(
        self, prompt: torch.Tensor, cache: SharedKVCache, impl: str, cached: int, on_logits: OnLogits | None = None
    ) -> int:
        """Fill one chunk of a prompt [L] into a one-sequence cache that holds its first `cached` tokens -> how many it
        holds then. The last chunk is left to `prefill`: nothing is done where only that is missing."""
        chunk = self._chunk(cache)
        if cached + chunk >= prompt.numel():
            return cached
        hidden = prefill_chunk(self.model, prompt, cache, cached, chunk, impl, self._prefill_linear(impl))
        if on_logits is not None:
            self._tell(on_logits, impl)(hidden)
        return cached + chunk

    def _tell(self, on_logits: OnLogits | None, impl: str) -> Callable[[torch.Tensor], None] | None:
        """What takes hidden states [1, n, H] and gives their logits to `on_logits`, few rows at a time."""
        if on_logits is None:
            return None

        def tell(hidden: torch.Tensor) -> None:
            for rows in hidden.split(ROWS, dim=1):
                on_logits(self.model.compute_logits(rows, impl)[0])

        return tell

    def _chunk(self, cache: SharedKVCache) -> int:
        return self.prefill_chunk or (GPU_CHUNK if cache.context_len.device.type == "cuda" else CPU_CHUNK)

    def _prefill_linear(self, impl: str) -> str:
        return impl if self.batch_invariant_prefill or impl == "reference" else "library"
