"""Without a GPU, kernels run in Triton's interpreter: the variable must be set before Triton is imported."""

from __future__ import annotations

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    # torch then fills what `empty` gives with NaN, so that nothing nobody wrote is read unnoticed
    torch.use_deterministic_algorithms(True, warn_only=True)

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=15, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import install

    install()
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the longest first, in both halves of the list: two processes start with one half each
    long = [item for item in items if "compile_only" in item.path.parts or "slow" in item.keywords]
    rest = [item for item in items if item not in long]
    middle = max(len(items) // 2 - len(long[::2]), 0)
    items[:] = long[::2] + rest[:middle] + long[1::2] + rest[middle:]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm GPU"))


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: a GPU if there is one, else the CPU and the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["C", "torch"])
def with_and_without_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with the C kernels, and with PyTorch's own operations alone."""
    from orthrus_triton.ops.cpu import kernels

    if request.param == "torch":
        monkeypatch.setattr(kernels, "c_library", lambda: None)
    elif kernels.c_library() is None:
        pytest.skip("no C kernels here")


@pytest.fixture
def without_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a C compiler."""
    monkeypatch.setattr("orthrus_triton.ops.cpu.kernels.c_library", lambda: None)


# of tests of the command line; imported late, for transformers takes seconds
@pytest.fixture(scope="module")
def tokenizer():
    from tests.cli_models import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="module")
def base_folder(tokenizer, tmp_path_factory) -> Path:
    from tests.cli_models import save_base_model

    folder = tmp_path_factory.mktemp("base")
    save_base_model(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(base_folder, tmp_path_factory) -> Path:
    """What `convert` makes of it."""
    from tests.cli_models import BLOCK_SIZE, run

    folder = tmp_path_factory.mktemp("converted") / "orthrus"
    result = run("convert", base_folder, folder, "--block-size", BLOCK_SIZE)
    assert result.exit_code == 0, result.stderr
    return folder
