"""Rows on disk: shards of jsonl that are complete or not there, a manifest, and what a killed run left behind."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from filelock import FileLock, Timeout

MANIFEST = "manifest.json"
LOCK = "run.lock"  # held by the process that writes into the folder
Row = dict[str, Any]


class Question(NamedTuple):
    """A prompt as token ids."""

    domain: str
    ids: list[int]


class ShardFolder:
    """A folder of shards, and the manifest that tells what they are.

    The rows of an unfinished shard are appended to `shard-NNNNN.part` as they come, so that not even they are lost;
    complete, they become `shard-NNNNN.jsonl` by one rename, in the order of the questions.

    Args:
        folder: made if it does not exist.
        identity: what makes this run itself; `shard_rows` is one of it. A folder of a run with another is refused.
        questions: all that are to be answered, in order.

    Attributes:
        manifest: as it stands in the folder.
    """

    def __init__(self, folder: str | PathLike[str], identity: dict[str, Any], questions: Sequence[Question]) -> None:
        self.folder, self.identity, self.questions = Path(folder), identity, questions
        self.manifest: dict[str, Any] = {}
        self._shards: dict[int, dict[str, Any]] = {}  # complete ones, as in the manifest
        self._rows: dict[int, dict[int, Row]] = {}  # of the others
        self._parts: dict[int, TextIO] = {}
        self._earlier_seconds, self._started = 0.0, time.perf_counter()
        self._lock = FileLock(self.folder / LOCK)

    def resume(self) -> list[int]:
        """Take over what is there; the questions that still need an answer. Nobody else may write until `close`.

        Raises:
            ValueError: the folder holds something else, a manifest that is none or a shard that was changed, or another
                process writes into it.
        """
        self._read_manifest()  # nothing is put into a folder of something else
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.folder} must have one run at a time, but another is writing into it") from None
        recorded = self._read_manifest()
        for shard in range(-(-len(self.questions) // self.identity["shard_rows"])):
            if self._path(shard).is_file():
                self._shards[shard] = self._describe(shard, self._read_rows(self._path(shard)))
                known = recorded.get(self._path(shard).name)
                if known is not None and known != self._shards[shard]:
                    raise ValueError(f"{self._path(shard)} must be as its manifest says, but it was changed")
                self._part(shard).unlink(missing_ok=True)
            else:
                self._resume_part(shard)
        self._write_manifest()
        return [
            n
            for n in range(len(self.questions))
            if self._shard_of(n) not in self._shards and n not in self._rows.get(self._shard_of(n), {})
        ]

    def add(self, n: int, answer: list[int]) -> None:
        """Keep the answer to question n."""
        shard, question = self._shard_of(n), self.questions[n]
        row = {"id": str(n), "domain": question.domain, "prompt_ids": question.ids, "answer_ids": answer}
        if shard not in self._parts:
            self._parts[shard] = open(self._part(shard), "a", encoding="utf-8")
        self._parts[shard].write(json.dumps(row) + "\n")
        self._parts[shard].flush()
        self._rows.setdefault(shard, {})[n] = row
        if len(self._rows[shard]) == len(self._numbers(shard)):
            self._finish(shard)

    def close(self) -> None:
        """Rows of unfinished shards stay in their part files. Another run may go on from here."""
        for part in self._parts.values():
            part.close()
        self._parts.clear()
        self._lock.release()

    def _finish(self, shard: int) -> None:
        rows = self._rows.pop(shard)
        if shard in self._parts:
            self._parts.pop(shard).close()
        _write(self._path(shard), "".join(json.dumps(rows[n]) + "\n" for n in self._numbers(shard)))
        self._part(shard).unlink(missing_ok=True)
        self._shards[shard] = self._describe(shard, rows)
        self._write_manifest()

    def _resume_part(self, shard: int) -> None:
        if not self._part(shard).is_file():
            return
        rows = self._read_rows(self._part(shard), torn=True)
        _write(self._part(shard), "".join(json.dumps(row) + "\n" for row in rows.values()))
        self._rows[shard] = rows
        if len(rows) == len(self._numbers(shard)):
            self._finish(shard)

    def _read_rows(self, path: Path, torn: bool = False) -> dict[int, Row]:
        """Rows by question; with `torn`, a last line that was cut short does not count."""
        rows = {}
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if torn and not line.endswith("\n"):
                    break
                row = json.loads(line)
                n = int(row["id"])
                if row["prompt_ids"] != self.questions[n].ids or not row["answer_ids"]:
                    raise ValueError("it answers another prompt")
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ValueError(f"{path} must hold answers to these prompts, but {error!r}") from error
            rows[n] = row
        return rows

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        """The shards the manifest names, after a look whether it is this run's."""
        path = self.folder / MANIFEST
        if not path.is_file():
            if self.folder.is_dir() and any(path.suffix not in (".tmp", ".lock") for path in self.folder.iterdir()):
                raise ValueError(f"{self.folder} must be empty or hold an earlier run, but it has no {MANIFEST}")
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            seconds, shards = manifest["seconds"], {shard["file"]: shard for shard in manifest["shards"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must be a run's manifest, but {error!r}") from error
        different = [name for name, value in self.identity.items() if manifest.get(name) != value]
        if different:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({', '.join(different)}): name another folder, or give "
                "the settings of that run"
            )
        self._earlier_seconds = seconds
        return shards

    def _write_manifest(self) -> None:
        shards = [self._shards[shard] for shard in sorted(self._shards)]
        done, domains = sum(shard["rows"] for shard in shards), Counter()
        for shard in shards:
            domains.update(shard["domains"])
        self.manifest = {
            **self.identity,
            "complete": done == len(self.questions),
            "finished_rows": done,
            "answer_tokens": sum(shard["answer_tokens"] for shard in shards),
            "domains": dict(domains),
            "seconds": round(self._earlier_seconds + time.perf_counter() - self._started, 1),
            "torch": torch.__version__,
            "shards": shards,
        }
        _write(self.folder / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")

    def _describe(self, shard: int, rows: dict[int, Row]) -> dict[str, Any]:
        if sorted(rows) != list(self._numbers(shard)):
            raise ValueError(f"{self._path(shard)} must hold {len(self._numbers(shard))} rows, but has {len(rows)}")
        return {
            "file": self._path(shard).name,
            "rows": len(rows),
            "answer_tokens": sum(len(row["answer_ids"]) for row in rows.values()),
            "domains": dict(Counter(row["domain"] for row in rows.values())),
            "sha256": hashlib.sha256(self._path(shard).read_bytes()).hexdigest(),
        }

    def _shard_of(self, n: int) -> int:
        return n // self.identity["shard_rows"]

    def _numbers(self, shard: int) -> range:
        size = self.identity["shard_rows"]
        return range(shard * size, min((shard + 1) * size, len(self.questions)))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.jsonl"

    def _part(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.part"


def _write(path: Path, text: str) -> None:
    """Under its name when it is complete, and not before."""
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)
