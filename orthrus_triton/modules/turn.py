"""Turn: one thread at a time works on a decoder's buffers, and the others wait.
Two calls at once would commit into each other's text, without an error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any


class Turn:
    """A lock that its thread may take again, and of which a copy is a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return Turn, ()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self._lock.release()


def in_turn(method: Callable) -> Callable:
    """A method of an object that has a `turn`, which it holds from its beginning to its end."""

    @wraps(method)
    def alone(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.turn:
            return method(self, *arguments, **options)

    return alone
