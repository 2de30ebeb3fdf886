"""Tokens to text while they come: only what no later token can change is given out, stop strings held back."""

from __future__ import annotations

from typing import Any

from orthrus_triton.models.stop_strings import StopStrings

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no character yet


class TextStream:
    """The text of one sequence.

    Args:
        tokenizer: of transformers.
        stop: strings that end the text and are not part of it, or None.

    Attributes:
        tokens: all that were pushed.
        stopped: a stop string came; nothing more is given out.
    """

    def __init__(self, tokenizer: Any, stop: StopStrings | None = None) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens: list[int] = []
        self._done, self._shown = 0, 0  # tokens whose text is final, and from where on they are decoded again
        self._held = ""
        self.stopped = False

    def push(self, tokens: list[int], last: bool = False) -> str:
        """Take new tokens, the last ones or not; give what text is certain now."""
        self.tokens += tokens
        before = self._decode(self.tokens[self._shown : self._done])
        now = self._decode(self.tokens[self._shown :])
        if len(now) > len(before) and (last or not now.endswith(UNFINISHED)):
            self._held += now[len(before) :]
            self._shown, self._done = self._done, len(self.tokens)
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

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
