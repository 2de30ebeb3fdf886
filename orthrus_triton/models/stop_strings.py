"""Stop strings: a sequence ends with the token that completes one of them, wherever in an accepted block it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_STRINGS, MOST_CHARACTERS = 64, 1000
TOKENS_PER_CHARACTER = 4  # a byte-level tokenizer may need four tokens for one character


class StopStrings:
    """Looks for strings in what was generated, called after every token with all new tokens.

    Args:
        tokenizer: of transformers; only `decode` is used.
        strings: one or more, not empty.

    Raises:
        ValueError: no strings, an empty one, or too many.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        if not strings or len(strings) > MOST_STRINGS:
            raise ValueError(f"stop_strings must be 1..{MOST_STRINGS} strings, but got {len(strings)}")
        for string in strings:
            if not isinstance(string, str) or not 1 <= len(string) <= MOST_CHARACTERS:
                raise ValueError(f"stop_strings must have 1..{MOST_CHARACTERS} characters each, but got {string!r:.80}")
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        self._window = TOKENS_PER_CHARACTER * max(map(len, strings)) + TOKENS_PER_CHARACTER

    def __call__(self, new: Sequence[int]) -> bool:
        """Whether one of the strings is in the text of the newest tokens."""
        text = self.tokenizer.decode(list(new[-self._window :]))
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """`text` up to the first stop string in it."""
        ends = [text.find(string) for string in self.strings if string in text]
        return text[: min(ends)] if ends else text

    def safe_length(self, text: str) -> int:
        """How many characters of `text` cannot become part of a stop string, whatever follows."""
        for length in range(min(len(text), max(map(len, self.strings)) - 1), 0, -1):
            if any(string.startswith(text[-length:]) for string in self.strings):
                return len(text) - length
        return len(text)
