"""ASGI middleware in front of the application: who may come in, and how much they may bring."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

BODY_SECONDS = 30  # a client that sends its request slower than this is sent away
OPEN_PATHS = ("/health",)


class Guard:
    """Checks the API key before anything is read, and reads bodies up to a limit before they are parsed.

    Args:
        app: the application behind it.
        api_key: the bearer token to ask for, or None.
        max_body_bytes: of a request.
    """

    def __init__(self, app: Any, api_key: str | None, max_body_bytes: int) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
        self.expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        # constant time: how much of a guess was right does not show
        given = headers.get(b"authorization", b"")
        if self.expected is not None and scope["path"] not in OPEN_PATHS:
            if not hmac.compare_digest(given, self.expected):
                await _refuse(send, 401, "authorization: a valid API key is needed, sent as a bearer token")
                return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            await _refuse(send, 408, f"body: must arrive within {BODY_SECONDS} s")
            return
        if body is None:
            await _refuse(send, 413, f"body: must have at most {self.max_body_bytes} bytes")
            return
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict:
            # afterwards the real channel, which tells of a disconnect
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Any) -> bytes | None:
        """The whole body, or None if it is too long."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                return None
            if not message.get("more_body"):
                return b"".join(parts)


async def _refuse(send: Any, status: int, message: str) -> None:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
