"""Kernel configurations: looked up, never searched for at call time.
A configuration's key is the op, the dtype and the weight or head shape; never a row count, never a context length."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from orthrus_triton.autotune import files
from orthrus_triton.autotune.config import KernelConfig, Problem, dtype_name
from orthrus_triton.autotune.space import SPACES

__all__ = ["Found", "Gpu", "KernelConfig", "device_family", "find", "forget", "gpu_of", "lookup", "looked_up"]

logger = logging.getLogger("orthrus_triton.autotune")

# Which file an answer came from, in the order in which they are asked.
USER, PACKAGED, FAMILY, BUILT_IN = "user file", "packaged file", "family default", "built-in default"


@dataclass(frozen=True)
class Gpu:
    """A GPU as files know it: its name, family and compute capability ("9.0", "gfx942")."""

    name: str
    family: str
    capability: str

    def identity(self) -> tuple[str, str, str]:
        """What a file says it is for."""
        return self.name, self.family, self.capability


@dataclass(frozen=True)
class Found:
    """A configuration and where it came from; `entry` is None for the built-in default."""

    config: KernelConfig
    place: str
    path: Path | None = None
    entry: files.Entry | None = None


@cache
def device_family(device: torch.device) -> str:
    """The family whose defaults fit `device`: "sm80", "sm90", "sm100", "gfx942"; "sm90" where there is no GPU
    (the interpreter then runs the configuration of the main target)."""
    if device.type != "cuda":
        return "sm90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # consumer Blackwell (12.x) has Ampere's shared memory per block and no tensor memory
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


@cache
def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU behind a device, None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    if torch.version.hip:
        capability = properties.gcnArchName.split(":")[0]
    return Gpu(properties.name, device_family(device), capability)


def lookup(op: str, dtype: torch.dtype, device: torch.device | str, **key: Any) -> KernelConfig:
    """The configuration of `op` for this dtype, GPU and weight or head shape.

    Asked in this order: the user's file for this GPU in $ORTHRUS_TRITON_CONFIG_DIR or the user's cache folder; the
    file of this GPU in the package; the package's defaults of the GPU's family; the built-in rule. An answer is kept
    for the life of the process (until `forget`), so that no run changes its bits half-way.

    Args:
        op: "linear", "dual_view_attention", or the name of a `tunable`.
        dtype: of the weights.
        device: where the kernel runs. Without a GPU, sm_90's defaults.
        **key: N and K, or head_dim and group, or what the tunable declares.

    Raises:
        KeyError: no op has this name.
        ValueError: a dtype that no kernel takes, or a key that is not the op's.
    """
    if isinstance(device, str):
        device = torch.device(device)
    return find(op, dtype, device, **key).config


def find(op: str, dtype: torch.dtype, device: torch.device, **key: Any) -> Found:
    """`lookup`, with where the configuration came from."""
    gpu = gpu_of(device)
    # the variable counts at every look-up, so it is part of what an answer is kept under
    folder = files.user_folder() if gpu is not None else None
    return _find(op, dtype_name(dtype), gpu, device_family(device), folder, tuple(sorted(key.items())))


def looked_up() -> list[tuple[Problem, Gpu | None, Found]]:
    """Everything this process has asked for so far."""
    return list(_seen.values())


def forget() -> None:
    """Read all files anew at the next look-up. CUDA graphs captured before keep the configuration they have."""
    _find.cache_clear()
    _table.cache_clear()
    _seen.clear()


_seen: dict[tuple, tuple[Problem, Gpu | None, Found]] = {}
_said: set[tuple] = set()


def _say_once(level: int, subject: tuple, text: str) -> None:
    if subject not in _said:
        _said.add(subject)
        logger.log(level, text)


@cache
def _find(op: str, dtype: str, gpu: Gpu | None, family: str, folder: Path | None, key: tuple) -> Found:
    if op not in SPACES:
        raise KeyError(f"op must be one of {', '.join(SPACES)}, but got {op!r}")
    problem = Problem(op, dtype, key)
    if wrong := SPACES[op].problem_with_key(dtype, problem.shape):
        raise ValueError(f"{op}: {wrong}")
    found = _from_files(problem, gpu, family, folder)
    if found is None:
        found = Found(SPACES[op].default(dtype, family, problem.shape), BUILT_IN)
    if gpu is not None and found.place in (FAMILY, BUILT_IN):
        _log_miss(problem, gpu, found)
    _seen[problem, gpu, folder] = problem, gpu, found
    return found


def _from_files(problem: Problem, gpu: Gpu | None, family: str, folder: Path | None) -> Found | None:
    places = [(FAMILY, files.PACKAGED / f"{family}.json", None)]
    if gpu is not None:
        name = files.file_name(gpu.name)
        places = [(USER, folder / name, gpu), (PACKAGED, files.PACKAGED / name, gpu), *places]
    for place, path, owner in places:
        if (table := _table(path, owner)) is not None:
            entry = _current(table, problem, family)
            if entry is not None:
                return Found(entry.config, place, path, entry)
    return None


@cache
def _table(path: Path, gpu: Gpu | None) -> files.Table | None:
    """A file's entries by problem; what is wrong with the file is said here, once."""
    table = files.read_table(path)
    if table is None:
        return None
    wrong = table.problems
    if not wrong and table.gpu != (gpu.name if gpu else None):
        wrong = [f"it is for {table.gpu!r}"]
        table.entries.clear()
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        _say_once(logging.WARNING, (path,), f"{path}: {wrong[0]}{more}; the next default is taken instead")
    return table


def _current(table: files.Table, problem: Problem, family: str) -> files.Entry | None:
    """The entry for a problem, if it was made for the kernels as they are and names a configuration that may run."""
    space, stale = SPACES[problem.op], False
    for entry in table.entries:
        if entry.op != problem.op or entry.problem != problem:
            continue
        if (entry.version, entry.source) != (space.version, space.source()):
            stale = True
            continue
        wrong = space.problem_with_key(entry.dtype, entry.key)
        wrong = wrong or space.problem_with(entry.config, entry.dtype, family, entry.key)
        if wrong is None:
            return entry
        text = f"{table.path}: the entry for {problem} is ignored: {wrong}"
        _say_once(logging.WARNING, (table.path, problem), text)
    if stale:
        text = f"{table.path}: entries of {problem.op} were made for another version of its kernels and are ignored"
        _say_once(logging.WARNING, (table.path, problem.op, "stale"), f"{text}. Tune again: {command(problem)}")
    return None


def command(problem: Problem) -> str:
    """What tunes this one key."""
    return f"orthrus-triton autotune --key {problem} --dtype {problem.dtype}"


def _log_miss(problem: Problem, gpu: Gpu, found: Found) -> None:
    text = f"{problem} in {problem.dtype} is not tuned for {gpu.name}: {found.place}. Tune it: {command(problem)}"
    # one warning for a model that has five such weights; the others are there for who asks
    first = (gpu.name, "miss") not in _said
    _said.add((gpu.name, "miss"))
    more = " (or all of a model: orthrus-triton autotune --model PATH)" if first else ""
    _say_once(logging.WARNING if first else logging.INFO, (gpu.name, problem), text + more)


def on_file(problem: Problem, gpu: Gpu, folder: Path) -> Found | None:
    """What the files say of a problem now, read anew; None where only the built-in rule is left."""
    _table.cache_clear()
    return _from_files(problem, gpu, gpu.family, folder)
