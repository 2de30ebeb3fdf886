"""Thousands of random generate() calls against an unbatched AR oracle; cache that is kept; what is wrong with the
input, and that it harms nobody else."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.run_to_end import run_to_end
from orthrus_triton.ops.gumbel import CHOICE, DRAFT
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.ledger_model import LedgerModel, oracle

VOCAB, CALLS = 17, 2000  # half of them for each form of the anchor


def random_params(rng: random.Random, sequence: int, hosted: bool = False) -> SamplingParams:
    values: dict = {"sequence": sequence, "seed": rng.randrange(-(2**63), 2**63)}
    if rng.random() < 0.7:
        values["temperature"] = rng.choice([0.1, 0.7, 1.0, 2.5])
        for name, choices in (("top_k", [1, 3, 8, 50]), ("top_p", [0.01, 0.5, 0.9]), ("min_p", [0.02, 0.3, 1.0])):
            if rng.random() < 0.4:
                values[name] = rng.choice(choices)
    if rng.random() < 0.4:
        for name, choices in (
            ("repetition_penalty", [0.7, 1.3, 5.0]), ("presence_penalty", [-0.5, 1.0]),
            ("frequency_penalty", [-0.3, 0.4]), ("min_new_tokens", [2, 7]),
        ):  # fmt: skip
            if rng.random() < 0.5:
                values[name] = rng.choice(choices)
        if rng.random() < 0.4:
            values["logit_bias"] = {rng.randrange(VOCAB): rng.choice([-torch.inf, -1.0, 2.0]) for _ in range(2)}
    if hosted:
        values["logits_processor"] = no_token_twice_in_three
    return SamplingParams(**values)


def no_token_twice_in_three(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    scores = scores.clone()
    scores[:, input_ids[0, -3:]] = -50.0
    return scores


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_two_thousand_calls_are_their_ar_oracle(anchor_rows: int) -> None:
    rng = random.Random(7 + anchor_rows)
    model = LedgerModel(VOCAB, anchor_rows=anchor_rows)
    decoders = [
        ConsensusDecoder(model, impl="torch", max_cache_len=64, **options)
        for options in ({}, {"block_size": 2}, {"block_size": "auto"}, {"mode": "ar"})
    ]
    for call in range(CALLS // 2):
        decoder = decoders[rng.choice([0, 0, 0, 1, 2, 3])]
        prompts = [
            torch.tensor(rng.choices(range(VOCAB), k=rng.randint(1, 20))) for _ in range(rng.choice([1, 1, 1, 2, 3]))
        ]
        eos, hosted, tokens = rng.sample(range(VOCAB), k=rng.randint(0, 2)), rng.random() < 0.05, rng.randint(1, 9)
        if rng.random() < 0.2:
            params = [SamplingParams()] * len(prompts)
        else:
            params = [random_params(rng, b, hosted) for b in range(len(prompts))]
        expected = [oracle(model, p.tolist(), tokens, one, eos) for p, one in zip(prompts, params)]
        stop = None
        if rng.random() < 0.2:  # ends with a token of the text that may lie in the middle of an accepted block
            last = [rng.choice(new) for new in expected]
            expected = [new[: new.index(token) + 1] for new, token in zip(expected, last)]
            stop = lambda b, new, last=last: new[-1] == last[b]  # noqa: E731
        elif len(prompts) > 1 and rng.random() < 0.3:  # whoever is ahead is cut to where all are
            count = rng.randint(1, 9)
            stop = end_together(count, [len(new) for new in expected])
            expected = [new[:count] for new in expected]
        output = decoder.generate(
            prompts, max_new_tokens=tokens, eos_token_id=eos, params=params, stop=stop,
            block_size=rng.choice([None, 3, 5]) if decoder is decoders[0] else None, reuse_cache=rng.random() < 0.3,
        )  # fmt: skip
        got = [ids[len(prompt) :].tolist() for prompt, ids in zip(prompts, output.sequences)]
        assert got == expected, f"call {call}: {params}"


def end_together(count: int, lengths: list[int]) -> Callable[[int, list[int]], dict[int, int]]:
    """A `stop` that ends all sequences at `count` tokens when each has as many, or all of its own."""
    known = [0] * len(lengths)

    def stop(b: int, new: list[int]) -> dict[int, int]:
        known[b] = len(new)
        if any(there < min(count, length) for there, length in zip(known, lengths)):
            return {}
        return {c: count for c, there in enumerate(known) if there >= count}

    return stop


class Listener:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def put(self, ids: torch.Tensor) -> None:
        self.heard += ids.flatten().tolist()

    def end(self) -> None:
        self.heard.append(-1)


@pytest.mark.parametrize("lag", [0, 3])
def test_a_host_that_looks_late_stops_at_the_same_token(lag: int) -> None:
    """On a GPU several cycles may be known at once: what lies behind the stop is neither kept nor streamed."""
    model, prompt = LedgerModel(VOCAB), torch.tensor([3, 1])
    answer = oracle(model, prompt.tolist(), 25, SamplingParams())
    for count, more in itertools.product(range(1, 12), (1, 2, 4)):
        decoder, streamer = ConsensusDecoder(model, impl="torch", block_size=3), Listener()
        run = decoder.open(1, 64)
        run.lag = lag
        output = run_to_end(
            run, [prompt], count + more, [SamplingParams()], decoder.clock, streamer=streamer,
            stop=lambda b, new, count=count: len(new) == count,
        )  # fmt: skip
        assert output.sequences[0].tolist() == [3, 1, *answer[:count]]
        assert streamer.heard == [3, 1, *answer[:count], -1]


def tiny(anchor_rows: int = 0) -> TinyDualViewModel:
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "num_layers": 1, "intermediate_size": 32, "num_heads": 2, "block_size": 6}
    model = TinyDualViewModel(anchor_rows=anchor_rows, **shape)
    model.layers[0].self_attn.o_proj.weight.data *= 8
    model.layers[0].self_attn.copy_ar_to_diffusion()
    return model


@pytest.mark.parametrize(("impl", "anchor_rows"), [("torch", 0), ("torch", 1), ("triton", 0), ("triton", 1)])
def test_coupled_consensus_is_sampled_ar_on_a_transformer(impl: str, anchor_rows: int) -> None:
    """Real attention, a ragged batch, any block size; and a sequence in a batch is that sequence alone."""
    model, prompts = tiny(anchor_rows), [torch.arange(5), torch.arange(3, 12)]
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 5, "repetition_penalty": 1.2}
    if impl == "triton":
        prompts, lengths = prompts[:1], (3,)
    else:
        lengths = (24,)
    for tokens in lengths:
        ar = ConsensusDecoder(model, mode="ar", impl=impl).generate(prompts, max_new_tokens=tokens, **options)
        for block_size in (6, 3) if impl == "torch" else (4,):
            decoder = ConsensusDecoder(model, impl=impl, block_size=block_size)
            output = decoder.generate(prompts, max_new_tokens=tokens, **options)
            assert [ids.tolist() for ids in output.sequences] == [ids.tolist() for ids in ar.sequences]
            if impl == "torch":
                alone = decoder.generate(prompts[1:], max_new_tokens=tokens, **{**options, "sequence": 1})
                assert torch.equal(alone.sequences[0], ar.sequences[1])
    greedy = ConsensusDecoder(model, impl=impl).generate(prompts, max_new_tokens=5).sequences
    assert greedy[0].tolist() != ar.sequences[0][: len(greedy[0])].tolist()


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_rejection_follows_the_ar_distribution(anchor_rows: int) -> None:
    """The decoder's own cycle, 1,200 sequences of three tokens: chi-square over all 27 texts."""
    model = LedgerModel(vocab_size=3, block_size=3, certainty=1.0, anchor_rows=anchor_rows)
    decoder = ConsensusDecoder(model, impl="torch")
    n, prompt = 1200, torch.tensor([1, 2])
    output = decoder.generate([prompt] * n, max_new_tokens=3, temperature=1.0, seed=2, sampling="rejection")
    counts = torch.zeros(3, 3, 3, dtype=torch.float64)
    expected = torch.zeros_like(counts)
    for ids in output.sequences:
        counts[tuple(ids[2:].tolist())] += 1
    for a in range(3):
        for b in range(3):
            first, second, third = (
                model.next_logits(ids).double().softmax(-1) for ids in ([1, 2], [1, 2, a], [1, 2, a, b])
            )
            expected[a, b] = n * first[a] * second[b] * third
    assert float(((counts - expected) ** 2 / expected).sum()) < 54.1  # 99.9 % of 26 degrees of freedom
    coupled = decoder.generate([prompt] * 200, max_new_tokens=30, temperature=1.0, seed=3)
    rejection = decoder.generate([prompt] * 200, max_new_tokens=30, temperature=1.0, seed=3, sampling="rejection")
    alone = [SamplingParams(temperature=1.0, seed=3, sequence=7)]
    again = decoder.generate([prompt], max_new_tokens=30, params=alone, sampling="rejection").sequences[0]
    assert torch.equal(again, rejection.sequences[7])
    assert rejection.stats.tokens_per_cycle > coupled.stats.tokens_per_cycle > 1.1


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_what_replaces_a_refused_draft_is_drawn_independently_of_it(anchor_rows: int, monkeypatch) -> None:
    """With the draft's own noise, a token that nearly was the draft would be its replacement too often."""
    streams, sample = [], ops.sample_choice

    def watched(*arguments, stream, **options):
        streams.append(stream)
        return sample(*arguments, stream=stream, **options)

    monkeypatch.setattr(ops, "sample_choice", watched)
    decoder = ConsensusDecoder(tiny(anchor_rows), impl="torch")
    options = {"max_new_tokens": 12, "temperature": 1.0}
    decoder.generate([torch.arange(5)], sampling="rejection", **options)
    # the first token comes from prefill and is no draft
    assert streams[0] == CHOICE and len(streams) > 2 and set(streams[1:]) == {DRAFT}
    streams.clear()
    decoder.generate([torch.arange(5)], **options)
    assert set(streams) == {CHOICE}  # a coupled draft hits what verify draws because it is drawn alike


def test_the_cache_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    decoder = ConsensusDecoder(model, impl="torch", max_cache_len=128, batch_invariant_prefill=True)
    first = decoder.generate([torch.arange(9)], max_new_tokens=10).sequences[0]
    turn = torch.cat((first, torch.tensor([7, 8, 9])))
    fresh = ConsensusDecoder(model, impl="torch", max_cache_len=128, batch_invariant_prefill=True)
    expected = fresh.generate([turn], max_new_tokens=10).sequences[0]
    seen = []
    forward = type(model).forward_view
    monkeypatch.setattr(
        type(model), "forward_view", lambda self, ids, *rest: seen.append(ids.shape[1]) or forward(self, ids, *rest)
    )
    assert torch.equal(decoder.generate([turn], max_new_tokens=10, reuse_cache=True).sequences[0], expected)
    assert seen[0] == 8  # four tokens, rounded up, instead of 22


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, r"temperature must be in 0..10000, but got -0.1"),
        ({"temperature": float("nan")}, r"temperature must be in 0..10000, but got nan"),
        ({"temperature": 1, "top_p": 0.0}, r"top_p must be in \(0, 1\], but got 0.0"),
        ({"temperature": 1, "top_p": 1.5}, r"top_p must be in \(0, 1\], but got 1.5"),
        ({"top_k": -1}, r"top_k must be an integer in 0..2\*\*31-1, but got -1"),
        ({"min_p": 2}, r"min_p must be in \[0, 1\], but got 2"),
        ({"seed": 2**64}, r"seed must be an integer of 64 bits"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be in \(0, 10000\], but got 0.0"),
        ({"logit_bias": {99: 1.0}}, r"logit_bias must be of tokens in 0..16, but got 99"),
        ({"logit_bias": {1: float("nan")}}, r"logit_bias must be finite or -inf, but got nan"),
        ({"sampling": "nucleus"}, r"sampling must be 'coupled' or 'rejection', but got 'nucleus'"),
        ({"max_new_tokens": 100}, r"max_cache_len=64"),
        ({"max_new_tokens": True}, r"max_new_tokens must be an integer >= 1, but got True"),
        ({"eos_token_id": "</s>"}, r"eos_token_id must be in 0..16, but got '</s>'"),
        ({"eos_token_id": [3, 17]}, r"eos_token_id must be in 0..16, but got 17"),
        ({"logits_processor": lambda ids, scores: scores[:, :3]}, r"logits_processor must return a tensor \[1, 17\]"),
    ],
)
def test_bad_input_is_named_and_harms_nothing(options: dict, message: str) -> None:
    model = LedgerModel(VOCAB)
    decoder = ConsensusDecoder(model, impl="torch", max_cache_len=64)
    prompts = [torch.tensor([1, 2]), torch.tensor([3])]
    with pytest.raises(ValueError, match=message):
        decoder.generate(prompts, **{"max_new_tokens": 5} | options)
    output = decoder.generate(prompts, max_new_tokens=5)
    assert output.sequences[1].tolist() == [3, *oracle(model, [3], 5, SamplingParams())]


def test_numbers_may_be_numpys() -> None:
    decoder, prompt = ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), [torch.tensor([1, 2])]
    plain = {"temperature": 0.5, "top_k": 5, "min_new_tokens": 2, "repetition_penalty": 1.25, "seed": -(2**63)}
    kinds = {float: np.float32, int: np.int64}
    numpys = {name: kinds[type(value)](value) for name, value in plain.items()}
    numpys |= {"logit_bias": {np.int64(3): np.float32(2.0)}, "eos_token_id": np.int64(4)}
    plain |= {"logit_bias": {3: 2.0}, "eos_token_id": 4}
    sequences = [decoder.generate(prompt, max_new_tokens=9, **options).sequences[0] for options in (plain, numpys)]
    assert torch.equal(*sequences)
    for wrong in ({"top_k": np.bool_(True)}, {"seed": np.float32(3)}, {"eos_token_id": np.int64(VOCAB)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            decoder.generate(prompt, max_new_tokens=3, **wrong)


def test_a_model_on_several_devices_or_of_several_dtypes_is_named() -> None:
    model, prompt = tiny(), [torch.tensor([1, 2])]
    decoder = ConsensusDecoder(model, impl="torch")
    expected = decoder.generate(prompt, max_new_tokens=5).sequences[0]
    whole = model.layers[0]
    model.layers[0] = copy.deepcopy(whole).to("meta")
    with pytest.raises(ValueError, match="model must have all parameters on one device, but has .*'meta'"):
        decoder.generate(prompt, max_new_tokens=5)
    model.layers[0] = copy.deepcopy(whole).to(torch.bfloat16)
    with pytest.raises(ValueError, match="must have dtype"):
        decoder.generate(prompt, max_new_tokens=5)
    model.layers[0] = whole
    assert torch.equal(decoder.generate(prompt, max_new_tokens=5).sequences[0], expected)


@pytest.mark.parametrize("ids", [2, None, [None], ["</s>"]])
def test_stop_tokens_of_a_model_that_are_no_list_of_ids_are_named(ids: object) -> None:
    model = LedgerModel(VOCAB)
    model.eos_token_ids = ids
    with pytest.raises(ValueError, match=r"model.eos_token_ids must be a list of ids, .* but is "):
        ConsensusDecoder(model, impl="torch").generate([torch.tensor([1, 2])], max_new_tokens=5)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}])
@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda hidden: hidden.flatten(0, 1), r"shape \(8, "),
        (lambda hidden: hidden[:, -1:], r"shape \(1, 1, "),
        (lambda hidden: (hidden, None), "a tuple"),
    ],
)
def test_hidden_states_that_are_not_one_per_token_are_named(wrong, got: str, options: dict) -> None:
    model = tiny()
    right = model.forward_view
    model.forward_view = lambda *arguments: wrong(right(*arguments))
    with pytest.raises(ValueError, match=rf"must return .* \[B, T, H\], one for each .* \(1, 8\), but got {got}"):
        ConsensusDecoder(model, impl="torch").generate([torch.tensor([1, 2])], max_new_tokens=5, **options)


def test_bad_prompts_are_named() -> None:
    decoder = ConsensusDecoder(LedgerModel(VOCAB), impl="torch")
    for prompts, message in [
        ([torch.tensor([1]), torch.tensor([], dtype=torch.int64)], "prompt 1 must be 1-D with at least one token"),
        ([torch.tensor([1, 17])], r"ids in 0..16, but got 17"),
        ([torch.tensor([-1])], r"ids in 0..16, but got -1"),
        ([], "at least one prompt"),
    ]:
        with pytest.raises(ValueError, match=message):
            decoder.generate(prompts, max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 1 must be 1-D with at least one token"):
        decoder.generate(torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]]), max_new_tokens=3)
    elsewhere = torch.ones(2, 3, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="attention_mask must be on the device of input_ids, cpu, but got meta"):
        decoder.generate(torch.ones(2, 3).long(), elsewhere, max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 0 must hold integers, but got torch.float32"):
        decoder.generate(torch.ones(2, 3), max_new_tokens=3)
    with pytest.raises(TypeError, match=r"does not know: \['temprature'\]; of sampling it knows \['temperature'"):
        decoder.generate([torch.tensor([1])], max_new_tokens=3, temprature=1.0)
    run = decoder.open(1, 20)
    with pytest.raises(ValueError, match="sampled=True"):
        run.admit(0, torch.tensor([1]), 5, SamplingParams(temperature=1.0))
