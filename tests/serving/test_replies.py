"""What the endpoint sends, to the letter, and what it makes of a request's fields before it samples."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.serving import Scheduler
from tests.modules.ledger_model import LedgerModel, oracle
from tests.serving.watched import wait_for

pytest.importorskip("fastapi", reason="needs the extra [serve]")
from fastapi.testclient import TestClient  # noqa: E402

VOCAB = 17


def no_loop_runs_here() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


class Words:
    """A tokenizer: w3 is token 3. It takes its time, so it must not be asked in the event loop."""

    chat_template = "has one"

    def __init__(self) -> None:
        self.templated: list[tuple] = []

    def get_chat_template(self, tools: object = None) -> str:
        return self.chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert no_loop_runs_here()
        return {"input_ids": [*([9] if add_special_tokens else []), *(int(word[1:]) for word in text.split())]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"w{token}\u2028" for token in tokens)  # for some clients that ends a line

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        assert no_loop_runs_here()
        self.templated.append((messages, options))
        return " ".join(message["content"] for message in messages if message["content"])


class Here:
    """The application without a socket."""

    def __init__(self, **options: Any) -> None:
        from orthrus_triton.serving.app import create_app

        self.tokenizer = Words()
        self.scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), **{"slots": 2} | options)
        self.app = create_app(self.scheduler, self.tokenizer, "tiny", max_body_bytes=2000)
        self.client = TestClient(self.app)

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(f"/v1/{path}", json={"temperature": 0} | body)


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    here = Here(max_len=600)
    yield here
    here.scheduler.close()


def said(ids: list[int], tokens: int) -> str:
    return Words().decode(oracle(LedgerModel(VOCAB), ids, tokens, SamplingParams()))


ASSISTANT = {"role": "assistant"}
SAY_W3 = {"messages": [{"role": "user", "content": "w3"}]}


@pytest.mark.parametrize("chat", [False, True])
def test_whole_replies(chat: bool, here: Here) -> None:
    ids = [3] if chat else [9, 3]  # a template brings its own first token
    replies = [
        here.post("chat/completions" if chat else "completions", max_tokens=7, **(SAY_W3 if chat else {"prompt": "w3"}))
        for _ in range(2)
    ]
    first, second = (reply.json() for reply in replies)
    text = {"message": ASSISTANT | {"content": said(ids, 7)}} if chat else {"text": said(ids, 7)}
    assert first["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length", **text}]
    assert (first["object"], first["model"]) == ("chat.completion" if chat else "text_completion", "tiny")
    usage = {"prompt_tokens": len(ids), "completion_tokens": 7, "total_tokens": len(ids) + 7}
    assert {name: first["usage"][name] for name in usage} == usage
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": len(ids) - 1}
    assert first["id"] != second["id"] and first["choices"] == second["choices"]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_streamed_replies(chat: bool, usage: bool, here: Here) -> None:
    text = said([3] if chat else [9, 3], 7)
    # what might become this is held back, until it cannot
    stop = text[-3:] + "and more"
    body = {"stream": True, "max_tokens": 7, "stream_options": {"include_usage": usage}, "stop": stop}
    if chat:
        reply = here.post("chat/completions", **body, **SAY_W3)
    else:
        reply = here.post("completions", **body, prompt="w3")
    assert reply.headers["content-type"].startswith("text/event-stream") and reply.text.isascii()
    *events, done, end = reply.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk" if chat else "text_completion"}
    assert len({(chunk["id"], chunk["model"], chunk["created"]) for chunk in chunks}) == 1
    if usage:
        *chunks, last = chunks
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == 7
    choices = [chunk["choices"][0] for chunk in chunks]
    assert not any("usage" in chunk for chunk in chunks)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    parts = [choice["delta"]["content"] if chat else choice["text"] for choice in choices]
    assert "".join(parts) == text and all(parts[:-1])
    if chat:
        assert choices[0]["delta"]["role"] == "assistant" and not any("role" in one["delta"] for one in choices[1:])


def test_what_a_chat_template_is_given(here: Here) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "w1"}, {"type": "text", "text": "2"}], "name": "me"},
        {"role": "assistant", "content": None},
    ]
    here.tokenizer.templated.clear()
    assert here.post("chat/completions", messages=messages, max_tokens=1).json()["usage"]["prompt_tokens"] == 1
    given = [{"role": "system", "content": "w12", "name": "me"}, {"role": "assistant", "content": ""}]
    assert here.tokenizer.templated == [(given, {"tokenize": False, "add_generation_prompt": True})]


@pytest.mark.parametrize("template", [None, ""])
def test_a_model_without_a_chat_template_says_so(here: Here, template, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here.tokenizer, "chat_template", template, raising=False)
    reply = here.post("chat/completions", **SAY_W3)
    assert reply.status_code == 400 and "use /v1/completions" in reply.json()["error"]["message"]


def test_how_long_a_text_becomes(here: Here) -> None:
    def tokens(path: str, **body: Any) -> int:
        return here.post(path, **body).json()["usage"]["completion_tokens"]

    chat = "chat/completions"
    assert tokens(chat, **SAY_W3, max_tokens=3) == tokens(chat, **SAY_W3, max_completion_tokens=3) == 3
    assert tokens(chat, **SAY_W3, max_tokens=3, max_completion_tokens=3) == 3
    # by default 512, or what there is room for
    assert [tokens("completions", prompt=[1] * length) for length in (50, 590, 599)] == [512, 10, 1]


@pytest.mark.parametrize("streamed", [False, True])
def test_nothing_of_a_stop_string_is_sent_and_nothing_behind_it_counted(here: Here, streamed: bool) -> None:
    text = said([9, 3], 9)
    lines = text.splitlines(keepends=True)
    for count in range(7):
        stop = "".join(lines[count : count + 3])  # three tokens, which may come in as many cycles
        body = {"prompt": "w3", "max_tokens": 9, "stop": stop, "stream": streamed}
        if streamed:
            reply = here.post("completions", **body, stream_options={"include_usage": True})
            chunks = [json.loads(event.removeprefix("data: ")) for event in reply.text.split("\n\n")[:-2]]
            usage = chunks.pop()["usage"]
        else:
            chunks = [here.post("completions", **body).json()]
            usage = chunks[0]["usage"]
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"
        assert usage["completion_tokens"] == len(text[: text.index(stop) + len(stop)].splitlines())


def test_errors_have_the_kind_that_clients_look_for(here: Here) -> None:
    def error(reply: Any) -> tuple[int, str]:
        body = reply.json()["error"]
        assert body["code"] == reply.status_code
        return reply.status_code, body["type"]

    assert error(here.post("completions", prompt="w3", top_p=2)) == (400, "invalid_request_error")
    assert error(here.client.get("/v1/models/other")) == (404, "invalid_request_error")
    refused = here.client.put("/v1/completions")
    assert error(refused) == (405, "invalid_request_error") and refused.headers["allow"] == "POST"
    other = Here(max_waiting=1)
    other.scheduler.close()
    assert error(other.post("completions", prompt="w3")) == (503, "server_error")
    other.scheduler._closing = False  # nobody takes what waits now
    other.scheduler._waiting.extend([None] * 3)
    refused = other.post("completions", prompt="w3")
    assert error(refused) == (429, "rate_limit_error") and refused.headers["retry-after"] == "1"


def test_every_field_of_sampling_is_heeded() -> None:
    from orthrus_triton.serving.schema import CompletionRequest

    fields = {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "min_p": 0.125, "seed": 0, "presence_penalty": 1.0,
              "frequency_penalty": -1.5, "repetition_penalty": 1.25}  # fmt: skip
    more = {"logit_bias": {"4": -100}, "min_tokens": 6}
    body = CompletionRequest.model_validate({"prompt": [0, 1], **fields, **more})
    assert body.params() == SamplingParams(**fields, logit_bias={4: -100}, min_new_tokens=6) and body.prompt == [0, 1]
    plain = [CompletionRequest.model_validate({"prompt": "w1", "stop": ["a", "b"]}) for _ in range(2)]
    first, second = (one.params() for one in plain)
    assert first.seed != second.seed and plain[0].stop_strings == ["a", "b"]
    assert first == SamplingParams(temperature=1.0, seed=first.seed)


def test_a_stream_that_nobody_reads_frees_its_slot() -> None:
    """The client is gone before the first event."""
    here = Here(slots=1, max_len=4096)

    async def ask() -> None:
        body = json.dumps({"prompt": "w3", "max_tokens": 4000, "stream": True}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(_: dict) -> None:
            raise OSError("gone")

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b"",
                 "asgi": {"spec_version": "2.4"}, "client": None, "server": None, "http_version": "1.1",
                 "scheme": "http", "root_path": ""}  # fmt: skip
        with pytest.raises(Exception):  # noqa: B017
            await here.app(scope, receive, send)
        # while the loop can still be told of tokens
        await asyncio.to_thread(wait_for, lambda: here.scheduler.running == here.scheduler.waiting == 0)

    asyncio.run(ask())
    assert len(here.scheduler._run.slots[0].tokens) < 4000
    here.scheduler.close()
