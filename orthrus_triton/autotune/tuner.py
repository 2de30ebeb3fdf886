"""`tune`: the fastest configuration of every problem of a model on this GPU, checked, timed and written to a file.
`tune_dry` is as much of it as can be done without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orthrus_triton.autotune import files, store
from orthrus_triton.autotune.config import KernelConfig, Problem
from orthrus_triton.autotune.defaults import FAMILIES
from orthrus_triton.autotune.run import COMPILE_TIMEOUT, Result, Run, home_of_op, versions
from orthrus_triton.autotune.shapes import problems_of, select
from orthrus_triton.autotune.space import MAX_CANDIDATES, SPACES
from orthrus_triton.autotune.worker import Answer, Worker, ask_all, compiler_environment

HANDLER = "orthrus_triton.autotune.jobs:handle"
MODEL_ORIGIN = "compile-time model, not measured"
# The model is coarse: another configuration than the built-in one must promise at least this share of the time.
WORTH = 0.10

What = str | Path | Mapping[str, Any] | Problem
Advance = Callable[[int, int, str], None]


def tune(
    what: What | Sequence[What],
    *,
    ops: Sequence[str] | None = None,
    dtype: str | None = None,
    device: torch.device | str = "cuda",
    budget: float | None = 300.0,
    jobs: int | None = None,
    candidates: int = MAX_CANDIDATES,
    repeats: int = 1,
    fresh: bool = False,
    folder: Path | None = None,
    gpu: store.Gpu | None = None,
    handler: str = HANDLER,
    advance: Advance = lambda done, total, text: None,
) -> Result:
    """Find the fastest configuration of each problem on this GPU and write it to the user's file.

    Compiles all candidates in parallel processes; those that fit and do not spill are run against the fp64 reference
    and for equal row bits; those that pass are timed in turns, as CUDA graphs with cold L2. Nothing a candidate does
    to its process ends the run. Stopped at any moment, the same call goes on where it was.

    Args:
        what: a model by name, folder or config, or a `Problem`; or several.
        ops: only these.
        dtype: "bf16", "fp16" or "fp32"; by default each model's own.
        device: a CUDA or ROCm device.
        budget: seconds for all; None for no limit. With too few, fewer candidates of each problem are tried.
        jobs: compiling processes, by default one per core.
        candidates: at most so many per problem.
        repeats: how often to time and choose anew; the outcomes say what each repetition chose.
        fresh: do not go on with an interrupted run.
        folder: of the user's files, by default `files.user_folder()`.
        gpu: what the device is, where it is not asked (tests).
        handler: what workers run (tests).
        advance: told (units done, units in all, what is going on).

    Raises:
        ValueError: there is no GPU to time on, nothing to tune, or a count below 1.
    """
    _require_positive(jobs=jobs, candidates=candidates, repeats=repeats)
    problems = collect(what, ops, dtype)
    device = torch.device(device)
    if gpu is None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ValueError(
                "timing needs a GPU, and torch sees none here; what fits can be found out without one: "
                "--dry-run --target sm_90, in Python tune_dry(..., target='sm_90')"
            )
        gpu = store.gpu_of(device)
    run = Run(problems, gpu, str(device), budget, candidates, repeats, folder or files.user_folder(), handler, advance)
    try:
        return run.run(jobs or cores(), fresh)
    finally:
        store.forget()


def collect(what: What | Sequence[What], ops: Sequence[str] | None, dtype: str | None) -> list[Problem]:
    """The problems of everything named, each once.

    Raises:
        ValueError: there are none.
    """
    several = [what] if isinstance(what, (str, Path, Mapping, Problem)) else list(what)
    found = [p for one in several for p in ([one] if isinstance(one, Problem) else problems_of(one, dtype))]
    found = select(found, ops)
    if not found:
        raise ValueError("nothing to tune: no problem is left of what was named")
    return found


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class DryOutcome:
    """What compiling one problem's candidates came to. `fitting` are (configuration, bytes of shared memory, registers,
    cost by the compile-time model or None), the built-in default first; `pick` is the one of them to prefer."""

    problem: Problem
    fitting: list[tuple[KernelConfig, int, int, float | None]] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def pick(self) -> KernelConfig | None:
        """The default unless the model promises `WORTH` for another one; None if nothing fits."""
        if not self.fitting:
            return None
        first = self.fitting[0]
        if first[3] is None:
            return first[0]
        best = min(self.fitting, key=lambda fit: fit[3])
        return best[0] if best[3] < first[3] * (1 - WORTH) else first[0]


def tune_dry(
    what: What | Sequence[What],
    target: str,
    *,
    ops: Sequence[str] | None = None,
    dtype: str | None = None,
    jobs: int | None = None,
    candidates: int = MAX_CANDIDATES,
    handler: str = HANDLER,
    advance: Advance = lambda done, total, text: None,
) -> list[DryOutcome]:
    """Compile every candidate for a GPU that need not be there: which fit its shared memory and do not spill.

    Args:
        target: "sm_80", "sm_90", "sm_100" or "gfx942".
        what, ops, dtype, jobs, candidates, handler, advance: as in `tune`.

    Raises:
        ValueError: no such target, nothing to compile, or a count below 1.
    """
    family = target.replace("_", "")
    if family not in FAMILIES:
        raise ValueError(f"target must be one of sm_80, sm_90, sm_100, gfx942, but got {target!r}")
    _require_positive(jobs=jobs, candidates=candidates)
    configs = {
        problem: SPACES[problem.op].candidates(problem.dtype, family, problem.shape, candidates)
        for problem in collect(what, ops, dtype)
    }

    def compiled(done: int, total: int) -> None:
        advance(done, total, f"compiling for {target}")

    answers = _compile_each(configs, family, jobs or cores(), handler, compiled)
    return [_dry_outcome(problem, several, family, answers) for problem, several in configs.items()]


def _compile_each(
    configs: Mapping[Problem, Sequence[KernelConfig]], family: str, jobs: int, handler: str,
    compiled: Callable[[int, int], None],
) -> dict[tuple, Answer]:  # fmt: skip
    """Answers by `_compiled_as`: one compilation serves all weight shapes that compile to the same thing."""
    asked: dict[tuple, dict[str, Any]] = {}
    for problem, several in configs.items():
        for config in several:
            asked[_compiled_as(problem, config)] = {
                "stage": "compile", "home": home_of_op(problem.op), "problem": _stand_in(problem).as_json(),
                "config": config.as_json(), "family": family, "every": False,
            }  # fmt: skip
    answers: dict[tuple, Answer] = {}
    keys = list(asked)

    def answered(number: int, answer: Answer) -> None:
        answers[keys[number]] = answer
        compiled(len(answers), len(keys))

    workers = [Worker(handler, compiler_environment()) for _ in range(jobs)]
    try:
        ask_all(workers, list(asked.values()), COMPILE_TIMEOUT, answered, lambda: float("inf"))
    finally:
        for worker in workers:
            worker.close()
    return answers


def _dry_outcome(
    problem: Problem, configs: Sequence[KernelConfig], family: str, answers: Mapping[tuple, Answer]
) -> DryOutcome:
    outcome = DryOutcome(problem)
    for config in configs:
        answer = answers[_compiled_as(problem, config)]
        if why := answer.get("error") or "; ".join(answer["problems"]):
            outcome.rejected[str(config)] = why
            continue
        usage = answer["shared"], answer["registers"]
        cost = SPACES[problem.op].cost(config, problem.dtype, family, problem.shape, *usage)
        outcome.fitting.append((config, *usage, cost))
    return outcome


def _compiled_as(problem: Problem, config: KernelConfig) -> tuple:
    return _stand_in(problem), problem.uses, config.identity()


def _require_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be >= 1, but got {value}")


def _stand_in(problem: Problem) -> Problem:
    return Problem.of(problem.op, problem.dtype, problem.uses, **SPACES[problem.op].stand_in(problem.shape))


def entries_of(outcomes: Sequence[DryOutcome]) -> list[files.Entry]:
    """The picks as entries of a family's file, marked as what they are."""
    return [
        files.Entry(
            outcome.problem.op, space.version, space.source(), outcome.problem.dtype, outcome.problem.shape,
            outcome.pick.constants, outcome.pick.launch, origin=MODEL_ORIGIN, triton=versions()["triton"],
        )
        for outcome in outcomes
        if outcome.pick is not None and (space := SPACES[outcome.problem.op])
    ]  # fmt: skip
