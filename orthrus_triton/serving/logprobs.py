"""Log probabilities of the tokens of a text, as the model had them, before temperature, penalties and bias.
From logits in the scheduler's thread; in the two forms that clients know."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from orthrus_triton.models.token_text import UNFINISHED, TokenText
from orthrus_triton.modules.run_to_end import WHY_NO_TOKEN

MOST_ALTERNATIVES = 20
LEAST = -9999.0  # stands for -inf, which JSON has not
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenLogprobs(NamedTuple):
    """A token, its log probability, which a prompt's first one has not, and those of the likeliest tokens at its place,
    best first."""

    token: int
    logprob: float | None
    likeliest: list[tuple[int, float]]


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int], alternatives: int) -> list[TokenLogprobs]:
    """logits [n, V] that n tokens were chosen from -> what is reported of each, with so many alternatives."""
    logprobs = logits.log_softmax(-1).clamp(min=LEAST)
    chosen = logprobs.gather(1, torch.tensor([tokens], device=logits.device).T)[:, 0].tolist()
    top = logprobs.topk(min(alternatives, logits.shape[1]))
    rows = zip(top.indices.tolist(), top.values.tolist())
    return [TokenLogprobs(token, of, list(zip(*row))) for token, of, row in zip(tokens, chosen, rows)]


class PromptLogprobs:
    """Those of a prompt's tokens, collected while it is read.

    Attributes:
        tokens: as far as it was read.
    """

    def __init__(self, prompt: Sequence[int], alternatives: int) -> None:
        self._prompt, self._alternatives = prompt, alternatives
        self.tokens = [TokenLogprobs(token, None, []) for token in prompt[:1]]

    def __call__(self, logits: torch.Tensor) -> None:
        """Take logits [n, V] that the next n tokens of the prompt say of the one behind each.

        Raises:
            ValueError: what the one request is to be told.
        """
        behind = self._prompt[len(self.tokens) : len(self.tokens) + len(logits)]  # of the last one, the text's first
        if logits.isnan().any():
            raise ValueError(f"logprobs: {WHY_NO_TOKEN}")
        try:
            self.tokens += token_logprobs(logits[: len(behind)], behind, self._alternatives)
        except Exception as error:  # such as a lack of memory
            raise ValueError(f"logprobs: {type(error).__name__}: {error}") from error


class LogprobsField:
    """The field of a choice, piece by piece of one text.

    Args:
        tokenizer: of transformers.
        context: as in `TokenText`.
        offsets: where the first tokens begin, if they are those of a prompt.
        length: of the prompt's text then.
    """

    def __init__(
        self, tokenizer: Any, context: Sequence[int] = (), offsets: Iterable[int] = (), length: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._text = TokenText(tokenizer, context, skip_special_tokens=True)
        self._offsets, self._length = deque(offsets), length

    def of_chat(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """For the next tokens of a chat's choice."""
        content = [
            self._entry(one.token, one.logprob) | {"top_logprobs": [self._entry(*other) for other in one.likeliest]}
            for one in tokens
        ]
        return {"content": content, "refusal": None}

    def of_completion(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """For the next tokens of a completion's choice. Of alternatives with one name the best counts; the token that
        came is always among them."""
        field: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in tokens:
            field["tokens"].append(self._name(one.token))
            field["token_logprobs"].append(one.logprob)
            field["text_offset"].append(self._offsets.popleft() if self._offsets else self._next_offset(one.token))
            if one.logprob is None:
                field["top_logprobs"].append(None)
                continue
            named: dict[str, float] = {}
            for token, logprob in (*one.likeliest, (one.token, one.logprob)):
                named.setdefault(self._name(token), logprob)
            field["top_logprobs"].append(named)
        return field

    def _next_offset(self, token: int) -> int:
        offset = self._length
        self._length += len(self._text.push([token])[0])
        return offset

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = text_and_bytes(self._tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": None if data is None else list(data)}

    def _name(self, token: int) -> str:
        text, data = text_and_bytes(self._tokenizer, token)
        if UNFINISHED not in text or data is None:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@lru_cache(maxsize=1 << 18)
def text_and_bytes(tokenizer: Any, token: int) -> tuple[str, bytes | None]:
    """What a token adds to a text, as it would behind itself: with the space that begins a word, which the first of a
    text may lose; and the bytes, None where the tokenizer does not tell those of a part of a character."""
    alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    text = twice[len(alone) :] if twice.startswith(alone) else alone
    if UNFINISHED not in text:
        return text, text.encode()
    piece = tokenizer.convert_ids_to_tokens(token)
    if byte := BYTE.fullmatch(piece):
        return text, bytes.fromhex(byte[1])
    table = _byte_level()
    return text, bytes(table[sign] for sign in piece) if all(sign in table for sign in piece) else None


@cache
def _byte_level() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies since GPT-2: those that can be printed for
    themselves, the others in order from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
