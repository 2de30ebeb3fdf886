"""Request: one sequence that a client wants, and what becomes of it.
Between whoever asks, on any thread, and the scheduler, on its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from orthrus_triton.modules import SamplingParams
from orthrus_triton.serving.logprobs import PromptLogprobs, TokenLogprobs

logger = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "error"]
Deliver = Callable[[list[int], "FinishReason | None", str], None]


@dataclass(eq=False)
class Request:
    """One sequence to generate.

    Args:
        prompt: [L] integers, a tensor or a list.
        max_new_tokens: most tokens to generate.
        params: how it samples. A `logits_processor` must not raise: that would end all sequences that are running.
        deliver: called from the scheduler's thread with new tokens, the reason once it has finished, and what went
            wrong if the reason is "error". Must not block.
        prompt_logprobs: collects those of the prompt's tokens, which is read from its beginning then; None if nobody
            asked. They are there before the first token is delivered.
        alternatives: None, or for how many tokens at each place `logprobs` has a number, besides the token that came.
        stop: called after every token with all new tokens, also from that thread; True ends the sequence there.

    Attributes:
        cached: tokens of the prompt that a slot held already.
        logprobs: of tokens that were delivered, where asked for: there before these are, until their reader drops them.
    """

    prompt: torch.Tensor | Sequence[int]
    max_new_tokens: int
    params: SamplingParams
    deliver: Deliver
    stop: Callable[[list[int]], bool] | None = None
    alternatives: int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    cancelled: bool = field(default=False, init=False)
    delivered: int = field(default=0, init=False)
    cached: int = field(default=0, init=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        # a copy: it is read in parts, while its owner may use the tensor for the next one
        self.prompt = torch.as_tensor(self.prompt).clone()

    def tokens_to_stop(self, generated: list[int], new: int) -> int | None:
        """After how many of the `new` last tokens of `generated` its own function ends it; None if it does not."""
        if self.stop is not None:
            for count in range(1, new + 1):
                if self.stop(generated[: self.delivered + count]):
                    return count
        return None

    def hand_over(self, tokens: list[int], reason: FinishReason | None, error: str) -> None:
        """To a listener that may be gone, such as an event loop that has closed; that is no concern of the others."""
        if self.cancelled:
            return
        try:
            self.deliver(tokens, reason, error)
        except Exception:
            logger.exception("a listener failed; its request is dropped")
            self.cancelled = True
