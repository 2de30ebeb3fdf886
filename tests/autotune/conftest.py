"""Every test has a folder of its own for configurations, and starts with nothing looked up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orthrus_triton.autotune import files, store

# where there is a GPU, kernels are compiled and do not run on CPU tensors
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="for kernels in the interpreter")
GPU = store.Gpu("Test GPU 9000", "sm90", "9.0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(files.CONFIG_DIR_VARIABLE, str(tmp_path / "configs"))
    _forget_all()
    yield tmp_path / "configs"
    _forget_all()


def _forget_all() -> None:
    store.forget()
    store._said.clear()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> store.Gpu:
    """Look-ups believe that the CPU is this GPU."""
    monkeypatch.setattr(store, "gpu_of", lambda device: GPU)
    return GPU


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Tell the fake worker what to do; returns the log of its jobs."""

    def set_fakes(**what: object) -> Path:
        log = tmp_path / "jobs.log"
        monkeypatch.setenv("ORTHRUS_TEST_FAKES", json.dumps({"log": str(log), **what}))
        return log

    set_fakes()
    return set_fakes
