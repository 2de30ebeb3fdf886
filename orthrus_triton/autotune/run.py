"""One tuning run: compile every candidate, check it, time the survivors in turns, write the winner.
Each problem is written as soon as it is done; what was found out before an interruption is not asked again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from orthrus_triton._triton import HAS_TRITON, triton
from orthrus_triton.autotune import files, store
from orthrus_triton.autotune.choose import Choice, Timed, choose
from orthrus_triton.autotune.config import KernelConfig, Problem
from orthrus_triton.autotune.journal import Journal
from orthrus_triton.autotune.space import SPACES
from orthrus_triton.autotune.tunable_op import OPS
from orthrus_triton.autotune.worker import NOT_RUN, Answer, Worker, ask_all, compiler_environment, worker_environment

BUILT_IN_HOME = "orthrus_triton.autotune.builtin"
# Seconds after which a job is given up, and how samples are taken: (most samples, seconds of each candidate and load)
# at a first look, then for the near-winners.
COMPILE_TIMEOUT, GATE_TIMEOUT, TIME_TIMEOUT = 180.0, 120.0, 300.0
FIRST_LOOK, SECOND_LOOK = (20, 0.2), (100, 1.0)
GATE_SHARE = 0.6  # of a problem's share of the budget, what goes to checks; the rest is for timing what has passed


@dataclass
class Outcome:
    """What tuning one problem came to.

    Attributes:
        problem: which.
        entry: what was written, None if no candidate got through.
        tried: candidates that were compiled and checked; `timed` of them were timed.
        rejected: configuration -> why it may not be used, or what became of its process.
        previous: what an earlier tuning had chosen, None if there was none.
        choices: the winner of each repetition, and how much slower than the fastest it was measured there.
    """

    problem: Problem
    entry: files.Entry | None = None
    tried: int = 0
    timed: int = 0
    rejected: dict[str, str] = field(default_factory=dict)
    previous: KernelConfig | None = None
    choices: list[tuple[KernelConfig, float]] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether another configuration won than in the earlier tuning."""
        return self.previous is not None and self.entry is not None and self.previous != self.entry.config


@dataclass
class Result:
    """`unfinished` problems had no time; the same call goes on with them."""

    path: Path
    outcomes: list[Outcome] = field(default_factory=list)
    unfinished: list[Problem] = field(default_factory=list)


def home_of_op(name: str) -> str:
    """What a worker imports to define an op."""
    return OPS[name].home if name in OPS else BUILT_IN_HOME


def versions() -> dict[str, str]:
    """Of what compiles and runs the kernels."""
    return {"torch": torch.__version__, "triton": triton.__version__ if HAS_TRITON else "none"}


class Run:
    """State of `tuner.tune`; see there for the arguments."""

    def __init__(
        self, problems: list[Problem], gpu: store.Gpu, device: str, budget: float | None, candidates: int, repeats: int,
        folder: Path, handler: str, advance: Callable[[int, int, str], None],
    ) -> None:  # fmt: skip
        self.gpu, self.device, self.handler, self.folder = gpu, device, handler, folder
        self.repeats, self.advance = repeats, advance
        self.path = folder / files.file_name(gpu.name)
        self.deadline = None if budget is None else time.monotonic() + budget
        self.stopped = threading.Event()
        self.known = {problem: store.on_file(problem, gpu, folder) for problem in problems}
        self.candidates = {problem: self._candidates(problem, candidates) for problem in problems}
        self.compiled: dict[Problem, dict[int, Answer]] = {problem: {} for problem in problems}
        self.versions = versions()
        self.failure: BaseException | None = None
        self.lock, self.arrived = threading.Lock(), threading.Condition()
        self.done, self.total = 0, 2 * sum(map(len, self.candidates.values())) + len(problems)

    def _candidates(self, problem: Problem, most: int) -> list[KernelConfig]:
        found = SPACES[problem.op].candidates(problem.dtype, self.gpu.family, problem.shape, most)
        known = self.known[problem]
        return found if known is None or known.config in found else [found[0], known.config, *found[1:]]

    def left(self) -> float:
        """Seconds of the budget."""
        if self.stopped.is_set():
            return 0.0
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def step(self, units: int, text: str) -> None:
        with self.lock:
            self.done += units
        self.advance(self.done, self.total, text)

    def question(self, stage: str, problem: Problem, config: KernelConfig | None = None) -> list:
        """Everything an answer depends on, so that no answer outlives its kernel."""
        space = SPACES[problem.op]
        return [
            stage, self.gpu.name, self.versions, problem.as_json(), space.version, space.source(),
            config and config.as_json(),
        ]  # fmt: skip

    def job(self, stage: str, problem: Problem, **more: Any) -> dict[str, Any]:
        return {"stage": stage, "home": home_of_op(problem.op), "problem": problem.as_json(), **more}

    def run(self, jobs: int, fresh: bool) -> Result:
        """All problems, as far as the budget goes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.path.with_suffix(".journal.jsonl"), fresh)
        compilers = [Worker(self.handler, compiler_environment()) for _ in range(jobs)]
        measurer = Worker(self.handler, worker_environment())
        result = Result(self.path)
        compiling = threading.Thread(target=self._compile_all, args=(compilers,), daemon=True)
        try:
            bandwidth = measurer.ask({"stage": "bandwidth", "device": self.device}, TIME_TIMEOUT)
            if "error" in bandwidth:
                raise ValueError(f"the device {self.device} cannot be measured: {bandwidth['error']}")
            compiling.start()
            for place, problem in enumerate(self.candidates):
                share = self.left() / (len(self.candidates) - place)
                outcome = self._tune_one(problem, measurer, bandwidth, share, compiling)
                result.outcomes.append(outcome) if outcome else result.unfinished.append(problem)
        finally:
            self.stopped.set()
            for worker in [*compilers, measurer]:
                worker.close()
        compiling.join()
        if not result.unfinished:
            self.journal.remove()
        return result

    def _previous(self, problem: Problem) -> store.Found | None:
        """What an earlier tuning on this machine chose."""
        known = self.known[problem]
        return known if known is not None and known.place == store.USER else None

    def _finished(self, problem: Problem) -> bool:
        """Whether the run that this one goes on with had written its winner, and it is still there."""
        return self.journal.get(self.question("done", problem)) is not None and self._previous(problem) is not None

    def _compile_all(self, workers: list[Worker]) -> None:
        """In a thread of its own: problems compile while earlier ones are timed."""
        asked, jobs = [], []
        for problem, configs in self.candidates.items():
            if self._finished(problem):
                continue
            for index, config in enumerate(configs):
                if (answer := self.journal.get(self.question("compile", problem, config))) is not None:
                    self._compiled(problem, index, answer)
                    continue
                asked.append((problem, index))
                jobs.append(self.job("compile", problem, config=config.as_json(), family=self.gpu.family))

        def answered(number: int, answer: Answer) -> None:
            problem, index = asked[number]
            # a run that ends kills its compilers: an error is then not the configuration's fault
            if "error" not in answer or (answer["error"] != NOT_RUN and not self.stopped.is_set()):
                self._record("compile", problem, self.candidates[problem][index], answer)
            self._compiled(problem, index, answer)

        try:
            ask_all(workers, jobs, COMPILE_TIMEOUT, answered, self.left)
        except BaseException as error:  # a full disk under the journal: the main thread has to say so
            self.failure = error

    def _compiled(self, problem: Problem, index: int, answer: Answer) -> None:
        with self.arrived:
            self.compiled[problem][index] = answer
            self.arrived.notify_all()
        self.step(1, f"{problem}: compiling")

    def _record(self, stage: str, problem: Problem, config: KernelConfig | None, answer: Any) -> None:
        with self.lock:
            self.journal.put(self.question(stage, problem, config), answer)

    def _tune_one(
        self, problem: Problem, measurer: Worker, bandwidth: Answer, share: float, compiling: threading.Thread
    ) -> Outcome | None:
        """None if there was no time."""
        configs, previous = self.candidates[problem], self._previous(problem)
        outcome = Outcome(problem, previous=previous and previous.config)
        if self._finished(problem):
            outcome.entry = previous.entry
            self.step(2 * len(configs) + 1, f"{problem}: done before")
            return outcome
        started = time.monotonic()
        passed = []
        for index, config in enumerate(configs):
            late = self.left() <= 0 or (passed and time.monotonic() - started > share * GATE_SHARE)
            with self.arrived:
                while not late and index not in self.compiled[problem] and compiling.is_alive():
                    self.arrived.wait(0.2)
                    late = self.left() <= 0
            if self.failure is not None:
                raise self.failure
            answer = self.compiled[problem].get(index, {"error": NOT_RUN})
            if not late and not (why := _objection(answer)):
                answer = self._gate(problem, config, measurer)
                why = _objection(answer)
            if not late and why != NOT_RUN:
                outcome.tried += 1
                if why:
                    outcome.rejected[str(config)] = why
                else:
                    passed.append(index)
            self.step(1, f"{problem}: checking")
        if self.left() <= 0 and not passed:
            return None
        self._choose(outcome, passed, measurer, bandwidth)
        self.step(1, f"{problem}: timed")
        if outcome.entry is not None:
            files.merge_entries(self.path, *self.gpu.identity(), [outcome.entry])
            self._record("done", problem, None, True)
        return outcome

    def _gate(self, problem: Problem, config: KernelConfig, measurer: Worker) -> Answer:
        answer = self.journal.get(self.question("gate", problem, config))
        if answer is None:
            job = self.job("gate", problem, config=config.as_json(), device=self.device)
            answer = measurer.ask(job, GATE_TIMEOUT)
            self._record("gate", problem, config, answer)
        return answer

    def _choose(self, outcome: Outcome, passed: list[int], measurer: Worker, bandwidth: Answer) -> None:
        problem, configs = outcome.problem, self.candidates[outcome.problem]
        previous = configs.index(outcome.previous) if outcome.previous in configs else None
        nbytes: dict[str, int] = {}

        def timer(indices: Sequence[int], closely: bool) -> tuple[list[Timed], dict[str, int]]:
            self.advance(self.done, self.total, f"{problem}: timing {len(indices)}")
            timed = self._time(outcome, list(indices), SECOND_LOOK if closely else FIRST_LOOK, measurer, nbytes)
            return timed, nbytes

        choice: Choice | None = None
        for _ in range(self.repeats):
            choice = choose(passed, timer, previous) if passed else None
            if choice is None:
                return
            outcome.timed = choice.timed
            outcome.choices.append((configs[choice.winner.index], choice.behind))
        space, winner = SPACES[problem.op], choice.winner
        floor = {load: nbytes[load] / bandwidth["bandwidth"] for load in winner.seconds}
        config = configs[winner.index]
        outcome.entry = files.Entry(
            problem.op, space.version, space.source(), problem.dtype, problem.shape, config.constants, config.launch,
            origin="measured", date=datetime.now(timezone.utc).strftime("%Y-%m-%d"), driver=bandwidth["driver"],
            **self.versions, us={load: round(seconds * 1e6, 3) for load, seconds in winner.seconds.items()},
            of_floor={load: round(floor[load] / seconds, 4) for load, seconds in winner.seconds.items()},
            spread=round(winner.noise, 5),
        )  # fmt: skip

    def _time(
        self, outcome: Outcome, indices: list[int], how: tuple[int, float], measurer: Worker, nbytes: dict[str, int]
    ) -> list[Timed]:
        """In turns. If the process does not survive that, in halves, until the one to blame is found."""
        if not indices:
            return []
        configs = self.candidates[outcome.problem]
        job = self.job(
            "time", outcome.problem, configs=[configs[i].as_json() for i in indices], device=self.device,
            samples=how[0], seconds=how[1],
        )  # fmt: skip
        answer = measurer.ask(job, TIME_TIMEOUT)
        if "error" not in answer:
            nbytes.update(answer["bytes"])
            return [
                Timed(i, {load: p50 for load, (p50, _) in times.items()}, {load: s for load, (_, s) in times.items()})
                for i, times in zip(indices, answer["times"])
            ]
        if len(indices) == 1:
            outcome.rejected[str(configs[indices[0]])] = f"while being timed: {answer['error']}"
            return []
        middle = len(indices) // 2
        halves = (indices[:middle], indices[middle:])
        return [timed for half in halves for timed in self._time(outcome, half, how, measurer, nbytes)]


def _objection(answer: Answer) -> str | None:
    """Why a candidate goes no further, None if nothing speaks against it."""
    return answer.get("error") or "; ".join(answer.get("problems", [])) or None
