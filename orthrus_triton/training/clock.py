"""Training for a given time: the learning rate's schedule goes by the clock, and both are finished together."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerCallback


class TrainingClock(TrainerCallback):
    """Ends training after `seconds`, counted from the end of the first step, which compiles.

    A step's place in the schedule is its number or, where that is further, the share of the time that is gone. The
    clock starts anew where a run is resumed.

    Args:
        seconds: > 0.
        clock: tells the time.

    Attributes:
        started, ended: when the first and the newest step ended.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.started: float | None = None
        self.ended: float | None = None

    @property
    def share(self) -> float:
        """Of the time that is gone, in 0..1."""
        return 0.0 if self.started is None else min((self.clock() - self.started) / self.seconds, 1.0)

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

    def on_train_begin(self, args, state, control, **_):
        self.started = None

    def on_step_end(self, args, state, control, **_):
        if self.started is None:
            self.started = self.clock()
        self.ended = self.clock()
        if self.share >= 1.0:
            control.should_training_stop = control.should_log = True
            control.should_save |= args.save_strategy != "no"
            control.should_evaluate |= args.eval_strategy != "no"
