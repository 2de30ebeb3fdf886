"""Choosing the winner from timings: near-winners are timed again, and what cannot be told apart is decided by order,
so that tuning twice on one GPU ends with the same configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

NEAR = 0.05  # slower than the fastest by at most this: timed again
SAME = 0.01  # slower by at most this, or by the spread: not told apart
MOST_NEAR = 6


@dataclass(frozen=True)
class Timed:
    """One configuration's timing: median seconds and relative spread of each load."""

    index: int
    seconds: dict[str, float]
    spread: dict[str, float]

    def score(self, nbytes: dict[str, int]) -> float:
        """Seconds per byte that must move, averaged over the loads: long ones do not outweigh short ones."""
        return fmean(seconds / nbytes[load] for load, seconds in self.seconds.items())

    @property
    def noise(self) -> float:
        """The largest spread of its loads."""
        return max(self.spread.values())


Timer = Callable[[Sequence[int], bool], tuple[list[Timed], dict[str, int]]]


@dataclass(frozen=True)
class Choice:
    """The winner; how many were timed; and how much slower than the fastest the winner was measured, as a share."""

    winner: Timed
    timed: int
    behind: float


def choose(indices: Sequence[int], timer: Timer, previous: int | None = None) -> Choice | None:
    """Time all, time the near-winners again, choose.

    Args:
        indices: of the candidates; earlier ones win ties.
        timer: times the candidates of these indices in turns, with many samples if asked; those that fail are left out.
        previous: index of what an earlier tuning chose: it stays unless another one is really faster.

    Returns:
        None if nothing could be timed.
    """
    first, nbytes = timer(indices, False)
    if not first:
        return None
    fastest = min(timed.score(nbytes) for timed in first)
    near = [timed for timed in first if timed.score(nbytes) <= fastest * (1 + NEAR) or timed.index == previous]
    near.sort(key=lambda timed: timed.score(nbytes))
    keep = {timed.index for timed in near[:MOST_NEAR]} | ({previous} & {timed.index for timed in near})
    again, nbytes = timer([index for index in indices if index in keep], True)
    if not again:  # each ran once and failed now: nothing to trust
        return None
    fastest = min(again, key=lambda timed: timed.score(nbytes))
    limit = fastest.score(nbytes) * (1 + max(SAME, fastest.noise))
    equal = [timed for timed in again if timed.score(nbytes) <= limit]
    order = {index: place for place, index in enumerate(indices)}
    winner = min(equal, key=lambda timed: (timed.index != previous, order[timed.index]))
    return Choice(winner, len(first), winner.score(nbytes) / fastest.score(nbytes) - 1)
