"""Timing on a device: CUDA-graph replay in turns with cold L2, percentiles, and copy bandwidth as the yardstick.
The tuner and the benchmarks measure with this and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orthrus_triton._capture import capture

WARM_UP = 3
MIN_SAMPLES = 5
LEAST_COPIES, MOST_COPIES = 4, 16  # few steps would show the few microseconds of their graph's own replay

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
    graph: bool = True,
) -> dict[str, Timing]:
    """Time of one step of each candidate, samples taken in turns so that a drifting clock meets all alike.

    On a GPU a candidate's steps are captured as one CUDA graph and timed with events around its replay: what the
    device does, without the host's launches, after its L2 cache was overwritten, as the rest of a cycle would. The time
    of a replay is divided by the number of steps; many steps over copies of the data (`copies_beyond_cache`) hide the
    replay's own few microseconds.

    Args:
        candidates: name -> steps. A step is called without arguments and must allocate nothing that outlives it.
        device: where they run.
        samples: most samples of each candidate.
        seconds: most time to spend on each, warm-up excluded; five samples (or `samples`, if fewer) are taken anyway.
        graph: False times eager calls instead, launches included (what cannot be captured).
    """
    if device.type != "cuda":
        return _measure_on_cpu(candidates, samples, seconds)
    replays = {name: _captured(steps) if graph else _in_order(steps) for name, steps in candidates.items()}
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    junk = torch.empty(max(4 * l2_bytes, 2**26), dtype=torch.int8, device=device)
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
    with capture(graph):
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


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many copies of `nbytes` of data to take turns on, so that none is still in the GPU's L2 when its turn comes
    again; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return max(LEAST_COPIES, min(MOST_COPIES, -(-3 * l2_bytes // max(nbytes, 1))))


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


def driver_version() -> str:
    """Of the NVIDIA driver, "unknown" where nobody can say."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0] or "unknown"
