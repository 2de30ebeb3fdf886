"""The text of tokens while they come, at the same small cost for each of them.
What no later token can change is told apart from what the next one may complete or replace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no character yet
LONGEST_CHARACTER = 4  # tokens: a byte-level tokenizer may need one for each byte
MOST_OPEN = 4 * LONGEST_CHARACTER  # more tokens without a character are none: bytes that never were text, or no text


class TokenText:
    """The text of one sequence.

    Where one invalid byte spoils those before it (byte fallback, as of Llama 2), characters that were whole stay.

    Args:
        tokenizer: of transformers; only `decode` is used.
        context: tokens before the first: many tokenizers leave out a space at the beginning of a text.
        **options: of `decode`.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = (), **options: Any) -> None:
        self._tokenizer, self._options = tokenizer, options
        # tokens whose text is final, decoded again because what follows may depend on them; and those behind them
        self._context: list[int] = list(context)
        self._open: list[int] = []

    def push(self, tokens: list[int]) -> tuple[str, str]:
        """Take new tokens; give the text that has become final, and what stands behind it so far."""
        self._open = [*self._open, *tokens]
        before, now = self._decode(self._context), self._decode(self._context + self._open)
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            return self._settle(len(self._open), before, now), ""
        if len(self._open) <= MOST_OPEN:
            return "", now[len(before) :]
        if len(now) <= len(before):  # special tokens that are left out
            self._open = []
            return "", ""
        for count in range(1, len(self._open)):
            settled, rest = self._decode(self._context + self._open[:-count]), self._decode(self._open[-count:])
            if rest and settled + rest == now:  # no character lies across that border
                return self._settle(len(self._open) - count, before, settled), rest
        return self._settle(len(self._open), before, now), ""

    def _settle(self, count: int, before: str, now: str) -> str:
        self._context, self._open = self._open[:count], self._open[count:]
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, **self._options)
