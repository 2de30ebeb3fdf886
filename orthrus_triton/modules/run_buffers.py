"""RunBuffers: what runs of a decoder share: cache, state on the device, and what was captured or compiled over them.
They stay from run to run while they are large enough and the model's weights lie where they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from orthrus_triton.modules.compiled import compile_apart
from orthrus_triton.modules.cuda_graph import CudaGraphCapture, StepRunner, weight_addresses
from orthrus_triton.modules.decode_cycle import DecodeCycle
from orthrus_triton.modules.decode_run import AR_STEPS
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.dual_view_model import DualViewModel
from orthrus_triton.modules.kv_cache import SharedKVCache
from orthrus_triton.modules.recorded_passes import RecordedPasses
from orthrus_triton.ops._dispatch import resolve_impl

if TYPE_CHECKING:
    from orthrus_triton.modules.decode_run import DecodeRun

EOS_SLOTS = 8  # places for stop ids are made in eights, so that calls with few of them share buffers


class RunBuffers(DecodeCycle):
    """A cycle and the buffers it runs over.

    Args:
        model, exact, prefill_chunk, batch_invariant_prefill, impl, max_cache_len, cuda_graph, compile: as in
            `ConsensusDecoder`.

    Attributes:
        cache: see `ConsensusDecoder`.
        run: the one that has the buffers, the last that was opened.
    """

    def __init__(
        self, model: DualViewModel, exact: bool, prefill_chunk: int | None, batch_invariant_prefill: bool, impl: str,
        max_cache_len: int | None, cuda_graph: bool | None, compile: bool | str,
    ) -> None:  # fmt: skip
        super().__init__(model, exact, prefill_chunk, batch_invariant_prefill)
        self.max_cache_len, self.cuda_graph = max_cache_len, cuda_graph
        self.cache: SharedKVCache | None = None
        self.run: DecodeRun | None = None
        self._impl = impl
        self._state: DecodeState | None = None
        self._runner: StepRunner | None = None
        self._weights: tuple = ()
        self._settings: tuple = ()
        self._compile_options = {"backend": "inductor" if compile is True else compile} if compile else None
        self._compiled: dict[tuple, Callable] = {}

    @property
    def impl(self) -> str:
        """As it was given; what is captured is of it."""
        return self._impl

    @property
    def needs_all_slots(self) -> bool:
        """Whether every step is of the whole batch: on a GPU, where rows cost little, and what is captured or compiled
        is so for a batch of one size."""
        on_gpu = self.cache.context_len.device.type != "cpu"
        return on_gpu or self._runner.captures_steps or self._compile_options is not None

    def run_cycle(self, cache: SharedKVCache, state: DecodeState, block_size: int, impl: str) -> None:
        """`cycle`, or what was compiled of it: once per block size and kind of choosing."""
        cycle = self.cycle
        if self._compile_options is not None and not self.choosing.hosted:
            key = (block_size, self.choosing)
            if key not in self._compiled:
                self._compiled[key] = compile_apart(self.cycle, **self._compile_options)
            cycle = self._compiled[key]
        cycle(cache, state, block_size, impl)

    def _reserve(self, batch_size: int, max_len: int, block_size: int, eos_count: int, settings: tuple) -> bool:
        """Buffers for a run: the ones there are if they are large enough and of these weights (True), and what was
        captured over them is of these settings; else new ones and no captures of the old."""
        cache, state = self.cache, self._state
        weights, self._weights = self._weights, weight_addresses(self.model)
        changed, self._settings = self._settings != settings, settings
        if (
            cache is not None and weights == self._weights
            and not (changed and (self._runner.captures_steps or self._compile_options is not None))
            and cache.batch_size == batch_size and cache.capacity >= max_len
            and cache.block_size >= block_size and state.eos_ids.numel() >= eos_count
        ):  # fmt: skip
            return True
        # free the old buffers and what was captured over them before the new ones are made
        self.run = self.cache = self._state = self._runner = cache = state = None
        self._compiled.clear()
        cache = self.model.new_cache(batch_size, max_len, block_size)
        device = cache.context_len.device
        if device.type == "cpu" and self.cuda_graph is None:
            cache.recorded = RecordedPasses()
        eos_slots = max(-(-eos_count // EOS_SLOTS), 1) * EOS_SLOTS
        state = DecodeState.allocate(
            batch_size, block_size, cache.capacity, max(block_size + self.anchor_rows, AR_STEPS), eos_slots,
            self.model.mask_token_id, device, getattr(self.model, "has_chain", False),
        )  # fmt: skip
        runner = StepRunner(self._new_capture(device), state.idle)
        # all or nothing: whatever fails above must fail the next call alike, not leave it one of three
        self.cache, self._state, self._runner = cache, state, runner
        return False

    def _new_capture(self, device: torch.device) -> Callable | None:
        """What captures steps on `device`, or None to run them eagerly."""
        can = device.type == "cuda" and resolve_impl(self.impl, torch.empty(0, device=device)) == "triton"
        if self.cuda_graph and not can:
            raise ValueError(
                f"cuda_graph=True needs impl='triton' on a GPU, but the model is on {device} and impl is {self.impl!r}"
            )
        return CudaGraphCapture(device) if can and self.cuda_graph is not False else None
