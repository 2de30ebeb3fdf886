"""The endpoint with the real openai client over a real socket: what it says is AR decoding's text, under load, and
when clients go away."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from orthrus_triton.modules import SamplingParams
from tests.modules.ledger_model import oracle
from tests.serving.running import KEY, TEMPLATE, VOCAB, Running, SlowModel, openai


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
    free = server.expected("w4 w5", 30).lstrip()
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


def test_an_answer_without_text_has_a_role_all_the_same() -> None:
    server = Running(eos=oracle(SlowModel(VOCAB), [1], 1, SamplingParams()))
    try:
        chunks = server.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "w1"}], temperature=0, stream=True
        )
        (choice,) = (chunk.choices[0] for chunk in chunks)
        assert (choice.delta.role, choice.delta.content, choice.finish_reason) == ("assistant", "", "stop")
    finally:
        server.close()


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
        text = server.tokenizer.decode([1, *ids], skip_special_tokens=True)[2:]
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
        assert whole.choices[0].text == server.behind([1], free[:at])
        assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("stop", at + 1)
        parts = [chunk.choices[0] for chunk in server.client().completions.create(**ask, stream=True)]
        assert "".join(part.text for part in parts) == whole.choices[0].text and parts[-1].finish_reason == "stop"
    finally:
        server.close()


def test_a_chat_template_has_options(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    template = TEMPLATE + "{% if quiet %}w7 w8{% endif %}"
    monkeypatch.setattr(server.tokenizer, "chat_template", template)
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "w1"}], "max_tokens": 5, "temperature": 0}
    for options, prompt in ({"quiet": True}, "w1 w7 w8"), ({"quiet": False}, "w1"), ({}, "w1"), (None, "w1"):
        reply = server.client().chat.completions.create(**ask, extra_body={"chat_template_kwargs": options})
        assert reply.choices[0].message.content == server.expected(prompt, 5).strip()
    for options in ({"loud": True}, {"chat_template": "w9"}, {"messages": []}):
        with pytest.raises(
            openai.BadRequestError, match="chat_template_kwargs: '.*' is no option of this model's chat"
        ):
            server.client().chat.completions.create(**ask, extra_body={"chat_template_kwargs": options})


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
            with pytest.raises(openai.APIError, match="the server is closing") as error:
                list(stream)
            assert str(error.value.code) == "503"
    finally:
        server.close()
