"""DecodeRun: a batch of slots driven step by step. Sequences may join and leave between steps.
The host enqueues cycles and looks at what they did a step later, so that the device never waits for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from orthrus_triton.modules.adaptive_block import AR, BlockRule
from orthrus_triton.modules.cuda_graph import StepRunner, on_device
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.kv_cache import SharedKVCache
from orthrus_triton.modules.prompts import split_prompts, tokens_to_cache
from orthrus_triton.modules.report_ring import Report, ReportRing
from orthrus_triton.modules.sampling_params import GREEDY_PARAMS, Choosing, SamplingParams
from orthrus_triton.modules.slot import Progress, Slot
from orthrus_triton.ops import VOID
from orthrus_triton.ops._dispatch import require_size

if TYPE_CHECKING:
    from orthrus_triton.modules.batch_prefill import BatchPrefill
    from orthrus_triton.modules.consensus_decoder import ConsensusDecoder

AR_STEPS = 8  # passes per replay in AR mode: one pass is too short to hide the host's work behind


class _Work(NamedTuple):
    """Note on a report: its number, block size, cycles, and how many slots they ran over. A prefill, which commits one
    token, has 0 of the last three."""

    number: int
    size: int
    cycles: int
    width: int


def _device_work(method: Callable) -> Callable:
    """A method of `DecodeRun` that launches kernels: in its decoder's turn, without gradients, on the device of its
    buffers, and outside inference mode, as they were made."""

    @wraps(method)
    def there(run: DecodeRun, *arguments: Any, **options: Any) -> Any:
        device = run.cache.context_len.device
        with run._decoder.turn, torch.inference_mode(False), torch.no_grad(), on_device(device):
            return method(run, *arguments, **options)

    return there


class DecodeRun:
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
        self.cache, self.state, self.impl, self.lag = cache, state, impl, lag
        self.choosing = choosing
        self.slots = [Slot() for _ in range(cache.batch_size)]
        self._decoder, self._runner, self._rules = decoder, runner, rules
        self._started: dict[int, BlockRule] = {}  # by the number of slots: the time of a cycle depends on it
        self._ring = ReportRing(state.report, decoder.clock)
        self._posted = 0
        self.cycles_known = 0

    @property
    def done(self) -> bool:
        """Every slot is known to have finished."""
        return all(slot.finished for slot in self.slots)

    @_device_work
    def admit(
        self, b: int, prompt: torch.Tensor, max_new_tokens: int, params: SamplingParams = GREEDY_PARAMS,
        cached: int = 0,
    ) -> None:  # fmt: skip
        """Prefill `prompt` [L] int64 into free slot `b` and choose its first token; it takes part in every later step.

        `cached` of its first tokens are taken from the slot's cache as they are: see `cached_prefix`.

        Raises:
            ValueError: no such slot or it is taken, a prompt or a length that cannot be, too much for the cache, or
                `params` that the run is not open for.
        """
        (prompt,) = split_prompts([prompt], None, self._decoder.model.vocab_size)
        self._require_room(b, prompt, max_new_tokens)
        if not 0 <= cached < prompt.numel():
            raise ValueError(f"cached must be in 0..{prompt.numel() - 1}, but got {cached}")
        self._require_current()
        self.choosing.require(params)
        params.require_vocab(self._decoder.model.vocab_size)
        # failed until the prefill is through: a cache that was half written must not be taken for the prompt's
        self.slots[b] = Slot(prompt, max_new_tokens, finished=False, failed=True, born=self._posted)
        self._ring.begin()
        self._decoder.prefill(
            prompt, self.cache.sequences(b, 1), self.state.slots(b, 1), max_new_tokens, self.impl, params, cached
        )
        self.slots[b].failed = False
        self.state.write_report()
        self._post(0, 0, 0)

    @_device_work
    def admit_together(
        self, slots: Sequence[int], prompts: Sequence[torch.Tensor], max_new_tokens: int, prefill: BatchPrefill,
        params: Sequence[SamplingParams] | None = None,
    ) -> None:  # fmt: skip
        """As `admit` into several free slots, with few passes for all of them. A prompt's K/V may then differ in their
        last bits from what it would have alone, and so may a token where two are equally likely.

        Raises:
            ValueError: the run is open for processed logits, a slot is named twice, does not exist or is taken, not
                one prompt for each, a prompt or a length that cannot be, or `params` that the run is not open for.
        """
        if self.choosing.processed or self.choosing.hosted:  # what processes the slots' last sequences would go on
            raise ValueError(
                f"admit_together is for runs that do not process logits, but this one is open for {self.choosing}"
            )
        if len(set(slots)) != len(slots):
            raise ValueError(f"slots must each be named once, but got {list(slots)}")
        params = [GREEDY_PARAMS] * len(slots) if params is None else params
        if not len(slots) == len(prompts) == len(params):
            got = f"{len(prompts)} and {len(params)}"
            raise ValueError(f"prompts and params must be one for each of {len(slots)} slots, but got {got}")
        prompts = split_prompts(prompts, None, self._decoder.model.vocab_size)
        for b, prompt, of_slot in zip(slots, prompts, params):
            self._require_room(b, prompt, max_new_tokens)
            self.choosing.require(of_slot)
        prefill.require_room(prompts)
        self._require_current()
        for b, prompt in zip(slots, prompts):  # failed until the pass is through, as in `admit`
            self.slots[b] = Slot(prompt, max_new_tokens, finished=False, failed=True, born=self._posted)
        if self.choosing.sampled:
            self.state.sampling.start_together(slots, params)
        prefill(slots, prompts, self.cache, self.state, max_new_tokens, self.impl)
        for b in slots:
            self.slots[b].failed = False

    def cached_prefix(self, b: int, prompt: torch.Tensor) -> int:
        """How many of `prompt`'s first tokens have their K/V in slot `b`: at most all but the last."""
        slot, static_len = self.slots[b], getattr(self._decoder.model, "static_rope_len", None)
        if static_len is not None and slot.prompt is not None and max(len(slot.prompt), len(prompt)) > static_len:
            return 0
        length = 0
        for held, token in zip(slot.cached, prompt[:-1].tolist()):
            if held != token:
                break
            length += 1
        return length

    @_device_work
    def release(self, b: int, keep: int | None = None) -> None:
        """Stop slot `b` now and free it for another sequence. What it generated stays in `slots[b].tokens`; with `keep`
        the first `keep` tokens do, as if what came behind them, be it a failure, had never been decoded. A ValueError
        if there is no such slot."""
        self._require_slot(b)
        self._require_current()
        slot = self.slots[b]
        if keep is not None:
            del slot.tokens[keep:]
            slot.failed = False
        slot.finished = True
        self.state.finished[b : b + 1].fill_(True)

    @_device_work
    def step(self) -> bool:
        """Enqueue the next cycle (in AR several). False, and nothing enqueued, if what is in flight will do."""
        self._require_current()
        missing = self._missing_tokens()
        if missing <= 0:
            return False
        first, width = self._live_slots()
        size = self._rule(width).next_size()
        cycles = AR_STEPS if size == AR and self._runner.captures_steps and missing >= AR_STEPS else 1
        key, work = self._key(size, cycles), self._work(size, cycles, first, width)
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

    @_device_work
    def prepare(self) -> None:
        """Capture a graph for every block size the rule may ask for, the largest first. Without graphs, nothing."""
        for size in sorted(self._rule(len(self.slots)).sizes, reverse=True):
            for cycles in (AR_STEPS, 1) if size == AR else (1,):
                self._runner.prepare(self._key(size, cycles), self._work(size, cycles, 0, len(self.slots)))

    def _rule(self, width: int) -> BlockRule:
        if width not in self._started:
            self._started[width] = self._rules(width)
            self._started[width].start()
        return self._started[width]

    def _live_slots(self) -> tuple[int, int]:
        """The first slot of the next step, and how many: where that may change, from the first to the last unfinished
        one, for on a CPU the rows of the others take time, too."""
        if self._decoder.needs_all_slots:
            return 0, len(self.slots)
        live = [b for b, slot in enumerate(self.slots) if not slot.finished]
        return live[0], live[-1] + 1 - live[0]

    def _key(self, size: int, cycles: int) -> tuple:
        return (size, cycles, self.choosing)

    def _work(self, size: int, cycles: int, first: int, width: int) -> Callable[[], None]:
        cache, state = self.cache, self.state
        if width < len(self.slots):
            cache, state = cache.sequences(first, width), state.slots(first, width)

        def work() -> None:
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

    def _post(self, size: int, cycles: int, width: int) -> None:
        self._ring.post(self.state.report, _Work(self._posted, size, cycles, width))
        self._posted += 1

    def _absorb(self, report: Report) -> list[Progress]:
        work: _Work = report.note
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

    def _require_slot(self, b: int) -> None:
        if b not in range(len(self.slots)):
            raise ValueError(f"a slot must be in 0..{len(self.slots) - 1}, but got {b!r}")

    def _require_room(self, b: int, prompt: torch.Tensor, max_new_tokens: int) -> None:
        """Raise a ValueError unless there is a slot `b`, it is free, and this sequence fits."""
        self._require_slot(b)
        if not self.slots[b].finished:
            raise ValueError(f"slot {b} must be free, but its sequence has not finished: release it first")
        require_size("max_new_tokens", max_new_tokens)
        needed = tokens_to_cache(prompt.numel(), max_new_tokens)
        if needed > self.cache.capacity:
            raise ValueError(f"prompt + max_new_tokens - 1 must be at most {self.cache.capacity}, but is {needed}")

    def _require_current(self) -> None:
        if self._decoder.run is not self:
            raise RuntimeError("this run's buffers belong to a newer run of the same decoder: finish one run at a time")
