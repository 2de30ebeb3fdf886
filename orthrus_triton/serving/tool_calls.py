"""Tool calls in a model's text, as Qwen3, too, writes them: `<tool_call>{"name": "f", "arguments": {}}</tool_call>`.
While text comes, what may become a call is held back; what turns out to be none is text after all."""

from __future__ import annotations

import json
import secrets
from typing import Any, NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A function to be called by the client: which call of the text it is, a name, and arguments in JSON."""

    index: int
    id: str
    name: str
    arguments: str

    @classmethod
    def read(cls, index: int, text: str) -> ToolCall | None:
        """What stood between the tags; None if that is no call."""
        try:
            call = json.loads(text)
        except ValueError:
            return None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return None
        arguments = call.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return cls(index, f"call_{secrets.token_hex(12)}", call["name"], arguments)

    def field(self) -> dict[str, Any]:
        """As a message has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


Part = str | ToolCall


def can_be_read(template: str) -> bool:
    """Whether a chat template shows a model its tools, and asks for calls in the form that is read here."""
    return "tools" in template and OPEN in template


def end_of_call(text: str, start: int) -> int:
    """Where the tag is that closes a call whose inside begins at `start`; -1 if it is not there yet."""
    end = text.find(CLOSE, start)
    while end >= 0:
        try:
            json.loads(text[start:end])
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):  # the tag is part of an argument
                end = text.find(CLOSE, end + 1)
                continue
        break
    return end


class ToolCallReader:
    """Splits text that comes piece by piece. White space before a call, and after the last one, is no text.

    Attributes:
        count: calls so far.
    """

    def __init__(self) -> None:
        self.count, self._held = 0, ""

    def push(self, text: str, last: bool = False) -> list[Part]:
        """Take more text, the last or not; give what is certain now."""
        self._held += text
        parts: list[Part] = []
        while (start := self._held.find(OPEN)) >= 0 and (end := end_of_call(self._held, start + len(OPEN))) >= 0:
            call, end = ToolCall.read(self.count, self._held[start + len(OPEN) : end]), end + len(CLOSE)
            parts.append(self._held[:end] if call is None else self._held[:start].rstrip())
            self._held = self._held[end:]
            if call is not None:
                self.count += 1
                parts.append(call)
        if last:
            certain = len(self._held) if self._held.strip() or not self.count else 0
        else:
            begun = next(n for n in range(len(OPEN), -1, -1) if self._held.endswith(OPEN[:n]))
            certain = len(self._held[: start if start >= 0 else len(self._held) - begun].rstrip())
        parts.append(self._held[:certain])
        self._held = self._held[certain:]
        return [part for part in parts if part]
