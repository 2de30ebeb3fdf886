"""The endpoint with the real openai client over a real socket: what it says is AR decoding's text, under load, and
when clients go away."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.serving import QueueFullError, Request, Scheduler
from tests.modules.ledger_model import LedgerModel, oracle

openai = pytest.importorskip("openai", reason="needs the extra [serve] and the package openai")
pytest.importorskip("fastapi", reason="needs the extra [serve]")

VOCAB, KEY = 17, "secret"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class SlowModel(LedgerModel):
    """Takes some time per pass, so that requests overlap."""

    def forward_view(self, input_ids, cache, view_pass):
        time.sleep(0.002)
        return super().forward_view(input_ids, cache, view_pass)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Running:
    """A server on a free port, in a thread."""

    def __init__(self, eos: Sequence[int] = (), **options) -> None:
        from orthrus_triton.serving.app import create_app
        from orthrus_triton.serving.server import Server

        self.model, self.tokenizer = SlowModel(VOCAB), make_tokenizer()
        self.model.eos_token_ids = list(eos)
        self.scheduler = Scheduler(
            ConsensusDecoder(self.model, impl="torch"), **{"slots": 3, "max_len": 3000} | options
        )
        app = create_app(self.scheduler, self.tokenizer, "tiny", api_key=KEY, max_body_bytes=20_000)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = Server(app, self.scheduler)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, **options) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": KEY, "max_retries": 0} | options)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def expected(self, prompt: str, tokens: int, **params) -> str:
        ids = self.tokenizer(prompt)["input_ids"]
        return self.tokenizer.decode(oracle(self.model, ids, tokens, SamplingParams(**params)))

    def wait_until(self, condition, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"running {self.scheduler.running}, waiting {self.scheduler.waiting}"
            time.sleep(0.005)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    server = Running(max_waiting=40)
    yield server
    server.close()


def test_completions_are_ar_text(server: Running) -> None:
    client = server.client()
    assert [(model.id, model.created <= time.time()) for model in client.models.list()] == [("tiny", True)]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is only 'tiny', but got 'a/b'"):
        client.models.retrieve("a/b")
    whole = client.completions.create(model="tiny", prompt="w1 w2 w3", max_tokens=9, temperature=0)
    assert whole.choices[0].text == server.expected("w1 w2 w3", 9)
    for batch_of_one in (["w1 w2 w3"], [[1, 2, 3]]):
        reply = client.completions.create(model="tiny", prompt=batch_of_one, max_tokens=9, temperature=0)
        assert reply.choices[0].text == whole.choices[0].text
        assert reply.usage.prompt_tokens_details.cached_tokens == 2  # all but the last
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 9)
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 7, "presence_penalty": 0.5}
    stream = client.completions.create(
        model="tiny", prompt=[1, 2, 3], max_tokens=9, stream=True, stream_options={"include_usage": True},
        extra_body={"top_k": 12, "repetition_penalty": 1.2}, **options,
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == server.expected("w1 w2 w3", 9, top_k=12, repetition_penalty=1.2, **options)
    assert chunks[-1].usage.completion_tokens == 9 and len(chunks) > 3
    server.wait_until(lambda: server.scheduler.running == 0)
    health = httpx.get(f"{server.url}/health", timeout=5).json()
    assert health["running"] == health["waiting"] == 0 and health["tokens"] >= health["cycles"] > 0


def test_chat_and_stop_strings(server: Running) -> None:
    client = server.client()
    messages = [{"role": "system", "content": "w4"}, {"role": "user", "content": [{"type": "text", "text": "w5"}]}]
    free = server.expected("w4 w5", 30)
    reply = client.chat.completions.create(model="tiny", messages=messages, max_tokens=30, temperature=0)
    assert reply.choices[0].message.content == free
    stop = " ".join(free.split()[4:6])
    for streamed in (False, True):
        reply = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=30, temperature=0, stop=[stop], stream=streamed
        )
        if streamed:
            parts = [chunk.choices[0] for chunk in reply]
            text, reason = "".join(part.delta.content for part in parts), parts[-1].finish_reason
        else:
            text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert (text, reason) == (free[: free.index(stop)], "stop")


def test_the_first_chunk_of_a_chat_says_whose_it_is(server: Running) -> None:
    for tokens in (1, 5):
        chunks = server.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "w1"}], max_tokens=tokens, stream=True
        )
        roles = [chunk.choices[0].delta.role for chunk in chunks]
        assert roles == ["assistant"] + [None] * (len(roles) - 1)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_stop_string_around_a_special_token_ends_the_sequence(streamed: bool) -> None:
    """Special tokens are not in the text, where the stop string then stands."""
    server = Running()
    try:
        ids = oracle(server.model, [1], 2800, SamplingParams())
        before, special, after = next(
            part for part in zip(ids[5:], ids[6:], ids[7:]) if part[1] not in (1, *ids[:5], part[0], part[2])
        )
        server.tokenizer.add_special_tokens({"additional_special_tokens": [f"w{special}"]})
        text = server.tokenizer.decode(ids, skip_special_tokens=True)
        stop = f"w{before} w{after}"
        reply = server.client().completions.create(
            model="tiny", prompt="w1", max_tokens=2800, temperature=0, stop=stop, stream=streamed
        )
        choices = [chunk.choices[0] for chunk in reply] if streamed else reply.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"
        server.wait_until(lambda: server.scheduler.running == 0)
        assert max(len(slot.tokens) for slot in server.scheduler._run.slots) < 2500
    finally:
        server.close()


@pytest.mark.parametrize("stop", [None, "w16 w16 w16"])
def test_a_stop_token_is_no_text_though_the_tokenizer_does_not_know_it(stop: str | None) -> None:
    free = oracle(SlowModel(VOCAB), [1], 40, SamplingParams())
    at = next(n for n in range(3, 40) if free[n] not in free[:n])
    server = Running(eos=[free[at]])
    try:
        ask = {"model": "tiny", "prompt": "w1", "max_tokens": 40, "temperature": 0, "stop": stop}
        whole = server.client().completions.create(**ask)
        assert whole.choices[0].text == server.tokenizer.decode(free[:at])
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("stop", at + 1)
        parts = [chunk.choices[0] for chunk in server.client().completions.create(**ask, stream=True)]
        assert "".join(part.text for part in parts) == whole.choices[0].text and parts[-1].finish_reason == "stop"
    finally:
        server.close()


def test_a_long_prompt_holds_nobody_up(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize, started, go_on = type(server.tokenizer).__call__, threading.Event(), threading.Event()

    def slowly(*arguments, **options):
        started.set()
        assert go_on.wait(20)
        return tokenize(*arguments, **options)

    monkeypatch.setattr(type(server.tokenizer), "__call__", slowly)
    ask = threading.Thread(target=server.client().completions.create, kwargs={"model": "tiny", "prompt": "w1"})
    ask.start()
    try:
        assert started.wait(20)
        assert httpx.get(f"{server.url}/health", timeout=5).json()["status"] == "ok"
    finally:
        go_on.set()
        ask.join()


def test_load(server: Running) -> None:
    """Thirty clients over three slots: each gets the text it would get alone."""

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def one(i: int) -> str:
                reply = await client.completions.create(
                    model="tiny", prompt=f"w{i % 16} w{i % 5}", max_tokens=3 + i % 11, temperature=0.8, seed=i
                )
                return reply.choices[0].text

            return await asyncio.gather(*(one(i) for i in range(30)))

    for i, text in enumerate(asyncio.run(run())):
        assert text == server.expected(f"w{i % 16} w{i % 5}", 3 + i % 11, temperature=0.8, seed=i)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_slot(server: Running, streamed: bool) -> None:
    client = server.client()
    if streamed:
        stream = client.completions.create(model="tiny", prompt="w1", max_tokens=2800, temperature=1, stream=True)
        next(iter(stream))
        assert server.scheduler.running == 1
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.15).completions.create(model="tiny", prompt="w1", max_tokens=2800, temperature=1)
    server.wait_until(lambda: server.scheduler.running == 0)
    # long before the 2,800 tokens were there
    assert max(len(slot.tokens) for slot in server.scheduler._run.slots) < 2500
    assert client.completions.create(model="tiny", prompt="w2", max_tokens=2, temperature=0).choices[0].text


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


def test_a_server_that_stops_tells_its_clients() -> None:
    """Neither does it wait for 2,800 tokens, nor do they see no more than a connection that ends."""
    server = Running(slots=1, max_waiting=1)
    try:
        streams = []
        for busy in (lambda: server.scheduler.running == 1, lambda: server.scheduler.waiting == 1):
            streams.append(server.client().completions.create(model="tiny", prompt="w1", max_tokens=2800, stream=True))
            server.wait_until(busy)
        server.server.should_exit = True
        for stream in streams:
            with pytest.raises(openai.APIError, match="the server is closing"):
                list(stream)
    finally:
        server.close()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "prompt must be 1-D with at least one token"),
        ({"prompt": [99]}, "prompt must hold ids in 0..16"),
        ({"prompt": "w1", "max_tokens": 3000}, "max_tokens must be in 1..2999"),
        ({"prompt": [1] * 3000}, "prompt must have at most 2999 tokens, but has 3000"),
        ({"prompt": [2**70]}, "prompt: .*must be one string or one list of token ids"),
        ({"prompt": ["w1", "w2"]}, "prompt: .*must be one string or one list of token ids"),
        ({"prompt": [[[1]]]}, "prompt: .*must be one string or one list of token ids"),
        ({"prompt": "w1", "top_p": 0}, "top_p: .*greater than 0"),
        ({"prompt": "w1", "temperature": -1}, "temperature: .*greater than or equal to 0"),
        ({"prompt": "w1", "temperature": 1e-40}, "temperature must be 0, which is greedy, or at least 1e-30"),
        ({"prompt": "w1", "n": 2}, "n: Input should be 1"),
        ({"prompt": "w1", "suffix": "x"}, "suffix: Extra inputs are not permitted"),
        ({"prompt": "w1", "seed": 2**70}, "seed must be an integer of 64 bits"),
        ({"prompt": "w1", "logit_bias": {"40": 1}}, "logit_bias must be of tokens in 0..16"),
        ({"prompt": "w1", "stop": [""]}, "stop_strings must have"),
        ({"prompt": "w1", "min_tokens": 2**31 - 1}, "min_tokens: .*less than or equal to"),
        ({"prompt": "w1", "max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"prompt": "w1", "max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"prompt": "w1", "seed": 5.0}, "seed: Input should be a valid integer"),
        ({"prompt": "w1", "temperature": True}, "temperature: Input should be a valid number"),
        ({"prompt": "w1", "top_p": "0.5"}, "top_p: Input should be a valid number"),
        ({"prompt": "w1", "stream": 1}, "stream: Input should be a valid boolean"),
        ({"prompt": "w1", "n": True}, "n: .*must be an integer, but got True"),
        ({"prompt": "w1", "echo": 0}, "echo: .*must be true or false, but got 0"),
        ({"prompt": "w1", "logit_bias": {"4": "1"}}, "logit_bias.4: Input should be a valid number"),
        ({"prompt": "w1", "stream_options": {"include_usage": True}}, "stream_options: .*only with stream=true"),
        ({"prompt": "w1", "stream": False, "stream_options": {}}, "stream_options: .*only with stream=true"),
        ({"prompt": "w1", "stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage:"),
        ({"prompt": None}, "prompt: Field required"),
        ({}, "prompt: Field required"),
    ],
)
def test_bad_requests_are_named(server: Running, body: dict, message: str) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert reply.status_code == 400
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(reply.json()["error"]["message"])


def test_what_json_may_hold_instead(server: Running) -> None:
    """Null for what is not set; content that is no text; text that is no JSON; paths that are not there."""

    def ask(path: str, text: str = "{}", method: str = "POST"):
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        return httpx.request(method, f"{server.url}{path}", headers=headers, content=text)

    plain = {"prompt": "w1", "max_tokens": 3, "temperature": 0}
    nulls = dict.fromkeys(("top_p", "stream", "n", "seed", "stop", "presence_penalty", "logit_bias", "user"))
    replies = [ask("/v1/completions", json.dumps(body)).json()["choices"] for body in (plain, plain | nulls)]
    assert replies[0] == replies[1]
    for content, message in (
        ("\ud800", "messages: not valid Unicode"),
        ([{"type": "text", "text": 5}], "messages: the text of a content part must be a string"),
        ([{"type": "text"}], "messages: the text of a content part must be a string"),
        ([{"type": "image_url"}], "messages: content parts must be of type 'text', but got ['image_url']"),
        ([{"type": ["text"]}], "messages: content parts must be of type 'text', but got [\"['text']\"]"),
    ):
        reply = ask("/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": content}]}))
        assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(message)
    for status, reply in (
        (400, ask("/v1/completions", "{")), (400, ask("/v1/completions", '{"prompt": "\\ud800"}')),
        (404, ask("/v1/nowhere")), (405, ask("/v1/completions", method="GET")),
    ):  # fmt: skip
        assert reply.status_code == status and reply.json()["error"]["code"] == status
    assert "body: JSON decode error" in ask("/v1/completions", "{").json()["error"]["message"]


def test_numbers_as_the_openai_api_takes_them(server: Running) -> None:
    body = {"prompt": "w1", "max_tokens": 2, "temperature": 0, "n": 1, "echo": False, "logit_bias": {"4": 1, "5": 0.5}}
    for more in (
        {}, {"stream_options": None}, {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": None}},
    ):  # fmt: skip
        reply = httpx.post(
            f"{server.url}/v1/completions", json={**body, **more}, headers={"Authorization": f"Bearer {KEY}"}
        )
        assert reply.status_code == 200


@pytest.mark.parametrize("stop", [None, "w3 w3"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_tokenizer_that_fails_ends_its_own_request_alone(
    server: Running, monkeypatch: pytest.MonkeyPatch, streamed: bool, stop: str | None
) -> None:
    decode, tokens = type(server.tokenizer).decode, 40
    prompt, *others = "w7 w7 w7", "w1 w1", "w2 w2"
    bad, *fine = (server.expected(text, tokens) for text in (prompt, *others))

    def fail_on_bad(tokenizer, ids, *args, **options):
        text = decode(tokenizer, ids, *args, **options)
        if len(text.split()) > 1 and text in bad and not any(text in one for one in fine):
            raise KeyError("no such piece")
        return text

    client, got = server.client(), {}

    def ask(other: str) -> None:
        got[other] = client.completions.create(model="tiny", prompt=other, max_tokens=tokens, temperature=0)

    monkeypatch.setattr(type(server.tokenizer), "decode", fail_on_bad)
    threads = [threading.Thread(target=ask, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    with pytest.raises(openai.APIError, match="KeyError: 'no such piece'"):
        list(
            client.completions.create(
                model="tiny", prompt=prompt, max_tokens=tokens, temperature=0, stop=stop, stream=streamed
            )
        )
    for thread in threads:
        thread.join()
    assert [got[other].choices[0].text for other in others] == fine
    server.wait_until(lambda: server.scheduler.running == 0)


def test_a_tokenizer_that_cannot_read_a_prompt_says_so(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise OverflowError("too much")

    monkeypatch.setattr(type(server.tokenizer), "__call__", fail)
    with pytest.raises(openai.InternalServerError, match="prompt: the tokenizer failed: OverflowError: too much"):
        server.client().completions.create(model="tiny", prompt="w1")


def test_a_template_may_quote_what_is_no_text(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.tokenizer, "chat_template", "{{ raise_exception('bad ' + messages[0]['content']) }}")
    body = '{"messages": [{"role": "user", "content": "\\ud800"}]}'
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    reply = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert reply.status_code == 400 and reply.json()["error"]["message"] == "messages: bad \ud800"


def test_a_body_that_does_not_say_it_is_json(server: Running) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/x-www-form-urlencoded"}
    reply = httpx.post(f"{server.url}/v1/completions", content='{"prompt": "w1"}', headers=headers)
    assert reply.status_code == 400
    message = "content-type: must be application/json, but got 'application/x-www-form-urlencoded'"
    assert reply.json()["error"]["message"] == message


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


def test_keys_and_limits(server: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="secreu").models.list()
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().completions.create(model="tiny", prompt="w1 " * 10_000, max_tokens=1)
    assert caught.value.status_code == 413
