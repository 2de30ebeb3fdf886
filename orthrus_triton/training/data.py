"""Rows of text the frozen model wrote itself: read from .jsonl shards, cut to length, packed where that is wanted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class TextRow(NamedTuple):
    """Token ids of one row, and where in it the frozen model's answers stand: (start, end) of each."""

    domain: str
    ids: list[int]
    answers: list[tuple[int, int]]

    @property
    def prompt_len(self) -> int:
        """Tokens before the first answer."""
        return self.answers[0][0]


def read_rows(path: str | Path, max_len: int) -> tuple[list[TextRow], int]:
    """Rows of a .jsonl file, or of every .jsonl file in a folder, cut to `max_len` tokens.

    Each line is an object with `prompt_ids`, `answer_ids` and, if it likes, `domain`.

    Returns:
        The rows, and how many were skipped because no draft can be supervised in them: there is no prompt, the answer
        has fewer than two tokens, or it begins beyond `max_len`.

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
                rows.append(TextRow(record.get("domain", "all"), ids, [(len(prompt), len(ids))]))
    return rows, skipped


def pack_rows(rows: Sequence[TextRow], row_len: int) -> list[TextRow]:
    """Join rows of the same domain, in order, into rows of at most `row_len` tokens.

    A later text sees the ones before it, in training as in the frozen model's pass over the packed row: fewer and
    longer rows, for GPUs. Rows longer than `row_len` stay alone.
    """
    packed = []
    for domain in dict.fromkeys(row.domain for row in rows):
        packed += _pack((row for row in rows if row.domain == domain), row_len)
    return packed


def _pack(rows: Iterable[TextRow], row_len: int) -> list[TextRow]:
    packed: list[TextRow] = []
    for row in rows:
        if packed and len(packed[-1].ids) + len(row.ids) <= row_len:
            before = packed[-1]
            start = len(before.ids)
            moved = [(first + start, end + start) for first, end in row.answers]
            packed[-1] = TextRow(row.domain, before.ids + row.ids, before.answers + moved)
        else:
            packed.append(row)
    return packed
