"""The OpenAI-compatible HTTP endpoint: a FastAPI application over a Scheduler.
Chat and plain completions, streamed or whole; a client that goes away frees its slot."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from orthrus_triton.serving.errors import error_response
from orthrus_triton.serving.generation import Generation
from orthrus_triton.serving.guard import Guard
from orthrus_triton.serving.replies import CHAT, COMPLETION, EventStream, ReplyFormat, reply_events, whole_reply
from orthrus_triton.serving.scheduler import Scheduler
from orthrus_triton.serving.schema import ChatRequest, CompletionRequest
from orthrus_triton.serving.structure import Structures
from orthrus_triton.serving.tool_calls import CALL, OPEN, Part, can_be_read

DISCONNECT_POLL_SECONDS = 0.1


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
    structures = Structures(tokenizer, scheduler.decoder.model.vocab_size, scheduler.decoder.model.eos_token_ids)
    # strict clients need a date
    card = {"id": model_name, "object": "model", "created": int(time.time()), "owned_by": "orthrus-triton"}
    app = FastAPI(title="orthrus-triton", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes)
    app.add_exception_handler(RequestValidationError, _say_what_is_invalid)
    app.add_exception_handler(StarletteHTTPException, _say_why_refused)  # FastAPI's own among them

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        counts = {name: getattr(scheduler, name) for name in ("running", "waiting", "tokens", "cycles")}
        why = scheduler.why_closed
        return JSONResponse({"status": why or "ok", **counts}, 503 if why else 200)

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
        prompts = await asyncio.to_thread(_encode_prompts, tokenizer, body.prompts)
        return await respond(prompts, body, body.max_tokens, http, COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, http: HttpRequest) -> Any:
        ids = await asyncio.to_thread(_encode_chat, tokenizer, body)
        return await respond([ids], body, body.max_completion_tokens or body.max_tokens, http, CHAT)

    async def respond(
        prompts: list[list[int]], body: CompletionRequest | ChatRequest, max_tokens: int | None, http: HttpRequest,
        reply: ReplyFormat,
    ) -> Any:  # fmt: skip
        choices = [ids for ids in prompts for _ in range(body.n)]
        if len(choices) > scheduler.most_at_once:
            most = f"at most {scheduler.most_at_once}, which is what this server has room for"
            raise HTTPException(400, f"n: times the number of prompts must be {most}, but is {len(choices)}")
        kept = await asyncio.to_thread(structures.of, body, [len(ids) for ids in choices])
        generations: list[Generation] = []
        try:
            for index, (ids, structure) in enumerate(zip(choices, kept)):
                generations.append(Generation(scheduler, tokenizer, ids, body, max_tokens, structure, index))
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


async def _say_what_is_invalid(http: HttpRequest, error: RequestValidationError) -> Response:
    first, media_type = error.errors()[0], http.headers.get("content-type", "")
    if first["loc"] == ("body",) and "json" not in media_type:  # FastAPI has not parsed it then
        return error_response(400, f"content-type: must be application/json, but got {media_type!r}")
    # where JSON itself is broken, the place is a number of characters
    where = "" if first["type"] == "json_invalid" else ".".join(str(part) for part in first["loc"][1:])
    return error_response(400, f"{where or 'body'}: {first['msg']}")


async def _say_why_refused(_: HttpRequest, error: StarletteHTTPException) -> Response:
    return error_response(error.status_code, str(error.detail), error.headers)


def _encode_chat(tokenizer: Any, body: ChatRequest) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise HTTPException(400, "messages: this model has no chat template: use /v1/completions")
    try:
        options = _template_options(tokenizer, body.template_tools)
        messages = [message.template_fields() for message in body.messages]
        prompt = tokenizer.apply_chat_template(messages, **options, tokenize=False, add_generation_prompt=True)
    except HTTPException:
        raise
    except Exception as error:  # templates raise what they like
        raise HTTPException(400, f"messages: {error}") from error
    return _encode(tokenizer, "messages", prompt, add_special_tokens=False)


def _template_options(tokenizer: Any, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    if not tools:
        return {}
    if not can_be_read(tokenizer.get_chat_template(tools=tools)):
        raise HTTPException(
            400, f"tools: this model's chat template does not ask for calls as {CALL}, the only form that is read here"
        )
    if OPEN in tokenizer.all_special_tokens:
        raise HTTPException(400, f"tools: {OPEN} is a special token of this tokenizer, which texts leave out")
    return {"tools": tools}


def _encode_prompts(tokenizer: Any, prompts: list[str | list[int]]) -> list[list[int]]:
    return [_encode(tokenizer, "prompt", one) if isinstance(one, str) else one for one in prompts]


def _encode(tokenizer: Any, field: str, text: str, **options: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can say
        raise HTTPException(400, f"{field}: not valid Unicode: {error}") from error
    try:
        return tokenizer(text, **options)["input_ids"]
    except Exception as error:  # tokenizers raise what they like
        raise HTTPException(500, f"{field}: the tokenizer failed: {type(error).__name__}: {error}") from error


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
