"""Training for a given time: the learning rate's schedule goes by the clock, and both are finished together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback

FILE = "training_clock.json"


class TrainingClock(TrainerCallback):
    """Ends training after `seconds`, counted from the end of the first step, which compiles.

    A step's place in the schedule is its number or, where that is further, the share of the time that is gone. A
    resumed run has the time that was left at its checkpoint; its first step, which compiles again, is not counted.

    Args:
        seconds: > 0.

    Attributes:
        clock: tells the time.
        started, ended: when the first and the newest step of this process ended.
        earlier: seconds that were spent before the checkpoint that the run goes on from.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.clock: Callable[[], float] = time.monotonic
        self.started: float | None = None
        self.ended: float | None = None
        self.earlier = 0.0

    @property
    def spent(self) -> float:
        """Seconds that are gone, those of earlier processes included."""
        return self.earlier + (0.0 if self.started is None else self.clock() - self.started)

    @property
    def share(self) -> float:
        """Of the time that is gone, in 0..1."""
        return min(self.spent / self.seconds, 1.0)

    def save(self, checkpoint: Path) -> None:
        """Note in a checkpoint what is gone."""
        (checkpoint / FILE).write_text(json.dumps({"seconds_spent": self.spent}) + "\n", encoding="utf-8")

    def resume(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, or from nothing; a checkpoint of a run without a clock has spent nothing."""
        noted = None if checkpoint is None else checkpoint / FILE
        self.started = self.ended = None
        self.earlier = json.loads(noted.read_text())["seconds_spent"] if noted is not None and noted.is_file() else 0.0

    def drive(self, scheduler: LRScheduler, num_steps: int) -> None:
        """Make `scheduler` go by this clock where it is ahead of the steps.

        Raises:
            ValueError: a scheduler that is no function of the step.
        """
        if not isinstance(scheduler, LambdaLR):
            raise ValueError(f"lr_scheduler_type must be a function of the step with max_seconds, but got {scheduler}")

        def by_the_clock(rate: Callable[[float], float]) -> Callable[[int], float]:
            return lambda step: rate(max(step, int(self.share * num_steps)))

        scheduler.lr_lambdas = [by_the_clock(rate) for rate in scheduler.lr_lambdas]

    def on_step_end(self, args, state, control, **_):
        if self.started is None:
            self.started = self.clock()
        self.ended = self.clock()
        if self.share >= 1.0:
            control.should_training_stop = control.should_log = True
            control.should_save |= args.save_strategy != "no"
            control.should_evaluate |= args.eval_strategy != "no"
