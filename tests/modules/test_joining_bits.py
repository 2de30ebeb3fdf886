"""A run over a real Transformer, driven in random order: sequences join chunk by chunk, go on from what any slot holds,
and leave in the middle of a block. Each has the text and the committed K/V, bit for bit, of AR decoding alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SamplingParams, SharedKVCache
from orthrus_triton.modules.decode_run import DecodeRun
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.sampling_params import Choosing
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.test_generate_fuzz import random_params

VOCAB, SLOTS, EOS, ACTS = 17, 3, [3], 300


@dataclass
class Seat:
    """A sequence in a slot: its prompt, and of AR decoding alone its ids and K/V, [layers, 2, HKV, S, D]."""

    prompt: list[int]
    ids: list[int]
    kv: torch.Tensor


class HalfRight(ConsensusDecoder):
    """Most drafts are the AR text of the sequence in that slot, so that accepted lengths vary; some are random."""

    rng: random.Random
    seated: dict[int, Seat]

    def block_to_verify(
        self, block: torch.Tensor, drafted: torch.Tensor, hidden: torch.Tensor, cache: SharedKVCache,
        state: DecodeState, impl: str,
    ) -> torch.Tensor:  # fmt: skip
        candidate = super().block_to_verify(block, drafted, hidden, cache, state, impl).clone()
        first = cache.context_len.storage_offset()  # a step may be of some of the slots
        for b, context in enumerate(cache.context_len.tolist()):
            if first + b in self.seated:
                known = self.seated[first + b].ids[context + 1 :][: candidate.shape[1] - 1]
                for t, token in enumerate(known, 1):
                    candidate[b, t] = token if self.rng.random() < 0.8 else self.rng.randrange(VOCAB)
        return candidate


def kv_of(cache: SharedKVCache, b: int) -> torch.Tensor:
    return torch.stack([torch.stack((layer.k[b], layer.v[b])) for layer in cache.layers])


def draw(rng: random.Random, alone: ConsensusDecoder, number: int, held: list[int]) -> tuple[Seat, int, SamplingParams]:
    """A sequence, its limit and how it samples. Some go on from what the slot holds, or end within it."""
    prompt = rng.choices(range(VOCAB), k=rng.randint(1, 40))
    if len(held) > 1 and rng.random() < 0.5:
        prompt = held[: rng.randint(1, min(len(held), 60))] + rng.choices(range(VOCAB), k=rng.randint(0, 2))
    limit, params = rng.choice([1, 9, 20]), random_params(rng, number)
    alone_too = alone.generate([torch.tensor(prompt)], max_new_tokens=limit, eos_token_id=EOS, params=[params])
    return Seat(prompt, alone_too.sequences[0].tolist(), kv_of(alone.cache, 0)), limit, params


def check(run: DecodeRun, b: int, seat: Seat, whole: bool) -> None:
    tokens = run.slots[b].tokens
    known = len(seat.prompt) + len(tokens)
    assert tokens == seat.ids[len(seat.prompt) : known]
    assert not whole or known == len(seat.ids)
    if tokens:
        assert torch.equal(kv_of(run.cache, b)[..., : known - 1, :], seat.kv[..., : known - 1, :])


@pytest.mark.parametrize(
    ("dtype", "anchor_rows", "window", "lag"),
    [
        (torch.float32, 0, None, 0), (torch.bfloat16, 1, None, 2), (torch.bfloat16, 0, 7, 0), (torch.float16, 1, 7, 0)
    ],
)  # fmt: skip
def test_text_and_cache_are_those_of_ar_alone(
    dtype: torch.dtype, anchor_rows: int, window: int | None, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    torch.manual_seed(3)
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "intermediate_size": 32, "block_size": 6}
    heads = {"num_heads": 3, "num_kv_heads": 1, "head_dim": 16, "qk_norm": True, "window": window}
    model = TinyDualViewModel(anchor_rows=anchor_rows, **shape, **heads).to(dtype)
    options = {"impl": "torch", "batch_invariant_prefill": True, "prefill_chunk": 16}
    alone, decoder = ConsensusDecoder(model, mode="ar", **options), HalfRight(model, **options)
    rng = decoder.rng = random.Random(7)
    seated = decoder.seated = {}
    choosing = Choosing(sampled=True, processed=True)
    run = decoder.open(SLOTS, 128, eos_token_id=EOS, block_size=rng.choice([3, 6]), choosing=choosing)
    run.lag = lag
    if lag:  # as on a GPU, where every step is of all slots: those that a prompt is being read into take part
        monkeypatch.setattr(ConsensusDecoder, "needs_all_slots", True)
    entering: dict[int, tuple[Seat, int, SamplingParams, int]] = {}
    seen = Counter()
    acts = ["enter", "enter", "enter", "read on", "read on", "advance", "step", "poll", "release"]
    for number in range(ACTS):
        b, act = rng.randrange(SLOTS), rng.choice(acts)
        if act == "enter" and b not in seated and b not in entering:
            source = rng.randrange(SLOTS)
            drawn = draw(rng, alone, number, run.slots[source].cached.tolist())
            prompt = torch.tensor(drawn[0].prompt)
            if source != b:
                copied = run.cached_prefix(source, prompt)
                run.copy_prefix(source, b, prompt)
                assert run.cached_prefix(b, prompt) == copied
                seen["copied from a live slot"] += copied > 4 and source in seated
            entering[b] = *drawn, run.cached_prefix(b, prompt)
            seen["went on from a cache"] += run.cached_prefix(b, prompt) > 4
        elif act == "read on" and entering:
            b = rng.choice(list(entering))
            seat, limit, params, cached = entering[b]
            prompt = torch.tensor(seat.prompt)
            now = run.prefill_ahead(b, prompt, cached)
            seen["read ahead"] += now > cached
            if now > cached:
                entering[b] = seat, limit, params, now
            else:
                assert prompt.numel() - now <= 16
                del entering[b]
                seated[b] = seat
                run.admit(b, prompt, limit, params, now)
        elif act == "advance":
            run.advance()
        elif act == "step":
            run.step()
        elif act == "poll":
            run.poll(rng.choice([None, 0]))
        elif act == "release" and seated:
            b = rng.choice(list(seated))
            known = len(run.slots[b].tokens)
            run.release(b, keep=rng.randint(0, known // 2))
            seen["released before the last known token"] += len(run.slots[b].tokens) < known
            check(run, b, seated.pop(b), whole=False)
        for b, seat in list(seated.items()):
            check(run, b, seat, whole=run.slots[b].finished)
            if run.slots[b].finished:
                seen["finished"] += 1
                seen["accepted"] += int(run.state.accepted_histogram[b, 2:].sum())
                del seated[b]
    assert seen["went on from a cache"] and seen["released before the last known token"] and seen["finished"] > 4, seen
    assert seen["accepted"] > 2 and seen["copied from a live slot"] and seen["read ahead"] > 4, seen
