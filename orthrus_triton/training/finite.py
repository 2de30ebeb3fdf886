"""A watch for losses and gradients that are not finite: at once on a CPU; on a GPU, whose numbers no step waits for, at
the next look."""

from __future__ import annotations

import math

import torch
from torch.distributed.tensor import DTensor

WATCHED, NEVER = ("loss", "gradient's norm"), 1 << 62


class FiniteWatch:
    """Stops a run at a number that is not finite.

    Args:
        output_dir: of the run, for the advice.
        deferred: numbers are only noted, on their own device, and `require` raises what was found.
    """

    def __init__(self, output_dir: str, deferred: bool) -> None:
        self.output_dir, self.deferred = output_dir, deferred
        self._broken = torch.full((len(WATCHED),), NEVER, dtype=torch.int64)  # first steps that were not finite

    def see(self, what: str, value: torch.Tensor | float, step: int) -> None:
        """Look at `value`, one of WATCHED, in step `step`; every process must call this.

        Raises:
            FloatingPointError: it is not finite, and not deferred.
        """
        if isinstance(value, torch.Tensor):
            value = whole(value)  # FSDP's norm is a DTensor, which mixes with no other tensor
            if self.deferred:
                self._broken = self._broken.to(value.device)
                first = self._broken[WATCHED.index(what)]
                first.copy_(torch.where(torch.isfinite(value), first, first.clamp(max=step)))
                return
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {float(value)} in step {step}: {self._advice()}; the weights are those of step "
                f"{step - 1}"
            )

    def require(self) -> None:
        """Before numbers are logged, and before a checkpoint or a model is written: raise what was noted.

        Raises:
            FloatingPointError: a number was not finite.
        """
        # the earliest: a bad gradient makes all later losses bad
        what, step = min(zip(WATCHED, self._broken.tolist()), key=lambda found: found[1])
        if step != NEVER:
            raise FloatingPointError(f"the {what} was not finite in step {step}: {self._advice()}")

    def _advice(self) -> str:
        return f"lower learning_rate, or resume from an earlier checkpoint in {self.output_dir}"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP has spread over the processes, whole again on each."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
