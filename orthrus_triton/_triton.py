"""Triton, or a stand-in where it cannot be installed (macOS, Windows): the package must import anywhere.
Every launch also takes its compile options from here, so that no kernel is built with a default that changes bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: torch implementations only

    class _Missing:
        """Absorbs decorators and annotations at import; a launch says what is missing."""

        constexpr = None

        def jit(self, fn: Callable | None = None, **_: Any) -> Any:
            return fn if fn is not None else (lambda inner: inner)

        def __getattr__(self, name: str) -> Any:
            raise ImportError(f"triton.{name} was asked for, but Triton is not installed: use impl='torch'")

    triton = tl = _Missing()  # type: ignore[assignment]
    HAS_TRITON = False
else:
    HAS_TRITON = True

# A fused multiply-add keeps an infinitely precise product. Whether the compiler contracts a*b+c depends on the code
# around it, so two kernels that share a formula could round differently. Contraction is off wherever bits are promised.
EXACT_LAUNCH = {"enable_fp_fusion": False}


def is_interpreted() -> bool:
    """True when kernels run in Triton's interpreter (TRITON_INTERPRET=1 was set before Triton was imported)."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n, without needing Triton."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)
