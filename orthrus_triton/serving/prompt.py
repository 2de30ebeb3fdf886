"""Prompts of HTTP requests as token ids: of chats through the model's template, of completions as they came.
What a tokenizer or a template cannot do is an answer to the client, and no failure of the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from fastapi import HTTPException

from orthrus_triton.models.chat_template import require_template_options
from orthrus_triton.models.token_text import LONGEST_CHARACTER, UNFINISHED, TokenText
from orthrus_triton.serving.schema import ChatRequest, CompletionRequest
from orthrus_triton.serving.thoughts import ThoughtReader, can_think, is_open
from orthrus_triton.serving.tool_calls import CALL, OPEN, can_be_read

TAIL = 8  # tokens of a prompt that say how a text goes on behind it


class Echo(NamedTuple):
    """A prompt's text, and where in it each of its tokens begins."""

    text: str
    offsets: list[int]


class Prompt(NamedTuple):
    """A prompt's token ids; the last of them, if what follows is to join on; its text, if the reply repeats it; what
    tells thoughts from the answer, if the model may think."""

    ids: list[int]
    tail: Sequence[int] = ()
    echo: Echo | None = None
    thoughts: Callable[[], ThoughtReader] | None = None


def encode_chat(tokenizer: Any, body: ChatRequest) -> Prompt:
    """Messages to a prompt, the beginning of the answer included.

    Raises:
        HTTPException: there is no template, it refuses the messages, or the tokenizer fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise HTTPException(400, "messages: this model has no chat template: use /v1/completions")
    try:
        options = _template_options(tokenizer, body.template_tools) | _own_options(tokenizer, body)
        messages = [message.template_fields() for message in body.messages]
        prompt = tokenizer.apply_chat_template(messages, **options, tokenize=False, add_generation_prompt=True)
    except HTTPException:
        raise
    except Exception as error:  # templates raise what they like
        raise HTTPException(400, f"messages: {error}") from error
    ids = _encode(tokenizer, "messages", prompt, add_special_tokens=False)["input_ids"]
    thinks = body.is_free and can_think(tokenizer.get_chat_template(tools=body.template_tools))
    return Prompt(ids, thoughts=partial(ThoughtReader, is_open(prompt)) if thinks else None)


def encode_completion(tokenizer: Any, body: CompletionRequest, vocab_size: int) -> list[Prompt]:
    """All prompts of a request.

    Raises:
        HTTPException: ids that are not the model's, or the tokenizer fails.
    """
    for ids in body.prompts:
        if not isinstance(ids, str) and max(ids, default=0) >= vocab_size:
            raise HTTPException(400, f"prompt must hold ids in 0..{vocab_size - 1}, but got {max(ids)}")
    return [_encode_one(tokenizer, prompt, body.echo) for prompt in body.prompts]


def _encode_one(tokenizer: Any, prompt: str | list[int], echoed: bool) -> Prompt:
    where = {"return_offsets_mapping": True} if echoed and getattr(tokenizer, "is_fast", False) else {}
    encoded = _encode(tokenizer, "prompt", prompt, **where) if isinstance(prompt, str) else {"input_ids": prompt}
    ids, echo = encoded["input_ids"], None
    try:
        if echoed:
            echo = _echo(tokenizer, prompt, ids, encoded.get("offset_mapping"))
        return Prompt(ids, _tail(tokenizer, ids), echo)
    except Exception as error:
        raise _failure("prompt", error) from error


def _tail(tokenizer: Any, ids: list[int]) -> Sequence[int]:
    """The last tokens of a prompt that have text; none if it ends within a character. They must not begin within one: a
    byte that is none spoils all bytes behind it where a tokenizer has bytes for what it has no tokens for."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for count in range(TAIL, TAIL + LONGEST_CHARACTER):
        tail = [token for token in ids[-count:] if token not in special]
        if not tokenizer.decode(tail).endswith(UNFINISHED):
            return tail
    return ()


def _echo(
    tokenizer: Any, prompt: str | list[int], ids: list[int], spans: Sequence[tuple[int, int]] | None
) -> Echo:  # fmt: skip
    """A text is repeated as it came; ids as their text, with the special tokens that a client has put there."""
    if spans is not None and isinstance(prompt, str):
        return Echo(prompt, _starts(spans))
    text = TokenText(tokenizer, skip_special_tokens=isinstance(prompt, str))
    final, unsure = zip(*(text.push([token]) for token in ids)) if ids else ((), ("",))
    ends = list(accumulate(map(len, final)))
    whole = prompt if isinstance(prompt, str) else "".join(final) + unsure[-1]
    return Echo(whole, [min(end, len(whole)) for end in [0, *ends][:-1]])


def _starts(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where tokens begin: with the space before a word, which some tokenizers leave to no token, and what a tokenizer
    adds of its own (at 0..0) where the next token does."""
    starts, start, end = [], 0, 0
    for first, last in spans:
        start = end if first == last else max(start, min(first, end))
        end = max(end, last)
        starts.append(start)
    return starts


def _template_options(tokenizer: Any, tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    if not tools:
        return {}
    if not can_be_read(tokenizer.get_chat_template(tools=tools)):
        raise HTTPException(
            400, f"tools: this model's chat template does not ask for calls as {CALL}, the only form that is read here"
        )
    if OPEN in tokenizer.all_special_tokens:
        raise HTTPException(400, f"tools: {OPEN} is a special token of this tokenizer, which texts leave out")
    return {"tools": tools}


def _own_options(tokenizer: Any, body: ChatRequest) -> dict[str, Any]:
    options = body.chat_template_kwargs or {}
    try:
        require_template_options(tokenizer, options, body.template_tools)
    except ValueError as error:
        raise HTTPException(400, f"chat_template_kwargs: {error}") from error
    return options


def _encode(tokenizer: Any, field: str, text: str, **options: Any) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can say
        raise HTTPException(400, f"{field}: not valid Unicode: {error}") from error
    try:
        return tokenizer(text, **options)
    except Exception as error:
        raise _failure(field, error) from error


def _failure(field: str, error: Exception) -> HTTPException:
    """Tokenizers raise what they like."""
    return HTTPException(500, f"{field}: the tokenizer failed: {type(error).__name__}: {error}")
