"""What a client reads: a generation as one JSON object, or as server-sent events while it goes on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from fastapi import HTTPException
from fastapi.responses import StreamingResponse

from orthrus_triton.serving.errors import error_body
from orthrus_triton.serving.generation import Generation, LogprobsForm
from orthrus_triton.serving.logprobs import LogprobsField
from orthrus_triton.serving.tool_calls import Part, ToolCall


class ReplyFormat(NamedTuple):
    """How one endpoint names things: a reply, a chunk of one, the parts of a text in either (of a chunk: is it the
    first?), and what is reported of tokens."""

    object: str
    chunk_object: str
    parts: Callable[[list[Part]], dict[str, Any]]
    chunk_part: Callable[[Part, bool], dict[str, Any]]
    logprobs: LogprobsForm


def _message(parts: list[Part]) -> dict[str, Any]:
    calls = [part.field() for part in parts if isinstance(part, ToolCall)]
    text = "".join(part for part in parts if isinstance(part, str))
    called = {"content": text or None, "tool_calls": calls} if calls else {"content": text}
    return {"message": {"role": "assistant", **called}}


def _delta(part: Part, first: bool) -> dict[str, Any]:
    # clients add up what the deltas say, so the role comes once
    role = {"role": "assistant"} if first else {}
    if isinstance(part, ToolCall):
        return {"delta": {**role, "tool_calls": [{"index": part.index, **part.field()}]}}
    return {"delta": {**role, "content": part}}


COMPLETION = ReplyFormat(
    "text_completion", "text_completion", lambda parts: {"text": "".join(parts)}, lambda text, _: {"text": text},
    LogprobsField.of_completion,
)  # fmt: skip
CHAT = ReplyFormat("chat.completion", "chat.completion.chunk", _message, _delta, LogprobsField.of_chat)


def whole_reply(generation: Generation, parts: list[Part], model_name: str, reply: ReplyFormat) -> dict[str, Any]:
    """The reply of a generation that has ended, with these parts."""
    return {
        **_head(generation, model_name, reply.object),
        "choices": [_choice(generation, reply, reply.parts(parts), generation.reason)], "usage": generation.usage(),
    }  # fmt: skip


async def reply_events(
    generation: Generation, model_name: str, reply: ReplyFormat, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, as the openai client reads them: a chunk per part, one with the finish reason."""
    head, first = _head(generation, model_name, reply.chunk_object), True
    pieces = generation.pieces()
    try:
        async for part in pieces:
            yield _event({**head, "choices": [_choice(generation, reply, reply.chunk_part(part, first), None)]})
            first = False
        last = _choice(generation, reply, reply.chunk_part("", first), generation.reason)
        yield _event({**head, "choices": [last]})
        if include_usage:
            yield _event({**head, "choices": [], "usage": generation.usage()})
        yield "data: [DONE]\n\n"
    except HTTPException as error:
        yield _event(error_body(error.status_code, str(error.detail)))
    finally:
        await pieces.aclose()


class EventStream(StreamingResponse):
    """Server-sent events that free the generation's slot however they end, even before the first was asked for."""

    def __init__(self, events: AsyncIterator[str], generation: Generation) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def _head(generation: Generation, model_name: str, kind: str) -> dict[str, Any]:
    return {"id": generation.id, "created": generation.created, "model": model_name, "object": kind}


def _choice(
    generation: Generation, reply: ReplyFormat, text: dict[str, Any], reason: str | None
) -> dict[str, Any]:  # fmt: skip
    return {"index": 0, **text, "logprobs": generation.new_logprobs(reply.logprobs), "finish_reason": reason}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
