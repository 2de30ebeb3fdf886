"""What becomes of the options of generate() on their way to the decoder, and whose word counts where several speak."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.generation_settings import GenerationSettings, merged_config
from orthrus_triton.modules import SamplingParams
from tests.models.tiny_bases import base_config, build_base, random_ids


@pytest.fixture(scope="module")
def model() -> OrthrusForCausalLM:
    base = build_base(base_config("qwen3", num_hidden_layers=1, hidden_size=32, intermediate_size=32))
    return OrthrusForCausalLM.from_base(base, block_size=5, mask_token_id=100)


def settings(default_eos: tuple[int, ...] = (), **fields: object) -> GenerationSettings:
    return GenerationSettings.of(GenerationConfig(**fields), 6, [6, 4], 101, seed=3, default_eos=list(default_eos))


def test_every_field_of_sampling_arrives() -> None:
    named = {"temperature": 0.7, "top_k": 3, "top_p": 0.8, "min_p": 0.1}
    copies = settings(do_sample=True, num_return_sequences=2, **named).params
    assert copies == [SamplingParams(seed=3, sequence=b, **named) for b in range(4)]
    # with nothing said, as in transformers
    assert settings(do_sample=True).params[1] == SamplingParams(temperature=1.0, top_k=50, seed=3, sequence=1)
    assert settings(**named).params[0] == SamplingParams(seed=3)  # of sampling, which is off


def test_what_ends_and_fills_a_text() -> None:
    assert settings((9,)).eos_token_ids == [9] and settings((9,)).pad_token_id == 9
    both = settings((9,), eos_token_id=[7, 8])
    assert both.eos_token_ids == [7, 8] and both.pad_token_id == 7
    assert settings((9,), pad_token_id=0).pad_token_id == settings().pad_token_id == 0
    assert settings(stop_strings="stop").stop_strings == ["stop"]
    assert settings(stop_strings=("a", "b")).stop_strings == ["a", "b"]


def test_lengths_count_the_padding() -> None:
    assert [one.min_new_tokens for one in settings(min_length=9).params] == [3, 3]
    assert settings(max_length=9).max_new_tokens == 3
    assert settings(min_length=3).params[1].min_new_tokens == 0


def test_the_shortest_length_of_several_criteria_counts() -> None:
    criteria = StoppingCriteriaList(map(MaxLengthCriteria, [20, 9, 12]))
    found = GenerationSettings.of(GenerationConfig(), 6, [6, 4], 101, seed=3, default_eos=[], criteria=criteria)
    assert found.max_new_tokens == 3


def test_whose_word_counts() -> None:
    own = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.5, top_k=7)
    given = GenerationConfig(do_sample=False, top_k=0, num_return_sequences=1)
    config, unknown = merged_config(own, given, {"temperature": 0.9, "beam_width": 3})
    found = (config.max_new_tokens, config.do_sample, config.temperature, config.top_k)
    assert found == (9, False, 0.9, 0) and list(unknown) == ["beam_width"]
    longest, _ = merged_config(own, None, {"max_length": 12})  # the checkpoint's own limit was not the caller's
    assert (longest.max_new_tokens, longest.max_length) == (None, 12)
    both, _ = merged_config(own, GenerationConfig(max_new_tokens=4), {"max_length": 12})  # as in transformers
    assert both.max_new_tokens == 4
    assert (own.max_new_tokens, own.do_sample, own.max_length) == (9, True, None)


def test_the_decoder_is_told(model, monkeypatch: pytest.MonkeyPatch) -> None:
    heard, decoder = {}, model.consensus_decoder()
    generate = decoder.generate
    monkeypatch.setattr(decoder, "generate", lambda prompts, **how: heard.update(how) or generate(prompts, **how))
    model.generate(random_ids(4), max_new_tokens=9, do_sample=True, sampling="rejection", block_size=3, eos_token_id=[])
    assert heard["sampling"] == "rejection" and set(model.last_stats.cycles_by_block_size) == {3}


def test_copies_of_a_model_have_decoders_of_their_own(model) -> None:
    model.generate(random_ids(4), max_new_tokens=2)
    other = copy.deepcopy(model)
    assert model.consensus_decoder().cache is not None and other.consensus_decoder().cache is None
    assert other.consensus_decoder().model is other and pickle.loads(pickle.dumps(model)).last_stats is not None


def test_copies_of_a_prompt_stand_together(model) -> None:
    """Their rows are those of the prompt, and a function is told of which prompt they are."""
    batch, end = random_ids(4, batch=2).clamp(min=3), 2
    options = {"eos_token_id": end, "pad_token_id": 1, "num_return_sequences": 2, "do_sample": True, "seed": 1}
    allowed = lambda row, ids: [10 + row, 20 + row] if len(ids) < 6 + row else [end]  # noqa: E731
    rows = model.generate(batch, max_new_tokens=6, prefix_allowed_tokens_fn=allowed, **options)
    assert torch.equal(rows[:, :4], batch[[0, 0, 1, 1]])
    for row, new in enumerate(rows[:, 4:].tolist()):
        said = 2 + row // 2
        assert set(new[:said]) <= {10 + row // 2, 20 + row // 2}
        assert new[said:] == [end] + [1] * (3 - said)
