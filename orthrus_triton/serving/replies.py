"""What a client reads: generations as one JSON object, or as server-sent events while they go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from fastapi import HTTPException
from fastapi.responses import StreamingResponse

from orthrus_triton.serving.errors import error_body
from orthrus_triton.serving.generation import Generation, LogprobsForm, Part
from orthrus_triton.serving.logprobs import LogprobsField
from orthrus_triton.serving.thoughts import Thought
from orthrus_triton.serving.tool_calls import ToolCall


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
    thoughts = "".join(part.text for part in parts if isinstance(part, Thought))
    return {"message": {"role": "assistant", **({"reasoning_content": thoughts} if thoughts else {}), **called}}


def _delta(part: Part, first: bool) -> dict[str, Any]:
    # clients add up what the deltas say, so the role comes once
    role = {"role": "assistant"} if first else {}
    if isinstance(part, ToolCall):
        return {"delta": {**role, "tool_calls": [{"index": part.index, **part.field()}]}}
    if isinstance(part, Thought):
        return {"delta": {**role, "reasoning_content": part.text}}
    return {"delta": {**role, "content": part}}


COMPLETION = ReplyFormat(
    "text_completion", "text_completion", lambda parts: {"text": "".join(parts)}, lambda text, _: {"text": text},
    LogprobsField.of_completion,
)  # fmt: skip
CHAT = ReplyFormat("chat.completion", "chat.completion.chunk", _message, _delta, LogprobsField.of_chat)


def whole_reply(
    generations: Sequence[Generation], parts: Sequence[list[Part]], model_name: str, reply: ReplyFormat, n: int
) -> dict[str, Any]:
    """The reply of generations that have ended, `n` to each prompt, with the parts of each."""
    choices = [_choice(one, reply, reply.parts(said), one.reason) for one, said in zip(generations, parts)]
    return {**_head(generations, model_name, reply.object), "choices": choices, "usage": _usage(generations, n)}


async def reply_events(
    generations: Sequence[Generation], model_name: str, reply: ReplyFormat, n: int, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, as the openai client reads them: a chunk per part, and per choice one with the finish reason,
    those of several choices as they come."""
    head = _head(generations, model_name, reply.chunk_object)
    arrived: asyncio.Queue[dict[str, Any] | BaseException | None] = asyncio.Queue()

    async def read(generation: Generation) -> None:
        first = True
        try:
            async for part in generation.pieces():
                arrived.put_nowait(_choice(generation, reply, reply.chunk_part(part, first), None))
                first = False
            arrived.put_nowait(_choice(generation, reply, reply.chunk_part("", first), generation.reason))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    reading, ended = [asyncio.ensure_future(read(generation)) for generation in generations], 0
    try:
        while ended < len(generations):
            choice = await arrived.get()
            if isinstance(choice, BaseException):
                raise choice
            if choice is None:
                ended += 1
            else:
                yield _event({**head, "choices": [choice]})
        if include_usage:
            yield _event({**head, "choices": [], "usage": _usage(generations, n)})
        yield "data: [DONE]\n\n"
    except HTTPException as error:
        yield _event(error_body(error.status_code, str(error.detail)))
    finally:
        for one in reading:
            one.cancel()


class EventStream(StreamingResponse):
    """Server-sent events that free the generations' slots however they end, even before the first was asked for."""

    def __init__(self, events: AsyncIterator[str], generations: Sequence[Generation]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._generations = generations

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """As ASGI calls it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generation in self._generations:
                generation.cancel()


def _head(generations: Sequence[Generation], model_name: str, kind: str) -> dict[str, Any]:
    return {"id": generations[0].id, "created": generations[0].created, "model": model_name, "object": kind}


def _choice(
    generation: Generation, reply: ReplyFormat, text: dict[str, Any], reason: str | None
) -> dict[str, Any]:  # fmt: skip
    return {
        "index": generation.index,
        **text,
        "logprobs": generation.new_logprobs(reply.logprobs),
        "finish_reason": reason,
    }


def _usage(generations: Sequence[Generation], n: int) -> dict[str, Any]:
    """Every prompt counts once, however many choices it has."""
    tokens = [generation.tokens() for generation in generations]
    prompt, completion = sum(one.prompt for one in tokens[::n]), sum(one.completion for one in tokens)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached for one in tokens[::n])},
    }  # fmt: skip


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
