"""Sequences that join and leave a run, with sampling, penalties, host processors and stops in the middle of a block:
each gets the text of an unbatched AR oracle, whatever its neighbours do and however late the host looks."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.decode_run import DecodeRun
from orthrus_triton.modules.sampling_params import Choosing
from tests.modules.ledger_model import LedgerModel, oracle
from tests.modules.test_generate_fuzz import VOCAB, random_params

SLOTS, CAPACITY, EOS = 3, 64, [3]


@dataclass
class Seat:
    """A sequence: what it asks for, what it is to get, and how many of its tokens were looked at.

    last: it stops after this token, as after a stop string; None: it does not.
    """

    prompt: list[int]
    limit: int
    params: SamplingParams
    expected: list[int]
    last: int | None = None
    shown: int = 0
    cut: bool = False


def draw(rng: random.Random, model: LedgerModel, number: int, held: list[int], hosts: bool) -> Seat:
    """A sequence; now and then one that goes on from what its slot holds, or that must stop before its end."""
    prompt = rng.choices(range(VOCAB), k=rng.randint(1, 30))
    if held and rng.random() < 0.3:
        prompt = [*held[:30], rng.randrange(VOCAB)]
    limit, params = rng.randint(1, 25), random_params(rng, number, hosted=hosts and rng.random() < 0.35)
    seat = Seat(prompt, limit, params, oracle(model, prompt, limit, params, EOS))
    if rng.random() < 0.5:
        seat.last = rng.choice(seat.expected)
        seat.expected = seat.expected[: seat.expected.index(seat.last) + 1]
    return seat


def stop_in_time(run: DecodeRun, b: int, seat: Seat) -> int:
    """Release a slot at its stop token, as a server does; how many tokens were known beyond it, -1 without one."""
    tokens = list(run.slots[b].tokens)
    for count in range(seat.shown + 1, len(tokens) + 1):
        if tokens[count - 1] == seat.last:
            run.release(b, keep=count)
            return len(tokens) - count
    seat.shown = len(tokens)
    return -1


@pytest.mark.parametrize(
    ("mode", "lag", "hosts", "anchor_rows"),
    [
        ("consensus", 0, False, 0), ("ar", 0, False, 0), ("consensus", 0, True, 0), ("consensus", 2, True, 0),
        ("ar", 0, True, 0), ("consensus", 0, False, 1), ("consensus", 2, True, 1),
    ],
)  # fmt: skip
def test_sequences_join_and_leave(
    mode: str, lag: int, hosts: bool, anchor_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Sixty over three slots, some released at random: what they got until then is right, too."""
    rng, model = random.Random(1), LedgerModel(VOCAB, anchor_rows=anchor_rows)
    decoder = ConsensusDecoder(model, impl="torch", mode=mode)
    choosing = Choosing(sampled=True, processed=True, hosted=hosts)
    run = decoder.open(SLOTS, CAPACITY, eos_token_id=EOS, choosing=choosing)
    run.lag = lag
    if lag:  # as on a GPU, where every step is of all slots; else it is of those that have not finished
        monkeypatch.setattr(ConsensusDecoder, "needs_all_slots", True)
    seated: dict[int, Seat] = {}
    seen = {"hosted": 0, "processed": 0, "stopped": 0, "stopped inside a block": 0, "cut": 0, "cached": 0}
    started = finished = 0
    while finished < 60:
        for b in range(SLOTS):
            if b not in seated and started < 60 and rng.random() < 0.8:
                seat = seated[b] = draw(rng, model, started, run.slots[b].cached.tolist(), hosts)
                started += 1
                prompt = torch.tensor(seat.prompt)
                cached = run.cached_prefix(b, prompt)
                run.admit(b, prompt, seat.limit, seat.params, cached)
                seen["hosted"] += seat.params.logits_processor is not None
                seen["processed"] += seat.params.is_processed
                seen["cached"] += cached > 4
        run.advance()
        for b, seat in list(seated.items()):
            beyond = -1 if seat.last is None else stop_in_time(run, b, seat)
            if beyond >= 0:
                seen["stopped"] += 1
                seen["stopped inside a block"] += beyond > 0
            elif not run.slots[b].finished and rng.random() < 0.15:
                run.release(b)
                seat.cut = True
                seen["cut"] += 1
            if run.slots[b].finished:
                got = run.slots[b].tokens
                assert got == (seat.expected[: len(got)] if seat.cut else seat.expected), (seat, got)
                del seated[b]
                finished += 1
    assert (seen.pop("hosted") > 10) == hosts
    if mode == "ar":
        del seen["stopped inside a block"]  # one token at a time
    assert min(seen.values()) > 2, seen
