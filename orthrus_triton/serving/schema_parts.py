"""Parts of requests of the OpenAI-compatible endpoint: types that JSON has, messages, tools, response formats."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


def integer(value: Any) -> Any:
    if type(value) is not int:  # true and 1.0 are equal to 1
        raise ValueError(f"must be an integer, but got {value!r}")
    return value


def boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # 0 is equal to false
        raise ValueError(f"must be true or false, but got {value!r}")
    return value


Integer = Annotated[int, BeforeValidator(integer)]
Boolean = Annotated[bool, BeforeValidator(boolean)]
No = Annotated[Literal[False], BeforeValidator(boolean)]


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
    strict: Boolean | None = None

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
    strict: Boolean | None = None  # it is kept to in either case


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema must be given with type 'json_schema', and only with that")
        return self
