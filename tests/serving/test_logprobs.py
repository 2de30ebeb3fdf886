"""Log probabilities as the openai client reads them: the model's own, whatever the sequence was sampled by."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from orthrus_triton.modules import SamplingParams
from orthrus_triton.serving.logprobs import LogprobsField, TokenLogprobs, _byte_level, token_logprobs
from tests.modules.ledger_model import oracle
from tests.serving.running import Running, openai

SAMPLED = {"temperature": 0.9, "seed": 5, "presence_penalty": 0.7}


def expected(server: Running, prompt: list[int], tokens: int) -> list[tuple[int, torch.Tensor]]:
    """Each token that is sampled, and all log probabilities [V] at its place."""
    ids = oracle(server.model, prompt, tokens, SamplingParams(**SAMPLED))
    return [
        (token, server.model.next_logits([*prompt, *ids[:n]]).log_softmax(-1)) for n, token in enumerate(ids)
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_chat(server: Running, stream: bool) -> None:
    reply = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "w1 w2"}], max_tokens=9, stream=stream, logprobs=True,
        top_logprobs=3, **SAMPLED,
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    content = [entry for choice in choices for entry in choice.logprobs.content]
    for entry, (token, logprobs) in zip(content, expected(server, [1, 2], 9), strict=True):
        assert (entry.token, bytes(entry.bytes).decode()) == (f" w{token}", f" w{token}")
        assert entry.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        values, ids = logprobs.topk(3)
        assert [one.token for one in entry.top_logprobs] == [f" w{other}" for other in ids.tolist()]
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    if stream:  # they come with their text
        text = "".join(choice.delta.content for choice in choices)
        assert f" {text}" == "".join(entry.token for entry in content) and len(choices[0].logprobs.content) < 9


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("alternatives", [0, 2])
def test_of_a_completion(server: Running, stream: bool, alternatives: int) -> None:
    reply = server.client().completions.create(
        model="tiny", prompt=[3, 4, 5], max_tokens=7, stream=stream, logprobs=alternatives, **SAMPLED
    )
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    found = {name: sum((getattr(choice.logprobs, name) for choice in choices), []) for name in (
        "tokens", "token_logprobs", "top_logprobs", "text_offset"
    )}  # fmt: skip
    truth = expected(server, [3, 4, 5], 7)
    assert found["tokens"] == [f" w{token}" for token, _ in truth]
    assert found["token_logprobs"] == pytest.approx([float(of[token]) for token, of in truth], abs=1e-4)
    for top, (token, of) in zip(found["top_logprobs"], truth):  # the one that came, too
        assert list(top) == list(
            dict.fromkeys(f" w{other}" for other in [*of.topk(alternatives).indices.tolist(), token])
        )
    text = "".join(choice.text for choice in choices)
    spans = zip(found["text_offset"], [*found["text_offset"][1:], None])
    assert [text[start:end].strip() for start, end in spans] == [token.strip() for token in found["tokens"]]


def test_parts_of_a_character_have_their_bytes_and_names_of_their_own() -> None:
    byte_level = Tokenizer(models.BPE({sign: n for n, sign in enumerate(sorted(_byte_level()))}, []))
    byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    byte_level = PreTrainedTokenizerFast(tokenizer_object=byte_level, clean_up_tokenization_spaces=False)
    ids = byte_level("a\u20acb")["input_ids"]
    given = [TokenLogprobs(token, -1.0, [(ids[1], -0.1), (ids[2], -2.0), (ids[3], -9.0)]) for token in ids]
    chat = LogprobsField(byte_level).of_chat(given)["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in chat).decode() == "a\u20acb"
    field = LogprobsField(byte_level).of_completion(given)
    assert field["tokens"] == ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac", "b"]
    assert field["text_offset"] == [0, 1, 1, 1, 2]
    assert field["top_logprobs"][0] == {"bytes:\\xe2": -0.1, "bytes:\\x82": -2.0, "bytes:\\xac": -9.0, "a": -1.0}
    assert field["top_logprobs"][1]["bytes:\\xe2"] == -0.1


def test_bytes_are_those_of_gpt_2() -> None:
    assert _byte_level() == {sign: byte for byte, sign in bytes_to_unicode().items()}


def test_a_special_token_has_no_place_in_the_text() -> None:
    words = Tokenizer(models.WordLevel({"<|mark|>": 0, "ab": 1, "c": 2}, unk_token="ab"))
    words.decoder = decoders.Fuse()
    words.add_special_tokens(["<|mark|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
    field = LogprobsField(tokenizer).of_completion([TokenLogprobs(token, -1.0, []) for token in (1, 0, 2, 1)])
    assert field["text_offset"] == [0, 2, 2, 3] and field["tokens"][1] == "<|mark|>"


def test_names_that_two_tokens_share_are_of_the_likelier() -> None:
    words = Tokenizer(models.WordLevel({"<0xE2>": 0, "\u2581the": 1, "the": 2}, unk_token="the"))
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
    field = LogprobsField(tokenizer).of_completion([TokenLogprobs(2, -0.1, [(2, -0.1), (1, -7.0), (0, -8.0)])])
    assert field["top_logprobs"] == [{"the": -0.1, " the": -7.0, "bytes:\\xe2": -8.0}]


def test_there_is_no_infinity() -> None:
    (one,) = token_logprobs(torch.tensor([[0.0, -torch.inf]]), [0], 2)
    assert one.likeliest == [(0, 0.0), (1, -9999.0)]


@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_for_one_ends_it_alone(server: Running, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = {"model": "tiny", "prompt": [3, 4], "max_tokens": 5, "temperature": 0}
    for place, message in (
        ("orthrus_triton.serving.logprobs.text_and_bytes", "logprobs: the tokenizer failed: KeyError: 7"),
        ("orthrus_triton.serving.scheduler.token_logprobs", "logprobs: KeyError: 7"),
    ):
        with monkeypatch.context() as patch, pytest.raises(openai.APIError, match=message):
            patch.setattr(place, lambda *_: {}[7])
            reply = server.client().completions.create(**ask, logprobs=1, stream=stream)
            list(reply) if stream else reply
        assert server.client().completions.create(**ask).choices[0].text == server.expected("w3 w4", 5)


def test_a_stop_token_has_one_in_completions_and_who_does_not_ask_gets_none() -> None:
    probe = Running()
    ids = oracle(probe.model, [1], 40, SamplingParams())
    probe.close()
    end = next(token for n, token in enumerate(ids) if n > 3 and token not in ids[:n])
    server = Running(eos=[end])
    try:
        ask = {"model": "tiny", "prompt": [1], "max_tokens": 40, "temperature": 0}
        reply = server.client().completions.create(**ask, logprobs=1).choices[0]
        assert reply.finish_reason == "stop" and "".join(reply.logprobs.tokens) == f"{reply.text} w{end}"
        assert reply.logprobs.text_offset[-1] == len(reply.text)
        assert server.client().completions.create(**ask).choices[0].logprobs is None
        chat = server.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "w1"}], logprobs=True, max_tokens=40, temperature=0
        ).choices[0]  # fmt: skip
        assert "".join(entry.token for entry in chat.logprobs.content) == f" {chat.message.content}" == reply.text
    finally:
        server.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs: Value error, is allowed only with logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20"),
        ({"logprobs": 1}, "logprobs: Value error, must be true or false, but got 1"),
    ],
)
def test_what_cannot_be_is_named(server: Running, options: dict, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        server.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "w1"}], extra_body=options
        )
    with pytest.raises(openai.BadRequestError, match="logprobs: Value error, must be an integer, but got True"):
        server.client().completions.create(model="tiny", prompt="w1", extra_body={"logprobs": True})
