"""What the benchmarks share: timing by graph replay, copy bandwidth, the environment, tables, CSV files and charts.
`measure`, `copy_bandwidth`, `environment`, `Report` and `require_green` are the whole of it."""

from __future__ import annotations

import csv
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import typer

from orthrus_triton._triton import HAS_TRITON, triton

ROOT = Path(__file__).parents[1]
DATA = ROOT / "benchmarks" / "data"
WARM_UP = 3
MIN_SAMPLES = 5

Step = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Percentiles of the time of one step, in seconds, over `samples` samples."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """Nearest-rank percentiles."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(*(ordered[round(last * share)] for share in (0.2, 0.5, 0.8)), len(ordered))

    def columns(self) -> dict[str, float]:
        """As columns of a report, in microseconds."""
        return {name: round(getattr(self, name[:3]) * 1e6, 2) for name in ("p20_us", "p50_us", "p80_us")}


def measure(
    candidates: Mapping[str, Sequence[Step]],
    device: torch.device,
    *,
    samples: int = 50,
    seconds: float = 2.0,
    flush: bool = True,
    graph: bool = True,
) -> dict[str, Timing]:
    """Time of one step of each candidate, samples taken in turns so that a drifting clock meets all alike.

    On a GPU a candidate's steps are captured as one CUDA graph and timed with events around its replay: what the
    device does, without the host's launches. The time of a replay is divided by the number of steps; many steps over
    copies of the data (`copies_beyond_cache`) hide the replay's own few microseconds.

    Args:
        candidates: name -> steps. A step is called without arguments and must allocate nothing that outlives it.
        device: where they run.
        samples: most samples of each candidate.
        seconds: most time to spend on each, warm-up excluded; at least five samples are taken anyway.
        flush: overwrite the GPU's L2 cache before every sample, as the rest of a cycle would.
        graph: False times eager calls instead, launches included (what cannot be captured).
    """
    if device.type != "cuda":
        return _measure_on_cpu(candidates, samples, seconds)
    replays = {name: _captured(steps) if graph else _in_order(steps) for name, steps in candidates.items()}
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    junk = torch.empty(max(4 * l2_bytes, 2**26) if flush else 1, dtype=torch.int8, device=device)
    rounds = {name: _rounds(replay, device, samples, seconds) for name, replay in replays.items()}
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in replays}
    for n in range(max(rounds.values())):
        for name, replay in replays.items():
            if n < rounds[name]:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                junk.zero_()  # also keeps the device busy while the host enqueues what follows
                start.record()
                replay()
                end.record()
                marks[name].append((start, end))
        if n % 16 == 15:
            torch.cuda.synchronize(device)
    torch.cuda.synchronize(device)
    return {
        name: Timing.of([start.elapsed_time(end) / 1e3 / len(candidates[name]) for start, end in marks[name]])
        for name in candidates
    }


def _captured(steps: Sequence[Step]) -> Step:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # compiles kernels and fills the libraries' workspaces
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph.replay


def _in_order(steps: Sequence[Step]) -> Step:
    def run() -> None:
        for step in steps:
            step()

    return run


def _rounds(replay: Step, device: torch.device, samples: int, seconds: float) -> int:
    for _ in range(WARM_UP):
        replay()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    replay()
    torch.cuda.synchronize(device)
    return _affordable(time.perf_counter() - started, samples, seconds)


def _affordable(one: float, samples: int, seconds: float) -> int:
    return min(samples, max(int(seconds / max(one, 1e-7)), MIN_SAMPLES))


def _measure_on_cpu(candidates: Mapping[str, Sequence[Step]], samples: int, seconds: float) -> dict[str, Timing]:
    def once(steps: Sequence[Step]) -> float:
        started = time.perf_counter()
        for step in steps:
            step()
        return (time.perf_counter() - started) / len(steps)

    rounds = {}
    for name, steps in candidates.items():
        once(steps)
        rounds[name] = _affordable(once(steps) * len(steps), samples, seconds)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for n in range(max(rounds.values())):
        for name, steps in candidates.items():
            if n < rounds[name]:
                times[name].append(once(steps))
    return {name: Timing.of(taken) for name, taken in times.items()}


def copies_beyond_cache(nbytes: int, device: torch.device, most: int = 16) -> int:
    """How many copies of `nbytes` of data to take turns on, so that none is still in the GPU's L2 when its turn comes
    again; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, -(-3 * l2_bytes // max(nbytes, 1))))


def copy_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes per second, read plus written, of a large copy on the device: the yardstick of everything memory-bound.

    Args:
        device: where.
        nbytes: size of the buffer, by default 1 GiB on a GPU and 64 MiB on a CPU.
    """
    nbytes = nbytes or (2**30 if device.type == "cuda" else 2**26)
    source = torch.zeros(nbytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": [lambda: target.copy_(source)]}, device, samples=20, seconds=1.0, graph=False)
    return 2 * nbytes / timing["copy"].p50


def environment(device: torch.device) -> dict[str, str]:
    """What a figure depends on: device, driver, versions, the tree's commit, the date (UTC)."""
    on_gpu = device.type == "cuda"
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "driver": _driver() if on_gpu else "none",
        "runtime": runtime if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "none",
        "git_sha": _git_sha(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0] or "unknown"


def _git_sha() -> str:
    """The commit, with + if tracked files differ from it; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None or not (sha := git("rev-parse", "--short=12", "HEAD")):
        return "unknown"
    return sha + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


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
    """

    def __init__(self, name: str, device: torch.device, out: Path | None = None) -> None:
        self.name, self.device = name, device
        self.environment = environment(device)
        self.rows: list[dict[str, Any]] = []
        root = out or (DATA if device.type == "cuda" else None)
        self.folder = root / slug(self.environment["device"]) if root else None

    def add(self, **row: Any) -> None:
        """One row; all rows have the same columns."""
        self.rows.append(row)

    def markdown(self, columns: Sequence[str] | None = None) -> str:
        """The rows as a table, with the environment beneath it."""
        environment = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        return f"{markdown_table(self.rows, columns)}\n\n{environment}"

    def write_csv(self) -> Path | None:
        """<folder>/<name>.csv, every row with the environment's columns; None if there is no folder."""
        if self.folder is None or not self.rows:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*self.rows[0], *self.environment], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | self.environment for row in self.rows)
        return path

    def write_chart(
        self, x: str, y: str, series: Callable[[dict[str, Any]], str], *, x_label: str, y_label: str,
        log_x: bool = True, rows: Sequence[dict[str, Any]] | None = None,
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
        if log_x:
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
