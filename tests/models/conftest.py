"""One thread for tiny models and few rows, to which a second costs more than it brings; and how int8 is multiplied."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from orthrus_triton.ops import _cpu_product
from orthrus_triton.ops.cpu.kernels import has_integer_product, linear_cpu


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[False, True], ids=["rows as they are", "rows rounded, too"])
def rounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether drafts also round what they multiply int8 with, as CPUs do that are faster so."""
    if not request.param:
        monkeypatch.setattr(_cpu_product, "linear_cpu", lambda *factors: linear_cpu(*factors[:4]))
    elif not has_integer_product():
        pytest.skip("no product of integers in C on this CPU")
    return request.param
