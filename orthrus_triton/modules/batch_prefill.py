"""Many prompts through the AR view in one pass, into slots of a running batch: where answers matter and their last bits
do not, as for training data. On a GPU a short prompt's own pass is launches and little else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.dual_view_model import DualViewModel, run_view
from orthrus_triton.modules.kv_cache import SharedKVCache
from orthrus_triton.modules.prefill import GPU_CHUNK

ROW_QUANTUM = 32  # passes have whole multiples of it, for kernels like few different shapes


class BatchPrefill:
    """Fills slots from prompts, `width` of them a pass, through buffers of its own.

    The last token of a prompt is left as the slot's anchor: the next cycle of AR decoding says what comes first.

    Args:
        model: see `DualViewModel`.
        longest: most tokens of a prompt.
        width: prompts of a pass; where there are fewer, the last one stands in for the others.
    """

    def __init__(self, model: DualViewModel, longest: int, width: int) -> None:
        self.model, self.longest = model, longest
        rows = -(-longest // ROW_QUANTUM) * ROW_QUANTUM
        self.width = max(1, min(width, GPU_CHUNK * 8 // rows))
        with torch.inference_mode(False):  # a run writes them outside it
            self.buffers = model.new_cache(self.width, rows, 1)

    def require_room(self, prompts: Sequence[torch.Tensor]) -> None:
        """Raise a ValueError if a prompt is longer than the buffers were made for."""
        if (most := max(map(len, prompts))) > self.longest:
            raise ValueError(f"prompts must have at most longest={self.longest} tokens, but one has {most}")

    @torch.no_grad()
    def __call__(
        self, slots: Sequence[int], prompts: Sequence[torch.Tensor], cache: SharedKVCache, state: DecodeState,
        max_new_tokens: int, impl: str,
    ) -> None:  # fmt: skip
        """Put prompts [L] int64 into `slots` of a run's buffers, with nothing committed yet.

        Raises:
            ValueError: a prompt is longer than the buffers were made for.
        """
        self.require_room(prompts)
        for first in range(0, len(slots), self.width):
            part = slice(first, first + self.width)
            self._fill(list(slots[part]), prompts[part], cache, state, max_new_tokens, impl)

    def _fill(
        self, slots: list[int], prompts: Sequence[torch.Tensor], cache: SharedKVCache, state: DecodeState,
        max_new_tokens: int, impl: str,
    ) -> None:  # fmt: skip
        buffers, device = self.buffers, cache.context_len.device
        lengths = [prompt.numel() for prompt in prompts]
        rows = -(-max(lengths) // ROW_QUANTUM) * ROW_QUANTUM
        ids = torch.zeros(self.width, rows, dtype=torch.int64)
        for n in range(self.width):
            prompt = prompts[min(n, len(prompts) - 1)]
            ids[n, : prompt.numel()] = prompt
        # [slot, length, last token], in one copy to the device
        notes = torch.tensor([slots, lengths, [int(prompt[-1]) for prompt in prompts]]).to(device)
        where, length, last = notes[0], notes[1].int(), notes[2]
        ids = ids.to(device)
        buffers.prompt_len.fill_(1)
        buffers.prompt_len[: len(slots)] = length
        view_pass = buffers.view_pass("ar", rows, impl=impl, linear_impl="library")
        run_view(self.model, ids, buffers, view_pass)
        kept = min(rows, cache.capacity)
        for filled, layer in zip(buffers.layers, cache.layers):
            layer.k[where, :, :kept] = filled.k[: len(slots), :, :kept]
            layer.v[where, :, :kept] = filled.v[: len(slots), :, :kept]
        cache.prompt_len[where], cache.context_len[where] = length, length - 1
        remembered = min(rows, state.prompt_ids.shape[1])
        state.prompt_ids[where, :remembered] = ids[: len(slots), :remembered]
        state.block[where, 0] = last
        state.output_len[where] = 0
        state.limit[where] = max_new_tokens
        state.accepted_histogram[where] = 0
        state.finished[where] = False
