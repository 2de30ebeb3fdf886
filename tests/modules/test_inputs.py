"""What callers may pass, up to the last value that is allowed, and what a run must be open for."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.decode_options import stop_ids, widest_block
from orthrus_triton.modules.prompts import split_prompts, tokens_to_cache
from orthrus_triton.modules.sampling_params import MOST_NEW_TOKENS, Choosing, params_of
from tests.modules.ledger_model import LedgerModel, oracle

VOCAB = 17


def some_processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_every_form_of_prompts_is_split_alike(dtype: torch.dtype) -> None:
    left = torch.tensor([[9, 9, 0, 1], [9, 2, 3, 16]], dtype=dtype)
    right = torch.tensor([[0, 1, 9, 9], [2, 3, 16, 9]], dtype=dtype)
    both = torch.tensor([[9, 0, 1, 9], [2, 3, 16, 9]], dtype=dtype)
    for ids, mask in (
        (left, [[0, 0, 1, 1], [0, 1, 1, 1]]), (right, [[1, 1, 0, 0], [1, 1, 1, 0]]),
        (both, [[0, 1, 1, 0], [1, 1, 1, 0]]),
    ):  # fmt: skip
        for kind in (torch.int64, torch.bool, torch.float32):
            prompts = split_prompts(ids, torch.tensor(mask, dtype=kind), VOCAB)
            assert [prompt.tolist() for prompt in prompts] == [[0, 1], [2, 3, 16]]
            assert all(prompt.dtype == torch.int64 for prompt in prompts)
    assert [prompt.tolist() for prompt in split_prompts([left[0, 2:], [2, 3, 16]], None, VOCAB)] == [[0, 1], [2, 3, 16]]
    assert [prompt.tolist() for prompt in split_prompts(left[1], None, VOCAB)] == [[9, 2, 3, 16]]
    assert [prompt.tolist() for prompt in split_prompts(left, None, VOCAB)] == left.tolist()
    for form in (left, [left[0]]):
        copy = split_prompts(form, None, VOCAB)[0]
        form[0].fill_(5)
        assert copy.tolist() == [9, 9, 0, 1]
        left[0] = torch.tensor([9, 9, 0, 1])
    with pytest.raises(ValueError, match=r"ids in 0..15, but got 16"):
        split_prompts(left, None, VOCAB - 1)
    with pytest.raises(ValueError, match="row 1 must have its ones in one run"):
        split_prompts(left, torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]]), VOCAB)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.tensor(3), None, r"input_ids must be \[B, L\] .* got shape \(\)"),
        (torch.ones(1, 2, 3).long(), None, r"input_ids must be \[B, L\] .* got shape \(1, 2, 3\)"),
        (None, None, r"input_ids must be \[B, L\] .* got a NoneType"),
        ([[[1], [2, 3]]], None, "input_ids must be .* prompts of integers, but: "),
        ([[1], torch.ones(2, 2).long()], None, r"prompt 1 must be 1-D with at least one token, but got \(2, 2\)"),
        ([[1, 2]], torch.ones(1, 2), r"attention_mask goes with a \[B, L\] tensor, but input_ids is a list"),
        (torch.ones(2, 2).long(), torch.tensor([[1, 1], [0, 0]]), r"prompt 1 must be 1-D .* but got \(0,\)"),
    ],
)
def test_prompts_of_another_form_are_refused(ids: object, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_prompts(ids, mask, VOCAB)


@pytest.mark.parametrize(("prompt", "tokens"), [(500, 13), (512, 1), (300, 213)])
def test_the_newest_token_needs_no_row(prompt: int, tokens: int) -> None:
    assert tokens_to_cache(prompt, tokens) == 512
    decoder = ConsensusDecoder(LedgerModel(VOCAB), impl="torch", max_cache_len=512)
    said = decoder.generate([torch.full((prompt,), 3)], max_new_tokens=tokens).sequences[0]
    assert said[prompt:].tolist() == oracle(LedgerModel(VOCAB), [3] * prompt, tokens, SamplingParams())
    with pytest.raises(ValueError, match="max_cache_len=512"):
        decoder.generate([torch.full((prompt,), 3)], max_new_tokens=tokens + 1)


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("temperature", [0, 1e-30, 1e4], [1e-31, 1.001e4, 10**400, math.inf, True, "1"]),
        ("top_k", [0, 2**31 - 1], [-1, 2**31, 1.0, True]),
        ("top_p", [1e-9, 1, 1.0], [0, -0.1, 1.0001, math.nan]),
        ("min_p", [0, 1, 0.5], [-1e-9, 1.0001, math.nan]),
        ("seed", [-(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 0.5, True]),
        ("sequence", [0, 2**31 - 1], [-1, 2**31]),
        ("repetition_penalty", [1e-9, 1e4], [0, -1, 1.001e4]),
        ("presence_penalty", [-1e4, 1e4], [-1.001e4, 1.001e4, math.nan]),
        ("frequency_penalty", [-1e4, 1e4], [-1.001e4, 1.001e4, math.nan]),
        ("min_new_tokens", [0, MOST_NEW_TOKENS], [-1, MOST_NEW_TOKENS + 1, 1.0]),
        (
            "logit_bias",
            [{}, {0: -math.inf, 5: 3}],
            [[5], {-1: 1}, {True: 1}, {1: math.inf}, {1: math.nan}, {1: 10**400}, {1: "1"}],
        ),
        ("logits_processor", [None, some_processor], [5]),
    ],
)
def test_sampling_options_up_to_their_limits(name: str, allowed: list, refused: list) -> None:
    for value in allowed:
        assert getattr(SamplingParams(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=f"{name} must be"):
            SamplingParams(**{name: value})


CHANGES: list[tuple[dict[str, Any], Choosing]] = [
    ({"temperature": 1}, Choosing(sampled=True)),
    *(
        ({name: value}, Choosing(processed=True))
        for name, value in (
            ("repetition_penalty", 0.5), ("repetition_penalty", 2), ("presence_penalty", -1), ("frequency_penalty", 1),
            ("min_new_tokens", 1), ("logit_bias", {0: 1}),
        )
    ),
    ({"logits_processor": some_processor}, Choosing(hosted=True)),
    *(({name: value}, Choosing()) for name, value in (("top_k", 1), ("top_p", 0.5), ("min_p", 0.5), ("seed", 3))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "needed"), CHANGES, ids=lambda value: "".join(value) if type(value) is dict else ""
)
def test_a_run_is_open_for_what_its_sequences_need(options: dict[str, Any], needed: Choosing) -> None:
    params, greedy = SamplingParams(**options), SamplingParams()
    assert Choosing.of([params]) == Choosing.of([greedy, params]) == Choosing.of([params, greedy]) == needed
    assert Choosing.of([params], "rejection") == needed._replace(rejection=needed.sampled)
    needed.require(params)
    Choosing(True, True, True, True).require(params)
    if any(needed):
        (name,) = (name for name, value in needed._asdict().items() if value)
        with pytest.raises(ValueError, match=f"{name}=True"):
            Choosing(True, False, True, True)._replace(**{name: False}).require(params)


def test_params_are_one_for_each_prompt() -> None:
    each = params_of(3, None, {"temperature": 1.0, "seed": 5}, VOCAB)
    assert each == [SamplingParams(temperature=1.0, seed=5, sequence=b) for b in range(3)]
    assert params_of(2, None, {"sequence": 7}, VOCAB) == [SamplingParams(sequence=7)] * 2
    given = [SamplingParams(seed=n, logit_bias={16: 1}) for n in range(2)]
    assert params_of(2, given, {}, VOCAB) == given
    for count, options in ((1, {}), (3, {}), (2, {"seed": 1})):
        with pytest.raises(ValueError, match=f"one SamplingParams for each of {count} prompts"):
            params_of(count, given, options, VOCAB)
    with pytest.raises(ValueError, match="of tokens in 0..15, but got 16"):
        params_of(2, given, {}, VOCAB - 1)


def test_stop_tokens_and_blocks_of_a_call() -> None:
    model = SimpleNamespace(eos_token_ids=[2, 3], vocab_size=VOCAB, block_size=8)
    assert stop_ids(None, model) == [2, 3] and stop_ids([], model) == []
    for ids in (0, 16, [0, 16], (0, 16), {0, 16}):
        assert stop_ids(ids, model) == ([ids] if isinstance(ids, int) else list(ids))
    for ids in (17, -1, True, [3, 17], 1.0):
        with pytest.raises(ValueError, match="eos_token_id must be in 0..16"):
            stop_ids(ids, model)
    assert [widest_block(size, model) for size in (None, "auto", 2, 8)] == [8, 8, 2, 8]
    for size in (1, 9, True, "fast", 4.0):
        with pytest.raises(ValueError, match="block_size must be in 2..8"):
            widest_block(size, model)
