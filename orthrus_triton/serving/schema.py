"""Requests of the OpenAI-compatible endpoint, checked: what nobody heeds is an error, not silence."""

from __future__ import annotations

import secrets
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationInfo, field_validator, model_validator

from orthrus_triton.modules import SamplingParams
from orthrus_triton.modules.sampling_params import MOST_NEW_TOKENS, SEED_LIMIT
from orthrus_triton.serving.logprobs import MOST_ALTERNATIVES
from orthrus_triton.serving.schema_parts import (
    Boolean,
    Function,
    Integer,
    Message,
    NamedTool,
    No,
    ResponseFormat,
    StreamOptions,
    Tool,
)

MOST_MESSAGES, MOST_TOOLS, MOST_CHOICES = 1000, 128, 128


Alternatives = Annotated[Integer, Field(ge=0, le=MOST_ALTERNATIVES)]


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
    n: Annotated[Integer, Field(ge=1, le=MOST_CHOICES)] = 1
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

    def params(self, choice: int = 0) -> SamplingParams:
        """How to sample a choice of `n`: of the first the seed is the one that was given, of each further one the next;
        without one, a fresh one."""
        seed = secrets.randbits(62) if self.seed is None else self.seed + choice
        if choice and seed >= SEED_LIMIT:
            seed -= 2 * SEED_LIMIT
        return SamplingParams(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            seed=seed, min_new_tokens=self.min_tokens,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty, logit_bias=self.logit_bias or {},
        )  # fmt: skip

    @property
    def structured_field(self) -> str:
        """What the reply's structure comes from, if it has one."""
        return "response_format"

    @property
    def scores_prompt(self) -> bool:
        """Whether the reply tells log probabilities of the prompt's tokens, too."""
        return False

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str | list[int]]
    max_tokens: int | None = Field(None, ge=0)
    echo: Boolean = False
    best_of: Integer | None = None
    logprobs: Alternatives | None = None

    @property
    def alternatives(self) -> int | None:
        """As in `Request`."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each a text or its token ids."""
        several = isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    @field_validator("prompt", mode="before")
    @classmethod
    def _texts_or_ids(cls, prompt: Any) -> Any:
        several = isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list))
        for one in prompt if several else [prompt]:
            is_ids = isinstance(one, list) and all(type(token) is int and 0 <= token < 2**31 for token in one)
            if not isinstance(one, str) and not is_ids:
                raise ValueError("must be a string, a list of token ids, or a list of such prompts")
        return prompt

    @property
    def scores_prompt(self) -> bool:
        """As above."""
        return self.echo and self.logprobs is not None

    @model_validator(mode="after")
    def _not_nothing(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be >= 1 without echo, but got 0")
        return self

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(f"best_of must be n, {self.n}: all are returned, but got {self.best_of}")
        if len(self.prompts) * self.n > MOST_CHOICES:
            raise ValueError(
                f"prompt must give at most {MOST_CHOICES} choices, but {len(self.prompts)} times n = {self.n} are more"
            )
        return self


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Boolean = False
    top_logprobs: Alternatives | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Boolean | None = None

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
    def is_free(self) -> bool:
        """Whether the reply may begin with whatever the model likes."""
        return not self.must_call and (self.response_format is None or self.response_format.type == "text")

    @property
    def kept_tools(self) -> list[Function] | None:
        """Of which every call must be one; None if nothing keeps to that."""
        tools = [tool.function for tool in self.tools or []] if self.template_tools else []
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in tools if tool.name == self.tool_choice.function.name]
        strict = self.parallel_tool_calls is False or any(tool.strict for tool in tools)
        return tools if self.must_call or (tools and strict) else None

    @property
    def structured_field(self) -> str:
        """What the reply's structure comes from."""
        return super().structured_field if self.kept_tools is None else "tools"

    @model_validator(mode="after")
    def _one_structure(self) -> ChatRequest:
        form, names = self.response_format, [tool.function.name for tool in self.tools or []]
        if len(set(names)) != len(names):
            raise ValueError(f"tools must have names of their own, but got {names}")
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
