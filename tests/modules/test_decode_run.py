"""Driving a run step by step: late looks, steps nobody needed, sequences that join and leave."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.adaptive_block import AdaptiveBlock
from orthrus_triton.modules.report_ring import ReportRing
from orthrus_triton.modules.sampling_params import Choosing
from tests.modules.drafts import ScriptedDrafts
from tests.modules.ledger_model import LedgerModel
from tests.modules.test_consensus_decoder import MODELS, ar_answer, prompts_of

MODEL = MODELS["qk_norm"]
PROMPTS = prompts_of(21, [6, 3, 11, 5])
ANSWERS = [ar_answer(MODEL, prompt, 24) for prompt in PROMPTS]


def drain(run, heard: dict[int, list[int]] | None = None) -> dict[int, list[int]]:
    """Advance until every slot has finished; what was heard of each."""
    heard = heard if heard is not None else {b: [] for b in range(len(run.slots))}
    while not run.done:
        for slot, tokens, _ in run.advance():
            heard[slot] += tokens
    return heard


def frozen(run, b: int) -> list[torch.Tensor]:
    """Everything that must stand still in slot b: its state, and the K/V of its committed tokens."""
    state, length = run.state, int(run.cache.context_len[b])
    kept = [state.output_ids, state.output_len, state.limit, state.finished, state.accepted_histogram, state.block]
    kept += [run.cache.context_len]
    tensors = [tensor[b].clone() for tensor in kept]
    return tensors + [x[b, :, :length].clone() for layer in run.cache.layers for x in (layer.k, layer.v)]


@settings(max_examples=12)
@given(
    lag=st.integers(0, 3), right=st.lists(st.integers(-1, 7), min_size=1, max_size=3), tokens=st.integers(1, 24),
    stop=st.integers(0, 23), mode=st.sampled_from(["consensus", "ar"]),
)  # fmt: skip
def test_a_host_that_looks_late_trims_what_ran_too_far(lag, right, tokens, stop, mode) -> None:
    decoder = ScriptedDrafts(MODEL, ANSWERS[:2], right, impl="torch", mode=mode)
    eos = int(ANSWERS[0][stop])
    run = decoder.open(2, 64, eos_token_id=eos)
    run.lag = lag
    for b in range(2):
        run.admit(b, PROMPTS[b], tokens)
    heard = drain(run)
    for b in range(2):
        said = ANSWERS[b].tolist()
        expected = said[: min(tokens, said.index(eos) + 1 if eos in said else tokens)]
        assert heard[b] == run.slots[b].tokens == expected
    assert len(run._ring) <= lag


@pytest.mark.parametrize("released", [False, True])
def test_steps_after_the_end_change_nothing(released: bool) -> None:
    """Overshoot: a slot that ended or was released is an exact no-op, its own K/V included, while another goes on."""
    decoder = ScriptedDrafts(MODEL, ANSWERS[:2], [0] if released else [7, 0, -1, 3], impl="torch")
    run = decoder.open(2, 64)
    run.admit(0, PROMPTS[0], 24 if released else 3)
    run.admit(1, PROMPTS[1], 24)
    while not run.slots[0].finished:
        run.advance()
        if released:
            run.release(0)
    before = frozen(run, 0)
    drain(run)
    assert run.slots[1].tokens == ANSWERS[1].tolist()
    for _ in range(3):  # and when nobody is left, whatever is enqueued
        decoder.run_cycle(run.cache, run.state, 8, "torch")
        decoder.run_cycle(run.cache, run.state, 1, "torch")
    for was, now in zip(before, frozen(run, 0)):
        assert torch.equal(was, now)


def test_idle_slots_are_given_back_as_they_were() -> None:
    state = ConsensusDecoder(MODEL, impl="torch").open(3, 64).state
    state.finished[1] = False
    with pytest.raises(RuntimeError, match="in a capture"), state.idle():
        assert state.finished.all()
        raise RuntimeError("in a capture")
    assert state.finished.tolist() == [True, False, True]


def test_no_step_is_enqueued_that_cannot_be_needed() -> None:
    run = ConsensusDecoder(MODEL, impl="torch").open(1, 64)
    run.lag = 4  # the prefill's report and three more
    run.admit(0, PROMPTS[0], 4)
    assert [run.step() for _ in range(5)] == [True, True, True, False, False]  # one token of the four is the prefill's
    assert run.poll() == [] and not run.done
    heard = [token for _, tokens, _ in run.advance() for token in tokens]
    assert run.done and heard == ANSWERS[0][:4].tolist() and not run.step()


def test_the_host_looks_at_a_step_when_the_next_one_is_enqueued() -> None:
    run = ConsensusDecoder(MODEL, impl="torch", mode="ar").open(1, 64, eos_token_id=[])
    run.lag = 1
    run.admit(0, PROMPTS[0], 24)
    for known in range(1, 4):
        assert [tokens for _, tokens, _ in run.advance()] == [ANSWERS[0][known - 1 : known].tolist()]
        assert len(run._ring) == 1 and len(run.slots[0].tokens) == known


@pytest.mark.parametrize("lag", [0, 2])
def test_sequences_join_and_leave(lag: int) -> None:
    """Slots are used again while others decode, and nobody's tokens depend on who came and went."""
    decoder = ScriptedDrafts(MODEL, [ANSWERS[0], ANSWERS[1]], [5, 0, -1], impl="torch")
    run = decoder.open(2, 64)
    run.lag = lag
    run.admit(1, PROMPTS[1], 24)
    run.step(), run.step()
    run.admit(0, PROMPTS[0], 24)
    run.step()
    with pytest.raises(ValueError, match="slot 0 must be free"):
        run.admit(0, PROMPTS[2], 24)
    run.poll(lag=0)
    gone = list(run.slots[0].tokens)
    assert gone and gone == ANSWERS[0][: len(gone)].tolist()
    run.step()
    run.release(0)  # with a step in flight: its report is about a sequence that is gone
    assert run.state.finished.tolist() == [True, False]  # on the device, too
    decoder.answers[0] = ANSWERS[2]
    run.admit(0, PROMPTS[2], 20)
    assert len(run._ring) > 0
    drain(run)
    assert run.slots[0].tokens == ANSWERS[2][:20].tolist() and run.slots[1].tokens == ANSWERS[1].tolist()
    decoder.answers[1] = ANSWERS[3]
    run.admit(1, PROMPTS[3], 7)
    drain(run)
    assert run.slots[1].tokens == ANSWERS[3][:7].tolist()


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_on_a_cpu_finished_slots_cost_no_rows(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is of the first to the last unfinished slot, and leaves the others as they are."""
    decoder = ConsensusDecoder(MODEL, impl="torch", mode=mode)
    run, widths, cycle = decoder.open(4, 64), [], decoder.run_cycle
    monkeypatch.setattr(
        decoder, "run_cycle", lambda cache, state, *rest: widths.append(cache.batch_size) or cycle(cache, state, *rest)
    )
    run.admit(2, PROMPTS[2], 20)
    run.step()
    run.admit(1, PROMPTS[1], 3)
    run.advance()
    assert widths == [1, 2]
    while not run.slots[1].finished:
        run.advance()
    before = frozen(run, 1)
    run.admit(0, PROMPTS[0], 24)
    run.advance()
    assert widths[-1] == 3  # slot 1 lies between two that go on
    drain(run)
    assert widths[-1] == 1
    for was, now in zip(before, frozen(run, 1)):
        assert torch.equal(was, now)
    for b, length in ((0, 24), (1, 3), (2, 20)):
        assert run.slots[b].tokens == ANSWERS[b][:length].tolist()
    compiled = ConsensusDecoder(MODEL, impl="torch", mode=mode, compile="eager")
    compiled.open(2, 64)
    assert compiled.needs_all_slots and not decoder.needs_all_slots


def test_a_block_size_is_timed_for_every_number_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slots, then one, in this run and the next; on a clock by which each slot of a cycle takes a second."""
    decoder = ConsensusDecoder(MODEL, impl="torch", block_size="auto")
    seconds, cycle = [0.0], decoder.cycle

    def timed(cache, *rest) -> None:
        cycle(cache, *rest)
        seconds[0] += cache.batch_size

    starts, start = [], AdaptiveBlock.start
    monkeypatch.setattr(AdaptiveBlock, "start", lambda rule: starts.append(rule) or start(rule))
    asked, told, next_size, observe = [], [], AdaptiveBlock.next_size, AdaptiveBlock.observe
    monkeypatch.setattr(AdaptiveBlock, "next_size", lambda rule: asked.append(rule) or next_size(rule))
    monkeypatch.setattr(AdaptiveBlock, "observe", lambda rule, *cycle: told.append(rule) or observe(rule, *cycle))
    decoder.cycle, decoder.clock = timed, lambda: seconds[0]
    for _ in range(2):
        run = decoder.open(3, 64)
        run.admit(0, PROMPTS[0], 24)
        run.admit(2, PROMPTS[2], 10)
        drain(run)
        assert [run.slots[b].tokens for b in (0, 2)] == [ANSWERS[0][:24].tolist(), ANSWERS[2][:10].tolist()]
    times = {width: set().union(*rule._times.values()) for width, rule in decoder._adaptive.items()}
    assert times == {1: {1.0}, 3: {3.0}}
    assert asked == told  # the rule that chose a size learns what came of it
    rules = list(decoder._adaptive.values())
    assert [starts.count(rule) for rule in rules] == [3, 3]  # as it is made, and for the texts of either run


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_a_rule_hears_of_the_drafts_that_were_accepted(anchor_rows: int) -> None:
    decoder, heard = ConsensusDecoder(LedgerModel(17, anchor_rows=anchor_rows), impl="torch"), []
    run = decoder.open(1, 64)
    run._rule(1).observe = lambda size, seconds, accepted: heard.extend(accepted)
    run.admit(0, torch.tensor([3]), 40)
    drain(run)
    counts = run.state.accepted_histogram[0].tolist()
    # the last cycle's sequence did not go on
    assert len(heard) == sum(counts) - 1 and all(0 <= counts[n] - heard.count(n) <= 1 for n in range(len(counts)))


def test_a_run_may_be_driven_in_inference_mode_and_out_of_it() -> None:
    run = ConsensusDecoder(MODEL).open(2, 64, eos_token_id=[])
    with torch.inference_mode():
        run.admit(0, PROMPTS[0], 24)
        run.advance(), run.advance()
        assert not run.slots[0].prompt_hidden.is_inference()
    run.admit(1, PROMPTS[0], 24, like=0)
    drain(run)
    assert [slot.tokens for slot in run.slots] == [ANSWERS[0].tolist()] * 2


def test_a_run_says_what_is_wrong() -> None:
    decoder = ConsensusDecoder(MODEL, impl="torch")
    run = decoder.open(1, 64)
    with pytest.raises(ValueError, match="at most 512, but is 513"):
        run.admit(0, PROMPTS[0], 508)
    run.admit(0, PROMPTS[0], 507)
    run.release(0)
    for arguments, message in (
        ((1, PROMPTS[0], 2), r"a slot must be in 0..0, but got 1"),
        ((0, PROMPTS[0][:0], 2), "at least one token"),
        ((0, PROMPTS[0] - 1000, 2), "ids in 0.."),
        ((0, PROMPTS[0], 0), "max_new_tokens must be an integer >= 1, but got 0"),
        ((0, PROMPTS[0], 2.5), "max_new_tokens must be an integer >= 1, but got 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            run.admit(*arguments)
    with pytest.raises(ValueError, match=r"cached must be in 0..5, but got 6"):
        run.admit(0, PROMPTS[0], 2, cached=6)
    for b in (-1, 1):  # -1 would end the last slot for the host alone
        with pytest.raises(ValueError, match=f"a slot must be in 0..0, but got {b}"):
            run.release(b)
    assert run.done  # nothing was begun
    biased = SamplingParams(logit_bias={10**6: 1.0})
    with pytest.raises(ValueError, match="logit_bias must be of tokens in 0.."):
        decoder.open(1, 64, choosing=Choosing.of([biased])).admit(0, PROMPTS[0], 2, biased)
    run = decoder.open(1, 64)
    for sizes, message in (((0, 64), "batch_size"), ((True, 64), "batch_size"), ((1, 64.0), "max_len")):
        with pytest.raises(ValueError, match=f"{message} must be an integer >= 1"):
            decoder.open(*sizes)
    processing = decoder.open(1, 64, choosing=Choosing(processed=True))
    with pytest.raises(ValueError, match="logit_bias must be of tokens in"):
        processing.admit(0, PROMPTS[0], 2, SamplingParams(logit_bias={1000: 1.0}))
    assert processing.done
    decoder.open(1, 64)
    for call in (run.step, lambda: run.admit(0, PROMPTS[0], 2), lambda: run.release(0)):
        with pytest.raises(RuntimeError, match="newer run"):
            call()


def test_many_stop_tokens_get_their_places() -> None:
    decoder = ConsensusDecoder(MODEL, impl="torch")
    every = [token for token in range(20) if token != int(ANSWERS[0][0])]
    first = next(i for i, token in enumerate(ANSWERS[0].tolist()) if token in every)
    every.sort(key=ANSWERS[0][first].__ne__)  # the one that comes first of all
    for stops in (every[:7], every[:8], every, every):
        output = decoder.generate(PROMPTS[:1], max_new_tokens=24, eos_token_id=stops)
        assert output.sequences[0][6:].tolist() == ANSWERS[0][: first + 1].tolist()
        # fewer stops in the same buffers: the others are forgotten
        assert len(decoder.generate(PROMPTS[:1], max_new_tokens=24, eos_token_id=[]).sequences[0]) == 6 + 24


def test_reports_keep_their_order_and_their_buffers() -> None:
    clock = iter(range(100))
    tensor = torch.zeros(1, 2, dtype=torch.int64)
    ring = ReportRing(tensor, lambda: next(clock))
    for n in range(3):
        ring.begin()
        tensor.fill_(n)
        ring.post(tensor, note=n)
    assert ring.notes == [0, 1, 2] and len(ring) == 3
    taken = [ring.take() for _ in range(3)]
    assert [(r.note, r.rows, r.seconds) for r in taken] == [(n, [[n, n]], 1.0) for n in range(3)]
    ring.begin()
    assert len(ring._free) == 2  # no fourth buffer


def test_ttft_and_cycles_by_block_size() -> None:
    decoder = ConsensusDecoder(MODEL, impl="torch")
    ticks = iter(range(1000))
    decoder.clock = lambda: next(ticks)
    stats = decoder.generate(PROMPTS[:2], max_new_tokens=9).stats
    assert stats.ttft == stats.prefill_seconds == 5  # two ticks for each prompt, and one as they are known
    assert stats.decode_seconds > 5 and stats.sequence_tokens == [9, 9]
    assert stats.cycles_by_block_size == {8: sum(stats.sequence_cycles)}
    stats = ConsensusDecoder(MODEL, impl="torch", mode="ar").generate(PROMPTS[:2], max_new_tokens=9).stats
    assert stats.cycles_by_block_size == {1: 16} and stats.forward_passes == 9
