"""Continuous batching: requests take free slots of one ragged run and leave them between cycles.
One thread owns the decoder; everybody else talks to it through `submit` and `cancel`."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from typing import NamedTuple

import torch

from orthrus_triton.modules import Choosing, ConsensusDecoder, DecodeRun
from orthrus_triton.modules.run_to_end import WHY_NO_TOKEN
from orthrus_triton.modules.sampling_params import SamplingRule
from orthrus_triton.modules.slot import Progress, Slot
from orthrus_triton.serving.apart import run_apart
from orthrus_triton.serving.logprobs import token_logprobs
from orthrus_triton.serving.placing import find_place
from orthrus_triton.serving.request import FinishReason, Request

logger = logging.getLogger(__name__)
EXIT_SECONDS = 10.0  # that the end of a program waits for a cycle


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


class _Entering(NamedTuple):
    """A request whose prompt is being read into its slot, and how many of its tokens the slot holds."""

    slot: int
    request: Request
    cached: int


class Scheduler:
    """Runs requests side by side on one decoder.

    Args:
        decoder: its buffers belong to the scheduler from now on.
        slots: sequences that decode at once.
        max_len: most tokens of prompt and output of one sequence.
        max_waiting: requests that may wait for a slot; one more is refused.
        sampling: "coupled" or "rejection".

    Attributes:
        running, waiting: sequences in slots, and requests without one.
        why_closed: why it takes no requests any more, as after the loss of a device; None while it does.
        requests: that were in a slot and left it, before their prompt was read among them.
        prompt_tokens, cached_tokens: of the prompts that were read, and how many of these a slot held already.
        tokens, cycles: of the same sequences; the first token of each, which no cycle gave, not counted. Tokens per
            cycle that fall are the first sign of a view that does not fit the model or the text.
    """

    def __init__(
        self, decoder: ConsensusDecoder, *, slots: int = 8, max_len: int = 4096, max_waiting: int = 64,
        sampling: SamplingRule = "coupled",
    ) -> None:  # fmt: skip
        for name, value in (("slots", slots), ("max_len", max_len), ("max_waiting", max_waiting)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, but got {value!r}")
        if sampling not in ("coupled", "rejection"):
            raise ValueError(f"sampling must be 'coupled' or 'rejection', but got {sampling!r}")
        self.decoder, self.max_len, self.max_waiting = decoder, max_len, max_waiting
        self._choosing = Choosing(sampled=True, rejection=sampling == "rejection", processed=True, hosted=True)
        self._slots: list[Request | None] = [None] * slots
        self._entering: _Entering | None = None
        self.requests = self.prompt_tokens = self.cached_tokens = self.tokens = self.cycles = 0
        self._waiting: deque[Request] = deque()
        self._wake = threading.Condition()
        self._closing, self._why_closed = False, "the server is closing"
        self._run = run_apart(self._open)
        self._thread = threading.Thread(target=self._work, name="orthrus-scheduler", daemon=True)
        self._thread.start()
        atexit.register(self._close_at_exit)

    @property
    def running(self) -> int:
        """Sequences in slots."""
        return sum(request is not None for request in self._slots)

    @property
    def waiting(self) -> int:
        """Requests without a slot yet."""
        return len(self._waiting)

    @property
    def most_at_once(self) -> int:
        """Requests that have room at the same time, in slots and waiting."""
        return len(self._slots) + self.max_waiting

    @property
    def why_closed(self) -> str | None:
        """Why it takes no requests any more; None while it does."""
        return self._why_closed if self._closing else None

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFullError: too many wait already.
            RuntimeError: it takes none any more; see `why_closed`.
            ValueError: it cannot ever run: prompt and max_new_tokens exceed max_len, or params are out of range.
        """
        length, vocab = request.prompt.numel(), self.decoder.model.vocab_size
        if length < 1 or request.prompt.dim() != 1:
            raise ValueError(f"prompt must be 1-D with at least one token, but got {tuple(request.prompt.shape)}")
        if request.prompt.is_floating_point() or request.prompt.dtype == torch.bool:
            raise ValueError(f"prompt must hold integers, but got {request.prompt.dtype}")
        low, high = int(request.prompt.min()), int(request.prompt.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"prompt must hold ids in 0..{vocab - 1}, but got {low if low < 0 else high}")
        if length >= self.max_len:
            raise ValueError(f"prompt must have at most {self.max_len - 1} tokens, but has {length}")
        if request.max_new_tokens < 1 or length + request.max_new_tokens > self.max_len:
            raise ValueError(
                f"max_tokens must be in 1..{self.max_len - length} with a prompt of {length} tokens and a context of "
                f"{self.max_len}, but got {request.max_new_tokens}"
            )
        self._choosing.require(request.params)
        request.params.require_vocab(vocab)
        with self._wake:
            if self._closing:
                raise RuntimeError(self._why_closed)
            # those who come at once enter one by one, though slots are free
            if len(self._waiting) >= self.max_waiting + self._slots.count(None):
                raise QueueFullError(f"{self.max_waiting} requests wait already")
            self._waiting.append(request)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Nobody wants this one any more: it leaves before the next cycle. Nothing more is delivered."""
        with self._wake:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)

    def close(self) -> None:
        """Stop the thread; requests in flight end with an error. Done when the program ends, if not before."""
        self._stop()

    def _close_at_exit(self) -> None:
        """Python aborts if the thread still computes while it ends; but one that hangs must not keep it from ending."""
        self._stop(EXIT_SECONDS)

    def _stop(self, seconds: float | None = None) -> None:
        atexit.unregister(self._close_at_exit)
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(seconds)

    def _open(self) -> DecodeRun:
        run = self.decoder.open(len(self._slots), self.max_len, choosing=self._choosing)
        run.prepare()
        return run

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._waiting or self.running):
                    self._wake.wait()
                if self._closing:
                    break
            try:
                self._cycle()
            except Exception as error:  # whatever a kernel or driver throws: the next requests get a new run
                self._end_all(f"{type(error).__name__}: {error}")
                self._reopen()
        self._end_all(self._why_closed)

    def _reopen(self) -> None:
        """A new run after an error. Where even that fails, a device is lost: say so to whoever waits or comes."""
        try:
            self._run = self._open()
        except Exception as error:
            with self._wake:
                self._closing = True
                self._why_closed = f"the model cannot run any more: {type(error).__name__}: {error}"

    def _cycle(self) -> None:
        for b, request in enumerate(self._slots):
            if request is not None and request.cancelled:
                self._run.release(b)
                self._leave(b)
        self._let_in()
        for part in self._run.advance():
            request = self._slots[part.slot]
            if request is not None:
                self._hand_out(part, request)

    def _let_in(self) -> None:
        """One request at a time and, of a long prompt, one chunk: nobody waits longer between two cycles."""
        if self._entering is None:
            self._place_next()
        if self._entering is None:
            return
        b, request = self._entering.slot, self._entering.request
        try:
            on_logits = request.prompt_logprobs
            cached = self._run.prefill_ahead(b, request.prompt, self._entering.cached, on_logits)
            if cached > self._entering.cached:
                self._entering = self._entering._replace(cached=cached)
                return
            self._run.admit(b, request.prompt, request.max_new_tokens, request.params, cached, on_logits=on_logits)
        except ValueError as error:  # about this request alone
            self._run.release(b)
            self._leave(b)
            request.hand_over([], "error", str(error))
        self._entering = None

    def _place_next(self) -> None:
        """Give the request that has waited longest a free slot, with what any slot holds of its prompt's beginning."""
        free = [b for b, request in enumerate(self._slots) if request is None]
        with self._wake:
            if not free or not self._waiting:
                return
            request = self._waiting.popleft()
            place = find_place(self._run, free, request.prompt)
            if request.prompt_logprobs is not None:  # which its reading gives
                place = place._replace(source=place.slot, cached=0)
            self._slots[place.slot] = request
        request.cached = place.cached
        self._entering = _Entering(place.slot, request, place.cached)
        if place.source != place.slot:
            self._run.copy_prefix(place.source, place.slot, request.prompt)

    def _hand_out(self, part: Progress, request: Request) -> None:
        tokens, slot = part.tokens, self._run.slots[part.slot]
        reason, error = self._ending(slot) if part.finished else (None, "")
        try:
            count = request.tokens_to_stop(slot.tokens, len(tokens))
        except Exception as failure:  # of a function that belongs to this request alone
            logger.exception("a stop function failed; its request ends")
            self._run.release(part.slot)
            reason, error = "error", f"stop: {type(failure).__name__}: {failure}"
        else:
            if count is not None:
                self._run.release(part.slot, keep=request.delivered + count)
                tokens, reason, error = tokens[:count], "stop", ""
        if tokens and request.alternatives is not None:
            try:
                logits = self._run.logits(part.slot, request.delivered, len(tokens))
                request.logprobs += token_logprobs(logits, tokens, request.alternatives)
            except Exception as failure:  # such as a lack of memory, which only this request needs
                logger.exception("log probabilities failed; their request ends")
                self._run.release(part.slot)
                tokens, reason, error = [], "error", f"logprobs: {type(failure).__name__}: {failure}"
        if reason is not None:
            self._leave(part.slot)
        request.delivered += len(tokens)
        if tokens or reason:
            request.hand_over(tokens, reason, error)

    def _leave(self, b: int) -> None:
        request, self._slots[b] = self._slots[b], None
        self.requests += 1
        if self._entering is not None and self._entering.slot == b:  # what the run's slot says is not about it yet
            self._entering = None
            return
        slot = self._run.slots[b]
        self.prompt_tokens += request.prompt.numel()
        self.cached_tokens += request.cached
        self.tokens += max(len(slot.tokens) - 1, 0)
        self.cycles += sum(slot.cycles.values())

    def _ending(self, slot: Slot) -> tuple[FinishReason, str]:
        """Why a sequence ended by itself, and what went wrong."""
        if slot.failed:
            return "error", WHY_NO_TOKEN
        at_eos = slot.tokens[-1] in self.decoder.model.eos_token_ids
        return ("length" if len(slot.tokens) >= slot.limit and not at_eos else "stop"), ""

    def _end_all(self, error: str) -> None:
        with self._wake:
            ended = [request for request in self._slots if request is not None]
            if self._closing:
                ended += self._waiting
                self._waiting.clear()
            for b, request in enumerate(self._slots):
                if request is not None:
                    self._leave(b)
        for request in ended:
            request.hand_over([], "error", error)
