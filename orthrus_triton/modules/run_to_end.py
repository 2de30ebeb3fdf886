"""A run driven to its end: prompts in, streaming and stopping on the way, sequences and what they cost out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from orthrus_triton.modules.decode_run import DecodeRun
from orthrus_triton.modules.decode_stats import DecodeOutput, DecodeStats
from orthrus_triton.modules.sampling_params import SamplingParams
from orthrus_triton.modules.slot import Progress

Stop = Callable[[int, list[int]], bool | dict[int, int]]
WHY_NO_TOKEN = "the model gave NaN or infinity, or its processors banned every token"


class NonFiniteLogitsError(ValueError):
    """There was no token to choose: NaN or infinity from the model, or NaN or -inf for every token from what processes
    its logits. `output` has what every sequence got; those in `failed` end before it."""

    def __init__(self, failed: list[int], output: DecodeOutput) -> None:
        lengths = [output.stats.sequence_tokens[b] for b in failed]
        super().__init__(
            f"logits must be finite, but {WHY_NO_TOKEN} in sequence(s) {failed} after {lengths} new tokens; the "
            "others are whole, see `output` of this error"
        )
        self.failed, self.output = failed, output

    def __reduce__(self) -> tuple:
        """Made anew from its two arguments, not from its text, where another process takes it over."""
        return type(self), (self.failed, self.output)


def run_to_end(
    run: DecodeRun, prompts: Sequence[torch.Tensor], max_new_tokens: int, params: Sequence[SamplingParams],
    clock: Callable[[], float], *, streamer: Any | None = None, stop: Stop | None = None, reuse_cache: bool = False,
) -> DecodeOutput:  # fmt: skip
    """Decode one prompt per slot. Arguments as in `ConsensusDecoder.generate`.

    Raises:
        NonFiniteLogitsError: after all sequences have ended, if any of them had to.
    """
    started = clock()
    first_with: dict[tuple[int, ...], int] = {}  # of several samples of one prompt
    for b, prompt in enumerate(prompts):
        if reuse_cache:
            run.admit(b, prompt, max_new_tokens, params[b], run.cached_prefix(b, prompt))
        else:
            first = first_with.setdefault(tuple(prompt.tolist()), b) if len(prompts) > 1 else b
            run.admit(b, prompt, max_new_tokens, params[b], like=None if first == b else first)
    watch = _Watch(run, stop, streamer)
    first = run.poll(lag=0)
    prefilled = clock()
    if streamer is not None:
        streamer.put(prompts[0][None].cpu())
    watch(first)
    while not run.done:
        watch(run.advance())
    finished = clock()
    if streamer is not None:
        streamer.end()
    tokens = [slot.tokens for slot in run.slots]
    stats = DecodeStats.measure(
        [len(ids) for ids in tokens], [dict(slot.cycles) for slot in run.slots], run.state.accepted_histogram.tolist(),
        prefilled - started, finished - prefilled,
    )  # fmt: skip
    output = DecodeOutput([torch.cat((ids, ids.new_tensor(new))) for ids, new in zip(prompts, tokens)], stats)
    failed = [b for b, slot in enumerate(run.slots) if slot.failed]
    if failed:
        raise NonFiniteLogitsError(failed, output)
    return output


class _Watch:
    """Shows new tokens to `stop`, one after the other, and what it lets through to the streamer."""

    def __init__(self, run: DecodeRun, stop: Stop | None, streamer: Any | None) -> None:
        self.run, self.stop, self.streamer = run, stop, streamer
        self.shown: Counter[int] = Counter()  # tokens per slot; its host view may be several reports ahead
        self.stopped: set[int] = set()

    def __call__(self, progress: list[Progress]) -> None:
        for part in progress:
            if part.slot in self.stopped:
                continue
            tokens = part.tokens if self.stop is None else self._before_stop(part)
            if tokens and self.streamer is not None:
                self.streamer.put(torch.tensor(tokens))

    def _before_stop(self, part: Progress) -> list[int]:
        b, slot = part.slot, self.run.slots[part.slot]
        for count in range(1, len(part.tokens) + 1):
            self.shown[b] += 1
            ends = self.stop(b, slot.tokens[: self.shown[b]])
            self._release(ends if isinstance(ends, dict) else {b: self.shown[b]} if ends else {})
            if b in self.stopped:
                return part.tokens[:count]
        if slot.failed and hasattr(self.stop, "end"):
            self._release(self.stop.end(b, slot.tokens))
        return part.tokens

    def _release(self, ends: dict[int, int]) -> None:
        for b, keep in ends.items():
            self.run.release(b, keep=keep)
            self.stopped.add(b)
