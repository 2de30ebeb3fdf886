"""Requests of the OpenAI-compatible endpoint, checked: what nobody heeds is an error, not silence."""

from __future__ import annotations

import json
import secrets
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from orthrus_triton.modules import SamplingParams
from orthrus_triton.modules.sampling_params import MOST_NEW_TOKENS
from orthrus_triton.serving.logprobs import MOST_ALTERNATIVES

MOST_MESSAGES, MOST_TOOLS = 1000, 128


def _integer(value: Any) -> Any:
    if type(value) is not int:  # true and 1.0 are equal to 1
        raise ValueError(f"must be an integer, but got {value!r}")
    return value


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # 0 is equal to false
        raise ValueError(f"must be true or false, but got {value!r}")
    return value


Alternatives = Annotated[int, BeforeValidator(_integer), Field(ge=0, le=MOST_ALTERNATIVES)]
One = Annotated[Literal[1], BeforeValidator(_integer)]
No = Annotated[Literal[False], BeforeValidator(_boolean)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = False
    include_obfuscation: No | None = None  # nothing is


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")  # templates read further fields
    role: str
    content: str | list[dict[str, Any]] | None = None

    def template_fields(self) -> dict[str, Any]:
        """For the chat template: text parts joined.

        Raises:
            ValueError: a part that is not text.
        """
        content = self.content
        if isinstance(content, list):
            kinds = [part.get("type") for part in content if part.get("type") != "text"]
            if kinds:
                raise ValueError(f"content parts must be of type 'text', but got {sorted(map(str, kinds))}")
            texts = [part.get("text") for part in content]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("the text of a content part must be a string")
            content = "".join(texts)
        fields = {**(self.model_extra or {}), "role": self.role, "content": content or ""}
        if fields.get("tool_calls"):
            fields["tool_calls"] = [_with_arguments_read(call) for call in fields["tool_calls"]]
        return fields


def _with_arguments_read(call: Any) -> Any:
    """Templates write arguments as JSON; clients send them as JSON in a string."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool, BeforeValidator(_boolean)] | None = None

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema and schema.get("type", "object") != "object":
            raise ValueError(f"must be the schema of an object, but got type {schema['type']!r}")
        return schema


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["function"]
    function: FunctionName


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str = Field(min_length=1)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: Annotated[bool, BeforeValidator(_boolean)] | None = None  # it is kept to in either case


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema must be given with type 'json_schema', and only with that")
        return self


class _Common(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[Annotated[int, Strict(False)], float] | None = None  # JSON's names are strings
    min_tokens: int = Field(0, ge=0, le=MOST_NEW_TOKENS)
    n: One = 1
    response_format: ResponseFormat | None = None
    # of no effect here or with its default: accepted so that common clients work
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: No | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, body: Any) -> Any:
        """Clients send null for what they do not set."""
        return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream", True):
            raise ValueError("is allowed only with stream=true")
        return options

    def params(self) -> SamplingParams:
        """How to sample; without a seed, a fresh one."""
        return SamplingParams(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            seed=secrets.randbits(62) if self.seed is None else self.seed, min_new_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty, logit_bias=self.logit_bias or {},
        )  # fmt: skip

    @property
    def structured_field(self) -> str:
        """What the reply's structure comes from, if it has one."""
        return "response_format"

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: str | list[int]
    echo: No = False
    best_of: One = 1
    logprobs: Alternatives | None = None

    @property
    def alternatives(self) -> int | None:
        """As in `Request`."""
        return self.logprobs

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]  # a batch of one, as some clients send every prompt
        is_ids = isinstance(prompt, list) and all(type(token) is int and 0 <= token < 2**31 for token in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise ValueError("must be one string or one list of token ids, alone or in a list of one")
        return prompt


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Annotated[bool, BeforeValidator(_boolean)] = False
    top_logprobs: Alternatives | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Annotated[bool, BeforeValidator(_boolean)] | None = None

    @property
    def alternatives(self) -> int | None:
        """As in `Request`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @cached_property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools the model may call, for the chat template; None where there are none."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in self.tools]

    @property
    def must_call(self) -> bool:
        """Whether the reply must consist of calls; otherwise the model may say what it likes."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def kept_tools(self) -> list[dict[str, Any]] | None:
        """Of which every call must be one, with arguments as its parameters say; None if nothing keeps to that."""
        tools = self.template_tools or []
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in tools if tool["function"]["name"] == self.tool_choice.function.name]
        strict = self.parallel_tool_calls is False or any(tool.function.strict for tool in self.tools or [])
        return tools if self.must_call or (tools and strict) else None

    @property
    def structured_field(self) -> str:
        """What the reply's structure comes from."""
        return super().structured_field if self.kept_tools is None else "tools"

    @model_validator(mode="after")
    def _one_structure(self) -> ChatRequest:
        form = self.response_format
        if self.must_call and not self.kept_tools:
            raise ValueError("tool_choice must be 'none' or 'auto' without tools, and a tool's name one of tools")
        if self.template_tools and form is not None and form.type != "text":
            raise ValueError(f"response_format must be 'text' where tools may be called, but got {form.type!r}")
        return self

    @field_validator("top_logprobs")
    @classmethod
    def _of_logprobs(cls, alternatives: int | None, info: ValidationInfo) -> int | None:
        if alternatives is not None and not info.data.get("logprobs", True):
            raise ValueError("is allowed only with logprobs=true")
        return alternatives

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_limit(cls, tokens: int | None, info: ValidationInfo) -> int | None:
        if tokens is not None and info.data.get("max_tokens", tokens) not in (None, tokens):
            raise ValueError("must be max_tokens, its older name, where both are given")
        return tokens
