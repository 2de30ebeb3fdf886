"""ConsensusDecoder: draft with the diffusion view, verify with the frozen AR view, keep what they agree on.
The output is the AR view's own, token for token; a bad draft costs time, never a token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from orthrus_triton.modules.adaptive_block import AR, AdaptiveBlock, BlockRule, FixedBlock, auto_sizes
from orthrus_triton.modules.cuda_graph import settings_of, weight_versions
from orthrus_triton.modules.decode_options import (
    BlockSize,
    Mode,
    require_members,
    require_one_device,
    require_streamer,
    stop_ids,
    widest_block,
)
from orthrus_triton.modules.decode_run import DecodeRun
from orthrus_triton.modules.decode_stats import DecodeOutput
from orthrus_triton.modules.dual_view_model import DualViewModel
from orthrus_triton.modules.prompts import split_prompts, tokens_to_cache
from orthrus_triton.modules.run_buffers import RunBuffers
from orthrus_triton.modules.run_to_end import Stop, run_to_end
from orthrus_triton.modules.sampling_params import Choosing, SamplingParams, SamplingRule, params_of
from orthrus_triton.modules.slot import Slot
from orthrus_triton.modules.turn import Turn, in_turn
from orthrus_triton.ops._cpu_packing import forget_changed
from orthrus_triton.ops._dispatch import IMPLS, require_size, resolve_impl


class ConsensusDecoder(RunBuffers):
    """Generates from a dual-view model.

    Args:
        model: see `DualViewModel`.
        mode: "consensus" drafts and verifies; "ar" decodes with the AR view alone, the baseline it must equal.
        block_size: rows of a block, anchor included, 2..model.block_size; by default the trained one. "auto" chooses
            before each cycle, by measured times and recent acceptance, among AR, powers of two and the trained block.
            In AR mode there are no blocks.
        impl: "auto", "triton", "torch" or "reference" for every op of a cycle.
        exact: in AR mode, use arithmetic whose bits equal the verify pass. Triton and the C kernels need nothing for
            that, torch's products round their rows up to eight; exact=False gives it the library's product of one row
            there, the fair baseline for wall-clock on a CPU.
        max_cache_len: tokens the cache can hold, or None to size it to each call.
        prefill_chunk: prompt tokens per prefill step; by default 512 on a CPU, 4096 on a GPU.
        batch_invariant_prefill: prefill with the cycle's own product instead of the library's, so that the prompt's
            K/V too are the bits that decoding token by token would leave.
        cuda_graph: replay each cycle as one CUDA graph. None does so for Triton on a GPU. On a CPU, None replays the
            calls of C kernels that a pass through the layers consists of, as they were when the run was opened; not
            where other people's modules are among them. False runs every module each time.
        compile: run the cycle through torch.compile; True, or the name of a backend. No bit changes: whatever rounds
            more than once is opaque to the compiler. It compiles anew for each batch size and cache size: set
            max_cache_len.

    Attributes:
        cache: the K/V buffers, or None before the first call. They stay from call to call while they are large enough
            and the model has the same tensors as weights. What they hold is used again (`reuse_cache`) only while
            settings (windows, epsilons) and hooks are the same, and these tensors were not written, as far as torch
            counts it: through `.data` it does not.

    Raises:
        ValueError: an option out of range. TypeError: `model` lacks a member of `DualViewModel`.

    Calls from several threads wait for each other. Decoders of their own do not, and may share a model.

    Source: Orthrus, arXiv 2605.12825, section 3 (consensus between the two views).
    """

    def __init__(
        self,
        model: DualViewModel,
        *,
        mode: Mode = "consensus",
        block_size: BlockSize | None = None,
        impl: str = "auto",
        exact: bool = True,
        max_cache_len: int | None = None,
        prefill_chunk: int | None = None,
        batch_invariant_prefill: bool = False,
        cuda_graph: bool | None = None,
        compile: bool | str = False,
    ) -> None:
        if mode not in ("consensus", "ar"):
            raise ValueError(f"mode must be 'consensus' or 'ar', but got {mode!r}")
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {IMPLS}, but got {impl!r}")
        for name, value in (("max_cache_len", max_cache_len), ("prefill_chunk", prefill_chunk)):
            if value is not None:
                require_size(name, value)
        require_members(model)
        super().__init__(model, exact, prefill_chunk, batch_invariant_prefill, impl, max_cache_len, cuda_graph, compile)
        self.mode = mode
        self._block_option, self._block_size = block_size, widest_block(block_size, self.model)
        self.clock: Callable[[], float] = time.perf_counter
        self.turn = Turn()
        self._versions: tuple = ()
        self._adaptive: dict[int, AdaptiveBlock] = {}

    @property
    def block_size(self) -> int:
        """Rows of the widest block, unless a call names another."""
        return self._block_size

    # never in inference mode: callers may edit the sequences in place, and buffers that were made in it could not be
    # written by a later call outside it
    @in_turn
    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | Sequence[torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | list[int] | None = None,
        block_size: BlockSize | None = None,
        streamer: Any | None = None,
        params: Sequence[SamplingParams] | None = None,
        sampling: SamplingRule = "coupled",
        stop: Stop | None = None,
        reuse_cache: bool = False,
        **options: Any,
    ) -> DecodeOutput:
        """Generate for every prompt, greedily unless told otherwise.

        Args:
            input_ids: [B, L] integers, or a list of 1-D prompts of any lengths.
            attention_mask: [B, L], left or right padding, or None.
            max_new_tokens: most tokens to generate per sequence, >= 1.
            eos_token_id: one or several ids that end a sequence (and are part of it); None takes the model's own, an
                empty list none.
            block_size: for this call, by default the decoder's.
            streamer: an object with transformers' `put(ids)` and `end()`; one sequence only.
            params: how each sequence samples; or, for all alike, the fields of `SamplingParams` as keywords
                (temperature=0.8, top_p=0.9, seed=1, ...), where sequence b draws noise of its own.
            sampling: "coupled" gives the tokens that AR mode gives with the same parameters; "rejection" gives other
                tokens of the same distribution and accepts as many drafts as can be.
            stop: called with a sequence's number and its new tokens after each of them; True ends it there, and a dict
                {c: n} ends sequence c with its first n new tokens, even if it has more by now. Its method `end`, if it
                has one, is called in the same way when there is no token for a sequence to go on with.
            reuse_cache: keep of the cache what prompt b has in common with sequence b of the last call: a conversation
                goes on without prefilling it again.

        Returns:
            `sequences`, a list of B 1-D LongTensors (prompt without padding, then what was generated), and `stats`.

        Raises:
            ValueError: an argument out of range; it names the argument, what was expected and what came.
            TypeError: a keyword that is no option, or `params` of another kind.
            NonFiniteLogitsError: a ValueError; the model gave NaN or infinity. Other sequences are not affected.
        """
        prompts = split_prompts(input_ids, attention_mask, self.model.vocab_size)
        require_size("max_new_tokens", max_new_tokens)
        if streamer is not None and len(prompts) != 1:
            raise ValueError(f"streamer takes one sequence, but got {len(prompts)}")
        require_streamer(streamer)
        params = params_of(len(prompts), params, options, self.model.vocab_size)
        max_len = tokens_to_cache(max(prompt.numel() for prompt in prompts), max_new_tokens)
        choosing = Choosing.of(params, sampling)
        run = self.open(len(prompts), max_len, eos_token_id=eos_token_id, block_size=block_size, choosing=choosing)
        return run_to_end(
            run, prompts, max_new_tokens, params, self.clock, streamer=streamer, stop=stop, reuse_cache=reuse_cache
        )

    @in_turn
    @torch.inference_mode(False)
    @torch.no_grad()
    def open(
        self,
        batch_size: int,
        max_len: int,
        *,
        eos_token_id: int | list[int] | None = None,
        block_size: BlockSize | None = None,
        choosing: Choosing = Choosing(),
    ) -> DecodeRun:
        """A run of `batch_size` free slots, to be driven step by step; `generate` is a loop on one.

        It takes over the decoder's buffers: an older run of this decoder cannot go on.

        Args:
            batch_size: sequences that decode side by side.
            max_len: most tokens of any of them in the cache: prompt + new tokens - 1.
            eos_token_id, block_size: as in `generate`.
            choosing: what the sequences may ask for beyond greedy decoding.

        Raises:
            ValueError: an argument out of range.
        """
        require_size("batch_size", batch_size)
        require_size("max_len", max_len)
        require_one_device(self.model)
        option = self._block_option if block_size is None else block_size
        widest = widest_block(option, self.model)
        eos_ids = stop_ids(eos_token_id, self.model)
        if self.max_cache_len is not None:
            if max_len > self.max_cache_len:
                raise ValueError(
                    f"input_ids and max_new_tokens must fit max_cache_len={self.max_cache_len} tokens, "
                    f"but prompt + max_new_tokens - 1 is {max_len}"
                )
            max_len = self.max_cache_len
        settings = settings_of(self.model)
        kept = self._reserve(batch_size, max_len, max(widest, self.block_size), 1 + len(eos_ids), settings)
        versions = (weight_versions(self.model), settings)
        # the buffers serve weights that were changed in place, but what lies in them is of the weights before
        last = self.run.slots if kept and versions == self._versions and self.run is not None else []
        self._state.reset(eos_ids, choosing, self.model.vocab_size)
        self.choosing = choosing
        forget_changed()
        if self.cache.recorded is not None:
            self.cache.recorded.begin_run()
        impl = resolve_impl(self.impl, self.cache.context_len)
        lag = 1 if self._runner.captures_steps else 0
        rules = partial(self._block_rule, option)
        self.run = DecodeRun(self, self.cache, self._state, self._runner, rules, impl, lag, choosing)
        self._versions = versions  # not before: had something failed above, the next call would go on from old K/V
        if last:  # what the cache still holds of them may be the beginning of the next prompts
            self.run.slots = [Slot(slot.prompt, tokens=slot.tokens, failed=slot.failed) for slot in last]
        if not choosing.hosted:  # else most likely for sequences that all have functions, of which nothing is captured
            self.run.prepare()
        return self.run

    def _block_rule(self, option: BlockSize | None, batch_size: int) -> BlockRule:
        if self.mode == "ar":
            return FixedBlock(AR)
        if option != "auto":
            return FixedBlock(widest_block(option, self.model))
        # cycle times differ by batch size
        rule = AdaptiveBlock(auto_sizes(self.model.block_size), self.anchor_rows)
        return self._adaptive.setdefault(batch_size, rule)
