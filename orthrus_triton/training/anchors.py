"""Which rows and anchors a step trains on: a pure function of the seed and the example's number.
So a resumed run, and a run on more processes, sees what an unbroken run on one would have seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from torch.utils.data import Dataset

from orthrus_triton.training.data import TextRow

UNCHAINED = 0.3  # share of the blocks that learn without a chain: it chooses among what the rows say by themselves


def row_shares(rows: Sequence[TextRow], domain_weights: Mapping[str, float] | None) -> list[float]:
    """How often each row is drawn, in proportion; None: all alike.

    Raises:
        ValueError: weights that do not name exactly the domains there are.
    """
    counts = Counter(row.domain for row in rows)
    weights = counts if domain_weights is None else domain_weights
    if set(weights) != set(counts) or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(
            f"domain_weights must give each domain of the data, {sorted(counts)}, and no other, a share >= 0, "
            f"but got {dict(weights)}"
        )
    return [weights[row.domain] / counts[row.domain] for row in rows]


class AnchorExample(TypedDict):
    """One row of a batch: which text, at which tokens its blocks begin, ascending [A], and which of them a chain
    corrects, if the view has one [A]."""

    row_id: int
    anchors: np.ndarray
    chained: np.ndarray


class AnchorExamples(Dataset):
    """Example i: a row drawn by domain, and anchors in its answers drawn from it, by (seed, i) alone.

    An anchor is the newest known token, so the first one is the prompt's last token and the last one is the one before
    the last that there is to predict.

    Args:
        rows: at least one.
        num_examples: length of the data set: steps x rows per step.
        num_anchors: blocks per row; drawn without replacement while the answers are long enough.
        domain_weights: share of the examples by domain. None: by number of rows.
        seed: of everything drawn.
        surprise: for each row, how unlikely the frozen model found each of its tokens, in 0..1, and
        focus: the share of the anchors drawn in proportion to it. In decoding a block begins where the last draft went
            wrong, so at such tokens more often than elsewhere.
        anchor_rows: 1 where the frozen view reads the anchor: the first token to predict is the one after the next.

    Raises:
        ValueError: no rows, weights that do not name exactly the domains there are, or focus without surprise.
    """

    def __init__(
        self,
        rows: Sequence[TextRow],
        num_examples: int,
        num_anchors: int,
        domain_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        surprise: Sequence[np.ndarray] | None = None,
        focus: float = 0.0,
        anchor_rows: int = 0,
    ) -> None:
        if not rows:
            raise ValueError("rows must not be empty: no row of the data has an answer to learn from")
        if not 0 <= focus < 1 or (focus and surprise is None):
            raise ValueError(f"focus must be in [0, 1), and 0 where no surprise is given, but got {focus}")
        self.rows, self.num_examples, self.num_anchors, self.seed = rows, num_examples, num_anchors, seed
        self.surprise, self.focus, self.anchor_rows = surprise, focus, anchor_rows
        shares = np.cumsum(row_shares(rows, domain_weights))
        self._cumulative = shares / shares[-1]

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> AnchorExample:
        generator = np.random.default_rng((self.seed, index))
        row_id = int(np.searchsorted(self._cumulative, generator.random(), side="right"))
        places = np.concatenate([self._places(start, end) for start, end in self.rows[row_id].answers])
        chances = None
        if self.focus:
            unlikely = self.surprise[row_id][places] + 1e-6
            chances = (1 - self.focus) / len(places) + self.focus * unlikely / unlikely.sum()
        anchors = generator.choice(places, self.num_anchors, replace=len(places) < self.num_anchors, p=chances)
        chained = generator.random(self.num_anchors) >= UNCHAINED
        return {"row_id": row_id, "anchors": np.sort(anchors), "chained": chained}

    def _places(self, start: int, end: int) -> np.ndarray:
        return np.arange(start - 1, max(end - 1 - self.anchor_rows, start))


class EvenAnchors(Dataset):
    """Example i: row i, with anchors spread evenly over its last answer, all blocks whole where that has room.

    Args:
        rows: held-out text.
        num_anchors: blocks per row.
        block_size: K.
        first_row_id: what the row ids count from.
        anchor_rows: as in `AnchorExamples`.
    """

    def __init__(
        self, rows: Sequence[TextRow], num_anchors: int, block_size: int, first_row_id: int = 0, anchor_rows: int = 0
    ) -> None:
        self.rows, self.num_anchors, self.block_size, self.first_row_id = rows, num_anchors, block_size, first_row_id
        self.anchor_rows = anchor_rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> AnchorExample:
        start, end = self.rows[index].answers[-1]
        last = max(start - 1, end - self.block_size - self.anchor_rows)
        anchors = np.linspace(start - 1, last, self.num_anchors).round().astype(np.int64)
        return {"row_id": self.first_row_id + index, "anchors": anchors, "chained": np.ones(len(anchors), bool)}
