"""Which block size the next cycle should have: a rule on measured cycle times and on how drafts fared lately.
Plain Python, no tensors: exactness never depends on what it says."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Protocol

AR = 1  # a block of one row drafts nothing: that cycle is a pass of the AR view alone


class BlockRule(Protocol):
    """Chooses the block size of each cycle."""

    sizes: Sequence[int]

    def start(self) -> None:
        """A new text begins."""
        ...

    def next_size(self) -> int:
        """The block size of the next cycle, one of `sizes`."""
        ...

    def observe(self, size: int, seconds: float, accepted: Sequence[int]) -> None:
        """A cycle of `size` took `seconds`; `accepted` lists the accepted drafts of the sequences that went on."""
        ...


class FixedBlock:
    """Always the same size."""

    def __init__(self, size: int) -> None:
        self.sizes = (size,)

    def start(self) -> None:
        pass

    def next_size(self) -> int:
        return self.sizes[0]

    def observe(self, size: int, seconds: float, accepted: Sequence[int]) -> None:
        pass


class AdaptiveBlock:
    """The size with the most expected tokens per second.

    Each size is timed over `SAMPLES` cycles at first; the largest goes first, it tells most about the drafts. The last
    `RECENT` cycles of a size count, and the sizes next to the one in use are timed anew every `RETIME` cycles, because
    the machine may have been busy when they were.
    The chance that a draft agrees, given that all before it did, is kept per position as counts that fade. A size's
    worth is `1 + sum of the chances that its first 1, 2, ... drafts are all accepted`, over its cycle time.

    Args:
        sizes: block sizes to choose from; 1 is AR.
        anchor_rows: tokens that a cycle with drafts commits besides, 0 or 1.
    """

    SAMPLES, RECENT, RETIME = 3, 9, 256
    MARGIN = 0.05  # another size must promise this much more, or estimates that are close would make it flutter
    FADE = 0.93  # per drafted cycle: what is remembered is about the last 15
    PROBE_FADE = 0.5  # what was learnt before a long stretch of AR counts half beside a probe
    TEXT_FADE = 0.25
    PRIOR_CHANCE, PRIOR_WEIGHT = 0.5, 1.0
    FIRST_PROBE, LAST_PROBE = 16, 256  # AR cycles between two drafted ones; doubles while drafting stays the worse

    def __init__(self, sizes: Sequence[int], anchor_rows: int = 0) -> None:
        self.sizes, self.anchor_rows = tuple(sorted(set(sizes))), anchor_rows
        if not self.sizes or self.sizes[0] < 1:
            raise ValueError(f"sizes must be block sizes >= 1, but got {list(sizes)}")
        self._times: dict[int, deque[float]] = {size: deque(maxlen=self.RECENT) for size in self.sizes}
        self._agreed = [0.0] * (self.sizes[-1] - 1)
        self._tried = [0.0] * (self.sizes[-1] - 1)
        self._current: int | None = None
        self._cycles = 0  # since sizes were timed anew
        self.start()

    def start(self) -> None:
        """Times stay; how drafts fared on the last text is only a hint about this one."""
        self._forget(self.TEXT_FADE)
        self._ar_cycles, self._probe_after = 0, self.FIRST_PROBE

    def next_size(self) -> int:
        """See `BlockRule`."""
        untimed = [size for size in self.sizes if len(self._times[size]) < self.SAMPLES]
        if untimed:
            return untimed[-1]
        best = max(self.sizes, key=self.tokens_per_second)
        if self._current is None or (
            self.tokens_per_second(best) > (1 + self.MARGIN) * self.tokens_per_second(self._current)
        ):
            self._current = best
        if self._current != AR:
            self._ar_cycles, self._probe_after = 0, self.FIRST_PROBE
            if self._cycles >= self.RETIME:
                self._cycles = 0
                at = self.sizes.index(self._current)
                for size in self.sizes[max(at - 1, 0) : at] + self.sizes[at + 1 : at + 2]:
                    self._times[size].clear()
                return self.next_size()
        elif self._ar_cycles >= self._probe_after and self.sizes != (AR,):
            self._ar_cycles, self._probe_after = 0, min(2 * self._probe_after, self.LAST_PROBE)
            self._forget(self.PROBE_FADE)
            return self.sizes[1]
        return self._current

    def observe(self, size: int, seconds: float, accepted: Sequence[int]) -> None:
        """See `BlockRule`."""
        self._times[size].append(seconds)
        self._cycles += 1
        if size == AR:
            self._ar_cycles += 1
            return
        self._forget(self.FADE)
        for length in accepted:
            for position in range(min(length + 1, size - 1)):
                self._tried[position] += 1
                self._agreed[position] += position < length

    def _forget(self, fade: float) -> None:
        self._agreed, self._tried = [n * fade for n in self._agreed], [n * fade for n in self._tried]

    def expected_tokens(self, size: int) -> float:
        """Tokens a cycle of `size` should commit: the bonus token and the drafts likely to be accepted before it."""
        chance, all_agree = self.PRIOR_CHANCE, 1.0
        tokens = 1.0 + (self.anchor_rows if size != AR else 0)
        for agreed, tried in zip(self._agreed[: size - 1], self._tried):
            # a position seldom reached is taken to be like the one before it
            chance = (agreed + self.PRIOR_WEIGHT * chance) / (tried + self.PRIOR_WEIGHT)
            all_agree *= chance
            tokens += all_agree
        return tokens

    def tokens_per_second(self, size: int) -> float:
        """What the rule expects of `size`, in tokens of one sequence."""
        return self.expected_tokens(size) / max(median(self._times[size]), 1e-9)


def auto_sizes(block_size: int) -> tuple[int, ...]:
    """AR, powers of two from 4, and the trained block itself."""
    powers = [1 << n for n in range(2, block_size.bit_length()) if 1 << n < block_size]
    return (AR, *powers, block_size)
