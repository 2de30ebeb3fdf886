"""Replies with a structure, over HTTP: JSON of a schema and calls that must come, from a model that says anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from orthrus_triton.models.grammar import GrammarProcessor, Grammars
from orthrus_triton.serving.schema_parts import Function
from orthrus_triton.serving.structure import grammar_of_calls
from orthrus_triton.serving.tool_calls import CLOSE, OPEN
from orthrus_triton.testing import TinyDualViewModel
from tests.cli_models import make_tokenizer
from tests.serving.running import Running, openai

pytest.importorskip("llguidance", reason="needs the extra [serve]")

TEMPLATE = (
    "{% if tools %}<tool_call>arguments{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["city", "days"],
    "properties": {"city": {"enum": ["Bern", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
}  # fmt: skip
NOTHING = {"type": "object", "additionalProperties": False, "properties": {}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
NOW = {"type": "function", "function": {"name": "now", "parameters": NOTHING}}
NAME = {"type": "function"}
DEEP = json.loads('{"not":' * 300 + "{" + "}" * 301)
ENDLESS = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
BROKEN = NOW | {"function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "objekt"}}}}}
NAMED = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server():
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = TinyDualViewModel(vocab_size=len(tokenizer) + 8, block_size=4)
    model.eos_token_ids = [tokenizer.eos_token_id]
    server = Running(model.eos_token_ids, model=model, tokenizer=tokenizer)
    yield server
    server.close()


def ask(server: Running, seed: int, **more: Any) -> Any:
    messages = [{"role": "user", "content": "So?"}]
    return server.client().chat.completions.create(model="tiny", messages=messages, seed=seed, **more)


def check(trip: dict[str, Any]) -> None:
    assert set(trip) == {"city", "days"} and trip["city"] in ("Bern", "Zürich") and 1 <= trip["days"] <= 14


def test_json_of_a_schema_whole_and_streamed_beside_free_text(server: Running) -> None:
    free = ask(server, 5, max_tokens=20).choices[0].message.content
    for seed in range(3):
        choice = ask(server, seed, response_format=NAMED, logprobs=True).choices[0]
        assert choice.finish_reason == "stop" and len(choice.logprobs.content) >= 10
        check(json.loads(choice.message.content))
        chunks = list(ask(server, seed, response_format=NAMED, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert ask(server, 5, max_tokens=20).choices[0].message.content == free
    completion = server.client().completions.create(
        model="tiny", prompt="So?", seed=0, extra_body={"response_format": NAMED}
    )
    check(json.loads(completion.choices[0].text))
    several = server.client().completions.create(
        model="tiny", prompt=["So?", "And where to then?"], n=2, seed=0, extra_body={"response_format": NAMED}
    )
    assert several.choices[0].text == completion.choices[0].text
    for choice in several.choices:  # of prompts of several lengths
        check(json.loads(choice.text))


def test_an_object_is_whole_or_cut_at_the_limit(server: Running) -> None:
    for seed in range(3):
        choice = ask(server, seed, response_format={"type": "json_object"}, max_tokens=60).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.finish_reason == "length" and choice.message.content.lstrip().startswith("{")


# a tool whose parameters refer to parts of themselves, and to themselves
LINKED = {
    "type": "object", "additionalProperties": False, "required": ["at", "next"],
    "properties": {"at": {"$ref": "#/$defs/Point"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "$defs": {
        "Point": {
            "type": "object", "additionalProperties": False, "required": ["x"],
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
        }
    },
}  # fmt: skip
LINE = {"type": "function", "function": {"name": 'trait "é"', "parameters": LINKED}}


def test_parameters_may_refer_to_their_own_parts(server: Running) -> None:
    for seed in range(3):
        reply = ask(server, seed, tools=[LINE], tool_choice="required", max_tokens=2500)
        for call in reply.choices[0].message.tool_calls:
            link = json.loads(call.function.arguments)
            assert call.function.name == 'trait "é"'
            while link is not None:
                assert set(link) == {"at", "next"} and 0 <= link["at"]["x"] <= 99
                link = link["next"]


def test_of_tools_that_are_not_strict_arguments_are_free_where_text_is(server: Running) -> None:
    tools = [BROKEN, WEATHER]
    assert ask(server, 0, tools=tools, max_tokens=5).choices[0].finish_reason == "length"
    assert ask(server, 0, tools=[BROKEN], max_tokens=5, parallel_tool_calls=False).choices[0].message.content


@pytest.mark.parametrize("word", ["tool_call", "call", "<tool"])
def test_words_of_the_tag_that_are_tokens_are_no_way_around_it(word: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([word])
    grammar = grammar_of_calls([Function(**WEATHER["function"])], tokenizer, alone=False, several=True)
    keep = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]).of(grammar, 0)
    tokens = tokenizer('So: <tool_call>\n{"name": "rm')["input_ids"]
    scores = [keep(torch.tensor([tokens[:n]]), torch.zeros(1, len(tokenizer)))[0] for n in range(len(tokens))]
    assert any(row[token] != 0 for row, token in zip(scores, tokens))


@pytest.mark.parametrize(
    "parameters",
    [
        None, {}, {"properties": {"x": {"type": "null"}}, "required": ["x"]}, {"anyOf": [{"type": "string"}, SCHEMA]},
        {"$ref": "#/$defs/Trip", "$defs": {"Trip": SCHEMA}},
    ],
)  # fmt: skip
def test_arguments_are_an_object_though_no_type_is_named(parameters: dict[str, Any] | None) -> None:
    tokenizer = make_tokenizer()
    grammar = grammar_of_calls([Function(name="f", parameters=parameters)], tokenizer, alone=True, several=False)
    keep = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]).of(grammar, 0)
    begun = tokenizer('<tool_call>\n{"name": "f", "arguments":')["input_ids"]
    scores = keep(torch.tensor([begun]), torch.zeros(1, len(tokenizer)))[0]
    may = {tokenizer.decode([token]).strip() for token in (scores == 0).nonzero()[:, 0].tolist()}
    assert {"", "{"} <= may and all(piece in ("", "{") or piece.startswith("{") for piece in may)


@pytest.mark.parametrize("more", [{}, {"parallel_tool_calls": False}])
def test_strict_tools_leave_the_model_free_to_say_what_it_likes(server: Running, more: dict[str, Any]) -> None:
    for seed in range(3):
        said = ask(server, seed, tools=[WEATHER], max_tokens=40, **more).choices[0]
        assert said.finish_reason in ("length", "stop") and said.message.content and not said.message.tool_calls


CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 3}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "several", "one"),
    [
        ("", "any", "any"), ("<think>So?<think>", "any", "any"), ("It is < 3 <tool_cal", "any", "any"),
        ("a <tool_call>", "\n", "\n"), ('é <tool_call>\n{"name": "now', "banned", "banned"),
        ('é <tool_call>\n{"name": "weather", "arguments": {"days"', "banned", "banned"),
        (CALLED.removesuffix(CLOSE), CLOSE, CLOSE), (f"So: {CALLED}", "any", "end"),
        (f"<think>{CALLED}", "any", "end"), (f"{CALLED}\nand {CALLED}, I think", "any", "banned"),
        (f"{CALLED}, I think", "any", "banned"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tags", [[], ["<tool_call>", "</tool_call>"], ["<tool_call>", "<think>"], ["<think>"]])
def test_calls_among_text_are_of_the_tools(text: str, several: str, one: str, tags: list[str]) -> None:
    """Where several calls may come, or one: whether a text is banned, and what may or must follow otherwise."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(tags)
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    tokens, end = tokenizer(text)["input_ids"], tokenizer.decode([tokenizer.eos_token_id])
    for follows, is_several in ((several, True), (one, False)):
        grammar = grammar_of_calls([Function(**WEATHER["function"])], tokenizer, alone=False, several=is_several)
        keep = grammars.of(grammar, 0)
        scores = [keep(torch.tensor([tokens[:n]]), torch.zeros(1, len(tokenizer)))[0] for n in range(len(tokens) + 1)]
        assert any(row[token] != 0 for row, token in zip(scores, tokens)) == (follows == "banned")
        if follows != "banned":
            may = {tokenizer.decode([token]) for token in (scores[-1] == 0).nonzero()[:, 0].tolist()}
            if follows == "any":
                assert {end, "a", "<", "\n"} < may and ("<tool_call>" in may) == ("<tool_call>" in tags)
                assert CLOSE not in may and may.isdisjoint({*tokenizer.all_special_tokens} - {end})
            elif follows == "end":
                assert may == {end}
            else:
                assert may and all(follows.startswith(piece) for piece in may)
                assert CLOSE not in tags or follows != CLOSE or may == {CLOSE}


def test_tags_that_are_tokens_are_said_as_such() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([OPEN, CLOSE])
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    keep = grammars.of(grammar_of_calls([Function(**WEATHER["function"])], tokenizer, alone=True, several=True), 0)
    tokens = tokenizer(f"{CALLED}\n{CALLED}")["input_ids"]
    for n, token in enumerate(tokens):
        scores = keep(torch.tensor([tokens[:n]]), torch.zeros(1, len(tokenizer)))[0]
        assert scores[token] == 0 and (n > 0 or (scores == 0).sum() == 1)


def test_a_tag_that_is_a_token_is_not_spelt_out() -> None:
    """It would be read as one all the same, and nothing would keep the call to its tool."""
    tokenizer = make_tokenizer()
    letters = tokenizer(OPEN)["input_ids"]
    tokenizer.add_tokens([OPEN, CLOSE])
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    keep = grammars.of(grammar_of_calls([Function(**WEATHER["function"])], tokenizer, alone=False, several=True), 0)
    scores = keep(torch.tensor([letters[:-1]]), torch.zeros(1, len(tokenizer)))[0]
    assert scores[letters[-2]] == 0 and scores[letters[-1]] == -torch.inf


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"tool_choice": "required"}, {"weather", "now"}),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"weather", "now"}),
        (
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": False},
            {"weather"},
        ),
    ],
)
def test_calls_that_must_come_do(server: Running, more: dict[str, Any], names: set[str], stream: bool) -> None:
    counts = set()
    for seed in range(4):
        reply = ask(server, seed, tools=[WEATHER, NOW], max_tokens=1000, stream=stream, **more)
        parts = [chunk.choices[0] for chunk in reply] if stream else reply.choices
        said = [part.delta if stream else part.message for part in parts]
        assert parts[-1].finish_reason == "tool_calls" and not any(one.content for one in said)
        calls = [call.function for one in said for call in one.tool_calls or []]
        counts.add(len(calls))
        for call in calls:
            assert call.name in names
            arguments = json.loads(call.arguments)
            check(arguments) if call.name == "weather" else None
            assert call.name == "weather" or arguments == {}
    assert (max(counts) > 1) == ("parallel_tool_calls" not in more) and min(counts) > 0


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format: .*json_schema must be given"),
        ({"response_format": {"type": "text", "json_schema": NAMED["json_schema"]}}, "json_schema must be given"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": NAMED | {"json_schema": {"name": "deep", "schema": DEEP}}}, "response_format:.*recursion"),
        ({"response_format": ENDLESS}, "response_format: grammar must be"),
        ({"response_format": NAMED, "extra_body": {"min_tokens": 3}}, "min_tokens: must be 0"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}},
            "response_format: .*objekt",
        ),
        ({"tools": [NOW], "tool_choice": NAME | {"function": {"name": "then"}}}, "tool_choice"),
        ({"tools": [NOW, NOW]}, r"tools must have names of their own, but got \['now', 'now'\]"),
        ({"tools": [NOW | {"function": {"name": "f", "parameters": {"type": 3}}}]}, "tools.*schema of an object"),
        ({"tools": [BROKEN], "tool_choice": "required"}, "tools: parameters of 'f': .*objekt"),
        (
            {"tools": [NOW, NOW | {"function": {"name": "g", "parameters": {"$ref": "#"}}}], "tool_choice": "required"},
            "tools: parameters of 'g': grammar must be",
        ),
        ({"tools": [BROKEN | {"function": BROKEN["function"] | {"strict": True}}]}, "tools: .*objekt"),
    ],
)  # fmt: skip
def test_structures_that_cannot_be_kept_to_are_refused(server: Running, more: dict[str, Any], problem: str) -> None:
    with pytest.raises(openai.BadRequestError, match=problem):
        ask(server, 0, **more)


def test_a_parser_that_gives_up_ends_its_request_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    go_to = GrammarProcessor._go_to

    def gives_up(processor: GrammarProcessor, text: list[int]) -> bool:
        if len(text) > 5:
            processor._matcher.consume_tokens([200, 200])
            return True
        return go_to(processor, text)

    monkeypatch.setattr(GrammarProcessor, "_go_to", gives_up)
    with pytest.raises(openai.BadRequestError, match="response_format: .*doesn't satisfy the grammar"):
        ask(server, 0, response_format=NAMED)
    monkeypatch.undo()
    check(json.loads(ask(server, 0, response_format=NAMED).choices[0].message.content))
