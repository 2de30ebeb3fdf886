"""Every kernel with every default configuration compiles for every GPU family, within its limits, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orthrus_triton._triton import HAS_TRITON

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton's compiler")


def environment(**extra: str) -> dict[str, str]:
    """The compiler and the interpreter cannot share a process."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": str(ROOT)} | extra


KERNELS_WITH_TENSOR_CORES = {
    "dual_view_attention_kernel", "linear_kernel", "linear_swiglu_kernel", "int8_product_kernel", "lm_head_kernel",
    "block_attention_forward_kernel", "block_attention_grad_q_kernel", "block_attention_grad_kv_kernel",
}  # fmt: skip


@pytest.mark.parametrize("families", [("sm80", "sm90", "sm100"), ("gfx942",)], ids=" ".join)
def test_every_kernel_compiles(families: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.compile_only.every_launch", *families]
    run = subprocess.run(
        command, cwd=ROOT, env=environment(TRITON_CACHE_DIR=str(tmp_path)), capture_output=True, text=True
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    problems = [line for line in lines if line["problems"]]
    assert not problems, problems[:3]
    assert run.returncode == 0, run.stderr[-2000:]
    for family in families:
        compiled = [line["kernel"] for line in lines if line["family"] == family]
        # those for a maker's other generations are what has instructions of its own there
        assert set(compiled) >= KERNELS_WITH_TENSOR_CORES
        if family in ("sm90", "gfx942"):
            assert len(set(compiled)) == 33 and len(compiled) > 110, (len(set(compiled)), len(compiled))


def test_a_spilling_configuration_is_reported() -> None:
    """The gate itself: huge tiles must be called out, or the test above proves nothing."""
    program = """
import torch
from orthrus_triton.autotune.aot import compile_launch, record_launches
from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.ops.linear import launch_linear
x = torch.empty(32, 4096, dtype=torch.bfloat16, device="meta")
w = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
constants = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "SPLIT_K": 1}
with record_launches() as launches:
    launch_linear(x, w, None, None, x.dtype, KernelConfig(constants, {"num_warps": 4, "num_stages": 3}))
print(compile_launch(launches[0], "sm80").problems())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert "shared memory" in run.stdout and "spills" in run.stdout, run.stdout
