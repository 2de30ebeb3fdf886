"""Kernel configurations: looked up, never searched for at call time.
A configuration's key is the op, the dtype and the weight or head shape; never a row count, never a context length."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from orthrus_triton.autotune import defaults


@dataclass(frozen=True)
class KernelConfig:
    """`constants` are the kernel's tile sizes, `launch` its num_warps and num_stages."""

    constants: dict[str, int] = field(default_factory=dict)
    launch: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        return self.constants[name]


@cache
def device_family(device: torch.device) -> str:
    """The family whose defaults fit `device`: "sm80", "sm90", "sm100", "gfx942"; "sm90" where there is no GPU
    (the interpreter then runs the configuration of the main target)."""
    if device.type != "cuda":
        return "sm90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    # consumer Blackwell (12.x) has Ampere's shared memory per block and no tensor memory
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(major, "sm80")


def lookup(op: str, dtype: torch.dtype, device: torch.device, **key: Any) -> KernelConfig:
    """The configuration of `op` for this dtype, GPU family and weight or head shape."""
    return _lookup(op, dtype, device_family(device), tuple(sorted(key.items())))


@cache
def _lookup(op: str, dtype: torch.dtype, family: str, key: tuple) -> KernelConfig:
    constants, launch = defaults.RULES[op](dtype, family, **dict(key))
    return KernelConfig(constants, launch)
