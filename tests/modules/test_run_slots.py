"""How sequences enter a run: several with one prefill, chunk by chunk, and behind what a slot holds."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SamplingParams, decode_cycle
from orthrus_triton.modules.batch_prefill import BatchPrefill
from orthrus_triton.modules.sampling_params import Choosing
from tests.modules.test_consensus_decoder import ar_answer, prompts_of
from tests.modules.test_decode_run import ANSWERS, MODEL, PROMPTS, drain


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_a_prompt_enters_chunk_by_chunk_behind_what_another_slot_holds(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """While steps are of all slots, as on a GPU: they write behind the rows that are there, and nowhere else."""
    monkeypatch.setattr(ConsensusDecoder, "needs_all_slots", True)
    decoder = ConsensusDecoder(MODEL, impl="torch", mode=mode, prefill_chunk=4, batch_invariant_prefill=True)
    run = decoder.open(2, 64, eos_token_id=[])
    run.admit(0, PROMPTS[2], 24)
    run.advance()
    prompt = torch.cat((PROMPTS[2], ANSWERS[2][:1], PROMPTS[0], PROMPTS[3], PROMPTS[3][:1]))  # 11 + 1 + 6 + 5 + 1
    run.copy_prefix(0, 1, prompt)
    assert (cached := run.cached_prefix(1, prompt)) == 12
    reached = []
    while run.advance() and (now := run.prefill_ahead(1, prompt, cached)) > cached:
        reached.append(cached := now)
        assert run.cached_prefix(1, prompt) == 0  # until it is whole, it is nobody's
    assert reached == [16, 20]
    run.admit(1, prompt, 20, cached=cached)
    drain(run)
    assert run.slots[0].tokens == ANSWERS[2].tolist()
    assert run.slots[1].tokens == ar_answer(MODEL, prompt, 20).tolist()
    run.admit(0, PROMPTS[0], 2)
    for source, b, message in ((0, 0, "slot 0 must be free"), (1, 1, "another slot than b"), (2, 1, "must be in 0..1")):
        with pytest.raises(ValueError, match=message):
            run.copy_prefix(source, b, prompt)
    with pytest.raises(ValueError, match="slot 0 must be free"):
        run.prefill_ahead(0, prompt, 0)


@pytest.mark.parametrize("sampled", [False, True])
def test_samples_of_one_prompt_are_prefilled_once_and_have_the_bits_they_have_alone(
    sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [SamplingParams(temperature=0.8 * sampled, seed=4, sequence=b, repetition_penalty=1.1) for b in range(3)]
    prompts = [PROMPTS[2], PROMPTS[0], PROMPTS[2].clone()]
    alone = [ConsensusDecoder(MODEL, mode="ar") for _ in prompts]
    expected = [
        decoder.generate([prompt], max_new_tokens=12, params=[one], eos_token_id=[]).sequences[0]
        for decoder, prompt, one in zip(alone, prompts, params)
    ]
    assert not sampled or not torch.equal(expected[0], expected[2])
    reads, prefill = [], decode_cycle.prefill
    monkeypatch.setattr(
        decode_cycle, "prefill", lambda model, prompt, *rest: reads.append(prompt) or prefill(model, prompt, *rest)
    )
    decoder = ConsensusDecoder(MODEL)
    output = decoder.generate(prompts, max_new_tokens=12, params=params, eos_token_id=[])
    assert len(reads) == 2
    assert all(map(torch.equal, output.sequences, expected))
    assert decoder.cache.prompt_len.tolist() == [11, 6, 11]  # by which rotary angles may go, copied or read
    for b, of_one in enumerate(alone):
        rows = len(expected[b]) - 1
        for ours, theirs in zip(decoder.cache.layers, of_one.cache.layers):
            assert torch.equal(ours.k[b, :, :rows], theirs.k[0, :, :rows])
        assert torch.equal(decoder.run.logits(b), of_one.run.logits(0))
    run = decoder.open(2, 64)
    for like, message in ((1, "slot 1 was not"), (2, r"a slot must be in 0\.\.1")):
        with pytest.raises(ValueError, match=message):
            run.admit(0, PROMPTS[0], 3, like=like)
    run.admit(0, PROMPTS[0], 3)
    with pytest.raises(ValueError, match="cached must be 0 with like=0, but got 2"):
        run.admit(1, PROMPTS[0], 3, cached=2, like=0)
    with pytest.raises(ValueError, match=r"a slot must be in 0\.\.1, but got True"):
        run.admit(1, PROMPTS[0], 3, like=True)
    for other in (PROMPTS[1], PROMPTS[0].flip(0)):  # of another length, and of the same
        with pytest.raises(ValueError, match="like must be a slot that was admitted with this prompt, but slot 0 was"):
            run.admit(1, other, 3, like=0)


def test_sequences_admitted_together() -> None:
    decoder = ConsensusDecoder(MODEL, impl="torch", mode="ar")
    run, prefill = decoder.open(3, 64, eos_token_id=[]), BatchPrefill(MODEL, 16, 2)
    run.admit(1, PROMPTS[0], 4)
    for slots, prompts, tokens, message in (
        ([0, 0], PROMPTS[:2], 2, r"slots must each be named once, but got \[0, 0\]"),
        ([0, 3], PROMPTS[:2], 2, "a slot must be in 0..2, but got 3"),
        ([0, 1], PROMPTS[:2], 2, "slot 1 must be free"),
        ([0, 2], PROMPTS[:2], 0, "max_new_tokens must be an integer >= 1, but got 0"),
        ([0, 2], [PROMPTS[0], PROMPTS[1] - 1000], 2, "ids in 0.."),
        ([0, 2], PROMPTS[:2], 600, "at most 512, but is 605"),
    ):
        with pytest.raises(ValueError, match=message):
            run.admit_together(slots, prompts, tokens, prefill)
    with pytest.raises(ValueError, match="prompts must have at most longest=5 tokens, but one has 6"):
        run.admit_together([2], PROMPTS[:1], 2, BatchPrefill(MODEL, 5, 2))
    for prompts, params in ((PROMPTS[:2], None), (PROMPTS[:1], [SamplingParams()] * 2)):
        with pytest.raises(ValueError, match="prompts and params must be one for each of 1 slots, but got"):
            run.admit_together([2], prompts, 2, prefill, params)
    assert run.slots[0].prompt is None and run.slots[2].prompt is None  # nothing was begun
    with pytest.raises(ValueError, match="prompts must have at most longest=4 tokens, but one has 11"):
        BatchPrefill(MODEL, 4, 2)([0, 2], PROMPTS[1:3], run.cache, run.state, 5, "torch")
    run.admit_together([2, 0], PROMPTS[1:3], 5, prefill)
    assert not any(slot.failed for slot in run.slots)
    # what rotary rules that know of lengths go by, in that pass and later
    assert prefill.buffers.prompt_len.tolist() == [3, 11] and run.cache.prompt_len.tolist() == [11, 6, 3]
    drain(run)
    assert [slot.tokens for slot in run.slots] == [
        ANSWERS[2][:5].tolist(), ANSWERS[0][:4].tolist(), ANSWERS[1][:5].tolist()
    ]  # fmt: skip


def test_prompts_of_any_lengths_may_be_admitted_together() -> None:
    prompts = prompts_of(3, [5, 40, 33])
    run = ConsensusDecoder(MODEL, impl="torch").open(3, 64, eos_token_id=[])
    run.admit_together([2, 0, 1], prompts, 9, BatchPrefill(MODEL, 40, 2))
    drain(run)
    assert [run.slots[b].tokens for b in (2, 0, 1)] == [ar_answer(MODEL, prompt, 9).tolist() for prompt in prompts]
    assert BatchPrefill(MODEL, 40_000, 2).width == 1  # one that is longer than a pass should be


def test_sequences_admitted_together_sample_as_each_says() -> None:
    decoder = ConsensusDecoder(MODEL, impl="torch", mode="ar")
    hot = [SamplingParams(temperature=2.0, seed=1, sequence=n) for n in range(4)]
    params = [hot[0], SamplingParams(), hot[1]]
    expected = decoder.generate(PROMPTS[:3], max_new_tokens=6, eos_token_id=[], params=params).sequences
    run = decoder.open(3, 64, eos_token_id=[], choosing=Choosing.of(hot))
    prefill = BatchPrefill(MODEL, 16, 2)
    run.admit_together([0, 1, 2], PROMPTS[:3], 6, prefill, [hot[2], hot[3], SamplingParams()])  # whose traces must go
    drain(run)
    other = [slot.tokens for slot in run.slots]
    run.admit_together([0, 2, 1], [PROMPTS[0], PROMPTS[2], PROMPTS[1]], 6, prefill, [params[0], params[2], params[1]])
    drain(run)
    assert [slot.tokens for slot in run.slots] == [ids[len(p) :].tolist() for ids, p in zip(expected, PROMPTS)]
    assert [slot.tokens for slot in run.slots] != other
    assert run.state.accepted_histogram.sum(1).tolist() == [6, 6, 6]  # cycles of the last ones alone
    run = decoder.open(1, 64, choosing=Choosing(processed=True))
    with pytest.raises(ValueError, match="runs that do not process logits"):
        run.admit_together([0], PROMPTS[1:2], 4, prefill)
    run = decoder.open(1, 64)
    with pytest.raises(ValueError, match="sampled=True"):
        run.admit_together([0], PROMPTS[1:2], 4, prefill, hot[:1])


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_sequences_admitted_together_take_any_seed_and_rule(rule) -> None:
    """Into slots that processed logits before; one step draws from both ends of what a seed may be."""
    decoder = ConsensusDecoder(MODEL, impl="torch")
    decoder.generate(PROMPTS[:2], max_new_tokens=3, repetition_penalty=5.0, logits_processor=lambda _, scores: -scores)
    ends = ((2**63 - 1, 2**31 - 1), (-(2**63), 0))
    params = [SamplingParams(temperature=1.5, top_p=0.9, seed=seed, sequence=number) for seed, number in ends]
    expected = decoder.generate(PROMPTS[:2], max_new_tokens=8, eos_token_id=[], params=params).sequences
    run = decoder.open(2, 64, eos_token_id=[], choosing=Choosing.of(params, rule))
    run.admit_together([1, 0], PROMPTS[:2], 8, BatchPrefill(MODEL, 16, 2), params)
    how = run.state.sampling.sampling
    assert how.seed.tolist() == [-(2**63), 2**63 - 1] and how.sequence.tolist() == [0, 2**31 - 1]
    assert how.temperature.tolist() == [1.5, 1.5] and torch.equal(how.top_p, torch.full((2,), 0.9))
    drain(run)
    assert [len(slot.tokens) for slot in run.slots] == [8, 8] and not any(slot.failed for slot in run.slots)
    if rule == "coupled":
        assert [run.slots[b].tokens for b in (1, 0)] == [ids[-8:].tolist() for ids in expected]


def test_a_cache_that_was_half_filled_is_nobodys_prefix() -> None:
    decoder = ConsensusDecoder(MODEL, impl="torch", mode="ar")
    run, prefill = decoder.open(2, 64, eos_token_id=[]), BatchPrefill(MODEL, 16, 1)
    fill, filled = prefill._fill, []

    def fill_one(slots, *arguments) -> None:
        if filled:
            raise RuntimeError("out of memory")
        filled.extend(slots)
        fill(slots, *arguments)

    prefill._fill = fill_one
    with pytest.raises(RuntimeError, match="out of memory"):
        run.admit_together([0, 1], PROMPTS[:2], 4, prefill)
    for _ in range(2):
        assert [run.cached_prefix(b, PROMPTS[b]) for b in range(2)] == [0, 0]
        run = decoder.open(2, 64, eos_token_id=[])  # which takes over what slots are said to hold
    for b in range(2):
        run.release(b)
        run.admit(b, PROMPTS[b], 4)
    drain(run)
    assert [slot.tokens for slot in run.slots] == [answer[:4].tolist() for answer in ANSWERS[:2]]
