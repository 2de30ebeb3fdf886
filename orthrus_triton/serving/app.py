"""The OpenAI-compatible HTTP endpoint: a FastAPI application over a Scheduler.
Chat and plain completions, streamed or whole; a client that goes away frees its slot."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from orthrus_triton.serving.errors import error_response
from orthrus_triton.serving.generation import Generation, Part
from orthrus_triton.serving.guard import Guard
from orthrus_triton.serving.metrics import MEDIA_TYPE, metrics_text
from orthrus_triton.serving.prompt import Prompt, encode_chat, encode_completion
from orthrus_triton.serving.replies import CHAT, COMPLETION, EventStream, ReplyFormat, reply_events, whole_reply
from orthrus_triton.serving.scheduler import Scheduler
from orthrus_triton.serving.schema import ChatRequest, CompletionRequest
from orthrus_triton.serving.structure import Structures

DISCONNECT_POLL_SECONDS = 0.1
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")  # as browsers send it: no path, not even a slash


def create_app(
    scheduler: Scheduler, tokenizer: Any, model_name: str, *, api_key: str | None = None, max_body_bytes: int = 1 << 20,
    allow_origins: Sequence[str] = (),
) -> FastAPI:  # fmt: skip
    """The application.

    Args:
        scheduler: runs the requests.
        tokenizer: of transformers; chat needs its template.
        model_name: what /v1/models lists; requests may name another, there is only one.
        api_key: clients must send it as a bearer token; None asks for none.
        max_body_bytes: larger requests are refused.
        allow_origins: web pages that browsers let use it, such as "http://localhost:3000"; "*" for all.

    Raises:
        ValueError: no such origin can be.
    """
    require_origins(allow_origins)
    structures = Structures(tokenizer, scheduler.decoder.model.vocab_size, scheduler.decoder.model.eos_token_ids)
    # strict clients need a date
    card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "orthrus-triton"}
    app = FastAPI(title="orthrus-triton", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes)
    if allow_origins:  # around the guard: a browser asks first, without the key, and a page is to see refusals, too
        how = {"allow_origins": allow_origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        if "allow_private_network" in inspect.signature(CORSMiddleware).parameters:  # where a browser asks, too
            how["allow_private_network"] = True
        app.add_middleware(CORSMiddleware, **how)
    app.add_exception_handler(RequestValidationError, _say_what_is_invalid)
    app.add_exception_handler(StarletteHTTPException, _say_why_refused)  # FastAPI's own among them

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        counts = {name: getattr(scheduler, name) for name in ("running", "waiting", "tokens", "cycles")}
        why = scheduler.why_closed
        return JSONResponse({"status": why or "ok", **counts}, 503 if why else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(metrics_text(scheduler), media_type=MEDIA_TYPE)

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != model_name:
            raise HTTPException(404, f"model: there is only {model_name!r}, but got {name!r}")
        return card

    # tokenizers work in a thread: a long prompt takes them a second, in which other clients want their text
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Any:
        prompts = await asyncio.to_thread(encode_completion, tokenizer, body, scheduler.decoder.model.vocab_size)
        return await respond(prompts, body, body.max_tokens, http, COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Any:
        prompt = await asyncio.to_thread(encode_chat, tokenizer, body)
        return await respond([prompt], body, body.max_completion_tokens or body.max_tokens, http, CHAT)

    async def respond(
        prompts: list[Prompt], body: CompletionRequest | ChatRequest, max_tokens: int | None, http: HttpRequest,
        reply: ReplyFormat,
    ) -> Any:  # fmt: skip
        choices = [prompt for prompt in prompts for _ in range(body.n)]
        if len(choices) > scheduler.most_at_once:
            most = f"at most {scheduler.most_at_once}, which is what this server has room for"
            raise HTTPException(400, f"n: times the number of prompts must be {most}, but is {len(choices)}")
        kept = await asyncio.to_thread(structures.of, body, [len(prompt.ids) for prompt in choices])
        generations: list[Generation] = []
        try:
            for index, (prompt, structure) in enumerate(zip(choices, kept)):
                generations.append(Generation(scheduler, tokenizer, prompt, body, max_tokens, structure, index))
        except HTTPException:
            for generation in generations:
                generation.cancel()
            raise
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            events = reply_events(generations, model_name, reply, body.n, include_usage)
            return EventStream(events, generations)
        parts = await _all_parts(generations, http)
        if parts is None:
            return Response(status_code=499)  # nobody reads it
        return await asyncio.to_thread(whole_reply, generations, parts, model_name, reply, body.n)

    return app


def require_origins(origins: Sequence[str], name: str = "allow_origins") -> None:
    """Raise a ValueError unless all are what browsers call a page's origin, or "*"."""
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise ValueError(f"{name} must be like https://host or http://host:port, or '*', but got {origin!r}")


async def _say_what_is_invalid(http: HttpRequest, error: RequestValidationError) -> Response:
    first, media_type = error.errors()[0], http.headers.get("content-type", "")
    if first["loc"] == ("body",) and "json" not in media_type:  # FastAPI has not parsed it then
        return error_response(400, f"content-type: must be application/json, but got {media_type!r}")
    # where JSON itself is broken, the place is a number of characters
    where = "" if first["type"] == "json_invalid" else ".".join(str(part) for part in first["loc"][1:])
    return error_response(400, f"{where or 'body'}: {first['msg']}")


async def _say_why_refused(_: HttpRequest, error: StarletteHTTPException) -> Response:
    return error_response(error.status_code, str(error.detail), error.headers)


async def _all_parts(generations: list[Generation], http: HttpRequest) -> list[list[Part]] | None:
    """All of each; None if the client went away. However this ends, the slots are free."""

    async def join(generation: Generation) -> list[Part]:
        return [part async for part in generation.pieces()]

    joined = [asyncio.ensure_future(join(generation)) for generation in generations]
    pending = set(joined)
    try:
        while pending:
            ended, pending = await asyncio.wait(
                pending, timeout=DISCONNECT_POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            for one in ended:
                one.result()
            if pending and await http.is_disconnected():
                return None
        return [one.result() for one in joined]
    finally:
        for one, generation in zip(joined, generations):
            one.cancel()
            generation.cancel()  # a task that has not begun yet would not
