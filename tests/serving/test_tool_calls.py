"""Tools: a chat template shows them to the model, and its calls come back as the openai client knows them."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from typing import Any

import pytest
import torch

from orthrus_triton.serving.tool_calls import CLOSE, OPEN, ToolCall, ToolCallReader, can_be_read
from tests.serving.running import Running, openai

CALL = OPEN + '\n{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n' + CLOSE
OTHER = OPEN + '{"name": "now"}' + CLOSE
SAME_JSON = OPEN + '{"name": "raw", "arguments": "{\\"x\\": 1}"}' + CLOSE
TAGS = OPEN + '{"name": "say", "arguments": {"text": "</tool_call> \\" <tool_call> </tool_call>"}}' + CLOSE
BROKEN = [
    OPEN + "{not json}" + CLOSE,
    OPEN + "[1]" + CLOSE,
    OPEN + '{"name": 3}' + CLOSE,
    OPEN + '{"name": "f"',
    "<tool_",
]


def read(pieces: list[str]) -> list[Any]:
    """Calls as (index, name, arguments), texts joined."""
    reader, parts = ToolCallReader(), []
    for i, piece in enumerate(pieces):
        for part in reader.push(piece, last=i == len(pieces) - 1):
            if isinstance(part, ToolCall):
                assert part.id.startswith("call_") and len(part.id) > 20
                parts.append((part.index, part.name, part.arguments))
            elif parts and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
    assert reader.count == sum(isinstance(part, tuple) for part in parts)
    return parts


WEATHER, NOW = (0, "weather", '{"city": "Zürich", "days": 2}'), (1, "now", "{}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []), ("  plain < text >\n", ["  plain < text >\n"]), (CALL, [WEATHER]), (f"\n{CALL}\n\n", [WEATHER]),
        (f"Let me look.\n\n{CALL}\n{OTHER}", ["Let me look.", WEATHER, NOW]),
        (f"{CALL}\n so \n{OTHER}\n", [WEATHER, "\n so", NOW]), (f"{CALL} {BROKEN[0]} ", [WEATHER, f" {BROKEN[0]} "]),
        (SAME_JSON, [(0, "raw", '{"x": 1}')]),
        (TAGS + OTHER, [(0, "say", '{"text": "</tool_call> \\" <tool_call> </tool_call>"}'), NOW]),
        (f"{BROKEN[0]}\n{CALL}", [BROKEN[0], WEATHER]),
        (f"{CALL} text \n", [WEATHER, " text \n"]),
        (f"Say {OPEN} first. {OTHER}", [f"Say {OPEN} first.", (0, "now", "{}")]),
        (f'{OPEN}{{"name": "f"\n{OTHER}', [f'{OPEN}{{"name": "f"', (0, "now", "{}")]),
        *((f"a {broken} \n", [f"a {broken} \n"]) for broken in BROKEN),
    ],
)  # fmt: skip
def test_calls_are_read_however_the_text_is_cut(text: str, parts: list[Any]) -> None:
    rng = random.Random(0)
    assert read([text]) == read([*text, ""]) == read([*text]) == parts if text else read([""]) == parts
    for _ in range(50):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 9)))
        assert read([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]) == parts


@pytest.mark.parametrize(
    ("arguments", "read_as"),
    [
        ('{"x": [1, null]}', '{"x": [1, null]}'), ("null", "{}"), ('""', "{}"), ('"[1]"', "[1]"), ('"hello"', None),
        ('{"x": NaN}', None), ('"NaN"', None), ('{"x": "\\ud83d"}', None), ("[" * 3000 + "]" * 3000, None),
        ("9" * 5000, None), ('{"x": -1e999}', None), ('{"x": 1e300}', '{"x": 1e+300}'),
    ],
)  # fmt: skip
def test_arguments_are_json(arguments: str, read_as: str | None) -> None:
    text = f'{OPEN}{{"name": "f", "arguments": {arguments}}}{CLOSE}'
    assert read([text]) == ([text] if read_as is None else [(0, "f", read_as)])
    assert read([text.replace('"f"', '""')]) == [text.replace('"f"', '""')]


QWEN = "{% if tools %}" + OPEN + '{"name": <function-name>, "arguments": <args-json-object>}' + CLOSE


@pytest.mark.parametrize(
    ("template", "can"),
    [
        (QWEN, True), (QWEN.replace("tools", "functions"), False), (QWEN.replace(OPEN, "[TOOL_CALLS]"), False),
        (QWEN + "<function=name>", False), ("{{ tools }}" + OPEN + "name <arg_key>arguments</arg_key>", False),
        ("{{ tools }}" + OPEN, False),
    ],
)  # fmt: skip
def test_templates_ask_for_calls_in_one_form_or_another(template: str, can: bool) -> None:
    assert can_be_read(template) == can


def test_only_what_may_become_a_call_is_held_back() -> None:
    reader = ToolCallReader()
    pieces = ("It is", " <", "b> 3", " \n", "<tool", "s>", OPEN, " a", f"{OPEN} {{", "}")
    said = [reader.push(piece) for piece in pieces]
    assert said == [["It is"], [], [" <b> 3"], [], [], [" \n<tools>"], [], [OPEN, " a"], [], []]
    assert reader.push("", last=True) == [f"{OPEN} {{}}"]


# what the model says is a matter of the position: one piece of text after the other, then the end
PIECES = [
    "Let me look.",
    "\n<tool",
    '_call>\n{"name": "weather", "argu',
    'ments": {"city": "Zürich"}}\n</tool_call>',
    "\n",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "of a city", "strict": False,
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip
TEMPLATE = (
    "{% if tools %}w1 {% for tool in tools %}{{ 'w2 ' if tool.function.name == 'weather' }}{% endfor %}"
    '{# <tool_call>{"name": , "arguments": } #}{% endif %}{% for m in messages %}{{ m.content }} '
    "{% for call in m.tool_calls or [] %}{{ 'w3 ' if call.function.arguments.city == 'Bern' }}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def scripted():
    """A prompt of one token is answered with PIECES, then token 9 ends it."""
    server = Running(eos=[9])
    model, decode = server.model, server.tokenizer.decode
    model.by_sum = torch.zeros_like(model.by_sum)
    model.by_position = 50.0 * torch.eye(model.vocab_size)[[3, 4, 5, 6, 7, 9, 16]]
    words = dict(zip((3, 4, 5, 6, 7), PIECES))
    server.tokenizer.decode = lambda ids, **how: "".join(words.get(token) or decode([token], **how) for token in ids)
    server.tokenizer.chat_template = TEMPLATE
    yield server
    server.close()


def ask(server: Running, messages: list[dict] | str, **more: Any) -> Any:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    return server.client().chat.completions.create(model="tiny", messages=messages, temperature=0, **more)


# 7 tokens, so that the answer begins at the beginning of the period: two of the tools and five of the message
PROMPT = "w8 w8 w8 w8 w8"


def test_a_call_comes_back(scripted: Running) -> None:
    reply = ask(scripted, PROMPT, tools=[TOOL], tool_choice="auto", parallel_tool_calls=True)
    assert reply.usage.prompt_tokens == 7
    choice = reply.choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", PIECES[0])
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function", "weather", {"city": "Zürich"},
    )  # fmt: skip
    chunks = list(ask(scripted, PROMPT, tools=[TOOL], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == PIECES[0] and deltas[0].role == "assistant"
    (streamed,) = [one for delta in deltas for one in delta.tool_calls or []]
    assert streamed.index == 0 and streamed.function.model_dump() == call.function.model_dump()
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_calls_alone_in_a_stream(scripted: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripted.tokenizer, "decode", lambda ids, **how: "".join(OTHER for _ in ids))
    chunks = list(ask(scripted, PROMPT, tools=[TOOL], stream=True, max_tokens=3))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [one.index for delta in deltas for one in delta.tool_calls or []] == [0, 1, 2]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None] and not any(d.content for d in deltas)
    reply = ask(scripted, PROMPT, tools=[TOOL], max_tokens=3).choices[0]
    assert reply.message.content is None and len(reply.message.tool_calls) == 3 and reply.finish_reason == "length"


def test_a_stop_string_ends_calls_too(scripted: Running) -> None:
    for stop, calls, text in (("days", 1, PIECES[0]), ("argu", 0, "".join(PIECES[:3])[:-4]), ("\n<", 0, PIECES[0])):
        for stream in (False, True):
            reply = ask(scripted, PROMPT, tools=[TOOL], stop=stop, stream=stream)
            parts = [chunk.choices[0] for chunk in reply] if stream else reply.choices
            said = [part.delta if stream else part.message for part in parts]
            assert "".join(one.content or "" for one in said) == text
            assert sum(len(one.tool_calls or []) for one in said) == calls
            assert parts[-1].finish_reason == ("tool_calls" if calls else "stop")


def test_text_is_text_where_there_are_no_tools(scripted: Running) -> None:
    seven = "w8 w8 w8 w8 w8 w8 w8"
    for more in ({}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = ask(scripted, seven, **more).choices[0]
        assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
        assert choice.message.content == "".join(PIECES)


def test_a_call_that_is_cut_off_is_text(scripted: Running) -> None:
    choice = ask(scripted, PROMPT, tools=[TOOL], max_tokens=3).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("length", None)
    assert choice.message.content == "".join(PIECES[:3])
    choice = ask(scripted, PROMPT, tools=[TOOL], max_tokens=4).choices[0]  # whole, but the text is not
    assert choice.finish_reason == "length" and len(choice.message.tool_calls) == 1


def test_a_conversation_with_calls_goes_through_the_template(scripted: Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "user", "content": "w8"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "w8 w8"},
    ]  # fmt: skip
    assert ask(scripted, messages, tools=[TOOL], max_tokens=1).usage.prompt_tokens == 2 + 1 + 1 + 2
    odd_ones: list[Any] = [
        "x",
        [],
        [1],
        [{}],
        *([{"function": one}] for one in ("x", {"arguments": 3}, {"arguments": "{"})),
    ]
    for odd in odd_ones:
        messages[1]["tool_calls"] = odd
        with suppress(openai.BadRequestError):  # templates may dislike it; anything else would be ours
            ask(scripted, messages, max_tokens=1)


def test_what_the_template_is_given() -> None:
    from orthrus_triton.serving.schema import ChatRequest

    (given,) = ChatRequest.model_validate({"messages": [{"role": "user"}], "tools": [TOOL]}).template_tools
    assert given["function"] == {name: value for name, value in TOOL["function"].items() if name != "strict"}
    bare = {"type": "function", "function": {"name": "f"}}
    assert ChatRequest.model_validate({"messages": [{"role": "user"}], "tools": [bare]}).template_tools == [bare]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"tools": [{"type": "search"}]}, "tools.0.type"), ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
        *(({"tools": [TOOL], **more}, "tools: tokenizer must be one that llguidance can read") for more in (
            {"tool_choice": "required"}, {"parallel_tool_calls": False},
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        )),
    ],
)  # fmt: skip
def test_what_is_not_heeded_is_refused(scripted: Running, more: dict[str, Any], field: str) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        ask(scripted, "w8", **more)


def test_a_template_without_calls_is_refused(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="template does not ask for calls as <tool_call>"):
        ask(server, "w8", tools=[TOOL])
    assert ask(server, "w8", tools=[TOOL], tool_choice="none", max_tokens=2).choices[0].finish_reason == "length"


def test_tokenizers_that_leave_the_tags_out_are_refused(scripted: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(scripted.tokenizer), "all_special_tokens", property(lambda self: [OPEN]))
    with pytest.raises(openai.BadRequestError, match="tools: <tool_call> is a special token of this tokenizer"):
        ask(scripted, "w8", tools=[TOOL])
    scripted.tokenizer.chat_template = {"rag": "x"}  # none of them is for what is asked
    try:
        with pytest.raises(openai.BadRequestError, match="messages: "):
            ask(scripted, "w8", tools=[TOOL])
    finally:
        scripted.tokenizer.chat_template = TEMPLATE
