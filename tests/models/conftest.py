"""One thread for tiny models and few rows, to which a second costs more than it brings; and how drafts multiply."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from orthrus_triton.ops.cpu import kernels


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
        monkeypatch.setattr(kernels, "DRAFT_DEPTH", 0)
    elif not kernels.has_draft_product():
        pytest.skip("no product of integers in C on this CPU")
    return request.param
