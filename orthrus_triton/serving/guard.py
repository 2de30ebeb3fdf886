"""ASGI middleware in front of the application: who may come in, and how much they may bring."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from orthrus_triton.serving.errors import error_response

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

        async def refuse(status: int, message: str) -> None:
            # what is left of the request is not read
            await error_response(status, message, {"Connection": "close"})(scope, receive, send)

        # of an application that is mounted in another, the path begins with where
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self.expected is not None and path not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            # constant time: how much of a guess was right does not show
            if not hmac.compare_digest(given, self.expected):
                await refuse(401, "authorization: a valid API key is needed, sent as a bearer token")
                return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            await refuse(408, f"body: must arrive within {BODY_SECONDS} s")
            return
        if body is None:
            await refuse(413, f"body: must have at most {self.max_body_bytes} bytes")
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
