"""What the tuner works with: a kernel's configuration, and a problem, by which a configuration is looked up.
A problem is an op, a dtype and a weight or head shape; it never holds a row count or a context length."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class KernelConfig:
    """`constants` are the kernel's tile sizes, `launch` its num_warps and num_stages."""

    constants: dict[str, int] = field(default_factory=dict)
    launch: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        return self.constants[name]

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in (self.constants | self.launch).items())

    def as_json(self) -> dict[str, dict[str, int]]:
        """What files and workers exchange; `KernelConfig(**it)` is the way back."""
        return {"constants": dict(self.constants), "launch": dict(self.launch)}

    def identity(self) -> tuple:
        """Equal for equal configurations, hashable."""
        return tuple(sorted(self.constants.items())), tuple(sorted(self.launch.items()))


@dataclass(frozen=True)
class Problem:
    """What is tuned as one: `key` are (name, value) pairs sorted by name. `uses` names what is fused behind the op in
    the model at hand; it is no part of the key."""

    op: str
    dtype: str
    key: tuple[tuple[str, int], ...]
    uses: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, op: str, dtype: str, uses: tuple[str, ...] = (), /, **key: int) -> Problem:
        """From keyword arguments."""
        return cls(op, dtype, tuple(sorted(key.items())), uses)

    @property
    def shape(self) -> dict[str, int]:
        """The key as keyword arguments."""
        return dict(self.key)

    def __str__(self) -> str:
        return f"{self.op}:{','.join(f'{name}={value}' for name, value in self.key)}"

    @classmethod
    def parse(cls, text: str, dtype: str) -> Problem:
        """The inverse of `str`: "linear:N=6144,K=4096".

        Raises:
            ValueError: the text has another form.
        """
        match = re.fullmatch(r"([A-Za-z_]\w*):((?:[A-Za-z_]\w*=\d{1,9})(?:,[A-Za-z_]\w*=\d{1,9})*)", text.strip())
        if match is None:
            raise ValueError(f"a key must look like linear:N=6144,K=4096, but got {text!r}")
        pairs = (pair.split("=") for pair in match[2].split(","))
        return cls.of(match[1], dtype, **{name: int(value) for name, value in pairs})

    def as_json(self) -> dict:
        """For workers."""
        return {"op": self.op, "dtype": self.dtype, "key": self.shape, "uses": list(self.uses)}

    @classmethod
    def from_json(cls, fields: Mapping) -> Problem:
        """The inverse of `as_json`."""
        return cls.of(fields["op"], fields["dtype"], tuple(fields["uses"]), **fields["key"])


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype, as files have it."""
    return DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch.")
