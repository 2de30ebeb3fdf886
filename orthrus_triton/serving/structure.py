"""What keeps a reply to the structure that a client asks for: JSON of a schema, or calls of tools.
A grammar bans the tokens that would leave it, in drafts and in what the frozen model says."""

from __future__ import annotations

import json
import threading
from typing import Any

from fastapi import HTTPException

from orthrus_triton.models.grammar import WHITESPACE, GrammarProcessor, Grammars
from orthrus_triton.serving.schema import ChatRequest, CompletionRequest
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

    def of(self, body: ChatRequest | CompletionRequest, prompt_len: int) -> GrammarProcessor | None:
        """None for free text.

        Raises:
            HTTPException: the structure cannot be kept to.
        """
        forced, wanted = getattr(body, "forced_tools", None), body.response_format
        if forced is None and (wanted is None or wanted.type == "text"):
            return None
        if body.min_tokens:
            raise HTTPException(400, f"min_tokens: must be 0 where a reply has a structure, but got {body.min_tokens}")
        field = "response_format" if forced is None else "tools"
        try:
            with self._making:
                self._grammars = self._grammars or Grammars(*self._of_model)
            if forced is None:
                return self._grammars.of_schema(wanted.json_schema and wanted.json_schema.schema_, prompt_len)
            return self._grammars.of(grammar_of_calls(forced, body.parallel_tool_calls is not False), prompt_len)
        except (ImportError, ValueError, RecursionError) as error:
            raise HTTPException(400, f"{field}: {error}") from error


def grammar_of_calls(tools: list[dict[str, Any]], several: bool) -> str:
    """One call, or several, in the form of `tool_calls`, each of one of these tools."""
    kinds = [
        {
            "type": "object", "additionalProperties": False, "required": ["name", "arguments"],
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
        }
        for tool in tools
    ]  # fmt: skip
    calls = [
        f"call{n}: %json {json.dumps({**kind, 'x-guidance': {'whitespace_pattern': WHITESPACE}})}"
        for n, kind in enumerate(kinds)
    ]
    any_of = " | ".join(f"call{n}" for n in range(len(calls)))
    call = f'call: "{OPEN}\\n" ({any_of}) "\\n{CLOSE}"'
    return "\n".join([f"start: call{' (NEWLINE call)*' if several else ''}", 'NEWLINE: "\\n"', call, *calls])
