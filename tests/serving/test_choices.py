"""Several choices of one request: `n` of a prompt, several prompts, whole and streamed; each as if it were alone."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.serving.running import KEY, Running

PROMPTS = ["w1 w2", [3, 4, 5], "w6"]
MESSAGES = [{"role": "user", "content": "w1 w2 w3"}]


def alone(server: Running, prompt: Any, **more: Any) -> Any:
    return server.client().completions.create(model="tiny", prompt=prompt, max_tokens=30, **more).choices[0]


@pytest.mark.parametrize("seed", [7, 2**63 - 2])
def test_every_choice_is_the_one_of_a_seed_of_its_own(server: Running, seed: int) -> None:
    seeds = [seed, seed + 1, seed + 2 if seed == 7 else -(2**63)]
    expected = [alone(server, prompt, seed=one).text for prompt in PROMPTS for one in seeds]
    assert len(set(expected)) == 9
    reply = server.client().completions.create(
        model="tiny", prompt=PROMPTS, max_tokens=30, seed=seed, n=3, best_of=3, logprobs=0
    )
    assert [choice.index for choice in reply.choices] == [*range(9)]
    assert [choice.text for choice in reply.choices] == expected
    assert all(len(choice.logprobs.tokens) == 30 for choice in reply.choices)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (6, 270, 276)


def test_without_a_seed_choices_differ(server: Running) -> None:
    reply = server.client().chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30, n=4)
    assert len({choice.message.content for choice in reply.choices}) == 4
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]


@pytest.mark.parametrize("chat", [False, True])
def test_choices_are_streamed_side_by_side(server: Running, chat: bool) -> None:
    create = server.client().chat.completions.create if chat else server.client().completions.create
    what = {"messages": MESSAGES} if chat else {"prompt": PROMPTS}
    more = {"model": "tiny", "max_tokens": 40, "seed": 3, "n": 2, **what}
    whole = create(**more)
    texts, ended, order, usage = defaultdict(str), {}, [], None
    for chunk in create(**more, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert choice.index not in ended
            assert not chat or (choice.delta.role == "assistant") == (choice.index not in texts)
            texts[choice.index] += (choice.delta.content or "") if chat else choice.text
            order.append(choice.index)
            if choice.finish_reason:
                ended[choice.index] = choice.finish_reason
    assert texts == {one.index: one.message.content if chat else one.text for one in whole.choices}
    assert ended == dict.fromkeys(texts, "length")
    assert order != sorted(order)  # nobody waits for those before
    assert usage.completion_tokens == 40 * len(texts) and usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_prompt_is_read_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, held = [(5 * n) % 17 for n in range(300)], []
    admit = server.scheduler._run.admit
    monkeypatch.setattr(
        server.scheduler._run, "admit", lambda *request, **how: [held.append(request[-1]), admit(*request, **how)]
    )
    reply = server.client().completions.create(model="tiny", prompt=prompt, max_tokens=100, n=3, temperature=0)
    assert len({choice.text for choice in reply.choices}) == 1 and reply.usage.prompt_tokens == 300
    assert held[0] < 299 and held[1:] == [299, 299]
    assert reply.usage.prompt_tokens_details.cached_tokens == held[0]  # what the prompt's first choice found


def test_a_structure_is_understood_once_and_kept_to_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance", reason="needs the extra [serve]")
    from orthrus_triton.models.grammar import Grammars
    from orthrus_triton.testing import TinyDualViewModel
    from tests.cli_models import make_tokenizer

    tokenizer, of, asked = make_tokenizer(), Grammars.of, []
    monkeypatch.setattr(Grammars, "of", lambda *how: [asked.append(how), of(*how)][1])
    server = Running(
        [tokenizer.eos_token_id], model=TinyDualViewModel(len(tokenizer), block_size=4), tokenizer=tokenizer
    )
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer", "minimum": 10**5}}}
    try:
        reply = server.client().completions.create(
            model="tiny", prompt=["a", "the text"], n=3, max_tokens=200, extra_body={"response_format": form}
        )
    finally:
        server.close()
    assert len(asked) == 1 and all(int(choice.text) >= 10**5 for choice in reply.choices) and len(reply.choices) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_choice_leaves_no_other_behind(server: Running, stream: bool) -> None:
    body = {"prompt": [[1], [2], [99]], "max_tokens": 2000, "stream": stream}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert reply.status_code == 400 and "0..16" in reply.json()["error"]["message"]
    server.wait_until(lambda: server.scheduler.running == server.scheduler.waiting == 0)


def test_all_are_free_when_the_client_goes(server: Running) -> None:
    body = {"prompt": [[1], [2], [3], [4]], "max_tokens": 2900, "temperature": 0}
    headers = {"Authorization": f"Bearer {KEY}"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=0.3)
    server.wait_until(lambda: server.scheduler.running == server.scheduler.waiting == 0)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, headers=headers) as reply:
        event = next(line for line in reply.iter_lines() if line)
        assert json.loads(event.removeprefix("data: "))["choices"]
    server.wait_until(lambda: server.scheduler.running == server.scheduler.waiting == 0)


def test_nobody_goes_on_reading_where_another_choice_failed() -> None:
    from fastapi import HTTPException

    from orthrus_triton.serving.replies import COMPLETION, reply_events

    class Choice:
        id, created, reason = "one", 0, None

        def __init__(self, index: int) -> None:
            self.index = index

        async def pieces(self) -> AsyncIterator[str]:
            if self.index:
                raise HTTPException(500, "no")
            await asyncio.Event().wait()
            yield ""

    async def read() -> list[str]:
        events = [event async for event in reply_events([Choice(0), Choice(1)], "tiny", COMPLETION, 2, False)]
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) == 1  # this one
        return events

    (event,) = asyncio.run(read())
    assert json.loads(event.removeprefix("data: "))["error"]["message"] == "no"
