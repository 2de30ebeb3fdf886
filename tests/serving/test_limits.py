"""Limits of the endpoint: connections, queue, keys and sizes; and what its health says."""

from __future__ import annotations

import inspect
import socket
import threading
import time

import httpx
import pytest
import torch

from orthrus_triton.modules import SamplingParams
from orthrus_triton.serving import QueueFullError, Request
from tests.serving.running import KEY, Running, openai


def test_a_full_queue_says_so() -> None:
    server = Running(slots=1, max_waiting=1)
    try:
        client, streams = server.client(), []
        for busy in (lambda: server.scheduler.running == 1, lambda: server.scheduler.waiting == 1):
            streams.append(client.completions.create(model="tiny", prompt="w1", max_tokens=200, stream=True))
            server.wait_until(busy)
        with pytest.raises(openai.RateLimitError, match="1 requests wait already"):
            client.completions.create(model="tiny", prompt="w1", max_tokens=2)
        for stream in streams:
            stream.close()
        server.wait_until(lambda: server.scheduler.running == server.scheduler.waiting == 0)
        assert client.completions.create(model="tiny", prompt="w1", max_tokens=2)
    finally:
        server.close()


def test_connections_that_ask_for_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is silent from the start nor one that never ends a head; but one that waits for its answer is
    left alone."""
    monkeypatch.setattr("orthrus_triton.serving.server.HEAD_SECONDS", 0.1)
    server = Running()
    try:
        health = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n"
        for said in (b"", health[:9], health + health[:9]):
            with socket.create_connection(server.socket.getsockname(), timeout=10) as connection:
                connection.sendall(said)
                while connection.recv(1000):
                    pass
        started = time.monotonic()
        reply = server.client().completions.create(model="tiny", prompt="w1", max_tokens=500, temperature=0)
        assert reply.choices[0].text == server.expected("w1", 500) and time.monotonic() - started > 0.3
    finally:
        server.close()


def test_more_connections_than_may_be_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthrus_triton.serving.server.MOST_CONNECTIONS", 3)
    server = Running()
    try:
        status = []
        for idle in range(4):
            waiting = [socket.create_connection(server.socket.getsockname(), timeout=10) for _ in range(idle)]
            server.wait_until(lambda idle=idle: len(server.server.server_state.connections) == idle)
            status.append(httpx.get(f"{server.url}/health", timeout=5).status_code)
            for connection in waiting:
                connection.close()
            server.wait_until(lambda: not server.server.server_state.connections)
        assert status == [200, 200, 503, 503]  # the last one allowed is no longer served
    finally:
        server.close()


def test_a_burst_may_fill_slots_and_queue() -> None:
    server = Running(slots=2, max_waiting=2)
    try:
        release = threading.Event()
        advance = server.scheduler._cycle
        server.scheduler._cycle = lambda: release.wait(10) and advance()
        requests = [Request(torch.tensor([1]), 2, SamplingParams(), lambda *_: None) for _ in range(5)]
        for request in requests[:-1]:  # two slots are free and two may wait
            server.scheduler.submit(request)
        with pytest.raises(QueueFullError):
            server.scheduler.submit(requests[-1])
        release.set()
        server.wait_until(lambda: server.scheduler.running == server.scheduler.waiting == 0)
    finally:
        server.close()


def test_metrics_count_what_has_left(server: Running) -> None:
    def counted() -> dict[str, float]:
        reply = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"})
        assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line.split() for line in reply.text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("orthrus_"): float(value) for name, value in lines}

    assert httpx.get(f"{server.url}/metrics").status_code == 401
    before, prompt = counted(), [3, 1, 4, 1, 5, 9, 2, 6]
    for _ in range(2):
        server.client().completions.create(model="tiny", prompt=prompt, max_tokens=9, temperature=0)
        server.wait_until(lambda: server.scheduler.running == 0)
    grown = {name: value - before[name] for name, value in counted().items()}
    assert (grown["requests_total"], grown["prompt_tokens_total"], grown["tokens_total"]) == (2, 16, 16)
    assert 7 <= grown["cached_prompt_tokens_total"] <= 14 and 2 <= grown["cycles_total"] <= 16
    assert counted()["requests_running"] == counted()["requests_waiting"] == 0


def test_pages_that_are_named_may_ask(server: Running) -> None:
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.testclient import TestClient

    from orthrus_triton.serving.app import create_app

    page, how = (
        "http://localhost:3000",
        {"access-control-request-method": "POST", "access-control-request-headers": "authorization"},
    )
    for origins, allowed in (([page], True), (["*"], True), (["http://localhost:3001"], False), ([], False)):
        client = TestClient(create_app(server.scheduler, server.tokenizer, "tiny", api_key=KEY, allow_origins=origins))
        asked = client.options("/v1/completions", headers={"origin": page, **how})
        assert (asked.status_code == 200) is allowed
        if "allow_private_network" in inspect.signature(CORSMiddleware).parameters:
            how["access-control-request-private-network"] = "true"  # of later ones: as browsers ask for loopback
        refused = client.post("/v1/completions", json={"prompt": "w1"}, headers={"origin": page})
        assert refused.status_code == 401 and ("access-control-allow-origin" in refused.headers) is allowed
    for origin in ("localhost:3000", "http://localhost/", "http://a b", ""):
        with pytest.raises(ValueError, match="allow_origins must be like https://host"):
            create_app(server.scheduler, server.tokenizer, "tiny", allow_origins=[origin])


def test_health_needs_no_key_where_the_application_is_mounted_in_another(server: Running) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from orthrus_triton.serving.app import create_app

    outer = FastAPI()
    outer.mount("/model", create_app(server.scheduler, server.tokenizer, "tiny", api_key=KEY))
    client = TestClient(outer)
    assert client.get("/model/health").json()["status"] == "ok"
    assert client.get("/model/v1/models").status_code == 401
    assert client.get("/model/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_health_says_that_no_request_can_be_served_any_more(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "the model cannot run any more: RuntimeError: device lost"
    monkeypatch.setattr(server.scheduler, "_why_closed", why)
    monkeypatch.setattr(server.scheduler, "_closing", True)
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503 and health.json()["status"] == why
    assert httpx.head(f"{server.url}/health").status_code == 503


def test_keys_and_limits(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="secreu").models.list()
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().completions.create(model="tiny", prompt="w1 " * 10_000, max_tokens=1)
    assert caught.value.status_code == 413
