"""`describe`: which configuration each op uses, where it came from, and what it was measured at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orthrus_triton.autotune import files, store
from orthrus_triton.autotune.config import DTYPES, KernelConfig, Problem
from orthrus_triton.autotune.space import SPACES


@dataclass(frozen=True)
class Described:
    """One op and key. `place` is where the look-up ended, `origin` what the file says of how it was found; `us` and
    `of_floor` are microseconds and share of the memory floor of each thing that was timed, empty if nothing was."""

    problem: Problem
    config: KernelConfig
    place: str
    path: Path | None
    origin: str
    us: dict[str, float]
    of_floor: dict[str, float]

    def __str__(self) -> str:
        times = ", ".join(f"{load} {us:g} us ({self.of_floor.get(load, 0):.0%})" for load, us in self.us.items())
        where = self.place + (f", {self.origin}" if self.origin else "")
        return f"{self.problem} {self.problem.dtype}: {self.config} [{where}{f'; {times} of floor' if times else ''}]"


def describe(problems: Sequence[Problem] | None = None, device: torch.device | str | None = None) -> list[Described]:
    """Which configuration each problem has, and why.

    Args:
        problems: which; by default all this process has looked up so far, and all that the user's file for this GPU
            and the package's know of.
        device: whose; by default the first GPU, else the CPU (sm_90's defaults).
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if problems is None:
        problems = [problem for problem, _, _ in store.looked_up()]
        problems += [problem for problem in _on_file(device) if problem not in problems]
    return [_described(problem, device) for problem in dict.fromkeys(problems)]


def _on_file(device: torch.device) -> list[Problem]:
    gpu = store.gpu_of(device)
    paths = [files.PACKAGED / f"{store.device_family(device)}.json"]
    if gpu is not None:
        name = files.file_name(gpu.name)
        paths = [files.user_folder() / name, files.PACKAGED / name, *paths]
    tables = filter(None, map(files.read_table, paths))
    known = (entry.problem for table in tables for entry in table.entries if entry.op in SPACES)
    return [problem for problem in known if SPACES[problem.op].problem_with_key(problem.dtype, problem.shape) is None]


def _described(problem: Problem, device: torch.device) -> Described:
    found = store.find(problem.op, DTYPES[problem.dtype], device, **problem.shape)
    entry = found.entry
    if entry is None:
        return Described(problem, found.config, found.place, None, "not measured", {}, {})
    return Described(problem, found.config, found.place, found.path, entry.origin, entry.us, entry.of_floor)
