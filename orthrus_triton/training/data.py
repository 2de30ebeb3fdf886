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

    Each line is an object with `prompt_ids` and `answer_ids`, lists of token ids, and optionally a `domain`.

    Returns:
        The rows, and how many were skipped because no draft can be supervised in them: there is no prompt, the answer
        has fewer than two tokens, or it begins beyond `max_len`.

    Raises:
        FileNotFoundError: no such file, or no .jsonl file in the folder.
        ValueError: a line that is not such an object, or not UTF-8; the message names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"rows must come from a .jsonl file or a folder of them, but there is no {str(path)!r}")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"rows must come from a .jsonl file or a folder of them, but {path} holds none")
    rows, skipped = [], 0
    for file in files:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    domain, prompt, answer = _parse(line)
                except ValueError as error:
                    raise ValueError(
                        f"{file}, line {number}: expected an object with prompt_ids and answer_ids, but {error}"
                    ) from error
                ids = (prompt + answer)[:max_len]
                if not prompt or len(ids) - len(prompt) < 2:
                    skipped += 1
                    continue
                rows.append(TextRow(domain, ids, [(len(prompt), len(ids))]))
    return rows, skipped


def _parse(line: bytes) -> tuple[str, list[int], list[int]]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"got a {type(record).__name__}")
    for name in ("prompt_ids", "answer_ids"):
        ids = record.get(name)
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError(f"{name} is no list of token ids")
    domain = record.get("domain", "all")
    if not isinstance(domain, str):
        raise ValueError(f"domain must be a string, not {domain!r}")
    return domain, record["prompt_ids"], record["answer_ids"]


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
