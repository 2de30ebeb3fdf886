"""Bodies of requests as common clients write them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("pydantic", reason="needs the extra [serve]")


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "n": 1},
        {name: None for name in (
            "n", "stop", "stream", "stream_options", "seed", "logit_bias", "tools", "tool_choice", "response_format",
            "user", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "functions",
            "parallel_tool_calls", "temperature", "top_p",
        )},
        {"seed": 2**63 - 1}, {"seed": -(2**63)}, {"logit_bias": {"7": -100, "12": 0.5}}, {"logit_bias": {}},
        {"stop": "a"}, {"stop": ["a", "b"]}, {"stop": []}, {"max_completion_tokens": 5}, {"stream_options": None},
        {"stream": True, "stream_options": {"include_usage": False}}, {"logprobs": False, "store": False},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"service_tier": "auto", "prompt_cache_key": "a", "safety_identifier": "b"},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
        {"response_format": {"type": "text"}, "tool_choice": "none", "metadata": {"a": "b"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "w1"}], "name": "someone"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": None, "annotations": []}]},
    ],
)  # fmt: skip
def test_what_clients_send_passes(more: dict[str, Any]) -> None:
    from orthrus_triton.serving.schema import ChatRequest

    body = ChatRequest.model_validate({"model": "tiny", "messages": [{"role": "user", "content": "w1"}], **more})
    body.params()
    assert all(isinstance(one, str) for one in body.stop_strings)


def test_two_limits_must_agree() -> None:
    from pydantic import ValidationError

    from orthrus_triton.serving.schema import ChatRequest

    body = {"messages": [{"role": "user", "content": "w1"}], "max_tokens": 9}
    assert ChatRequest.model_validate({**body, "max_completion_tokens": 9}).max_completion_tokens == 9
    with pytest.raises(ValidationError, match="must be max_tokens, its older name"):
        ChatRequest.model_validate({**body, "max_completion_tokens": 8})


def test_conversations_may_be_long() -> None:
    from orthrus_triton.serving.schema import ChatRequest

    message = {"role": "user", "content": "w1"}
    assert len(ChatRequest.model_validate({"messages": [message] * 1000}).messages) == 1000
    for count in (0, 1001):
        with pytest.raises(ValueError, match="messages"):
            ChatRequest.model_validate({"messages": [message] * count})
