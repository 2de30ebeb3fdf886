"""run_apart: work in a thread of its own that ends with it.
A server's main thread must not compute: torch's worker threads would stay with it, and slow the scheduler's down."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def run_apart(work: Callable[[], Result]) -> Result:
    """What `work` returns, or raises, from a thread that ends with it.

    A thread that has computed on a CPU keeps OpenMP workers of its own. When another one computes then, there are more
    workers than cores, and OpenMP lets all of them sleep between two operations instead of waiting actively.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # Ctrl-C does not wait for it
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
