"""Options of a chat template: as a request or a command gives them, and nothing that would replace the template."""

from __future__ import annotations

import json

import pytest

from orthrus_triton.models.chat_template import require_template_options, set_template_options
from tests.cli_models import assert_bad_input, make_tokenizer, run

# as Qwen3's: thoughts are left out where they are not wanted; `tone` is looked at in a macro
TEMPLATE = (
    "{% macro ending() %}{{ tone | default('') }}{% endmacro %}"
    "{% for m in messages %}{% generation %}{{ m['content'] }} {% endgeneration %}{% endfor %}{{ ending() }}"
    "{% set ns = 1 %}{% if false %}{{ bos_token }}{{ raise_exception('no') }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}no thoughts{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def templated():
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = TEMPLATE, "<|user|>"
    return tokenizer


def text_of(tokenizer, **options) -> str:
    return tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)


@pytest.mark.parametrize("several", [False, True])
def test_options_hold_unless_a_call_says_otherwise(templated, several: bool) -> None:
    if several:
        templated.chat_template = {"default": TEMPLATE, "tool_use": "tools " + TEMPLATE}
    assert text_of(templated) == "hello "
    tone = "\u00e9t\u00e9 \U0001f600 \"quoted\" 'twice' \\n {{ 1 }}"
    set_template_options(templated, {"enable_thinking": False, "tone": tone})
    assert text_of(templated) == f"hello {tone}no thoughts"
    assert text_of(templated, enable_thinking=True, tone="b") == "hello b"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with_tools = text_of(templated, tools=tools)
    assert with_tools == f"tools hello {tone}no thoughts" if several else f"hello {tone}no thoughts"


@pytest.mark.parametrize(
    "name",
    [
        "thinking",
        "messages",
        "tools",
        "chat_template",
        "m[",
        "",
        "enable",
        "no",
        "m",
        "ns",
        "bos_token",
        "raise_exception",
    ],
)
def test_what_is_no_option_is_named(templated, name: str) -> None:
    with pytest.raises(ValueError, match="is no option of this model's chat template") as error:
        require_template_options(templated, {"enable_thinking": True, name: "x"})
    assert repr(name) in str(error.value)


def test_with_tools_the_options_are_those_of_their_template(templated) -> None:
    templated.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}{{ plan }}"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    require_template_options(templated, {"plan": True}, tools)
    require_template_options(templated, {"tone": "x"})
    for options, given in (({"plan": True}, None), ({"tone": "x"}, tools)):
        with pytest.raises(ValueError, match="is no option of this model's chat template"):
            require_template_options(templated, options, given)


@pytest.mark.parametrize("beginning", ["\n", "  ", "\n\n  \n", "{# #}\n", "{%- if tone %}\n", ""])
def test_what_a_template_begins_with_stays(templated, beginning: str) -> None:
    templated.chat_template = beginning + "  {% for m in messages %}{{ m['content'] }}{% endfor %}{{ tone }}"
    templated.chat_template += "{% endif %}" if "if" in beginning else ""
    expected = text_of(templated, tone="x")
    set_template_options(templated, {"tone": "x"})
    assert text_of(templated) == expected


def test_values_and_models_that_cannot_be(templated) -> None:
    with pytest.raises(ValueError, match="tone must be true, false, a number or a text, but got None"):
        set_template_options(templated, {"tone": None})
    with pytest.raises(ValueError, match="tone must be true, false, a number or a text, but got nan"):
        set_template_options(templated, {"tone": float("nan")})
    assert templated.chat_template == TEMPLATE
    set_template_options(templated, {"tone": 1.5, "enable_thinking": True})
    assert text_of(templated) == "hello 1.5"
    templated.chat_template = None
    with pytest.raises(ValueError, match=r"has no chat template, which could have the options \['tone'\]"):
        set_template_options(templated, {"tone": 1})


def test_commands_take_them(model_folder, tmp_path, monkeypatch) -> None:
    option, said = "--chat-template-kwargs", []
    monkeypatch.setattr("orthrus_triton.cli.generate.text_streamer", lambda _: None)
    prompts = tmp_path / "p.txt"
    prompts.write_text("hello there\n")
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerBase.apply_chat_template",
        lambda self, messages, **how: said.append(self.chat_template) or "hello",
    )
    config = json.loads((model_folder / "tokenizer_config.json").read_text())
    folder = tmp_path / "with_template"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    how = ("--prompts", prompts, "--max-new-tokens", 2)
    for command in (
        ("generate", folder, "hello", "--max-new-tokens", 2), ("verify", "--model", folder, *how),
        ("evaluate", "--model", folder, *how), ("distill-data", tmp_path / "data", "--model", folder, *how),
    ):  # fmt: skip
        result = run(*command, option, '{"enable_thinking": false}')
        assert result.exit_code == 0, (command[0], result.stderr, result.exception)
        assert "set enable_thinking = false" in said[-1]
        assert_bad_input(run(*command, option, '{"a": 1}'), "'a' is no option")
        for value in ("{", "[1]"):
            result = run(*command, option, value)
            assert result.exit_code == 2 and "must be a JSON object" in result.stderr
    assert_bad_input(run("generate", folder, "hello", "--raw", option, '{"tone": 1}'), "this prompt is raw")
    prompts_only = run("distill-data", tmp_path / "p.jsonl", "--prompts", prompts, "--prompts-only", option, '{"a": 1}')
    assert_bad_input(prompts_only, f"{option} is for answers")
