"""A tuning run's journal: one line of JSON per answer, appended at once, so that a stopped run can go on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


class Journal:
    """Answers by what was asked. A question holds everything its answer depends on, kernel source included.

    Args:
        path: of the file; made with the first answer.
        fresh: forget what it holds.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self._answers: dict[str, Any] = {}
        if fresh:
            self.remove()
        try:
            text = path.read_bytes().decode("utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return
        for line in text.splitlines():
            try:
                question, answer = json.loads(line)
                self._answers[str(question)] = answer
            except (ValueError, TypeError, RecursionError):  # the line that a power cut left half-written
                continue
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, question: Any) -> Any:
        """The answer, or None if it was never given."""
        return self._answers.get(_digest(question))

    def put(self, question: Any, answer: Any) -> None:
        """Keep an answer."""
        digest = _digest(question)
        self._answers[digest] = answer
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([digest, answer]) + "\n")

    def remove(self) -> None:
        """The run is complete."""
        self.path.unlink(missing_ok=True)


def _digest(question: Any) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:24]
