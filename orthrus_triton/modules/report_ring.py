"""How the host learns what the device did without holding it up: copies into pinned buffers, looked at later."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Report:
    """`note` is what the sender attached; `rows` the reported tensor as lists; `seconds` the work before it took."""

    note: Any
    rows: list[list[int]]
    seconds: float


class ReportRing:
    """A queue of device tensors on their way to the host. Buffers are used again once their report was taken.

    Args:
        like: a tensor with the shape, dtype and device of every report.
        clock: seconds, times the work on a CPU; on a GPU events do.
    """

    def __init__(self, like: torch.Tensor, clock: Callable[[], float] = time.perf_counter) -> None:
        self._like, self._clock = like, clock
        self._free: list[_Slot] = []
        self._pending: deque[tuple[Any, _Slot]] = deque()
        self._open: _Slot | None = None

    def __len__(self) -> int:
        """Reports posted and not taken yet."""
        return len(self._pending)

    @property
    def notes(self) -> list[Any]:
        """The notes of those reports, oldest first."""
        return [note for note, _ in self._pending]

    def begin(self) -> None:
        """Mark where the work of the next report begins."""
        self._open = self._free.pop() if self._free else self._new_slot()
        self._open.begin.record()

    def post(self, report: torch.Tensor, note: Any) -> None:
        """Enqueue a copy of `report` behind the work in flight. Does not wait."""
        slot, self._open = self._open, None
        slot.buffer.copy_(report, non_blocking=True)
        slot.end.record()
        self._pending.append((note, slot))

    def take(self) -> Report:
        """The oldest report; waits until it is there."""
        note, slot = self._pending.popleft()
        slot.end.synchronize()
        report = Report(note, slot.buffer.tolist(), slot.begin.elapsed_time(slot.end) / 1000)
        self._free.append(slot)
        return report

    def _new_slot(self) -> _Slot:
        if self._like.device.type == "cuda":
            buffer = torch.empty(self._like.shape, dtype=self._like.dtype, pin_memory=True)
            return _Slot(buffer, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        return _Slot(torch.empty_like(self._like), _ClockEvent(self._clock), _ClockEvent(self._clock))


@dataclass
class _Slot:
    buffer: torch.Tensor
    begin: Any
    end: Any


class _ClockEvent:
    """A CUDA event's interface where work is done when the call returns."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.at = clock, 0.0

    def record(self) -> None:
        self.at = self.clock()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _ClockEvent) -> float:
        return (later.at - self.at) * 1000
