"""Compile kernels for GPUs that are not there, exactly as a launch would: shared memory, registers and spills.
Needs Triton's compiler but no driver; not available in a process where TRITON_INTERPRET is set."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orthrus_triton._triton import is_interpreted, triton
from orthrus_triton.autotune.defaults import SHARED_MEMORY_LIMIT

TARGETS = {
    "sm80": ("cuda", 80, 32), "sm90": ("cuda", 90, 32), "sm100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)
}  # fmt: skip
LAUNCH_OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


@dataclass(frozen=True)
class Launch:
    """A recorded kernel launch: the kernel and its arguments by name; tensors may be on the meta device."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class CompileReport:
    """What the compiler made of a launch. shared and spilled in bytes; spilled counts stack and scratch memory."""

    kernel: str
    family: str
    shared: int
    registers: int
    spilled: int

    def problems(self) -> list[str]:
        """Why this kernel must not ship for its family; empty if it may."""
        limit = SHARED_MEMORY_LIMIT[self.family]
        found = []
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, {self.family} has {limit}")
        if self.spilled:
            found.append(f"spills {self.spilled} bytes of registers")
        return found


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Inside the context, kernel launches are noted down instead of run: call any op's launch with meta tensors."""
    if is_interpreted():
        raise RuntimeError("kernels cannot be compiled in a process where TRITON_INTERPRET is set")
    recorded: list[Launch] = []
    function_type = triton.runtime.jit.JITFunction

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args))
        arguments |= {name: value for name, value in kwargs.items() if name not in LAUNCH_OPTIONS}
        recorded.append(Launch(kernel, arguments, {k: v for k, v in kwargs.items() if k in LAUNCH_OPTIONS}))

    original = function_type.run
    function_type.run = record
    try:
        yield recorded
    finally:
        function_type.run = original


def compile_launch(launch: Launch, family: str) -> CompileReport:
    """Compile a recorded launch for `family`, with the specialisations the JIT would apply to its arguments.

    They are Triton's own, in whatever version it is: the same source then finds the same file in its cache.
    """
    target = triton.backends.compiler.GPUTarget(*TARGETS[family])
    backend, kernel, jit = triton.compiler.make_backend(target), launch.kernel, triton.runtime.jit
    arguments = {
        name: jit.MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
    }
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(backend, launch.options, bound, specialization, options)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=launch.options)
    registers, spilled = _amd_usage(compiled) if family == "gfx942" else _cuda_usage(compiled)
    return CompileReport(kernel.__name__, family, compiled.metadata.shared, registers, spilled)


def _cuda_usage(compiled: Any) -> tuple[int, int]:
    """Registers, and bytes of stack plus local memory, read from the cubin by the tool in Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    text = usage.stdout + usage.stderr
    found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd_usage(compiled: Any) -> tuple[int, int]:
    """Vector registers, and bytes of scratch memory, read from the assembly's metadata."""
    assembly = compiled.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    return registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
