"""Files of configurations: where they are, strict reading, and writing that loses nothing to another writer.
A file is data from anywhere: whatever is wrong with it becomes a sentence, never an exception and never a launch."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orthrus_triton.autotune.config import KernelConfig, Problem

FORMAT = 1
CONFIG_DIR_VARIABLE = "ORTHRUS_TRITON_CONFIG_DIR"
PACKAGED = Path(__file__).parent / "configs"
MOST_BYTES = 4 * 2**20  # of a file that is read at all
MOST_ENTRIES = 20_000
NAME = re.compile(r"[A-Za-z_]\w{0,63}")
NOTES = ("origin", "date", "driver", "torch", "triton")

logger = logging.getLogger("orthrus_triton.autotune")


@dataclass(frozen=True)
class Entry:
    """One configuration in a file. `us` maps what was timed to microseconds, `of_floor` to its share of the memory
    floor; both are empty if nothing was measured."""

    op: str
    version: int
    source: str
    dtype: str
    key: dict[str, int]
    constants: dict[str, int]
    launch: dict[str, int]
    origin: str = ""
    date: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    us: dict[str, float] = field(default_factory=dict)
    of_floor: dict[str, float] = field(default_factory=dict)
    spread: float = 0.0

    @property
    def problem(self) -> Problem:
        """What it is looked up by."""
        return Problem.of(self.op, self.dtype, **self.key)

    @property
    def config(self) -> KernelConfig:
        """The configuration itself."""
        return KernelConfig(dict(self.constants), dict(self.launch))

    def identity(self) -> tuple:
        """A later entry replaces one of the same identity; those of other kernel versions stay beside it."""
        return self.problem, self.version, self.source


@dataclass
class Table:
    """What a file holds. `problems` are sentences about what was left out."""

    path: Path
    gpu: str | None = None
    family: str = ""
    capability: str = ""
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def user_folder() -> Path:
    """$ORTHRUS_TRITON_CONFIG_DIR, else `cache_folder`; read at every call."""
    chosen = os.environ.get(CONFIG_DIR_VARIABLE)
    return Path(chosen) if chosen else cache_folder()


def cache_folder() -> Path:
    """`orthrus_triton` in the platform's folder for what can be made again."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "orthrus_triton"


def file_name(gpu: str) -> str:
    """A GPU's name as a file name: "NVIDIA H200" -> "NVIDIA_H200.json"."""
    return f"{re.sub(r'[^0-9A-Za-z]+', '_', gpu).strip('_') or 'unnamed'}.json"


def read_table(path: Path) -> Table | None:
    """The file's valid entries; None if there is no file. Never raises."""
    table = Table(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"it has {status.st_size} bytes, more than {MOST_BYTES}")
        content = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_no_constant)
        _fill(table, content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        table.entries.clear()
        table.problems = [f"cannot be used: {error}"]
    return table


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number here")


def _fill(table: Table, content: Any) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError("it must be an object with a list `entries`")
    if content.get("format") != FORMAT:
        raise ValueError(f"`format` must be {FORMAT}, but is {content.get('format')!r}"[:200])
    for name in ("gpu", "family", "capability"):
        value = content.get(name)
        if not isinstance(value, str) and not (name == "gpu" and value is None):
            raise ValueError(f"`{name}` must be a string, but is {value!r}"[:200])
        setattr(table, name, value)
    if len(content["entries"]) > MOST_ENTRIES:
        raise ValueError(f"it has {len(content['entries'])} entries, more than {MOST_ENTRIES}")
    for number, fields in enumerate(content["entries"]):
        try:
            table.entries.append(parse_entry(fields))
        except ValueError as error:
            table.problems.append(f"entry {number} is ignored: {error}"[:300])


def parse_entry(fields: Any) -> Entry:
    """One entry of a file, types and ranges checked; whether the op may run with it is the op's space to say.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(fields, dict):
        raise ValueError("it must be an object")
    unknown = set(fields) - set(Entry.__dataclass_fields__)
    if unknown:
        raise ValueError(f"nothing is known by the name of {min(unknown)!r}")
    for name in ("op", "source", "dtype"):
        if not isinstance(fields.get(name), str) or not NAME.fullmatch("_" + fields[name]):
            raise ValueError(f"`{name}` must be a short name, but is {fields.get(name)!r}")
    if not _is_count(fields.get("version"), 2**31):
        raise ValueError(f"`version` must be an integer, but is {fields.get('version')!r}")
    for name in ("key", "constants", "launch"):
        _require_map(name, fields.get(name), lambda value: _is_count(value, 2**24), f"integers in 1..{2**24 - 1}")
    for name in ("us", "of_floor"):
        _require_map(name, fields.get(name, {}), _is_number, "numbers in 0..1e12", labels=True)
    for name in NOTES:
        if not isinstance(fields.get(name, ""), str) or len(fields.get(name, "")) > 200:
            raise ValueError(f"`{name}` must be a string of at most 200 characters")
    if not _is_number(fields.get("spread", 0.0)):
        raise ValueError(f"`spread` must be a number, but is {fields.get('spread')!r}")
    return Entry(**fields)


def _is_count(value: Any, below: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < below


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


def _require_map(name: str, value: Any, good: Any, what: str, labels: bool = False) -> None:
    if not isinstance(value, dict) or len(value) > 32:
        raise ValueError(f"`{name}` must be an object of at most 32 fields")
    for field_name, item in value.items():
        if not (len(field_name) <= 64 if labels else NAME.fullmatch(field_name)):
            raise ValueError(f"`{name}` holds a field named {field_name[:64]!r}")
        if not good(item):
            raise ValueError(f"`{name}` must hold {what}, but {field_name[:64]!r} is {item!r}"[:200])


def merge_entries(path: Path, gpu: str | None, family: str, capability: str, entries: list[Entry]) -> Table:
    """Put entries into a file beside those it has, under a lock, atomically: readers see the old file or the new one.
    A file that is not valid, or is for another GPU or family, is moved aside to `<name>.invalid` first.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an entry that could not be read again.
    """
    from filelock import FileLock

    for entry in entries:
        parse_entry(_compact(entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        known = read_table(path)
        foreign = known is not None and (known.gpu, known.family) != (gpu, family)
        if foreign or (known is not None and known.problems):
            os.replace(path, f"{path}.invalid")
            why = f"it is for {known.gpu or known.family!r}" if not known.problems else known.problems[0]
            logger.warning(f"{path}: {why}; what it was is now {path.name}.invalid")
            if foreign:
                known = None
        merged = {entry.identity(): entry for entry in (known.entries if known else [])}
        merged |= {entry.identity(): entry for entry in entries}
        table = Table(path, gpu, family, capability, list(merged.values()))
        write_table(table)
    return table


def write_table(table: Table) -> None:
    """Replace the table's file in one step; entries in an order that makes diffs small, one a line."""
    ordered = sorted(table.entries, key=lambda e: (e.op, e.dtype, e.problem.key, e.version, e.source))
    head = {"format": FORMAT, "gpu": table.gpu, "family": table.family, "capability": table.capability}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    rows = ",\n".join(f"    {json.dumps(_compact(entry))}" for entry in ordered)
    text = "\n".join(["{", *lines, '  "entries": [', *([rows] if rows else []), "  ]", "}"]) + "\n"
    handle, temporary = tempfile.mkstemp(dir=table.path.parent, prefix=f".{table.path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, table.path)
    except BaseException:
        os.unlink(temporary)
        raise


def _compact(entry: Entry) -> dict[str, Any]:
    optional = (*NOTES, "us", "of_floor", "spread")
    return {name: value for name, value in asdict(entry).items() if value or name not in optional}
