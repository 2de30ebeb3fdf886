"""Where a text of generate() begins and ends, as in transformers: padding without a mask, lengths and stop tokens that
nobody names, and which of two that are named is the stronger."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
)
from transformers.generation import EosTokenCriteria

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.generation_settings import GenerationSettings, merged_config
from tests.models.test_models_generation import EOS, PAD, padded
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view


@pytest.fixture(scope="module")
def pair():
    """A frozen base and its dual-view model."""
    base = build_base(base_config("qwen3", num_hidden_layers=1, hidden_size=32, intermediate_size=32))
    base.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    return base, randomise_view(OrthrusForCausalLM.from_base(base, block_size=5, mask_token_id=100))


@pytest.mark.parametrize("length", [6, 30, 120])
def test_with_no_length_named_there_are_twenty_new_tokens(pair, length: int) -> None:
    """Or as many as there are positions left, which are 128 here."""
    base, model = pair
    ids = random_ids(length, seed=4).clamp(min=3)
    expected = base.generate(ids, do_sample=False, eos_token_id=[])
    assert expected.shape[1] == min(length + 20, 128)
    assert model.generate(ids, eos_token_id=[]).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"min_length": 14, "min_new_tokens": 2, "eos_token_id": 31},  # the latter is the stronger
        {"eos_token_id": None},
        {"eos_token_id": torch.tensor([82, 95])},
        {"eos_token_id": torch.tensor(82)},
        {"generation_config": GenerationConfig(max_new_tokens=2), "max_length": 12},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(13), MaxLengthCriteria(30)])},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(2)])},
        {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria(82)]), "eos_token_id": 31},
        {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(7, 31)]), "min_length": 14},
    ],
)  # fmt: skip
def test_the_stronger_of_two_says_where_a_text_ends(pair, options: dict) -> None:
    """The free text is 80, 38, 95, 31, 44, 82, 4, ...; criteria and processors are stronger than options like them."""
    base, model = copy.copy(pair[0]), copy.copy(pair[1])
    base.generation_config = model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=31)
    ids = random_ids(6, seed=4).clamp(min=3)
    options = options if "generation_config" in options else {"max_new_tokens": 9} | options
    expected = base.generate(ids, do_sample=False, **options)
    assert model.generate(ids, **options).tolist() == expected.tolist()


def test_without_a_mask_the_padding_token_tells_where_the_text_is(pair) -> None:
    base, model = pair
    ids, mask = padded()
    expected = base.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert base.generate(ids, max_new_tokens=7, do_sample=False).tolist() == expected.tolist()
    assert model.generate(ids, max_new_tokens=7).tolist() == expected.tolist()
    right = torch.cat((ids[1:, 3:], ids[1:, :3]), dim=1)
    assert model.generate(right, max_new_tokens=7)[0, 6:].tolist() == expected[1, 6:].tolist()
    options = {"max_new_tokens": 7, "eos_token_id": PAD}  # as the end of a text, it may be part of one
    assert model.generate(ids, **options).tolist() == base.generate(ids, do_sample=False, **options).tolist()
    for unclear in (torch.tensor([[5, PAD, 7]]), torch.tensor([[PAD, PAD]])):
        with pytest.raises(ValueError, match="attention_mask must be given where pad_token_id=0 is part of a prompt"):
            model.generate(unclear, max_new_tokens=2)
        assert model.generate(unclear, attention_mask=torch.ones_like(unclear), max_new_tokens=2).dim() == 2


@pytest.mark.parametrize(("first", "last"), [(5, 7), (4, 8), (3, 5)])
def test_a_stop_string_may_begin_in_the_prompt(pair, first: int, last: int) -> None:
    """One that ends in it (the last of these) does not stop anything."""
    base, model = pair
    letters = Tokenizer(models.BPE({chr(40 + token): token for token in range(101)}, []))
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, clean_up_tokenization_spaces=False)
    ids, options = random_ids(6, seed=4).clamp(min=3), {"max_new_tokens": 5, "tokenizer": tokenizer}
    text = base.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()
    options["stop_strings"] = ["".join(chr(40 + token) for token in text[first:last])]
    expected = base.generate(ids, do_sample=False, **options)
    assert expected.shape[1] == (last if last > 6 else 11)
    assert model.generate(ids, **options).tolist() == expected.tolist()


def test_a_least_length_of_other_stop_tokens_than_the_criteria_s_is_refused(pair) -> None:
    options = {
        "max_new_tokens": 9,
        "min_new_tokens": 4,
        "stopping_criteria": StoppingCriteriaList([EosTokenCriteria(31)]),
    }
    ids = random_ids(6, seed=4).clamp(min=3)
    with pytest.raises(ValueError, match=r"about eos_token_id=\[2\], but stopping_criteria has .* of \[31\]"):
        pair[1].generate(ids, **options)
    assert pair[1].generate(ids, eos_token_id=31, **options).shape[1] > 10


@pytest.mark.parametrize(
    ("options", "left"), [({}, 50), ({"top_k": None}, 101), ({"top_k": 0}, 101), ({"top_k": 3}, 3)]
)
def test_sampling_is_from_as_many_tokens_as_in_transformers(pair, options: dict, left: int) -> None:
    base, model = pair
    config = merged_config(model.generation_config, None, {"do_sample": True, **options})[0]
    (params,) = GenerationSettings.of(config, 6, [6], 101, default_eos=[EOS]).params
    assert (params.top_k or 101) == left
    theirs = base._prepare_generation_config(None, do_sample=True, **options)[0]
    scores = base._get_logits_processor(theirs, 6)(torch.ones(1, 6).long(), torch.randn(1, 101))
    assert int((scores > -torch.inf).sum()) == left
