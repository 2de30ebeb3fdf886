"""Kernel configurations: look-up, defaults per GPU family, and the tuner that measures better ones.
Importing reads no file and no environment variable; the tuner is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

HOMES = {
    "KernelConfig": "config",
    "Problem": "config",
    "describe": "report",
    "lookup": "store",
    "problems_of": "shapes",
    "tunable": "tunable_op",
    "tune": "tuner",
    "tune_dry": "tuner",
}

__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
