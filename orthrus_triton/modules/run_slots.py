"""RunSlots: the slots of a run: who enters and leaves, and what of a prompt their caches hold already.
How the sequences in them go on, `DecodeRun` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from orthrus_triton.modules.batch_prefill import BatchPrefill
from orthrus_triton.modules.cuda_graph import on_device
from orthrus_triton.modules.decode_cycle import OnLogits
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.kv_cache import SharedKVCache
from orthrus_triton.modules.prompts import split_prompts, tokens_to_cache
from orthrus_triton.modules.report_ring import ReportRing
from orthrus_triton.modules.reread import reread_logits
from orthrus_triton.modules.sampling_params import GREEDY_PARAMS, Choosing, SamplingParams
from orthrus_triton.modules.slot import Slot
from orthrus_triton.ops._dispatch import require_size

if TYPE_CHECKING:
    from orthrus_triton.modules.consensus_decoder import ConsensusDecoder


class Work(NamedTuple):
    """Note on a report: its number, block size, cycles, and how many slots they ran over. A prefill, which commits one
    token, has 0 of the last three."""

    number: int
    size: int
    cycles: int
    width: int


def device_work(method: Callable) -> Callable:
    """A method of a run that launches kernels: in its decoder's turn, without gradients and autocast, on the device of
    its buffers, and outside inference mode, as they were made."""

    @wraps(method)
    def there(run: RunSlots, *arguments: Any, **options: Any) -> Any:
        device = run.cache.context_len.device
        with run._decoder.turn, torch.inference_mode(False), torch.no_grad(), on_device(device):
            return method(run, *arguments, **options)

    return there


class RunSlots:
    """B slots over static buffers. One that is finished, released or was never admitted is free.

    Attributes:
        slots: host view of each sequence.
    """

    def __init__(
        self, decoder: ConsensusDecoder, cache: SharedKVCache, state: DecodeState, impl: str, choosing: Choosing
    ) -> None:
        self.cache, self.state, self.impl, self.choosing = cache, state, impl, choosing
        self.slots = [Slot() for _ in range(cache.batch_size)]
        self._decoder = decoder
        self._ring = ReportRing(state.report, decoder.clock)
        self._posted = 0

    @device_work
    def admit(
        self, b: int, prompt: torch.Tensor, max_new_tokens: int, params: SamplingParams = GREEDY_PARAMS,
        cached: int = 0, like: int | None = None, on_logits: OnLogits | None = None,
    ) -> None:  # fmt: skip
        """Prefill `prompt` [L] int64 into free slot `b` and choose its first token; it takes part in every later step.

        `cached` of its first tokens are taken from the slot's cache as they are: see `cached_prefix`. Where slot `like`
        was admitted with this prompt, all is copied from there instead of being computed again: the same bits, and
        none are `cached`.

        `on_logits` is called with [n, V] fp32, what the next n tokens of the prompt that are read say of the one behind
        each, until all have been; a ValueError that it raises is raised here, and leaves the slot to be released.

        Raises:
            ValueError: no such slot or it is taken, a prompt or a length that cannot be, too much for the cache, or
                `params` that the run is not open for; slot `like` has another prompt.
            RuntimeError: a newer run has the buffers; this holds of every method.
        """
        prompt = self._checked(b, prompt, max_new_tokens, cached)
        if like is not None and cached:
            raise ValueError(f"cached must be 0 with like={like}, but got {cached}")
        hidden = None if like is None else self._hidden_of(like, prompt)
        self.choosing.require(params)
        params.require_vocab(self._decoder.model.vocab_size)
        # failed until the prefill is through: a cache that was half written must not be taken for the prompt's
        self.slots[b] = self._entering(prompt, max_new_tokens, params)
        self._ring.begin()
        self._decoder.choosing = self.choosing  # the last step's may be less
        if hidden is not None:
            self.cache.copy_sequence(like, b, prompt.numel())
        self.slots[b].prompt_hidden = self._decoder.prefill(
            prompt, self.cache.sequences(b, 1), self.state.slots(b, 1), max_new_tokens, self.impl, params, cached,
            hidden, on_logits,
        )  # fmt: skip
        self.slots[b].failed = False
        self.state.write_report()
        self._post(0, 0, 0)

    @device_work
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
        for b, prompt, of_slot in zip(slots, prompts, params):  # failed until the pass is through, as in `admit`
            self.slots[b] = self._entering(prompt, max_new_tokens, of_slot)
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
        return slot.holds_beginning_of(prompt)

    @device_work
    def copy_prefix(self, source: int, b: int, prompt: torch.Tensor) -> None:
        """Give free slot `b` what `source`, live or not, has cached of `prompt`'s beginning, instead of what `b` had.

        Raises:
            ValueError: no such slot, the same one twice, or `b` is taken.
        """
        self._require_slot(source)
        self._require_free(b)
        if source == b:
            raise ValueError(f"source must be another slot than b, but both are {b}")
        self._require_current()
        tokens = self.cached_prefix(source, prompt)
        self.slots[b] = Slot(born=self._posted)  # a copy that fails leaves rows of both
        self.cache.copy_sequence(source, b, tokens)
        self.slots[b] = Slot(prompt[: tokens + 1].clone(), born=self._posted)

    @device_work
    def prefill_ahead(self, b: int, prompt: torch.Tensor, cached: int, on_logits: OnLogits | None = None) -> int:
        """Prefill the next chunk of `prompt` [L] int64 into free slot `b`, which holds its first `cached` tokens -> how
        many it holds then. Steps of other slots may run before the next chunk; no more than one chunk is left to
        `admit`, and until then the slot counts as holding nothing. `on_logits` as in `admit`.

        Raises:
            ValueError: no such slot or it is taken, a prompt that cannot be, or too much for the cache.
        """
        prompt = self._checked(b, prompt, 1, cached)
        self.slots[b] = Slot(prompt, failed=True, born=self._posted)
        return self._decoder.prefill_ahead(prompt, self.cache.sequences(b, 1), self.impl, cached, on_logits)

    @device_work
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

    @device_work
    def logits(self, b: int, first: int = 0, count: int | None = None) -> torch.Tensor:
        """[count, V] fp32: the frozen view's logits that tokens `first`, `first` + 1, ... of slot `b` were chosen from,
        by default all that are known, before penalties or temperature. They are computed now, in passes of many rows,
        and have the bits that they had then, as long as the weights have theirs.

        Raises:
            ValueError: no such slot, or tokens that it does not have.
            RuntimeError: a newer run has the buffers, the slot's prompt was read together with others, or its tokens
                were chosen with exact=False, by products that cannot be had again.
        """
        self._require_slot(b)
        self._require_current()
        slot = self.slots[b]
        if self._decoder.mode == "ar" and not self._decoder.exact and self.impl != "triton":
            raise RuntimeError("logits of tokens that were chosen with exact=False cannot be had again")
        if not all(type(number) is int for number in (first, count) if number is not None):
            raise ValueError(f"first and count must be integers, but got {first!r} and {count!r}")
        count = len(slot.tokens) - first if count is None else count
        if first < 0 or count < 0 or first + count > len(slot.tokens):
            raise ValueError(f"first and count must lie in {len(slot.tokens)} tokens, but got {first} and {count}")
        if slot.prompt_hidden is None:
            raise RuntimeError(
                f"slot {b} has nothing to begin with: its prompt was read together with others, or none was"
            )
        rows = [*reread_logits(
            self._decoder.model, slot.tokens, slot.prompt.numel(), slot.prompt_hidden, self.cache.sequences(b, 1),
            self.impl, first, count,
        )]  # fmt: skip
        return torch.cat(rows) if rows else slot.prompt_hidden.new_empty(0, self._decoder.model.vocab_size).float()

    def width_with(self, b: int) -> int:
        """How many slots a step is of once slot `b` is live, too."""
        return self._span([b, *(n for n, slot in enumerate(self.slots) if not slot.finished)])[1]

    def _span(self, live: Iterable[int]) -> tuple[int, int]:
        """The first slot of a step with these live, and how many it is of: where that may change, from the first to the
        last of them, for on a CPU the rows of the others take time, too."""
        if self._decoder.needs_all_slots:
            return 0, len(self.slots)
        live = sorted(live)
        return live[0], live[-1] + 1 - live[0]

    def _post(self, size: int, cycles: int, width: int) -> None:
        self._ring.post(self.state.report, Work(self._posted, size, cycles, width))
        self._posted += 1

    def _entering(self, prompt: torch.Tensor, max_new_tokens: int, params: SamplingParams) -> Slot:
        greedy = params.temperature == 0
        return Slot(prompt, max_new_tokens, finished=False, failed=True, greedy=greedy, born=self._posted)

    def _hidden_of(self, source: int, prompt: torch.Tensor) -> torch.Tensor:
        """The hidden state by which slot `source` chose its first token after this prompt."""
        self._require_slot(source)
        slot = self.slots[source]
        if slot.prompt_hidden is None or not torch.equal(slot.prompt.cpu(), prompt.cpu()):
            raise ValueError(f"like must be a slot that was admitted with this prompt, but slot {source} was not")
        return slot.prompt_hidden

    def _require_slot(self, b: int) -> None:
        if isinstance(b, bool) or not isinstance(b, Integral) or not 0 <= b < len(self.slots):
            raise ValueError(f"a slot must be in 0..{len(self.slots) - 1}, but got {b!r}")

    def _require_free(self, b: int) -> None:
        self._require_slot(b)
        if not self.slots[b].finished:
            raise ValueError(f"slot {b} must be free, but its sequence has not finished: release it first")

    def _checked(self, b: int, prompt: torch.Tensor, max_new_tokens: int, cached: int) -> torch.Tensor:
        """The prompt [L] int64, if it may enter slot `b`."""
        (prompt,) = split_prompts([prompt], None, self._decoder.model.vocab_size)
        self._require_room(b, prompt, max_new_tokens)
        if not 0 <= cached < prompt.numel():
            raise ValueError(f"cached must be in 0..{prompt.numel() - 1}, but got {cached}")
        self._require_current()
        return prompt

    def _require_room(self, b: int, prompt: torch.Tensor, max_new_tokens: int) -> None:
        """Raise a ValueError unless there is a slot `b`, it is free, and this sequence fits."""
        self._require_free(b)
        require_size("max_new_tokens", max_new_tokens)
        needed = tokens_to_cache(prompt.numel(), max_new_tokens)
        if needed > self.cache.capacity:
            raise ValueError(f"prompt + max_new_tokens - 1 must be at most {self.cache.capacity}, but is {needed}")

    def _require_current(self) -> None:
        if self._decoder.run is not self:
            raise RuntimeError("this run's buffers belong to a newer run of the same decoder: finish one run at a time")
