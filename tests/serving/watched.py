"""A request to a scheduler and what its listener heard, for tests without HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from orthrus_triton.modules import SamplingParams
from orthrus_triton.serving import Request

GREEDY = SamplingParams()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Watched:
    """A request, and what its listener heard: [(tokens, reason, error)]; `heard` takes notes of several."""

    def __init__(
        self, prompt: list[int] | torch.Tensor, tokens: int, stop: Callable | None = None,
        params: SamplingParams = GREEDY, heard: list | None = None,
    ) -> None:  # fmt: skip
        self.parts, self.heard = [], heard if heard is not None else []
        self.request = Request(torch.as_tensor(prompt), tokens, params, self._deliver, stop)

    def _deliver(self, tokens: list[int], reason: str | None, error: str) -> None:
        self.parts.append((list(tokens), reason, error))
        self.heard.append((self, tokens))

    @property
    def tokens(self) -> list[int]:
        return [token for part in self.parts for token in part[0]]

    @property
    def ended(self) -> str | None:
        return self.parts[-1][1] if self.parts else None

    def wait(self) -> tuple[list[int], str, str]:
        """Its tokens, why it ended, and what went wrong."""
        wait_for(lambda: self.ended)
        return self.tokens, *self.parts[-1][1:]
