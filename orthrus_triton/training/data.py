"""Rows of text the frozen model wrote itself, and the seeded choice of rows and anchors for every training example."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset


@dataclass(frozen=True)
class TextRow:
    """One prompt with the frozen model's answer. ids: prompt and answer; prompt_len: where the answer begins."""

    domain: str
    ids: list[int]
    prompt_len: int


def read_rows(path: str | Path, max_len: int) -> tuple[list[TextRow], int]:
    """Rows of a .jsonl file, or of every .jsonl file in a folder, cut to `max_len` tokens.

    Each line is an object with `prompt_ids`, `answer_ids` and, if it likes, `domain`.

    Returns:
        The rows, and how many were skipped because no draft can be supervised in them: the answer is empty or begins
        beyond `max_len`.

    Raises:
        FileNotFoundError: no such file, or no .jsonl file in the folder.
        ValueError: a line that is not such an object; it names file and line.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"data must name a .jsonl file or a folder of them, but {path} holds none")
    rows, skipped = [], 0
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    prompt, answer = list(record["prompt_ids"]), list(record["answer_ids"])
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{file}, line {number}: expected an object with prompt_ids and answer_ids, but got {error!r}"
                    ) from error
                ids = (prompt + answer)[:max_len]
                if not prompt or len(ids) - len(prompt) < 2:
                    skipped += 1
                    continue
                rows.append(TextRow(record.get("domain", "all"), ids, len(prompt)))
    return rows, skipped


class AnchorExamples(Dataset):
    """Example i: a row drawn by domain weight and `num_anchors` anchors in its answer, a pure function of (seed, i).

    So a resumed run sees what an unbroken one would have seen.

    Args:
        rows: at least one.
        num_examples: length of the data set: steps x rows per step.
        num_anchors: drawn without replacement while the answer is long enough.
        domain_weights: share of the examples by domain; domains not named, and all without it, by number of rows.
        seed: of everything drawn.
    """

    def __init__(
        self,
        rows: Sequence[TextRow],
        num_examples: int,
        num_anchors: int,
        domain_weights: dict[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        if not rows:
            raise ValueError("rows must not be empty: no row has an answer to learn from")
        self.rows, self.num_examples, self.num_anchors, self.seed = rows, num_examples, num_anchors, seed
        counts: dict[str, int] = {}
        for row in rows:
            counts[row.domain] = counts.get(row.domain, 0) + 1
        weights = domain_weights or {}
        if unknown := set(weights) - set(counts):
            raise ValueError(
                f"domain_weights must name domains of the data {sorted(counts)}, but got {sorted(unknown)}"
            )
        share = np.array([weights.get(row.domain, counts[row.domain]) / counts[row.domain] for row in rows])
        self.share = share / share.sum()

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = np.random.default_rng((self.seed, index))
        row_id = int(generator.choice(len(self.rows), p=self.share))
        row = self.rows[row_id]
        # from the prompt's last token to the last one that has a successor to predict
        first, last = row.prompt_len - 1, len(row.ids) - 2
        enough = last - first + 1 >= self.num_anchors
        anchors = first + generator.choice(last - first + 1, self.num_anchors, replace=not enough)
        return {"row_id": row_id, "anchors": np.sort(anchors)}
