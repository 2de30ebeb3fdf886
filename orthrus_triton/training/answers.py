"""Many prompts answered side by side: a slot takes the next one as soon as its answer ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.batch_prefill import BatchPrefill
from orthrus_triton.modules.sampling_params import Choosing, SamplingParams


def answer_all(
    decoder: ConsensusDecoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    slots: int,
    *,
    prefill_batch: int | None = None,
    params_of: Callable[[int], SamplingParams] | None = None,
    stop_ids: list[int] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(number of the prompt, its answer), in the order in which answers end.

    Args:
        decoder: in AR mode.
        prompts: token ids of each.
        max_new_tokens: most tokens of an answer, the stop token included.
        slots: answers written side by side.
        prefill_batch: free slots are waited for until there are so many, and their prompts read in one pass; by default
            1 on a CPU, and on a GPU a quarter of the slots.
        params_of: how each answer is sampled, by number of its prompt; greedily where None.
        stop_ids: tokens that end an answer, by default the model's own.

    Raises:
        ValueError: the model gave NaN or infinity.
    """
    if not prompts:
        return
    if prefill_batch is None:
        prefill_batch = slots // 4 if decoder.model.device.type == "cuda" else 1
    longest = max(map(len, prompts))
    choosing = Choosing(sampled=params_of is not None)
    max_len = longest + max_new_tokens - 1
    run = decoder.open(min(slots, len(prompts)), max_len, eos_token_id=stop_ids, choosing=choosing)
    prefill_batch = min(prefill_batch, len(run.slots))  # a pass has its full width, whatever it reads
    prefill = BatchPrefill(decoder.model, longest, prefill_batch) if prefill_batch > 1 else None
    waiting, free, occupant = deque(range(len(prompts))), list(range(len(run.slots))), {}
    while waiting or occupant:
        if waiting and (len(free) >= prefill_batch or not occupant or len(waiting) <= len(free)):
            count = min(len(free), len(waiting))
            taken, free = free[:count], free[count:]
            occupant |= {slot: waiting.popleft() for slot in taken}
            ids = [torch.tensor(prompts[occupant[slot]]) for slot in taken]
            params = [SamplingParams() if params_of is None else params_of(occupant[slot]) for slot in taken]
            if prefill is not None:
                run.admit_together(taken, ids, max_new_tokens, prefill, params)
            else:
                for slot, prompt, of_slot in zip(taken, ids, params):
                    run.admit(slot, prompt, max_new_tokens, of_slot, run.cached_prefix(slot, prompt))
        for progress in run.advance():
            if progress.finished:
                n, slot = occupant.pop(progress.slot), run.slots[progress.slot]
                if slot.failed:
                    raise ValueError(f"model must give finite logits, but gave NaN or infinity for prompt {n}")
                free.append(progress.slot)
                yield n, list(slot.tokens)
