"""Thoughts apart from the answer, however the text is cut into pieces, and as clients read them."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthrus_triton.modules import SamplingParams
from orthrus_triton.serving.thoughts import ThoughtReader
from tests.modules.ledger_model import oracle
from tests.serving.running import TEMPLATE, VOCAB, Running, SlowModel, make_tokenizer

CASES = [  # what the prompt opened, the text, thoughts, the answer
    (False, "<think>\nfirst\n\nthen </thin k\n</think>\n\nthe answer </think> <think>x</think> ",
     "first\n\nthen </thin k", "the answer </think> <think>x</think> "),
    (False, "\n <think></think>yes", "", "yes"), (False, "<think>\n\n</think>\n\n", "", ""),
    (False, "no thoughts <think>a</think>", "", "no thoughts <think>a</think>"),
    (False, "  <thin air", "", "  <thin air"), (False, "<think", "", "<think"), (False, "", "", ""),
    (False, "<think>cut off </thi", "cut off </thi", ""), (True, "it \n goes on</think>\nyes", "it \n goes on", "yes"),
    (True, "\n\ncut off\n", "cut off", ""), (True, "</think>yes", "", "yes"),
    (True, "<think>a</think>b", "<think>a", "b"),
]  # fmt: skip


@pytest.mark.parametrize(("opened", "text", "thoughts", "answer"), CASES)
def test_every_way_to_cut_a_text(opened: bool, text: str, thoughts: str, answer: str) -> None:
    draws = random.Random(0)
    for chance in (0.0, 0.1, 0.5, 1.0):
        for _ in range(20):
            reader, found = ThoughtReader(opened), []
            cuts = [0, *(n for n in range(1, len(text)) if draws.random() < chance), len(text)]
            pieces = [text[start:end] for start, end in zip(cuts, cuts[1:])]
            found = [reader.push(piece, n == len(pieces) - 1) for n, piece in enumerate(pieces)]
            assert tuple(map("".join, zip(*found))) == (thoughts, answer), pieces


def test_what_is_certain_comes_at_once() -> None:
    reader = ThoughtReader()
    pushed = [reader.push(text) for text in ("<think>", "\nlet", " me see", " <", "b </th", "ink>", "\n\n", "so", " ")]
    thoughts, answers = zip(*pushed)
    assert thoughts == ("", "let", " me see", "", " <b", "", "", "", "") and answers == ("",) * 7 + ("so", " ")


def thinking(ids: list[int]) -> tuple[Running, str, str]:
    """A server whose model thinks from its first token on, to a later one; its thoughts, and its answer."""
    close = next(n for n in range(15, 38) if ids[n] not in (ids[0], 0, 1))
    names = {f"w{n}": n for n in range(VOCAB)}
    del names[f"w{ids[0]}"], names[f"w{ids[close]}"]
    words = Tokenizer(models.WordLevel({**names, "<think>": ids[0], "</think>": ids[close]}, unk_token="w1"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE + "{% if false %}</think>{% endif %}"
    text = tokenizer.decode(ids)
    thoughts, _, answer = text.removeprefix("<think>").partition("</think>")
    return Running(tokenizer=tokenizer), thoughts.strip(), answer.strip()


@pytest.mark.parametrize("stream", [False, True])
def test_as_clients_read_them(stream: bool) -> None:
    ids = oracle(SlowModel(VOCAB), [2], 40, SamplingParams())
    server, thoughts, answer = thinking(ids)
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "w2"}], "max_tokens": 40, "temperature": 0}
    try:
        reply = server.client().chat.completions.create(**ask, stream=stream)
        parts = [chunk.choices[0].delta for chunk in reply] if stream else [reply.choices[0].message]
        found = [
            "".join(getattr(part, name, None) or "" for part in parts) for name in ("reasoning_content", "content")
        ]
        assert found == [thoughts, answer] and parts[0].role == "assistant"
        assert not stream or sum(hasattr(part, "reasoning_content") for part in parts) > 1
        cut = server.client().chat.completions.create(**ask | {"max_tokens": 3}).choices[0].message
        assert thoughts.startswith(cut.reasoning_content) and cut.content == ""
        server.tokenizer.chat_template = TEMPLATE  # of a model that does not think
        plain = server.client().chat.completions.create(**ask).choices[0].message
        assert plain.content == server.tokenizer.decode(ids) and not hasattr(plain, "reasoning_content")
    finally:
        server.close()


def test_a_structure_leaves_no_room_for_them(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt may end with the tag; what must be JSON is an answer all the same."""
    from orthrus_triton.serving.prompt import encode_chat
    from orthrus_triton.serving.schema import ChatRequest

    monkeypatch.setattr(server.tokenizer, "chat_template", TEMPLATE + "<think>\n{% if false %}</think>{% endif %}")
    body = {"messages": [{"role": "user", "content": "w1"}]}
    assert encode_chat(server.tokenizer, ChatRequest(**body)).thoughts().push("a ", last=True) == ("a", "")
    form = {"response_format": {"type": "json_object"}}
    assert encode_chat(server.tokenizer, ChatRequest(**body, **form)).thoughts is None


def test_a_template_for_tools_says_for_itself_whether_the_model_thinks() -> None:
    from orthrus_triton.serving.prompt import encode_chat
    from orthrus_triton.serving.schema import ChatRequest

    tokenizer = make_tokenizer()
    thinks, calls = "{% if false %}</think>{% endif %}", "{% if false %}{{ tools }}<tool_call>arguments{% endif %}"
    body = {"messages": [{"role": "user", "content": "w1"}]}
    tools = {"tools": [{"type": "function", "function": {"name": "now"}}]}
    for plain, with_tools in ((thinks, ""), ("", thinks)):
        tokenizer.chat_template = {"default": TEMPLATE + plain, "tool_use": TEMPLATE + with_tools + calls}
        found = [encode_chat(tokenizer, ChatRequest(**body, **more)).thoughts is not None for more in ({}, tools)]
        assert found == [bool(plain), bool(with_tools)]
