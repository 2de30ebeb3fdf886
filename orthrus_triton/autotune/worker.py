"""Worker processes: a configuration that crashes, hangs or runs out of memory takes its process with it, nothing else.
Parent and worker exchange lines of JSON; `python -m orthrus_triton.autotune.worker module:function` is a worker."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

Job = dict[str, Any]
Answer = dict[str, Any]
NOT_RUN = "not run"


class Worker:
    """One process, started with its first job and again after it died.

    Args:
        handler: "module:function" that turns a job into an answer.
        environment: of the process.
    """

    def __init__(self, handler: str, environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", __name__, handler]
        self._environment = dict(environment)
        self._process: subprocess.Popen | None = None
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask(self, job: Job, timeout: float) -> Answer:
        """The handler's answer, or {"error": what happened} if it raised, died or took longer than `timeout` seconds.
        A worker that did the last two is gone; the next job gets a new one."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            return {"error": f"took longer than {timeout:.0f} s"}
        except BrokenPipeError:
            line = None
        if line is not None:
            return json.loads(line)
        code = self._process.wait()
        self.close()
        if code == -signal.SIGKILL:
            return {"error": "was killed, most likely for want of memory"}
        return {"error": f"ended its process with {f'signal {-code}' if code < 0 else f'exit code {code}'}"}

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: left to it
                process.wait(timeout=10)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _start(self) -> None:
        self.close()
        self._process = subprocess.Popen(
            self._command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, start_new_session=True,  # Ctrl-C is the parent's to handle
        )  # fmt: skip
        self._answers = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()


def _forward(lines: Any, answers: queue.SimpleQueue) -> None:
    with contextlib.suppress(ValueError):  # closed under our hands
        for line in lines:
            answers.put(line)
    answers.put(None)


def ask_all(
    workers: list[Worker], jobs: list[Job], timeout: float, answered: Callable[[int, Answer], None],
    seconds_left: Callable[[], float],
) -> None:  # fmt: skip
    """Hand jobs to workers until all are answered or no time is left; the rest gets {"error": "not run"}.

    Args:
        workers: one thread each.
        jobs: in the order in which they are begun.
        timeout: seconds for one job.
        answered: called with a job's index and answer, in the caller's thread.
        seconds_left: of the whole budget.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Answer]] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    stopped = threading.Event()

    def serve(worker: Worker) -> None:
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            late = stopped.is_set() or seconds_left() <= 0
            try:
                answer = {"error": NOT_RUN} if late else worker.ask(jobs[index], timeout)
            except Exception as error:  # a worker that cannot even be started: the job has an answer all the same
                answer = {"error": f"{type(error).__name__}: {error}"}
            done.put((index, answer))

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers[: len(jobs)]]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            answered(*done.get())
    except BaseException:  # Ctrl-C: let go of the processes, so that the threads end
        stopped.set()
        for worker in workers:
            worker.close()
        raise
    for thread in threads:
        thread.join()


def compiler_environment() -> dict[str, str]:
    """For workers that compile: Triton's interpreter and its compiler cannot share a process."""
    return {name: value for name, value in worker_environment().items() if name != "TRITON_INTERPRET"}


def worker_environment() -> dict[str, str]:
    """This process's own, with its import path."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def main(handler: str) -> None:
    """Answer jobs from stdin until it closes. Whatever kernels print goes to stderr."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # if memory runs out, this process is the one to go
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    module, _, name = handler.partition(":")
    handle = getattr(import_module(module), name)
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:  # any failure of a configuration is an answer
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _leave_with(parent: int) -> None:
    """A worker that hangs must not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
