"""What a model thinks before it answers, as Qwen3 and others write it: `<think>...</think>`, then the answer.
While text comes, what may become a tag is held back; the prompt may have opened the thoughts already."""

from __future__ import annotations

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Thought(NamedTuple):
    """A piece of what was thought."""

    text: str


class ThoughtReader:
    """Splits text that comes piece by piece. White space around thoughts is part of neither.

    Args:
        opened: the prompt ends with the opening tag.
    """

    def __init__(self, opened: bool = False) -> None:
        self._held, self._inside, self._ended = "", opened, False
        self._starts = True  # nothing of the part that is read now has come yet

    def push(self, text: str, last: bool = False) -> tuple[str, str]:
        """Take more text, the last or not; give what is certain now: (of thoughts, of the answer)."""
        self._held += text
        if not self._inside and not self._ended:
            begun = self._held.lstrip()
            if OPEN.startswith(begun) and not last:  # nothing yet, or the beginning of the tag
                return "", ""
            self._inside, self._ended = begun.startswith(OPEN), not begun.startswith(OPEN)
            if self._ended:  # there are none
                self._starts = False
            else:
                self._held = begun[len(OPEN) :]
        thought = ""
        if self._inside:
            inside, tag, behind = self._held.partition(CLOSE)
            thought, held = self._certain(inside, last or bool(tag))
            self._held = held + behind
            if tag:
                self._inside, self._ended, self._starts = False, True, True
        if not self._ended:
            return thought, ""
        answer = self._held.lstrip() if self._starts else self._held
        self._held = ""
        self._starts = self._starts and not answer
        return thought, answer

    def _certain(self, inside: str, whole: bool) -> tuple[str, str]:
        """What of thoughts is certain, `whole` or to be continued, and what is not."""
        if self._starts:
            inside = inside.lstrip()
        if whole:
            self._starts = self._starts and not inside
            return inside.rstrip(), ""
        begun = next(n for n in range(len(CLOSE) - 1, -1, -1) if inside.endswith(CLOSE[:n]))
        certain = inside[: len(inside) - begun].rstrip()
        self._starts = self._starts and not certain
        return certain, inside[len(certain) :]


def can_think(template: str) -> bool:
    """Whether a chat template knows such thoughts."""
    return CLOSE in template


def is_open(prompt: str) -> bool:
    """Whether a prompt ends where the model is to think."""
    return prompt.rstrip().endswith(OPEN)
