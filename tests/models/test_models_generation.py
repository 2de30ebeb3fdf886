"""generate() as transformers users call it: every option does what it does there, or says that it cannot."""

from __future__ import annotations

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
    pipeline,
)

from orthrus_triton.models import OrthrusForCausalLM
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view

PAD, EOS = 0, 2


@pytest.fixture(scope="module")
def pair():
    """A frozen base and its dual-view model."""
    base = build_base(base_config("qwen3", num_hidden_layers=1, hidden_size=32, intermediate_size=32))
    base.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    return base, randomise_view(OrthrusForCausalLM.from_base(base, block_size=5, mask_token_id=100))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", clean_up_tokenization_spaces=False
    )


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = random_ids(6, batch=2).clamp(min=3), torch.ones(2, 6, dtype=torch.int64)
    ids[1, :3], mask[1, :3] = PAD, 0
    return ids, mask


@pytest.mark.parametrize(
    "options",
    [
        {}, {"repetition_penalty": 1.8}, {"min_new_tokens": 6}, {"bad_words_ids": [[7], [8, 9]]},
        {"no_repeat_ngram_size": 2}, {"suppress_tokens": [11, 12, 500, -1]}, {"min_length": 11}, {"max_length": 14},
        {"sequence_bias": [[[5], 4.0]]}, {"begin_suppress_tokens": [4, 5, 6]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [5 + row, 9, 10 + len(ids)]},
        {"max_new_tokens": None},
        {"min_new_tokens": 1, "min_length": 14, "eos_token_id": 38},
        {"eos_token_id": 95, "bad_words_ids": [[95], [7]]},  # a stop token is no bad word
        {"sequence_bias": [[[80], 5.0], [[38], 5.0]], "repetition_penalty": 1.8},  # the bias before the penalty
        {"sequence_bias": [[[80], 2.0], [[38], 2.0]], "repetition_penalty": 1.8},  # which counts once
        {"bad_words_ids": [[38, 95]]},
        {"repetition_penalty": 1.8, "logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.2)])},
        {"suppress_tokens": [80], "logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([38])])},
    ],
)  # fmt: skip
def test_greedy_is_transformers_own(pair, options: dict) -> None:
    """fp32 on tiny weights with wide margins: the same ids as the base model's generate, options and all."""
    base, model = pair
    ids = random_ids(6, seed=4).clamp(min=3)
    options = {"max_new_tokens": 9} | options
    if "max_length" in options:
        del options["max_new_tokens"]
    expected = base.generate(ids, do_sample=False, **options)
    assert model.generate(ids, do_sample=False, **options).tolist() == expected.tolist()


def test_padded_batches_in_and_out(pair) -> None:
    base, model = pair
    ids, mask = padded()
    expected = base.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12).tolist() == expected.tolist()
    result = model.generate(ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True)
    assert result.sequences.tolist() == expected.tolist()
    options = {"max_new_tokens": 6, "prefix_allowed_tokens_fn": lambda row, _: [5 + row, 20 + row]}
    allowed = model.generate(ids, attention_mask=mask, **options)
    assert allowed.tolist() == base.generate(ids, attention_mask=mask, do_sample=False, **options).tolist()
    options = {"attention_mask": mask, "max_new_tokens": 6, "begin_suppress_tokens": expected[:, 6].tolist()}
    begun = base.generate(ids, do_sample=False, **options)  # of each text, wherever it begins
    assert model.generate(ids, **options).tolist() == begun.tolist()
    assert (
        model.generate(ids[0], max_new_tokens=12)[0].tolist() == model.generate(ids[:1], max_new_tokens=12)[0].tolist()
    )
    narrow = model.generate(ids.to(torch.uint8), attention_mask=mask, max_new_tokens=12)  # has no room for all ids
    assert narrow.dtype == torch.int64 and narrow.tolist() == expected.tolist()
    options = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": int(expected[0, 8]), "pad_token_id": 9}
    ended = model.generate(ids, **options)
    assert ended.tolist() == base.generate(ids, do_sample=False, **options).tolist() and int(ended[0, -1]) == 9
    ar = model.generate(ids, attention_mask=mask, max_new_tokens=12, use_diffusion_mode=False)
    assert ar.tolist() == expected.tolist() and model.last_stats.tokens_per_cycle == 1


def test_sampling_is_ar_sampling_of_the_same_seed(pair) -> None:
    _, model = pair
    ids, mask = padded()
    options = {"attention_mask": mask, "do_sample": True, "temperature": 1.5, "top_k": 30, "max_new_tokens": 10}
    options |= {"num_return_sequences": 3, "logits_processor": LogitsProcessorList([lambda ids, scores: scores * 0.9])}
    first = model.generate(ids, **options, seed=1)
    assert first.shape[0] == 6 and len({tuple(row) for row in first[:3, 6:].tolist()}) > 1
    assert first.tolist() == model.generate(ids, **options, seed=1, use_diffusion_mode=False).tolist()
    assert first.tolist() != model.generate(ids, **options, seed=2).tolist()
    torch.manual_seed(0)
    drawn = model.generate(ids, **options)
    assert drawn.tolist() != model.generate(ids, **options).tolist()
    torch.manual_seed(0)
    assert drawn.tolist() == model.generate(ids, **options).tolist()
    assert model.generate(ids, **options, seed=1, sampling="rejection").shape[0] == 6


def test_stopping_and_streaming(pair, tokenizer) -> None:
    _, model = pair
    ids = random_ids(4, seed=4).clamp(min=3)
    free = model.generate(ids, max_new_tokens=12, eos_token_id=[])[0, 4:].tolist()
    word = tokenizer.decode([free[4]])
    stopped = model.generate(ids, max_new_tokens=12, stop_strings=[word], tokenizer=tokenizer, eos_token_id=[])
    first = min(i for i, token in enumerate(free) if word in tokenizer.decode(free[: i + 1]))
    assert stopped[0, 4:].tolist() == free[: first + 1]
    other = model.generate(ids.flip(1), max_new_tokens=12, eos_token_id=[])[0, 4:].tolist()
    both = model.generate(  # each sequence of a batch has its own text
        torch.cat((ids.flip(1), ids)), max_new_tokens=12, stop_strings=word, tokenizer=tokenizer, eos_token_id=[]
    )
    for row, said in zip(both[:, 4:].tolist(), (other, free)):
        end = 1 + min(i for i in range(12) if word in tokenizer.decode(said[: i + 1]))
        assert row == said[:end] + [PAD] * (len(row) - end)
    criteria = StoppingCriteriaList([MaxLengthCriteria(7)])
    assert model.generate(ids, max_new_tokens=12, stopping_criteria=criteria).shape[1] == 7
    batch, mask = padded()  # as in transformers, padding counts
    criteria = StoppingCriteriaList([MaxLengthCriteria(9)])
    stopped = model.generate(batch, attention_mask=mask, max_new_tokens=12, eos_token_id=[], stopping_criteria=criteria)
    assert stopped.shape[1] == 9 and (stopped[:, 6:] == PAD).sum() == 0
    assert model.generate(ids, max_new_tokens=12, max_time=0.0).shape[1] == 5
    assert model.generate(ids, max_new_tokens=12, max_time=300.0, eos_token_id=[])[0, 4:].tolist() == free
    with pytest.raises(ValueError, match="tokenizer must be given with stop_strings"):
        model.generate(ids, stop_strings=["w5"])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, args=(ids,), kwargs={"max_new_tokens": 12, "eos_token_id": [], "streamer": streamer}
    )
    thread.start()
    assert "".join(streamer).split() == tokenizer.decode(free).split()
    thread.join()


def test_a_streamer_gets_the_padded_prompt_and_then_the_tokens(pair) -> None:
    base, model = pair
    batch, mask = padded()
    heard = []
    for model_of_them in (base, model):
        listener = SimpleNamespace(put=lambda ids: heard[-1].append(ids.tolist()), end=lambda: heard[-1].append("end"))
        heard.append([])
        model_of_them.generate(
            batch[1:], attention_mask=mask[1:], max_new_tokens=7, do_sample=False, eos_token_id=[], streamer=listener
        )
    theirs, ours = heard
    assert ours[0] == theirs[0] == batch[1:].tolist() and ours[-1] == theirs[-1] == "end"
    assert sum(ours[1:-1], []) == sum(theirs[1:-1], [])


def test_a_conversation_goes_on_from_its_cache(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair
    model.consensus_decoder().max_cache_len = 64
    first = model.generate(random_ids(8, seed=9), max_new_tokens=6, eos_token_id=[])
    turn = torch.cat((first, torch.tensor([[5, 6]])), dim=1)
    expected = model.generate(turn, max_new_tokens=5, eos_token_id=[])
    model.generate(random_ids(8, seed=9), max_new_tokens=6, eos_token_id=[])
    rows = []
    forward = OrthrusForCausalLM.forward_view
    monkeypatch.setattr(
        OrthrusForCausalLM,
        "forward_view",
        lambda self, ids, *rest: rows.append(ids.shape[1]) or forward(self, ids, *rest),
    )
    assert model.generate(turn, max_new_tokens=5, eos_token_id=[], reuse_cache=True).tolist() == expected.tolist()
    assert rows[0] == 8  # three tokens in a pass of eight, not sixteen
    model.consensus_decoder().max_cache_len = None


def test_a_continued_cache_has_a_fresh_ones_bits_where_the_prefill_is_the_cycles_own() -> None:
    """Of the K/V themselves, as generate() promises: some were written by decoding, some by an earlier prefill."""
    base = build_base(base_config("qwen3", hidden_size=256, intermediate_size=256))  # wide enough to round differently
    model, held = OrthrusForCausalLM.from_base(base, block_size=5, mask_token_id=100), []
    for reuse in (True, False):
        ours = copy.deepcopy(model)
        decoder = ours.consensus_decoder()
        decoder.batch_invariant_prefill, decoder.max_cache_len = True, 64
        first = ours.generate(random_ids(21), max_new_tokens=9, eos_token_id=[])
        turn = torch.cat((first, torch.tensor([[30, 31, 32]])), dim=1)
        ours.generate(turn, max_new_tokens=4, eos_token_id=[], reuse_cache=reuse)
        cached = int(decoder.cache.context_len[0])
        held.append([buffer[:, :, :cached].clone() for layer in decoder.cache.layers for buffer in (layer.k, layer.v)])
    assert cached >= turn.shape[1]
    assert all(torch.equal(kept, fresh) for kept, fresh in zip(*held))


@pytest.mark.parametrize("case", ["llama longrope", "llama dynamic"])
@pytest.mark.parametrize(("first", "second"), [(12, 12), (30, 5), (30, -24)])
def test_a_cache_whose_angles_belong_to_another_length_is_not_gone_on_from(case: str, first: int, second: int) -> None:
    """Beyond the original length (20 here) all of a prompt is rotated otherwise, and what is cached is of another."""
    model = OrthrusForCausalLM.from_base(build_base(base_config(case)), block_size=5, mask_token_id=100)
    decoder = model.consensus_decoder()
    decoder.batch_invariant_prefill, decoder.max_cache_len = True, 64
    ids = random_ids(first)
    said = model.generate(ids, max_new_tokens=4, eos_token_id=[])
    turn = torch.cat((said, random_ids(second, seed=9)), dim=1) if second > 0 else ids[:, :second]
    held = []
    for reuse in (True, False):
        model.generate(turn, max_new_tokens=6, eos_token_id=[], reuse_cache=reuse)
        held.append([layer.k[:, :, : turn.shape[1]].clone() for layer in decoder.cache.layers])
    assert all(torch.equal(kept, fresh) for kept, fresh in zip(*held))


def test_auto_classes_and_pipeline(pair, tokenizer, tmp_path: Path) -> None:
    _, model = pair
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(loaded) is OrthrusForCausalLM
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=6)
    assert loaded.generate(ids, max_new_tokens=6).tolist() == expected.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare = OrthrusForCausalLM.from_pretrained(tmp_path, dtype="auto")
        (tmp_path / "generation_config.json").unlink()
        bare.generation_config = OrthrusForCausalLM.from_pretrained(tmp_path, dtype="auto").generation_config
        for source in (str(tmp_path), loaded, bare):
            generator = pipeline("text-generation", model=source, tokenizer=tokenizer, device="cpu")
            text = generator("w5 w6 w7", max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
            assert text.split() == tokenizer.decode(expected[0, 3:], skip_special_tokens=True).split()
        several = generator(["w5 w6", "w9 w8 w7"], max_new_tokens=3, batch_size=2, do_sample=True)
    assert len(several) == 2
    with pytest.raises(ValueError, match="load_in_8bit is not an option"):
        AutoModelForCausalLM.from_pretrained(tmp_path, load_in_8bit=True)
    with pytest.raises(ValueError, match="dtype must be 'auto' or a torch dtype such as 'bfloat16', but got 'bf16'"):
        OrthrusForCausalLM.from_pretrained(tmp_path, dtype="bf16")


def test_logits_are_those_of_the_thread_that_asks(pair) -> None:
    _, model = pair
    ask = {"max_new_tokens": 9, "output_logits": True, "return_dict_in_generate": True}
    prompts = [random_ids(6, seed=seed).clamp(min=3) for seed in range(4)]
    alone = [torch.stack(model.generate(prompt, **ask).logits) for prompt in prompts]
    found: list[torch.Tensor | None] = [None] * 4

    def work(n: int) -> None:
        for _ in range(5):
            found[n] = torch.stack(model.generate(prompts[n], **ask).logits)
            assert torch.equal(found[n], alone[n])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.8}, {"use_diffusion_mode": False}])
def test_logits_of_a_padded_batch_are_transformers_own(pair, options: dict) -> None:
    """Before processors; 0 for a sequence that has ended, where transformers goes on with padding."""
    base, model = pair
    ids, mask = padded()
    texts = model.generate(ids, attention_mask=mask, max_new_tokens=9, eos_token_id=[], **options)
    ends = int(texts[1, 6 + 3])  # the second text's fourth token
    common = {
        "attention_mask": mask, "max_new_tokens": 9, "eos_token_id": ends, "return_dict_in_generate": True,
        "output_logits": True, "do_sample": False,
    }  # fmt: skip
    ours = model.generate(ids, **common, **options)
    of_theirs = {name: value for name, value in options.items() if name != "use_diffusion_mode"}
    theirs = base.generate(ids, **common, **of_theirs)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert len(ours.logits) == len(theirs.logits) > 4
    lengths = [(row != PAD).nonzero().max().item() + 1 for row in ours.sequences[:, 6:]]
    assert len(set(lengths)) == 2
    for step, (our, their) in enumerate(zip(ours.logits, theirs.logits)):
        for b, length in enumerate(lengths):
            expected = their[b] if step < length else torch.zeros_like(their[b])
            torch.testing.assert_close(our[b], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 4}, ValueError, "num_beams must be left at its default, but got 4"),
        ({"output_scores": True}, ValueError, "output_scores must be left at its default, .* output_logits=True gives"),
        ({"output_logits": True}, ValueError, "output_logits=True must come with return_dict_in_generate=True"),
        ({"bad_words_ids": [[500]]}, ValueError, r"bad_words_ids must hold lists of ids in 0..100, but got \[500\]"),
        ({"bad_words_ids": [[True]]}, ValueError, r"bad_words_ids must hold lists of ids in 0..100, but got \[True\]"),
        ({"suppress_tokens": ["a"]}, ValueError, r"suppress_tokens must hold integers, but got \['a'\]"),
        ({"bad_words_ids": [5]}, ValueError, "bad_words_ids must hold lists of ids in 0..100, but got 5"),
        ({"bad_words_ids": [[]]}, ValueError, r"bad_words_ids must hold lists of ids in 0..100, but got \[\]"),
        ({"begin_suppress_tokens": 5}, ValueError, "begin_suppress_tokens must be a list, but got 5"),
        ({"stop_strings": 5}, ValueError, "stop_strings must be strings, but got 5"),
        ({"logits_processor": min}, ValueError, "logits_processor must be a list, but got a builtin"),
        ({"stopping_criteria": min}, ValueError, "stopping_criteria must be a list, but got a builtin"),
        ({"generation_config": {}}, ValueError, "generation_config must be a GenerationConfig, but got a dict"),
        ({"remove_invalid_values": True}, ValueError, "remove_invalid_values must be left"),
        ({"penalty_alpha": 1.0}, ValueError, "penalty_alpha must be left"),
        ({"forced_eos_token_id": 0}, ValueError, "forced_eos_token_id must be left at its default, but got 0"),
        ({"forced_bos_token_id": 1}, ValueError, "forced_bos_token_id must be left at its default, but got 1"),
        ({"encoder_no_repeat_ngram_size": 1}, ValueError, "encoder_no_repeat_ngram_size must be left"),
        ({"guidance_scale": 0.0}, ValueError, "guidance_scale must be left"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences"),
        ({"do_sample": True, "num_return_sequences": 0}, ValueError, "num_return_sequences must be .* >= 1, but got 0"),
        ({"do_sample": True, "num_return_sequences": 2.0}, ValueError, "num_return_sequences must be an integer"),
        ({"eos_token_id": 101}, ValueError, "eos_token_id must be in 0..100, but got 101"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature must be > 0 with do_sample"),
        ({"do_sample": True, "top_p": 1.2}, ValueError, r"top_p must be in \(0, 1\], but got 1.2"),
        ({"past_key_values": ()}, ValueError, "past_key_values must be None.*reuse_cache=True"),
        ({"cache": ()}, ValueError, "cache must be None.*reuse_cache=True"),
        ({"use_cache": False}, ValueError, "use_cache must be True"),
        ({"synced_gpus": True}, ValueError, "synced_gpus must be False, but got bool True"),
        ({"custom_generate": "someone/beams"}, ValueError, "custom_generate must be None, but got str"),
        ({"beam_width": 3}, TypeError, "does not know.*beam_width"),
        ({"max_length": 3}, ValueError, "max_length must exceed the prompt's 4 tokens, but is 3"),
        (
            {"streamer": SimpleNamespace(put=print, end=print), "input_ids": torch.ones(2, 4).long()},
            ValueError,
            "streamer takes one sequence",
        ),
        ({"streamer": print}, TypeError, "streamer must have put.ids. and end.., but a builtin_function_or_method has"),
        ({"max_length": "9"}, ValueError, "max_length must be an integer or None, but got '9'"),
        ({"min_length": 3.5}, ValueError, "min_length must be an integer or None, but got 3.5"),
        ({"pad_token_id": 2.5}, ValueError, "pad_token_id must be an integer or None, but got 2.5"),
        ({"max_time": "x"}, ValueError, "max_time must be a number of seconds or None, but got 'x'"),
        ({"eos_token_id": 2.0}, ValueError, "eos_token_id must be one id, a list of ids or None, but got 2.0"),
        ({"stop_strings": "a", "tokenizer": "gpt2"}, ValueError, "tokenizer must be given with .* but got 'gpt2'"),
        (
            {"stopping_criteria": [lambda *_: None]},
            ValueError,
            r"must return a bool or a tensor \[1\], .* returned None",
        ),
        ({"stopping_criteria": [lambda *_: torch.ones(2)]}, ValueError, r"tensor \[1\], but .* returned shape \(2,\)"),
        ({"input_ids": None}, ValueError, "input_ids must be a tensor"),
        ({"input_ids": torch.full((1, 4), 101)}, ValueError, r"ids in 0..100, but got 101"),
    ],
)
def test_what_cannot_be_is_refused_by_name(pair, options: dict, error: type, message: str) -> None:
    _, model = pair
    with pytest.raises(error, match=message):
        model.generate(**{"input_ids": torch.ones(1, 4).long()} | options)
