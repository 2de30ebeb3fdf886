"""Texts that keep to a schema: the same in both modes, whole JSON, and masks that are a function of the text alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton.models.grammar import GrammarProcessor, Grammars
from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.testing import TinyDualViewModel
from tests.cli_models import assert_bad_input, make_tokenizer, run

pytest.importorskip("llguidance", reason="needs llguidance")
VOCAB = 280  # some more than the tokenizer knows, as models have
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["name", "tags", "size"],
    "properties": {
        "name": {"enum": ["ant", "anteater", "bee"]}, "size": {"type": "integer", "minimum": 3, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB, [tokenizer.eos_token_id])


def check(value: dict) -> None:
    assert set(value) == {"name", "tags", "size"} and value["name"] in ("ant", "anteater", "bee")
    assert 3 <= value["size"] <= 120 and len(value["tags"]) <= 3 and all(type(tag) is bool for tag in value["tags"])


@pytest.mark.parametrize("anchor_rows", [0, 1])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_texts_are_json_of_the_schema_and_those_of_ar(tokenizer, grammars, rule: str, anchor_rows: int) -> None:
    torch.manual_seed(0)
    model = TinyDualViewModel(vocab_size=VOCAB, anchor_rows=anchor_rows)
    prompts = [torch.tensor([5, 6, 7 + n]) for n in range(4)]
    texts = {}
    for mode in ("consensus", "ar"):
        # the last one says what it likes, beside the others
        params = [
            SamplingParams(
                temperature=0.9, seed=n, logits_processor=None if n == 3 else grammars.of_schema(SCHEMA, 3)
            )
            for n in range(4)
        ]  # fmt: skip
        output = ConsensusDecoder(model, mode=mode).generate(
            prompts, max_new_tokens=400, eos_token_id=tokenizer.eos_token_id, params=params, sampling=rule
        )
        texts[mode] = [sequence[3:].tolist() for sequence in output.sequences]
        for text in texts[mode][:3]:
            assert text[-1] == tokenizer.eos_token_id
            check(json.loads(tokenizer.decode(text[:-1])))
    if rule == "coupled":
        assert texts["consensus"] == texts["ar"]


def allowed(processor: GrammarProcessor, text: list[int]) -> list[int]:
    scores = processor(torch.tensor([[9, *text]]), torch.zeros(1, VOCAB))
    assert set(scores.unique().tolist()) <= {0.0, -torch.inf}
    return (scores[0] == 0).nonzero()[:, 0].tolist()


@given(data=st.data())
def test_a_mask_is_a_function_of_the_text(grammars, data: st.DataObject) -> None:
    """Whatever was asked before: texts that go on, go back, and go on in another way."""
    used, texts = grammars.of_schema(SCHEMA, 1), [[]]
    eos = 0
    for _ in range(25):
        text = data.draw(st.sampled_from(texts))[: data.draw(st.integers(0, 40))]
        tokens = allowed(used, text)
        assert tokens and tokens == allowed(grammars.of_schema(SCHEMA, 1), text)
        going_on = [token for token in tokens if token != eos]
        if going_on:
            texts.append([*text, data.draw(st.sampled_from(going_on))])


def test_any_object_will_do_without_a_schema(tokenizer, grammars) -> None:
    processor = grammars.of_schema(None, 1)
    starts = {tokenizer.decode([token]) for token in allowed(processor, [])}
    assert "{" in starts and "[" not in starts and "<|end|>" not in starts
    text = tokenizer('{"a": [1, null]}')["input_ids"]
    assert allowed(processor, text) == [tokenizer.eos_token_id]


def test_white_space_has_an_end(tokenizer, grammars) -> None:
    processor, (space,) = grammars.of_schema(SCHEMA, 1), tokenizer(" ")["input_ids"]
    text = tokenizer("{")["input_ids"]
    for _ in range(64):
        assert space in allowed(processor, text)
        text.append(space)
    assert allowed(processor, text) == tokenizer('"')["input_ids"]


def test_grammars_in_the_syntax_of_lark(tokenizer, grammars) -> None:
    processor = grammars.of('start: "yes" | "no"', 1)
    assert [tokenizer.decode([token]) for token in allowed(processor, [])] == ["n", "y"]


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "objekt"}, "objekt"), ({"type": "object", "if": {}}, "if"), ({"$ref": "#/x"}, "x"),
        ({"$ref": "#"}, "grammar must be one that llguidance can keep to"),
        ({"properties": {"default": {"minimum": 2**53 + 1}}}, "minimum must be within .* got 9007199254740993"),
        ({"anyOf": [{}, {"items": {"exclusiveMaximum": -1e20}}]}, "exclusiveMaximum must be within"),
        ({"enum": [object()]}, "JSON can say"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_to_is_said(grammars, schema: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        grammars.of_schema(schema, 1)


@pytest.mark.parametrize("depth", [300, 20_000])
def test_schemas_nested_too_deeply_are_refused(grammars, depth: int) -> None:
    schema: dict = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="recursion"):
        grammars.of_schema(schema, 1)
    while schema:  # layer by layer: Python's own way to free it all at once may overflow a small stack
        schema = schema["items"]


def test_a_text_that_broke_the_grammar_has_no_next_token_and_harms_no_other(tokenizer, grammars) -> None:
    processor = grammars.of_schema(SCHEMA, 1)
    wrong, right = tokenizer("[")["input_ids"], tokenizer('{"')["input_ids"]
    assert allowed(processor, wrong) == [] and "doesn't satisfy the grammar" in processor.error
    assert allowed(processor, right) == allowed(grammars.of_schema(SCHEMA, 1), right) != []


def test_the_command_line(model_folder, tmp_path) -> None:
    file = tmp_path / "schema.json"
    arguments = ("generate", model_folder, "the text", "--raw", "--stats", "none", "--json-schema", file)
    file.write_text(json.dumps(SCHEMA))
    texts = [run(*arguments, "--max-new-tokens", 400, "--mode", mode).stdout for mode in ("consensus", "ar")]
    check(json.loads(texts[0]))
    assert texts[0] == texts[1]
    deep = '{"a":' * 100_000 + "1" + "}" * 100_000
    for content, problem in (
        ("{", "must be a JSON file"), (deep, "must be a JSON file"), ("[]", "holds a list"), ('{"type": 5}', "llguid"),
    ):  # fmt: skip
        file.write_text(content)
        assert_bad_input(run(*arguments), problem)
    file.unlink()
    assert_bad_input(run(*arguments), "--json-schema")


def test_numbers_that_are_no_limits_may_be_large(tokenizer, grammars) -> None:
    schema = {"properties": {"minimum": {"const": 2**60}}, "default": {"maximum": 2**60}, "maximum": 2**53}
    processor = grammars.of_schema({"type": "object", "additionalProperties": False, **schema}, 1)
    assert allowed(processor, tokenizer(f'{{"minimum":{2**60}}}')["input_ids"]) == [tokenizer.eos_token_id]


def test_a_parser_that_gives_up_is_an_error_of_the_command(model_folder, tmp_path, monkeypatch) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    monkeypatch.setattr(GrammarProcessor, "_go_to", lambda keep, text: not text or keep._matcher.consume_tokens([3, 3]))
    result = run("generate", model_folder, "the text", "--raw", "--json-schema", file)
    assert result.exit_code == 2 and "schema.json is too much for the parser: Parser Error" in result.stderr


def test_what_is_missing_is_said(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="eos_token_ids must name a token"):
        Grammars(tokenizer, VOCAB, [])
    with pytest.raises(ValueError, match="tokenizer must be one that llguidance can read"):
        Grammars(object(), VOCAB, [0])
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(ImportError, match="pip install .llguidance"):
        Grammars(tokenizer, VOCAB, [0])
