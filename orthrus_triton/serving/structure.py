"""What keeps a reply to the structure that a client asks for: JSON of a schema, or calls of tools.
A grammar bans the tokens that would leave it, in drafts and in what the frozen model says."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException

from orthrus_triton.models.grammar import WHITESPACE, GrammarProcessor, Grammars, json_grammar
from orthrus_triton.serving.schema import ChatRequest, CompletionRequest
from orthrus_triton.serving.schema_parts import Function
from orthrus_triton.serving.tool_calls import CLOSE, OPEN


class Structures:
    """Makes the function that keeps a reply to its structure. What it knows of the tokenizer takes a second to find
    out, once, when a client first asks for a structure.

    Args:
        tokenizer, vocab_size, eos_token_ids: as in `Grammars`.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._of_model = (tokenizer, vocab_size, eos_token_ids)
        self._grammars: Grammars | None = None
        self._making = threading.Lock()

    def of(self, body: ChatRequest | CompletionRequest, prompt_lens: Sequence[int]) -> list[GrammarProcessor | None]:
        """One for each choice, behind a prompt of so many tokens; None for free text.

        Raises:
            HTTPException: the structure cannot be kept to.
        """
        tools, wanted = getattr(body, "kept_tools", None), body.response_format
        if tools is None and (wanted is None or wanted.type == "text"):
            return [None] * len(prompt_lens)
        if body.min_tokens:
            raise HTTPException(400, f"min_tokens: must be 0 where a reply has a structure, but got {body.min_tokens}")
        try:
            with self._making:
                self._grammars = self._grammars or Grammars(*self._of_model)
            if tools is None:
                one = self._grammars.of_schema(wanted.json_schema and wanted.json_schema.schema_, 0)
                return [one.behind(prompt_len) for prompt_len in prompt_lens]
            for tool in tools:  # alone, for what is wrong with one shows at the beginning of its arguments
                self._of_tool(tool, body.must_call)
            grammar = grammar_of_calls(
                tools, self._of_model[0], body.must_call, several=body.parallel_tool_calls is not False
            )
            one = self._grammars.of(grammar, 0)
            return [one.behind(prompt_len) for prompt_len in prompt_lens]
        except (ImportError, ValueError, RecursionError) as error:
            raise HTTPException(400, f"{body.structured_field}: {error}") from error

    def _of_tool(self, tool: Function, alone: bool) -> None:
        try:
            self._grammars.of_schema(arguments_of(tool, alone), 0)
        except ValueError as error:
            raise ValueError(f"parameters of {tool.name!r}: {error}") from error


def arguments_of(tool: Function, alone: bool) -> dict[str, Any]:
    """The schema that a call's arguments keep to: that of the tool, but any object where the model may say what it
    likes and the tool is not strict."""
    return {"type": "object", **((tool.parameters or {}) if alone or tool.strict else {})}


def grammar_of_calls(tools: Sequence[Function], tokenizer: Any, alone: bool, several: bool) -> str:
    """Calls in the form of `tool_calls`, each of one of these tools.

    Args:
        tools: of a request.
        tokenizer: of transformers. What it has a token for (tags, as of Qwen3) the model says with that.
        alone: nothing but calls, one at least; otherwise any text may stand before and behind one, or alone.
        several: more than one.

    Raises:
        ValueError: a tool whose parameters cannot be kept to.
    """
    added = tokenizer.added_tokens_decoder
    ids = {token.content: id for id, token in added.items()}
    opening, closing = (f"<[{ids[tag]}]>" if tag in ids else json.dumps(tag) for tag in (OPEN, CLOSE))
    any_of = " | ".join(f"call{n}" for n in range(len(tools)))
    rules = [f"inside: NEWLINE ({any_of}) NEWLINE {closing}", 'NEWLINE: "\\n"', f"SPACE: /{WHITESPACE}/"]
    for n, tool in enumerate(tools):
        # parameters are a schema of their own: what they refer to is in them
        rules += [
            f'call{n}: "{{" SPACE {_says("name")} SPACE ":" SPACE {_says(tool.name)} SPACE ","'
            f' SPACE {_says("arguments")} SPACE ":" SPACE arguments{n} SPACE "}}"',
            f"arguments{n}: %json {json_grammar(arguments_of(tool, alone))}",
        ]
    if alone:
        rules += [f"start: call{' (NEWLINE call)*' if several else ''}", f"call: {opening} inside"]
        return "\n".join(rules)
    # no pattern matches an added token of this form: these the model may say, too, such as <think>
    others = [
        id
        for id, token in added.items()
        if not token.special and token.content[:1] + token.content[-1:] == "<>" and OPEN not in token.content
        and token.content != CLOSE
    ]  # fmt: skip
    said = "said*" if others else ""
    rules += [f"said: TEXT? <[{','.join(map(str, others))}]>"] if others else []
    rules += ["lead: TEXT? " + opening] if OPEN in ids else [f"lead[lazy]: /(?s:.*){OPEN}/"]
    rules += [f"TEXT: /(?s:.+)/ & ~/(?s:.*){OPEN}(?s:.*)/"]
    call, text = f"{said} lead inside", f"{said} TEXT?"
    return "\n".join([*rules, f"start: ({call})* {text}" if several else f"start: {call} | {text}"])


def _says(text: str) -> str:
    """What matches this text as JSON has it."""
    return json.dumps(json.dumps(text, ensure_ascii=False), ensure_ascii=False)
