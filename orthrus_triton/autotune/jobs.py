"""What workers do: compile a configuration, check it, time several in turns. Jobs and answers are plain JSON."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from orthrus_triton.autotune.config import KernelConfig, Problem
from orthrus_triton.autotune.tunable_op import OPS, Load, TunableOp


def handle(job: dict[str, Any], measure: Any = None) -> dict[str, Any]:
    """Do one job.

    Args:
        job: `stage` ("compile", "gate", "time", "bandwidth") and its arguments.
        measure: stands in for `timing.measure`.
    """
    if job["stage"] == "bandwidth":
        from orthrus_triton.autotune.timing import copy_bandwidth, driver_version

        device = torch.device(job["device"])
        return {"bandwidth": copy_bandwidth(device), "driver": driver_version()}
    op, problem = load_op(job["home"], job["problem"]["op"]), Problem.from_json(job["problem"])
    with torch.no_grad():
        if job["stage"] == "compile":
            return _compile(op, problem, KernelConfig(**job["config"]), job["family"], job.get("every", True))
        device = torch.device(job["device"])
        if job["stage"] == "gate":
            return {"problems": _gate(op, problem, device).problems(KernelConfig(**job["config"]))}
        configs = [KernelConfig(**config) for config in job["configs"]]
        return _time(op, problem, device, configs, job["samples"], job["seconds"], measure)


def load_op(home: str, name: str) -> TunableOp:
    """Import the module or file that defines an op.

    Raises:
        ValueError: it does not.
    """
    if name not in OPS:
        if home.endswith(".py"):
            load_file(Path(home))
        else:
            import_module(home)
    if name not in OPS:
        raise ValueError(f"{home} must define the op {name!r} at its top level, but does not")
    return OPS[name]


def load_file(path: Path) -> None:
    """Run a Python file as a module of a name that nobody imports: its own might hide another, such as `random`."""
    name = "_orthrus_tuned_" + path.stem.replace(".", "_")  # a dot would make it part of a package
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def _compile(op: TunableOp, problem: Problem, config: KernelConfig, family: str, every: bool) -> dict[str, Any]:
    """Every kernel of the configuration for one family: the worst of each figure, and what forbids it."""
    from orthrus_triton.autotune.aot import compile_launch, record_launches

    with record_launches() as launches:
        op.launch_all(problem, config, torch.device("meta"), every)
    if not launches:
        raise ValueError(f"the launch function of {problem.op!r} must launch a kernel of Triton, but launched none")
    reports = [compile_launch(launch, family) for launch in launches]
    problems = [f"{report.kernel} {problem}" for report in reports for problem in report.problems()]
    return {
        "problems": list(dict.fromkeys(problems)),  # a kernel may be launched in several ways that spill alike
        "shared": max(report.shared for report in reports), "registers": max(report.registers for report in reports),
        "kernels": len(reports),
    }  # fmt: skip


@lru_cache(maxsize=1)  # one problem's data at a time: a large weight and its copies fill a GPU quickly
def _gate(op: TunableOp, problem: Problem, device: torch.device) -> Any:
    from orthrus_triton.autotune.gate import Gate

    _loads.cache_clear()
    return Gate.of(op, problem, device)


@lru_cache(maxsize=1)
def _loads(op: TunableOp, problem: Problem, device: torch.device) -> list[Load]:
    _gate.cache_clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return op.loads(problem, device)


def _time(
    op: TunableOp, problem: Problem, device: torch.device, configs: list[KernelConfig], samples: int, seconds: float,
    measure: Any,
) -> dict[str, Any]:  # fmt: skip
    """Per configuration and load: median seconds and spread; per load: the bytes that must move."""
    if measure is None:
        from orthrus_triton.autotune.timing import measure
    loads = _loads(op, problem, device)
    times: list[dict[str, list[float]]] = [{} for _ in configs]
    for load in loads:
        candidates = {
            str(n): [partial(load.run, inputs, config) for inputs in load.copies] for n, config in enumerate(configs)
        }
        for n, timing in measure(candidates, device, samples=samples, seconds=seconds).items():
            times[int(n)][load.name] = [timing.p50, (timing.p80 - timing.p20) / 2 / timing.p50]
    return {"times": times, "bytes": {load.name: load.nbytes for load in loads}}
