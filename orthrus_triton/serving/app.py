"""The OpenAI-compatible HTTP endpoint: a FastAPI application over a Scheduler.
Chat and plain completions, streamed or whole; a client that goes away frees its slot."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from orthrus_triton.models.stop_strings import StopStrings
from orthrus_triton.serving.guard import Guard
from orthrus_triton.serving.scheduler import QueueFullError, Request, Scheduler
from orthrus_triton.serving.schema import ChatRequest, CompletionRequest
from orthrus_triton.serving.text_stream import TextStream

DEFAULT_MAX_TOKENS = 512
DISCONNECT_POLL_SECONDS = 0.1


@dataclass
class _Generation:
    """A request on its way: `events` gets what the scheduler's thread delivers."""

    request: Request
    text: TextStream
    events: asyncio.Queue
    prompt_tokens: int
    reason: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict[str, int]:
        completion = len(self.text.tokens)
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }  # fmt: skip


def create_app(
    scheduler: Scheduler, tokenizer: Any, model_name: str, *, api_key: str | None = None, max_body_bytes: int = 1 << 20
) -> FastAPI:
    """The application.

    Args:
        scheduler: runs the requests.
        tokenizer: of transformers; chat needs its template.
        model_name: what /v1/models lists; requests may name another, there is only one.
        api_key: clients must send it as a bearer token; None asks for none.
        max_body_bytes: larger requests are refused.
    """
    app = FastAPI(title="orthrus-triton", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        # where JSON itself is broken, the place is a number of characters
        where = "" if first["type"] == "json_invalid" else ".".join(str(part) for part in first["loc"][1:])
        return error_response(400, f"{where or 'body'}: {first['msg']}")

    @app.exception_handler(StarletteHTTPException)  # FastAPI's own among them
    async def _refused(_: HttpRequest, error: StarletteHTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), error.headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "running": scheduler.running, "waiting": scheduler.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model_name, "object": "model", "owned_by": "orthrus-triton"}]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Any:
        ids = body.prompt if isinstance(body.prompt, list) else encode("prompt", body.prompt)
        generation = start(ids, body, body.max_tokens)
        return await respond(generation, body, http, "text_completion", lambda text, _: {"text": text})

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Any:
        if not getattr(tokenizer, "chat_template", None):
            raise HTTPException(400, "messages: this model has no chat template: use /v1/completions")
        try:
            fields = [message.template_fields() for message in body.messages]
            prompt = tokenizer.apply_chat_template(fields, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise HTTPException(400, f"messages: {error}") from error
        ids = encode("messages", prompt, add_special_tokens=False)
        generation = start(ids, body, body.max_completion_tokens or body.max_tokens)

        def part(text: str, streamed: bool) -> dict[str, Any]:
            return {"delta": {"content": text}} if streamed else {"message": {"role": "assistant", "content": text}}

        return await respond(generation, body, http, "chat.completion", part)

    def encode(field: str, text: str, **options: Any) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can say
            raise HTTPException(400, f"{field}: not valid Unicode: {error}") from error
        return tokenizer(text, **options)["input_ids"]

    def start(ids: list[int], body: CompletionRequest | ChatRequest, max_tokens: int | None) -> _Generation:
        """Queue the request, or say why not."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(tokens: list[int], reason: str | None, error: str) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (tokens, reason, error))

        try:
            stop = StopStrings(tokenizer, body.stop_strings) if body.stop_strings else None
            room = scheduler.max_len - len(ids)
            tokens = min(DEFAULT_MAX_TOKENS, max(room, 1)) if max_tokens is None else max_tokens
            request = Request(torch.tensor(ids, dtype=torch.int64), tokens, body.params(), deliver, stop)
            scheduler.submit(request)
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        except (ValueError, OverflowError) as error:
            raise HTTPException(400, str(error)) from error
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from error
        return _Generation(request, TextStream(tokenizer, stop), events, len(ids))

    async def pieces(generation: _Generation) -> AsyncIterator[str]:
        """Text as it becomes certain. However this ends, the slot is free afterwards."""
        try:
            while generation.reason is None:
                tokens, reason, error = await generation.events.get()
                if reason == "error":
                    raise HTTPException(500, error)
                text = generation.text.push(tokens, last=reason is not None)
                generation.reason = reason
                if text:
                    yield text
        finally:
            scheduler.cancel(generation.request)

    async def respond(generation: _Generation, body: Any, http: HttpRequest, kind: str, part: Any) -> Any:
        head = {"id": generation.id, "created": generation.created, "model": model_name}
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            kind = "chat.completion.chunk" if kind == "chat.completion" else kind
            head = {**head, "object": kind}
            events = _events(pieces(generation), generation, head, part, include_usage)
            return _Stream(events, lambda: scheduler.cancel(generation.request))
        collected = asyncio.ensure_future(_collect(pieces(generation)))
        while not collected.done():
            await asyncio.wait([collected], timeout=DISCONNECT_POLL_SECONDS)
            if not collected.done() and await http.is_disconnected():
                collected.cancel()
                return JSONResponse({}, 499)  # nobody reads it
        choice = {"index": 0, **part(await collected, False), "logprobs": None, "finish_reason": generation.reason}
        return {**head, "object": kind, "choices": [choice], "usage": generation.usage()}

    return app


class _Stream(StreamingResponse):
    """Server-sent events that call `leave` however they end, even before the first was asked for."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _collect(pieces: AsyncIterator[str]) -> str:
    return "".join([text async for text in pieces])


async def _events(
    pieces: AsyncIterator[str], generation: _Generation, head: dict, part: Any, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, as the openai client reads them."""

    def chunk(choices: list[dict], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"

    def choice(text: str, reason: str | None) -> dict[str, Any]:
        return {"index": 0, **part(text, True), "logprobs": None, "finish_reason": reason}

    try:
        async for text in pieces:
            yield chunk([choice(text, None)])
        yield chunk([choice("", generation.reason)])
        if include_usage:
            yield chunk([], usage=generation.usage())
        yield "data: [DONE]\n\n"
    except HTTPException as error:
        yield f"data: {json.dumps(_error(error.status_code, str(error.detail)))}\n\n"
    finally:
        await pieces.aclose()


def _error(status: int, message: str) -> dict[str, Any]:
    kind = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
    return {"error": {"message": message, "type": kind.get(status, "invalid_request_error"), "code": status}}


def error_response(status: int, message: str, headers: Any = None) -> JSONResponse:
    """An error in the shape the openai client understands."""
    return JSONResponse(_error(status, message), status, headers)
