"""Run as a program: per launch of the built-in ops, whether compiling it ahead of time and launching it through the JIT
(on a driver that is not there) ask Triton's cache for the same thing."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.compiler.compiler as compiler
from triton.backends.compiler import GPUTarget

from orthrus_triton.autotune.aot import Launch, compile_launch, record_launches
from orthrus_triton.autotune.builtin import OPS
from orthrus_triton.autotune.config import Problem

PROBLEMS = (
    Problem.of("linear", "bf16", ("followed", "gate_up", "head"), N=1536, K=576),
    Problem.of("dual_view_attention", "fp16", head_dim=128, group=4),
)


class NoDriver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Asked(Exception):
    pass


def ask(source: Any, target: Any = None, options: Any = None, **_: Any) -> None:
    """In place of triton.compile."""
    parsed = compiler.make_backend(target).parse_options(dict(options or {}))
    raise Asked(source.hash(), parsed.hash(), str(target))


def asked_by(call: Any) -> tuple:
    try:
        call()
    except Asked as error:
        return error.args
    raise AssertionError("nothing was compiled")


def by_jit(launch: Launch) -> None:
    mock = triton.runtime.jit.MockTensor
    arguments = {
        name: mock(value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
    }
    launch.kernel.run(grid=(1,), warmup=True, **arguments, **launch.options)


def main() -> None:
    triton.compile = triton.compiler.compile = compiler.compile = ask
    triton.runtime.driver.set_active(NoDriver())
    for problem in PROBLEMS:
        op = OPS[problem.op]
        with record_launches() as launches:
            op.launch_all(problem, op.space.default(problem.dtype, "sm90", problem.shape), torch.device("meta"))
        for launch in launches:
            same = asked_by(lambda: compile_launch(launch, "sm90")) == asked_by(lambda: by_jit(launch))  # noqa: B023
            print("same" if same else launch.kernel.__name__)


if __name__ == "__main__":
    main()
