"""Stopping criteria of a batch: asked what transformers asks them, though sequences get ahead of each other here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteriaList

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.stopping import Stopping
from orthrus_triton.modules.run_to_end import NonFiniteLogitsError
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view

B, L, NEW, PAD = 4, 6, 24, 0


@pytest.fixture(scope="module")
def pair():
    base = build_base(base_config("qwen3", num_hidden_layers=1, hidden_size=32, intermediate_size=32))
    base.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=2)
    return base, randomise_view(OrthrusForCausalLM.from_base(base, block_size=5, mask_token_id=100))


def prompts() -> dict[str, torch.Tensor]:
    ids, mask = random_ids(L, batch=B, seed=3).clamp(min=3), torch.ones(B, L, dtype=torch.int64)
    ids[1, :3], mask[1, :3] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


class Rows:
    """Each row ends behind a token of its own, which it had before as well."""

    def __init__(self, ends: list[int]) -> None:
        self.ends, self.heard = ends, []

    def __call__(self, ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self.heard.append(ids.tolist())
        return torch.tensor([ids.shape[1] - L == end for end in self.ends])


class Integers(Rows):
    """Not every criterion is careful about dtypes."""

    def __call__(self, ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return super().__call__(ids, scores).to(torch.uint8)


class All(Rows):
    """Of the batch as a whole, with a state of its own: ends when each row has been where it was to go."""

    def __call__(self, ids: torch.Tensor, scores: Any, **options: Any) -> bool:
        self.heard.append(ids.tolist())
        return ids.shape[1] - L >= max(self.ends)


@pytest.mark.parametrize("eos", [[], "some"], ids=["no eos", "eos"])
@pytest.mark.parametrize("kind", [Rows, Integers, All])
@pytest.mark.parametrize("ends", [[3, 20, 9, 4], [11, 2, 2, 13], [30, 1, 30, 30], [1, 1, 1, 1]], ids=str)
def test_criteria_hear_what_they_hear_in_transformers(pair, kind: type[Rows], ends: list[int], eos) -> None:
    base, model = pair
    if eos:  # as the third sequence says it as its sixth token, and maybe others somewhere
        eos = [base.generate(**prompts(), max_new_tokens=6, eos_token_id=[], do_sample=False)[2, -1].item()]
    heard = []
    for one in (base, model):
        criteria = [kind(ends), Rows([30, 30, 30, ends[3] + 1])]
        said = one.generate(
            **prompts(), max_new_tokens=NEW, do_sample=False, eos_token_id=eos,
            stopping_criteria=StoppingCriteriaList(criteria),
        )  # fmt: skip
        heard.append(([criterion.heard for criterion in criteria], said.tolist()))
    assert heard[0] == heard[1]


def test_who_is_ahead_waits_and_is_cut(pair) -> None:
    """Also by what it has in the cache, and in the figures."""
    _, model = pair
    model.generate(**prompts(), max_new_tokens=NEW, eos_token_id=[], stopping_criteria=[Rows([20, 3, 3, 9])])
    run = model.consensus_decoder().run
    assert [len(slot.tokens) for slot in run.slots] == model.last_stats.sequence_tokens == [20, 3, 3, 9]


def test_criteria_beside_stop_strings() -> None:
    """A sequence that a string has ended is padded, and no one waits for it."""
    criterion = Rows([5, 2, 5, 5])
    strings = [lambda new: False, lambda new: False, lambda new: new[-1] == 77, lambda new: False]
    stopping = Stopping(torch.zeros(B, L, dtype=torch.int64), {2}, PAD, criteria=[criterion], strings=strings)
    assert stopping(0, [11]) == stopping(0, [11, 12]) == {} and not criterion.heard
    assert stopping(1, [21]) == stopping(1, [21, 22]) == stopping(1, [21, 22, 23]) == {} and not criterion.heard
    assert stopping(2, [77]) == {2: 1}  # the others are told nothing before the last one has a token, too
    assert stopping(3, [41]) == {} and [row[L:] for row in criterion.heard[0]] == [[11], [21], [77], [41]]
    assert stopping(3, [41, 2]) == {1: 2} and [row[L:] for row in criterion.heard[1]] == [
        [11, 12],
        [21, 22],
        [77, 0],
        [41, 2],
    ]
    for count in (3, 4, 5):
        ended = stopping(0, [11, 12, 13, 14, 15][:count])
        assert [row[L:][count - 1] for row in criterion.heard[-1]] == [10 + count, 0, 0, 0]
    assert ended == {0: 5} and len(criterion.heard) == 5


def test_who_is_far_ahead_is_asked_about_once_the_others_have_ended() -> None:
    criterion = Rows([3, 30, 30, 30])
    stopping = Stopping(torch.zeros(B, L, dtype=torch.int64), {2}, PAD, criteria=[criterion])
    for count in range(1, 7):
        assert stopping(0, [11] * count) == {}
    assert stopping(2, [2]) == stopping(3, [2]) == {}
    assert stopping(1, [2]) == {0: 3} and len(criterion.heard) == 3


@pytest.mark.parametrize("banned_from", [0, 2])
def test_no_one_waits_for_a_sequence_that_has_no_token(pair, banned_from: int) -> None:
    _, model = pair

    def ban(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        of_the_first = ids[0, :L].equal(prompts()["input_ids"][0])
        return torch.full_like(scores, -torch.inf) if of_the_first and ids.shape[1] >= L + banned_from else scores

    with pytest.raises(NonFiniteLogitsError) as caught:
        model.generate(
            **prompts(), max_new_tokens=30, eos_token_id=[], logits_processor=[ban], stopping_criteria=[All([0, 5])]
        )
    assert caught.value.output.stats.sequence_tokens == [banned_from, 5, 5, 5]
