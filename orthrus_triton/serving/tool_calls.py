"""Tool calls in a model's text, as Qwen3, too, writes them: `<tool_call>{"name": "f", "arguments": {}}</tool_call>`.
While text comes, what may become a call is held back; what turns out to be none is text after all."""

from __future__ import annotations

import json
import secrets
from typing import Any, NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL = OPEN + '{"name": ..., "arguments": ...}' + CLOSE


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
            call = json.loads(text, parse_constant=_refuse)
            name, arguments = call["name"], call.get("arguments")
            if isinstance(arguments, str) and arguments:
                json.loads(arguments, parse_constant=_refuse)
            else:
                arguments = {} if arguments in (None, "") else arguments
                arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)  # 1e999 is read as infinity
            (name + arguments).encode()  # JSON can say half of a surrogate pair
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return cls(index, f"call_{secrets.token_hex(12)}", name, arguments) if name else None

    def field(self) -> dict[str, Any]:
        """As a message has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def can_be_read(template: str) -> bool:
    """Whether a chat template shows a model its tools, and asks for calls in the form that is read here: others have
    arguments in tags of their own."""
    others = any(tag in template for tag in ("<function=", "<arg_key>"))
    return "tools" in template and OPEN in template and "arguments" in template and not others


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def end_of_call(text: str, start: int) -> int:
    """Where the tag is that closes a call whose inside begins at `start`; -1 if it is not there yet."""
    end = text.find(CLOSE, start)
    while end >= 0:
        try:
            json.loads(text[start:end])
        except (ValueError, RecursionError) as error:
            if "Unterminated string" in str(error):  # the tag is part of an argument
                end = text.find(CLOSE, end + 1)
                continue
        break
    return end


class ToolCallReader:
    """Splits text that comes piece by piece. White space before a call, and behind one that is the last, is no text.

    Attributes:
        count: calls so far.
    """

    def __init__(self) -> None:
        self.count, self._held, self._text_came = 0, "", False

    def push(self, text: str, last: bool = False) -> list[str | ToolCall]:
        """Take more text, the last or not; give what is certain now."""
        self._held += text
        parts: list[str | ToolCall] = []
        while (start := self._held.find(OPEN)) >= 0:
            inside = start + len(OPEN)
            end, call = end_of_call(self._held, inside), None
            if self._held[inside:].lstrip()[:1] in ("", "{"):  # else it only speaks of calls
                if end < 0:
                    break
                call = ToolCall.read(self.count, self._held[inside:end])
            if call is None:
                self._say(parts, inside)
                continue
            behind = self._held[end + len(CLOSE) :]
            self._say(parts, len(self._held[:start].rstrip()))
            self._held = behind
            parts.append(call)
            self.count, self._text_came = self.count + 1, False
        if last:
            self._say(parts, 0 if self.count and not self._text_came and self._held.isspace() else len(self._held))
        else:
            begun = next(n for n in range(len(OPEN), -1, -1) if self._held.endswith(OPEN[:n]))
            self._say(parts, len(self._held[: start if start >= 0 else len(self._held) - begun].rstrip()))
        return parts

    def _say(self, parts: list[str | ToolCall], length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text:
            parts.append(text)
            self._text_came = True
