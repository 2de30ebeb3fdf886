"""RMSNorm as a module, under transformers' parameter name."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import nn

from orthrus_triton import ops
from orthrus_triton.ops._dispatch import require_size


class RMSNorm(nn.Module):
    """`orthrus_triton.ops.rms_norm` with a weight of `hidden_size`. It starts as 1, together with `offset`."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__()
        require_size("hidden_size", hidden_size)
        for name, value in (("eps", eps), ("offset", offset)):
            if not isinstance(value, Real) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number >= 0, but got {value!r}")
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, impl: str = "auto"
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x [..., H] -> normed [..., H]; with a residual, (normed, x + residual)."""
        return ops.rms_norm(x, self.weight, self.eps, residual, norm_offset=self.offset, impl=impl)

    def add_to(
        self, residual: torch.Tensor, x: torch.Tensor, next_norm: RMSNorm | None = None, *, impl: str = "auto"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(next_norm(sum), sum) of `residual` and the norm of x, [..., H] each; the sum twice without `next_norm`.

        Raises:
            ValueError: the offsets of the two norms differ.
        """
        if next_norm is not None and next_norm.offset != self.offset:
            raise ValueError(f"next_norm must have offset {self.offset}, as this norm has, but got {next_norm.offset}")
        following = (None, None) if next_norm is None else (next_norm.weight, next_norm.eps)
        return ops.add_normed(x, residual, self.weight, self.eps, *following, norm_offset=self.offset, impl=impl)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}"
