"""Log probabilities of the tokens of a text, as the model had them, before temperature, penalties and bias.
From logits in the scheduler's thread; in the two forms that clients know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from orthrus_triton.models.token_text import UNFINISHED

MOST_ALTERNATIVES = 20


class TokenLogprobs(NamedTuple):
    """A token, its log probability, and those of the likeliest tokens at its place, best first."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenLogprobs]:
    """logits [n, V] that n tokens were chosen from -> what is reported of each, with so many alternatives."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor([tokens], device=logits.device).T)[:, 0].tolist()
    top = logprobs.topk(min(alternatives, logits.shape[1]))
    rows = zip(top.indices.tolist(), top.values.tolist())
    return [TokenLogprobs(token, of, list(zip(*row))) for token, of, row in zip(tokens, chosen, rows)]


def chat_logprobs(tokenizer: Any, tokens: Sequence[TokenLogprobs], _text_offset: int = 0) -> dict[str, Any]:
    """The field of a chat's choice."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.decode([token])
        whole = None if UNFINISHED in text else list(text.encode())  # part of a character
        return {"token": text, "logprob": logprob, "bytes": whole}

    return {
        "content": [
            entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.likeliest]}
            for one in tokens
        ],
        "refusal": None,
    }  # fmt: skip


def completion_logprobs(tokenizer: Any, tokens: Sequence[TokenLogprobs], text_offset: int = 0) -> dict[str, Any]:
    """The field of a completion's choice; `text_offset`: characters that tokens before these have."""
    texts, offsets = [tokenizer.decode([one.token]) for one in tokens], []
    for text in texts:
        offsets.append(text_offset)
        text_offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{tokenizer.decode([token]): of for token, of in one.likeliest} for one in tokens],
        "text_offset": offsets,
    }
