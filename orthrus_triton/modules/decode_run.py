"""DecodeRun: a batch of slots driven step by step. Sequences may join and leave between steps.
The host enqueues cycles and looks at what they did a step later, so that the device never waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from orthrus_triton.modules.adaptive_block import AR, BlockRule
from orthrus_triton.modules.cuda_graph import StepRunner
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.kv_cache import SharedKVCache
from orthrus_triton.modules.report_ring import Report
from orthrus_triton.modules.run_slots import RunSlots, Work, device_work
from orthrus_triton.modules.sampling_params import Choosing
from orthrus_triton.modules.slot import Progress
from orthrus_triton.ops import VOID

if TYPE_CHECKING:
    from orthrus_triton.modules.consensus_decoder import ConsensusDecoder

AR_STEPS = 8  # passes per replay in AR mode: one pass is too short to hide the host's work behind


class DecodeRun(RunSlots):
    """B slots over static buffers; made by `ConsensusDecoder.open`.

    Drive it with `admit`, then `step` and `poll` (or `advance`, which does both) until `done`. A step never waits for
    the device; `poll` waits for steps that are at least `lag` steps old. Slots that are finished, released or were
    never admitted are exact no-ops in every step.

    Attributes:
        slots: host view of each sequence.
        cycles_known: cycles whose outcome the host has seen, over all steps.
        lag: steps the host stays behind: 1 on a GPU, so that the next step is enqueued before the last one is looked
            at; 0 on a CPU, where work is done when the call returns.
    """

    def __init__(
        self, decoder: ConsensusDecoder, cache: SharedKVCache, state: DecodeState, runner: StepRunner,
        rules: Callable[[int], BlockRule], impl: str, lag: int, choosing: Choosing,
    ) -> None:  # fmt: skip
        super().__init__(decoder, cache, state, impl, choosing)
        self.lag = lag
        self._runner, self._rules = runner, rules
        self._started: dict[int, BlockRule] = {}  # by the number of slots: the time of a cycle depends on it
        self.cycles_known = 0

    @property
    def done(self) -> bool:
        """Every slot is known to have finished."""
        return all(slot.finished for slot in self.slots)

    @device_work
    def step(self) -> bool:
        """Enqueue the next cycle (in AR several). False, and nothing enqueued, if what is in flight will do."""
        self._require_current()
        missing = self._missing_tokens()
        if missing <= 0:
            return False
        first, width = self._span(b for b, slot in enumerate(self.slots) if not slot.finished)
        size, choosing = self._rule(width).next_size(), self._choosing_now()
        cycles = AR_STEPS if size == AR and self._runner.captures_steps and missing >= AR_STEPS else 1
        key, work = (size, cycles, choosing), self._work(size, cycles, first, width, choosing)
        if choosing.hosted:  # what runs on the host cannot be captured
            self._ring.begin()
            work()
        else:
            self._runner.prepare(key, work)
            self._ring.begin()
            self._runner.run(key, work)
        self._post(size, cycles, width)
        return True

    def poll(self, lag: int | None = None) -> list[Progress]:
        """What steps at least `lag` steps old (by default the run's `lag`) brought; waits for them."""
        progress = []
        while len(self._ring) > (self.lag if lag is None else lag):
            progress += self._absorb(self._ring.take())
        return progress

    def advance(self) -> list[Progress]:
        """One step and a look at the one before it."""
        return self.poll() if self.step() else self.poll(lag=0)

    @device_work
    def prepare(self) -> None:
        """Capture a graph for every block size the rule may ask for, the largest first. Without graphs, nothing."""
        choosing = self._choosing_now()
        if choosing.hosted:
            return
        choosing = choosing._replace(rejection=self.choosing.rejection)  # no sequence is there yet that says otherwise
        for size in sorted(self._rule(len(self.slots)).sizes, reverse=True):
            for cycles in (AR_STEPS, 1) if size == AR else (1,):
                work = self._work(size, cycles, 0, len(self.slots), choosing)
                self._runner.prepare((size, cycles, choosing), work)

    def _rule(self, width: int) -> BlockRule:
        if width not in self._started:
            self._started[width] = self._rules(width)
            self._started[width].start()
        return self._started[width]

    def _choosing_now(self) -> Choosing:
        """What the next step has to do: functions on the host only while a sequence has one. Where logits are not made
        for another reason, though, they are made for these, in every step: a fused choice may round otherwise."""
        choosing = self.choosing
        if choosing.rejection and all(slot.greedy for slot in self.slots if not slot.finished):
            choosing = choosing._replace(rejection=False)  # the same tokens, and drafts that know of each other
        if not choosing.hosted or not (choosing.sampled or choosing.processed):
            return choosing
        hosts = self.state.sampling.hosts
        return choosing._replace(hosted=any(b in hosts and not slot.finished for b, slot in enumerate(self.slots)))

    def _work(self, size: int, cycles: int, first: int, width: int, choosing: Choosing) -> Callable[[], None]:
        cache, state = self.cache, self.state
        if width < len(self.slots):
            cache, state = cache.sequences(first, width), state.slots(first, width)

        def work() -> None:
            self._decoder.choosing = choosing
            for _ in range(cycles):
                self._decoder.run_cycle(cache, state, size, self.impl)
            self.state.write_report()

        return work

    def _missing_tokens(self) -> int:
        """Cycles that may still be needed: most tokens missing, less one for each cycle in flight."""
        missing = 0
        for slot in self.slots:
            if not slot.finished:
                flying = sum(
                    note.cycles or note.number == slot.born for note in self._ring.notes if note.number >= slot.born
                )
                missing = max(missing, slot.limit - len(slot.tokens) - flying)
        return missing

    def _absorb(self, report: Report) -> list[Progress]:
        work: Work = report.note
        progress, accepted = [], []
        self.cycles_known += work.cycles
        for b, (slot, (length, finished, *newest)) in enumerate(zip(self.slots, report.rows)):
            if slot.finished or work.number < slot.born:
                continue
            new = length - len(slot.tokens)
            tokens = newest[len(newest) - new :]
            slot.finished = bool(finished)
            slot.failed = slot.finished and tokens[-1:] == [VOID]
            if slot.failed:
                tokens.pop()
            slot.tokens += tokens
            if work.size:
                # a cycle of AR commits one token, so a replay that ended early ran as many cycles as it gave tokens
                slot.cycles[work.size] += new if work.size == AR else 1
                if not finished:
                    # besides drafts: the bonus token, and what the frozen view says while drafting
                    accepted.append(new - 1 - self._decoder.anchor_rows if work.size != AR else 0)
            if tokens or finished:
                progress.append(Progress(b, tokens, slot.finished))
        if work.size:
            self._rule(work.width).observe(work.size, report.seconds / work.cycles, accepted)
        return progress
