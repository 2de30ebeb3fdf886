"""Completions that repeat their prompt, and what the model says of each of its tokens: how likely a given text is."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.serving import prompt as prompt_module
from orthrus_triton.serving.logprobs import PromptLogprobs
from orthrus_triton.serving.text_stream import TextStream
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.ledger_model import oracle
from tests.serving.running import VOCAB, Running, SlowModel, openai

PROMPT = [(5 * n) % 17 for n in range(150)]  # more than two passes of logits


@pytest.fixture(scope="module")
def small_chunks() -> Running:
    server = Running(max_waiting=40)
    server.scheduler.decoder.prefill_chunk = 100
    yield server
    server.close()


def said(reply, streamed: bool) -> tuple[str, dict[str, list], str]:
    """Text, log probabilities and reason of the only choice."""
    choices = [chunk.choices[0] for chunk in reply] if streamed else reply.choices
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    found = {
        name: [one for choice in choices if choice.logprobs for one in getattr(choice.logprobs, name)] for name in names
    }
    return "".join(choice.text for choice in choices), found, choices[-1].finish_reason


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_is_repeated_with_what_the_model_says_of_it(small_chunks: Running, streamed: bool) -> None:
    server = small_chunks
    ask = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": streamed}
    new = oracle(server.model, PROMPT, 5, SamplingParams())
    for _ in range(2):  # the second time the prompt's K/V are there: it is read nevertheless
        text, found, reason = said(server.client().completions.create(**ask, echo=True, logprobs=2), streamed)
        ids = [*PROMPT, *new]
        assert text == server.tokenizer.decode(ids) and reason == "length"
        assert found["tokens"] == [f" w{token}" for token in ids]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        for n in range(1, len(ids)):
            of = server.model.next_logits(ids[:n]).log_softmax(-1)
            assert found["token_logprobs"][n] == pytest.approx(float(of[ids[n]]), abs=1e-4)
            best = [f" w{token}" for token in of.topk(2).indices.tolist()]
            assert list(found["top_logprobs"][n]) == list(dict.fromkeys([*best, f" w{ids[n]}"]))
        spans = zip(found["text_offset"], [*found["text_offset"][1:], None])
        assert [text[start:end].strip() for start, end in spans] == [f"w{token}" for token in ids]
    text, found, _ = said(server.client().completions.create(**ask, echo=True), streamed)
    assert text == server.tokenizer.decode(ids) and not found["tokens"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_prompt_alone(server: Running, streamed: bool) -> None:
    """As those who score given texts ask for it: several at a time, and nothing new."""
    ask = {"model": "tiny", "prompt": "w3 w9", "max_tokens": 0, "echo": True, "stream": streamed}
    text, found, reason = said(server.client().completions.create(**ask, logprobs=0), streamed)
    assert (text, reason, found["tokens"], found["text_offset"]) == ("w3 w9", "length", [" w3", " w9"], [0, 2])
    assert said(server.client().completions.create(**ask), streamed)[0] == "w3 w9"
    if streamed:
        return
    reply = server.client().completions.create(**ask | {"prompt": [[3, 9], [3, 9, 4]]}, logprobs=0)
    assert [choice.text for choice in reply.choices] == ["w3 w9", "w3 w9 w4"]
    assert reply.choices[1].logprobs.token_logprobs[:2] == found["token_logprobs"]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (5, 0)


def test_scores_are_of_the_bits_that_decoding_has() -> None:
    """A generated text that is read as a prompt, in chunks of any size, has the logits its tokens were chosen from."""
    model = TinyDualViewModel(VOCAB, block_size=4).bfloat16()
    decoder = ConsensusDecoder(model, impl="torch", batch_invariant_prefill=True)
    text = decoder.generate([torch.tensor(PROMPT[:40])], max_new_tokens=50, eos_token_id=[]).sequences[0]
    expected = decoder.run.logits(0)
    for chunk in (16, 64, 512):
        decoder = ConsensusDecoder(model, impl="torch", batch_invariant_prefill=True, prefill_chunk=chunk)
        run, parts, cached = decoder.open(2, 128), [], 0
        while (now := run.prefill_ahead(1, text, cached, parts.append)) > cached:
            cached = now
        run.admit(1, text, 9, cached=cached, on_logits=parts.append)
        rows = torch.cat(parts)
        assert rows.shape == (90, VOCAB) and torch.equal(rows[39:-1], expected)


def test_nothing_to_say_ends_one_request_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = {"model": "tiny", "prompt": [3, 4], "max_tokens": 2, "temperature": 0, "echo": True}
    with monkeypatch.context() as patch, pytest.raises(openai.APIError, match="logprobs: KeyError: 7"):
        patch.setattr("orthrus_triton.serving.logprobs.token_logprobs", lambda *_: {}[7])
        server.client().completions.create(**ask, logprobs=1)
    assert server.client().completions.create(**ask).choices[0].text == "w3 w4" + server.expected("w3 w4", 2)
    with pytest.raises(ValueError, match="logprobs: the model gave NaN"):
        PromptLogprobs([1, 2], 1)(torch.full((2, 4), torch.nan))
    with pytest.raises(openai.BadRequestError, match="max_tokens must be >= 1 without echo, but got 0"):
        server.client().completions.create(**ask | {"max_tokens": 0, "echo": False})


def metaspace(before: str = "<s> $A") -> PreTrainedTokenizerFast:
    """As of Llama 2: words carry the space before them, and a text loses its first one."""
    pieces = [
        "<s>",
        "\u2581a",
        "\u2581b",
        "c",
        "\u2581",
        *(f"<0x{byte:02X}>" for byte in "\U0001f600\u20ac".encode()),
        "a",
        "b",
    ]
    merges, ids = [("\u2581", "a"), ("\u2581", "b")], {piece: n for n, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(before, special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("fast", [True, False])
def test_offsets_and_what_joins_on(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = metaspace()
    monkeypatch.setattr(type(tokenizer), "is_fast", fast)
    prompt = prompt_module._encode_one(tokenizer, "a", True)
    assert prompt.ids == [0, 1] and prompt.echo == ("a", [0, 0]) and prompt.tail == [1]
    prompt = prompt_module._encode_one(tokenizer, [0, 1, 2, 3], True)
    assert prompt.echo.text == tokenizer.decode([0, 1, 2, 3]) and prompt.echo.offsets[-1] == len(prompt.echo.text) - 1
    ids = [*tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "\U0001f600\u20ac\u20ac".encode()]), 1]
    half = prompt_module._encode_one(tokenizer, [1, *ids[:-3]], True)  # of a character
    assert half.tail == () and half.echo.text.rstrip("\ufffd") == "a\U0001f600\u20ac" != half.echo.text
    tail = prompt_module._encode_one(tokenizer, ids[:-1], False).tail  # which does not begin within one, either
    assert TextStream(tokenizer, context=tail).push(ids[-1:]) == " a"
    assert prompt_module._encode_one(tokenizer, [], True).echo == ("", [])
    assert TextStream(tokenizer, context=[0, 1]).push([2, 3]) == " bc" and TextStream(tokenizer).push([2, 3]) == "bc"


def test_offsets_are_where_names_begin() -> None:
    """A token that a tokenizer appends has no text, and spaces that belong to no token are the next one's."""
    field = prompt_module._encode_one(metaspace("<s> $A <s>"), "a b", True).echo
    assert field == ("a b", [0, 0, 1, 3])
    for spans, starts in (
        ([(0, 1), (2, 3), (4, 5)], [0, 1, 3]), ([(0, 1), (1, 3), (3, 5)], [0, 1, 3]),
        ([(0, 2), (0, 2), (2, 3)], [0, 0, 2]), ([], []),
    ):  # fmt: skip
        assert prompt_module._starts(spans) == starts


def test_a_stop_string_that_begins_with_the_space_between_prompt_and_text(server: Running) -> None:
    """The sequence ends with it, not only its text."""
    text, (first, second) = server.expected("w1 w2 w5", 9), oracle(server.model, [1, 2, 5], 2, SamplingParams())
    assert text.startswith(f" w{first} w{second}")
    for stop in (f" w{first} w{second}", f"w{first} w{second}"):
        reply = server.client().completions.create(
            model="tiny", prompt="w1 w2 w5", max_tokens=90, temperature=0, stop=stop, logprobs=0
        )
        assert (reply.usage.completion_tokens, len(reply.choices[0].logprobs.tokens)) == (2, 2)


def test_a_chat_template_writes_its_special_tokens_itself() -> None:
    """A second beginning, which the tokenizer would put before it, is none that the model knows."""
    from orthrus_triton.serving.schema import ChatRequest

    tokenizer = metaspace()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    body = ChatRequest(messages=[{"role": "user", "content": "a"}])
    assert prompt_module.encode_chat(tokenizer, body).ids == tokenizer("a")["input_ids"] == [0, 1]


def test_a_prompt_alone_ends_by_its_length_whatever_would_come_next() -> None:
    (end,) = oracle(SlowModel(VOCAB), [3, 9], 1, SamplingParams())
    server = Running(eos=[end])
    try:
        ask = {"model": "tiny", "prompt": [3, 9], "temperature": 0, "echo": True}
        reasons = [
            server.client().completions.create(**ask, max_tokens=tokens).choices[0].finish_reason for tokens in (0, 1)
        ]
        assert reasons == ["length", "stop"]
    finally:
        server.close()


def test_ids_are_looked_at_before_a_tokenizer_fails_over_them(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(server.tokenizer), "decode", lambda *_, **__: {}[7])
    with pytest.raises(openai.BadRequestError, match=f"prompt must hold ids in 0..{VOCAB - 1}, but got {VOCAB}"):
        server.client().completions.create(model="tiny", prompt=[[1], [2, VOCAB]])
