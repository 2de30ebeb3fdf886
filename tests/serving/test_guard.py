"""Who may come in, and how much they may bring: the middleware alone, message by message."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra [serve]")


def call(
    parts: list[dict[str, Any]], *, method: str = "POST", path: str = "/v1/completions", key: bytes = b"Bearer secret",
    limit: int = 10,
) -> tuple[int | None, list[dict[str, Any]]]:  # fmt: skip
    """The status of a refusal, if it was refused, and the messages that the application read."""
    from orthrus_triton.serving.guard import Guard

    read, sent, waiting = [], [], list(parts)

    async def app(scope: dict, receive: Any, send: Any) -> None:
        read.extend([await receive() for _ in range(2)])

    async def receive() -> dict:
        if not waiting:
            await asyncio.sleep(100)
        return waiting.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"authorization", key)]}
    asyncio.run(Guard(app, "secret", limit)(scope, receive, send))
    if sent:
        assert (b"connection", b"close") in sent[0]["headers"]
    return sent[0]["status"] if sent else None, read


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


@pytest.mark.parametrize("sizes", [[10], [4, 6], [0, 10, 0], [3, 3, 4]])
def test_a_body_comes_whole_and_once(sizes: list[int]) -> None:
    parts = [part(bytes([97 + n]) * size, more=n + 1 < len(sizes)) for n, size in enumerate(sizes)]
    whole = part(b"".join(one["body"] for one in parts))
    assert call([*parts, GONE]) == (None, [whole, GONE])  # then whether the client is still there
    assert call([*parts[:-1], part(parts[-1]["body"] + b"x"), GONE]) == (413, [])
    assert call([part(b"a", more=True)] * 3 + [GONE, GONE]) == (None, [part(b""), GONE])  # half of it is nothing


def test_a_body_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthrus_triton.serving.guard.BODY_SECONDS", 0.02)
    assert call([part(b"abc", more=True)]) == (408, [])


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
def test_a_key_opens_everything_and_nothing_else_does(method: str) -> None:
    messages = [part(b"abc"), GONE]
    for key in (b"", b"secret", b"Bearer ", b"Bearer secre", b"Bearer secret2", b"Bearer  secret", b"Basic secret"):
        assert call(messages, method=method, key=key) == (401, [])
        for path in ("/", "/healthy", "/health/", "/v1/health", "/v1/models/health"):
            assert call(messages, method=method, key=key, path=path) == (401, [])
    assert call(messages, method=method) == call(messages, method=method, key=b"", path="/health") == (None, messages)
