"""Tokens to text while they come: only what no later token can change is given out, stop strings held back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from orthrus_triton.models.stop_strings import StopStrings
from orthrus_triton.models.token_text import TokenText


class TextStream:
    """The text of one sequence.

    Args:
        tokenizer: of transformers.
        stop: strings that end the text and are not part of it, or None.
        stop_ids: tokens that end the text and are not part of it: not every tokenizer knows that they are special.
        context: as in `TokenText`.

    Attributes:
        tokens: all that were pushed.
        stopped: a stop string came; nothing more is given out.
    """

    def __init__(
        self, tokenizer: Any, stop: StopStrings | None = None, stop_ids: Collection[int] = (),
        context: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.stop, self.stop_ids = stop, frozenset(stop_ids)
        self.tokens: list[int] = []
        self._text, self._held = TokenText(tokenizer, context, skip_special_tokens=True), ""
        self.stopped = False

    def push(self, tokens: list[int], last: bool = False) -> str:
        """Take new tokens, the last ones or not; give what text is certain now."""
        self.tokens += tokens
        final, unsure = self._text.push([token for token in tokens if token not in self.stop_ids])
        self._held += final + unsure if last else final
        if self.stop is None:
            text, self._held = self._held, ""
            return text
        if self.stopped:
            return ""
        cut = self.stop.cut(self._held)
        if cut != self._held:
            self.stopped = True
            return cut
        length = len(self._held) if last else self.stop.safe_length(self._held)
        text, self._held = self._held[:length], self._held[length:]
        return text
