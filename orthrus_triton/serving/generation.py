"""One generation on behalf of an HTTP request: from the prompt's ids to text, piece by piece.
The scheduler's thread delivers tokens into the event loop; whoever reads the pieces frees the slot by stopping."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from fastapi import HTTPException

from orthrus_triton.models.grammar import GrammarProcessor
from orthrus_triton.models.stop_strings import StopStrings
from orthrus_triton.serving.logprobs import LogprobsField, PromptLogprobs, TokenLogprobs
from orthrus_triton.serving.prompt import Prompt
from orthrus_triton.serving.request import FinishReason, Request
from orthrus_triton.serving.scheduler import QueueFullError, Scheduler
from orthrus_triton.serving.schema import ChatRequest, CompletionRequest
from orthrus_triton.serving.text_stream import TextStream
from orthrus_triton.serving.thoughts import Thought
from orthrus_triton.serving.tool_calls import ToolCall, ToolCallReader

DEFAULT_MAX_TOKENS = 512
Part = str | Thought | ToolCall
LogprobsForm = Callable[[LogprobsField, Sequence[TokenLogprobs]], dict[str, Any]]


class Tokens(NamedTuple):
    """Of one choice: those of its prompt, those of its text, and those of its prompt that a slot held already."""

    prompt: int
    completion: int
    cached: int


class Generation:
    """Queued when it is made, by a task of the event loop that will read its `pieces`.

    Args:
        scheduler: runs it.
        tokenizer: of transformers.
        prompt: what it goes on from.
        body: what the client asked for.
        max_tokens: most tokens to generate; None is the default, or as many as there is room for; 0 gives none.
        structure: what keeps the text to the structure that was asked for; None for free text.
        index: of the choice that it becomes, prompt by prompt.

    Attributes:
        id, created: name the reply, that of the first choice.
        reason: why it has ended; None until then.

    Raises:
        HTTPException: the request cannot run, now or ever.
    """

    def __init__(
        self, scheduler: Scheduler, tokenizer: Any, prompt: Prompt, body: CompletionRequest | ChatRequest,
        max_tokens: int | None, structure: GrammarProcessor | None = None, index: int = 0,
    ) -> None:  # fmt: skip
        self.id, self.created, self.index = uuid.uuid4().hex, int(time.time()), index
        self.reason: FinishReason | Literal["tool_calls"] | None = None
        self._scheduler, self._prompt, self._mute = scheduler, prompt, max_tokens == 0
        self._structure, self._structured_field = structure, body.structured_field
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        stop = None
        try:
            if body.stop_strings:
                stop = StopStrings(tokenizer, body.stop_strings, context=prompt.tail)
        except ValueError as error:
            raise HTTPException(400, f"stop: {error}") from error
        repeated = () if prompt.echo is None else (prompt.echo.offsets, len(prompt.echo.text))
        self._logprobs, self._reported = LogprobsField(tokenizer, prompt.tail, *repeated), 0
        self._stop_tokens_count = isinstance(body, CompletionRequest)  # in log probabilities, for each API its own way
        self._calls = ToolCallReader() if isinstance(body, ChatRequest) and body.template_tools else None
        self._thoughts = None if prompt.thoughts is None else prompt.thoughts()
        self._text = TextStream(tokenizer, stop, scheduler.decoder.model.eos_token_ids, prompt.tail)
        if max_tokens is None:
            max_tokens = min(DEFAULT_MAX_TOKENS, max(scheduler.max_len - len(prompt.ids), 1))
        try:
            scores = PromptLogprobs(prompt.ids, body.alternatives) if body.scores_prompt else None
            self._unreported = [] if scores is None else scores.tokens
            ids = torch.tensor(prompt.ids, dtype=torch.int64)
            params = replace(body.params(index % body.n), logits_processor=structure)
            self._request = Request(
                ids, max(max_tokens, 1), params, self._deliver, stop, body.alternatives, prompt_logprobs=scores
            )
            scheduler.submit(self._request)
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": "1"}) from error
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from error

    def _deliver(self, tokens: list[int], reason: FinishReason | None, error: str) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (tokens, reason, error))

    async def pieces(self) -> AsyncIterator[Part]:
        """Text as it becomes certain, behind the prompt's if that is repeated; thoughts where the model may think, and
        tool calls where there are tools. However this ends, the slot is free afterwards.

        Raises:
            HTTPException: the generation failed.
        """
        repeat = "" if self._prompt.echo is None else self._prompt.echo.text
        try:
            while self.reason is None:
                tokens, reason, error = await self._events.get()
                if reason == "error":
                    if self._structure is not None and self._structure.error:  # too much for the parser
                        raise HTTPException(400, f"{self._structured_field}: {self._structure.error}")
                    raise HTTPException(503 if self._scheduler.why_closed else 500, error)
                if repeat:
                    yield repeat
                repeat, text = "", self._push([] if self._mute else tokens, last=reason is not None)
                # a stop string may be in the text alone: special tokens, which the text leaves out, stood inside it
                self.reason = "stop" if self._text.stopped else "length" if self._mute and reason else reason
                last, thought = self.reason is not None, ""
                if self._thoughts is not None:
                    thought, text = self._thoughts.push(text, last)
                if thought:
                    yield Thought(thought)
                parts = [text] if self._calls is None else self._calls.push(text, last)
                if self.reason == "stop" and self._calls is not None and self._calls.count:
                    self.reason = "tool_calls"
                for part in filter(None, parts):
                    yield part
        finally:
            self.cancel()

    def _push(self, tokens: list[int], last: bool) -> str:
        try:
            return self._text.push(tokens, last)
        except Exception as error:  # tokenizers raise what they like
            raise HTTPException(500, f"text: the tokenizer failed: {type(error).__name__}: {error}") from error

    def new_logprobs(self, form: LogprobsForm) -> dict[str, Any] | None:
        """Those of the tokens that came since the last call, behind the prompt's if that is repeated, as `form` has
        them: even of those whose text is held back or cut off; in chats, all but stop tokens. None if nobody asked."""
        if self._request.alternatives is None:
            return None
        arrived = self._request.logprobs[: len(self._text.tokens) - self._reported]
        del self._request.logprobs[: len(arrived)]
        self._reported += len(arrived)
        if not self._stop_tokens_count:
            arrived = [one for one in arrived if one.token not in self._text.stop_ids]
        prompt, self._unreported = self._unreported, []
        try:
            return form(self._logprobs, [*prompt, *arrived])
        except Exception as error:  # tokenizers raise what they like
            raise HTTPException(500, f"logprobs: the tokenizer failed: {type(error).__name__}: {error}") from error

    def cancel(self) -> None:
        """Free the slot, or the place in the queue."""
        self._scheduler.cancel(self._request)

    def tokens(self) -> Tokens:
        """How many it had, and how many of the prompt's needed no work."""
        return Tokens(len(self._prompt.ids), len(self._text.tokens), self._request.cached)
