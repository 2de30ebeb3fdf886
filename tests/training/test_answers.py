"""Prompts answered side by side give what each gives alone, however many slots and prompts a pass there are."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.training.answers import answer_all
from tests.models.tiny_bases import base_config, build_base

PROMPTS = [[20 + n, *range(30, 30 + n)] for n in range(7)]
SIZES = [(1, None), (2, 5), (3, 0), (5, 2), (5, 5), (20, None), (20, 4), (20, 50)]


def decoder_that_stops_at(stop: list[int] | None) -> ConsensusDecoder:
    base = build_base(base_config("llama", eos_token_id=stop))
    return ConsensusDecoder(OrthrusForCausalLM.from_base(base, block_size=4, mask_token_id=1), mode="ar")


@pytest.mark.parametrize("stop", [list(range(101)), list(range(50)), None], ids=["at once", "sometimes", "never"])
@pytest.mark.parametrize("max_new_tokens", [1, 6])
def test_answers_are_those_of_each_prompt_alone(stop, max_new_tokens):
    decoder = decoder_that_stops_at(stop)
    alone = {}
    for n, prompt in enumerate(PROMPTS):
        output = decoder.generate([torch.tensor(prompt)], max_new_tokens=max_new_tokens)
        alone[n] = output.sequences[0][len(prompt) :].tolist()
    if stop is not None and len(stop) > 100:
        assert {len(answer) for answer in alone.values()} == {1}
    for slots, prefill_batch in SIZES:
        found = list(answer_all(decoder, PROMPTS, max_new_tokens, slots, prefill_batch=prefill_batch))
        assert len(found) == len(PROMPTS) and dict(found) == alone, (slots, prefill_batch)


def test_no_prompts_have_no_answers():
    assert list(answer_all(decoder_that_stops_at(None), [], 4, 3, prefill_batch=2)) == []


def test_a_pass_reads_no_more_prompts_than_there_are_slots(monkeypatch):
    from orthrus_triton.training import answers

    widths, made = [], answers.BatchPrefill

    def batch_prefill(model, longest, width):
        widths.append(width)
        return made(model, longest, width)

    monkeypatch.setattr(answers, "BatchPrefill", batch_prefill)
    for slots, prompts in ((20, PROMPTS[:3]), (2, PROMPTS)):
        assert len(list(answer_all(decoder_that_stops_at(None), prompts, 2, slots, prefill_batch=10))) == len(prompts)
    assert widths == [3, 2]


@pytest.mark.parametrize("prefill_batch", [None, 2])
def test_answers_of_a_model_that_gives_nan_are_none(prefill_batch):
    """They would be trained on."""
    decoder = decoder_that_stops_at(None)
    decoder.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="model must give finite logits, but gave NaN or infinity for prompt"):
        list(answer_all(decoder, PROMPTS, 4, 2, prefill_batch=prefill_batch))
