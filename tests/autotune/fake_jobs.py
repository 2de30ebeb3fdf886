"""A worker's handler for tests without a GPU: fake compiler and clock; with "real", the gate and the launches are real.
What happens to which configuration comes as JSON in $ORTHRUS_TEST_FAKES. Nothing heavy is loaded until it is needed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

FAKES = json.loads(os.environ.get("ORTHRUS_TEST_FAKES", "{}"))


@cache
def real_handle() -> Callable:
    if os.environ.get("TRITON_INTERPRET") == "1":  # before a kernel is imported
        from tests.interpreter import install

        install()
    from orthrus_triton.autotune import jobs

    return jobs.handle


def name_of(config: dict) -> str:
    """As `str(KernelConfig)` has it."""
    return " ".join(f"{name}={value}" for name, value in (config["constants"] | config["launch"]).items())


def handle(job: dict) -> dict:
    if "log" in FAKES:
        with Path(FAKES["log"]).open("a") as file:
            file.write(json.dumps([job["stage"], job.get("config") or job.get("configs")]) + "\n")
    if job["stage"] == "bandwidth":
        return {"bandwidth": 1e9, "driver": "fake"}
    configs = [name_of(config) for config in job.get("configs", [job.get("config")])]
    for config in configs:
        misbehave(FAKES.get(job["stage"], {}).get(config))
    if job["stage"] == "compile":
        return {"problems": [], "shared": 1024, "registers": 64, "kernels": 1}
    if FAKES.get("real"):
        return real_handle()(job, measure=lambda candidates, device, **_: measure(configs, candidates))
    if job["stage"] == "gate":
        return {"problems": []}
    times = [[microseconds(config) * 1e-6, FAKES.get("noise", 0.0)] for config in configs]
    return {"times": [{"rows=1": time, "rows=32": time} for time in times], "bytes": {"rows=1": 1200, "rows=32": 9600}}


def microseconds(config: str) -> float:
    return FAKES.get("us", {}).get(config, 100.0)


def misbehave(how: str | None) -> None:
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "slow":
        time.sleep(0.5)
    if how == "hang":
        time.sleep(600)
    if how == "memory":
        raise MemoryError("no memory left")
    if how == "exit":
        print("a library that thinks it owns the process")
        os._exit(3)
    if how == "raise":
        raise RuntimeError("out of resource: shared memory")


def measure(configs: list[str], candidates: dict) -> dict:
    """One call of each candidate, so that its launch is real; the times are those asked for."""
    from orthrus_triton.autotune.timing import Timing

    for steps in candidates.values():
        steps[0]()
    noise = FAKES.get("noise", 0.0)
    times = [microseconds(config) * 1e-6 for config in configs]
    return {name: Timing(us * (1 - noise), us, us * (1 + noise), 20) for name, us in zip(candidates, times)}
