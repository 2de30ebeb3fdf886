"""What the endpoint refuses, and how it says so; what fails of one request alone."""

from __future__ import annotations

import json
import threading

import httpx
import pytest

from tests.serving.running import KEY, Running, openai


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "prompt must be 1-D with at least one token"),
        ({"prompt": [99]}, "prompt must hold ids in 0..16"),
        ({"prompt": "w1", "max_tokens": 3000}, "max_tokens must be in 1..2999"),
        ({"prompt": [1] * 3000}, "prompt must have at most 2999 tokens, but has 3000"),
        ({"prompt": [2**70]}, "prompt: .*must be a string, a list of token ids, or a list of such prompts"),
        ({"prompt": ["w1", [True]]}, "prompt: .*must be a string, a list of token ids, or a list of such prompts"),
        ({"prompt": [[[1]]]}, "prompt: .*must be a string, a list of token ids, or a list of such prompts"),
        ({"prompt": ["w1", []]}, "prompt must be 1-D with at least one token"),
        ({"prompt": ["w1"] * 65, "n": 2}, "prompt must give at most 128 choices, but 65 times n = 2"),
        (
            {"prompt": "w1", "n": 68},
            "n: times the number of prompts must be at most 43, .* but is 68",
        ),
        ({"prompt": "w1", "n": 2, "best_of": 3}, "best_of must be n, 2: all are returned, but got 3"),
        ({"prompt": "w1", "top_p": 0}, "top_p: .*greater than 0"),
        ({"prompt": "w1", "temperature": -1}, "temperature: .*greater than or equal to 0"),
        ({"prompt": "w1", "temperature": 1e-40}, "temperature must be 0, which is greedy, or at least 1e-30"),
        ({"prompt": "w1", "n": 0}, "n: Input should be greater than or equal to 1"),
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
