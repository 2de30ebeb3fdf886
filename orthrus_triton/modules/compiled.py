"""torch.compile for a method of which a program may have many instances."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch


def compile_apart(method: Callable, **options: Any) -> Callable:
    """torch.compile of a bound method with a compilation cache of its own. The cache otherwise belongs to the code,
    shared by every instance, and a program with several decoders would reach the limit of recompilations."""
    function = method.__func__
    copy = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    return torch.compile(MethodType(copy, method.__self__), fullgraph=True, dynamic=False, **options)
