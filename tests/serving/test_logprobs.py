"""Log probabilities as the openai client reads them: the model's own, whatever the sequence was sampled by."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.modules import SamplingParams
from tests.modules.ledger_model import oracle
from tests.serving.running import Running, openai

SAMPLED = {"temperature": 0.9, "seed": 5, "presence_penalty": 0.7}


def expected(server: Running, prompt: list[int], tokens: int) -> list[tuple[int, torch.Tensor]]:
    """Each token that is sampled, and all log probabilities [V] at its place."""
    ids = oracle(server.model, prompt, tokens, SamplingParams(**SAMPLED))
    return [
        (token, server.model.next_logits([*prompt, *ids[:n]]).log_softmax(-1)) for n, token in enumerate(ids)
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_of_a_chat(server: Running, stream: bool) -> None:
    reply = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "w1 w2"}], max_tokens=9, stream=stream, logprobs=True,
        top_logprobs=3, **SAMPLED,
    )  # fmt: skip
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    content = [entry for choice in choices for entry in choice.logprobs.content]
    for entry, (token, logprobs) in zip(content, expected(server, [1, 2], 9), strict=True):
        assert (entry.token, bytes(entry.bytes).decode()) == (f"w{token}", f"w{token}")
        assert entry.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
        values, ids = logprobs.topk(3)
        assert [one.token for one in entry.top_logprobs] == [f"w{other}" for other in ids.tolist()]
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    if stream:  # they come with their text
        text = "".join(choice.delta.content for choice in choices)
        assert text.split() == [entry.token for entry in content] and len(choices[0].logprobs.content) < 9


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("alternatives", [0, 2])
def test_of_a_completion(server: Running, stream: bool, alternatives: int) -> None:
    reply = server.client().completions.create(
        model="tiny", prompt=[3, 4, 5], max_tokens=7, stream=stream, logprobs=alternatives, **SAMPLED
    )
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    found = {name: sum((getattr(choice.logprobs, name) for choice in choices), []) for name in (
        "tokens", "token_logprobs", "top_logprobs", "text_offset"
    )}  # fmt: skip
    truth = expected(server, [3, 4, 5], 7)
    assert found["tokens"] == [f"w{token}" for token, _ in truth]
    assert found["token_logprobs"] == pytest.approx([float(of[token]) for token, of in truth], abs=1e-4)
    assert [list(top) for top in found["top_logprobs"]] == [
        [f"w{other}" for other in of.topk(alternatives).indices.tolist()] for _, of in truth
    ]
    lengths = [len(token) for token in found["tokens"]]
    assert found["text_offset"] == [sum(lengths[:n]) for n in range(7)]


def test_a_stop_token_has_none_and_who_does_not_ask_gets_none() -> None:
    probe = Running()
    ids = oracle(probe.model, [1], 40, SamplingParams())
    probe.close()
    end = next(token for n, token in enumerate(ids) if n > 3 and token not in ids[:n])
    server = Running(eos=[end])
    try:
        ask = {"model": "tiny", "prompt": [1], "max_tokens": 40, "temperature": 0}
        reply = server.client().completions.create(**ask, logprobs=1).choices[0]
        assert reply.finish_reason == "stop" and reply.logprobs.tokens == reply.text.split()
        assert server.client().completions.create(**ask).choices[0].logprobs is None
    finally:
        server.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs: Value error, is allowed only with logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20"),
        ({"logprobs": 1}, "logprobs: Value error, must be true or false, but got 1"),
    ],
)
def test_what_cannot_be_is_named(server: Running, options: dict, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        server.client().chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "w1"}], extra_body=options
        )
    with pytest.raises(openai.BadRequestError, match="logprobs: Value error, must be an integer, but got True"):
        server.client().completions.create(model="tiny", prompt="w1", extra_body={"logprobs": True})
