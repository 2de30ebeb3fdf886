"""What the benchmarks share: parsing of options, the correctness gate, the environment, tables, CSV files and charts.
Their timing is the tuner's, `orthrus_triton.autotune.timing`, handed on from here."""

from __future__ import annotations

import csv
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import typer

from orthrus_triton._triton import HAS_TRITON, triton
from orthrus_triton.autotune.config import DTYPES
from orthrus_triton.autotune.timing import (
    Timing,
    copies_beyond_cache,
    copy_bandwidth,
    driver_version,
    measure,
)

__all__ = [
    "DTYPES", "Report", "Timing", "copies_beyond_cache", "copy_bandwidth", "environment", "measure", "require_green",
    "require_known", "whole_numbers",
]  # fmt: skip

ROOT = Path(__file__).parents[1]
DATA = ROOT / "benchmarks" / "data"


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on: device, driver, versions, the tree's commit, the date (UTC)."""
    on_gpu = device.type == "cuda"
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "driver": driver_version() if on_gpu else "none",
        "runtime": runtime if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "none",
        "git_sha": _git_sha(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """The processor's name, and the instruction sets that decide about its half precision."""
    name, flags = "CPU", ""
    if (info := Path("/proc/cpuinfo")).is_file():
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", info.read_text(), re.MULTILINE))
        name, flags = fields.get("model name", name), fields.get("flags", "")
    widest = next((what for what in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if what in flags.split()), None)
    return f"{name} ({widest})" if widest else name


def _git_sha() -> str:
    """The commit, with + if tracked files differ from it; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None or not (sha := git("rev-parse", "--short=12", "HEAD")):
        return "unknown"
    return sha + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def require_known(option: str, text: str, known: Collection[str]) -> list[str]:
    """The names in `text`, separated by commas.

    Raises:
        ValueError: one is not among `known`.
    """
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{option} must be one of {', '.join(known)}, but got {name!r}")
    return names


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers in `text`, separated by commas.

    Raises:
        ValueError: one is not a whole number >= 1.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
        raise ValueError(f"{option} must be whole numbers >= 1 separated by commas, but got {text!r}")
    return [int(word) for word in words]


def require_green(problems: Sequence[str]) -> None:
    """The correctness gate: say what is wrong and leave with code 1. Called before anything is timed, so that no
    figure of a wrong result is ever printed."""
    if problems:
        for problem in problems:
            typer.echo(f"WRONG: {problem}", err=True)
        typer.echo("correctness gate is red: nothing was timed", err=True)
        raise typer.Exit(1)


class Report:
    """Rows of one benchmark: printed as a Markdown table, kept as CSV and as a chart.

    Args:
        name: of the files.
        device: where it ran.
        out: folder that gets a folder per device, by default benchmarks/data. On a CPU nothing is written unless it
            is given.

    Raises:
        typer.BadParameter: `out` is no folder. Said before anything is timed, not when the figures are to be written.
    """

    def __init__(self, name: str, device: torch.device, out: Path | None = None) -> None:
        self.name, self.device = name, device
        self.environment = environment(device)
        self.rows: list[dict[str, Any]] = []
        if out is not None and out.exists() and not out.is_dir():
            raise typer.BadParameter(f"--out must be a folder, but {out} is a file")
        root = out or (DATA if device.type == "cuda" else None)
        self.folder = root / slug(self.environment["device"]) if root else None

    def add(self, **row: Any) -> None:
        """One row; all rows have the same columns. The CSV file has it at once, whatever happens to the rest."""
        self.rows.append(row)
        self.write_csv()

    def markdown(self, columns: Sequence[str] | None = None) -> str:
        """The rows as a table, with the environment beneath it."""
        environment = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        return f"{markdown_table(self.rows, columns)}\n\n{environment}"

    def write_csv(self) -> None:
        """<folder>/<name>.csv, every row with the environment's columns, if there is a folder."""
        if self.folder is None or not self.rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*self.rows[0], *self.environment], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | self.environment for row in self.rows)

    def publish(self, text: str) -> None:
        """Print the table and what is said of it, and keep both as <folder>/<name>.md."""
        print(text, flush=True)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"{self.name}.md").write_text(text + "\n")

    def write_chart(
        self, x: str, y: str, series: Callable[[dict[str, Any]], str], *, x_label: str, y_label: str,
        rows: Sequence[dict[str, Any]] | None = None,
    ) -> Path | None:  # fmt: skip
        """<folder>/<name>.png, one line per value of `series(row)`, of all rows or of these; None without a folder or
        without matplotlib."""
        rows = self.rows if rows is None else rows
        if self.folder is None or not rows:
            return None
        try:
            from matplotlib.figure import Figure  # no pyplot: no display, no global state
        except ImportError:
            print(f"{self.name}.png was not drawn: pip install matplotlib", file=sys.stderr)
            return None
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            lines.setdefault(series(row), []).append((row[x], row[y]))
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for label, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=label)
        ticks = sorted({row[x] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set(xlabel=x_label, ylabel=y_label, title=f"{self.name}: {self.environment['device']}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}.png"
        figure.savefig(path, dpi=120)
        return path


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table, by default all columns of the first one."""
    columns = columns or list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def slug(name: str) -> str:
    """A device's name as a folder name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
