"""Stop strings: a sequence ends with the token that completes one of them, wherever in an accepted block it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orthrus_triton.models.token_text import LONGEST_CHARACTER, UNFINISHED, TokenText

MOST_STRINGS, MOST_CHARACTERS = 64, 1000


class StopStrings:
    """Looks for strings in what was generated, called after every token with all new tokens of one sequence.

    Args:
        tokenizer: of transformers; only `decode` is used.
        strings: one or more, not empty.
        prompt: tokens before the first new one, in whose text a string may begin; none where only new text counts.
        context: these tokens where only new text counts, as in `TokenText`.

    Raises:
        ValueError: no strings, an empty one, or too many.
    """

    def __init__(
        self, tokenizer: Any, strings: Sequence[str], prompt: Sequence[int] = (), context: Sequence[int] = ()
    ) -> None:
        if not strings or len(strings) > MOST_STRINGS:
            raise ValueError(f"stop_strings must be 1..{MOST_STRINGS} strings, but got {len(strings)}")
        for string in strings:
            if not isinstance(string, str) or not 1 <= len(string) <= MOST_CHARACTERS:
                raise ValueError(f"stop_strings must have 1..{MOST_CHARACTERS} characters each, but got {string!r:.80}")
        self.strings = tuple(strings)
        self._longest = max(map(len, strings))
        self._text, self._seen = TokenText(tokenizer, context), 0
        self._tail = ""  # final text in which a stop string may have begun
        self._looked = ""  # that, and what stood behind it unfinished, of which so many characters are the prompt's
        self._prompt_end = 0
        if prompt:
            self._look([], prompt[-self._longest - LONGEST_CHARACTER :])
            self._prompt_end = len(self._looked)

    def __call__(self, new: Sequence[int]) -> bool:
        """Whether one of the strings is in the text that came with the tokens since the last call."""
        came, self._seen = new[self._seen :], len(new)
        return self._look(self.strings, came)

    def _look(self, strings: Sequence[str], tokens: Sequence[int]) -> bool:
        final, unsure = self._text.push(list(tokens))
        known = max(len(self._tail), self._prompt_end)
        self._tail += final
        text = self._tail + unsure.rstrip(UNFINISHED)  # a stop string may have that character itself
        dropped = max(len(self._tail) - self._longest + 1, 0)
        self._tail, self._looked = self._tail[dropped:], text[dropped:]
        self._prompt_end = max(self._prompt_end - dropped, 0)
        return any(text.find(string, max(known - len(string) + 1, 0)) >= 0 for string in strings)

    def cut(self, text: str) -> str:
        """`text` up to the first stop string in it."""
        ends = [text.find(string) for string in self.strings if string in text]
        return text[: min(ends)] if ends else text

    def safe_length(self, text: str) -> int:
        """How many characters of `text` cannot become part of a stop string, whatever follows."""
        safe = len(text)
        for string in self.strings:
            at = text.find(string[0], max(len(text) - len(string) + 1, 0), safe)
            while at >= 0 and not string.startswith(text[at:]):
                at = text.find(string[0], at + 1, safe)
            safe = at if at >= 0 else safe
        return safe
