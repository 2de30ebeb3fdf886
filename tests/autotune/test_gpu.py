"""On a GPU: a small model is tuned for real, found again, and its rows keep their bits."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.autotune import files, problems_of, store, tune

pytestmark = pytest.mark.gpu


def test_tuning_a_small_model(folder: Path):
    problems = problems_of("smollm2-135m", "bf16")
    free, started = torch.cuda.mem_get_info()[0], time.monotonic()
    result = tune(problems, budget=120, candidates=3, repeats=2, jobs=6)
    assert time.monotonic() - started < 150
    assert torch.cuda.mem_get_info()[0] > free - 2**28, "workers are gone when a run returns, with what they held"
    assert result.unfinished == [] and all(outcome.entry for outcome in result.outcomes)
    device = torch.device("cuda", torch.cuda.current_device())
    for outcome in result.outcomes:
        entry = outcome.entry
        found = store.find(entry.op, torch.bfloat16, device, **entry.key)
        assert (found.place, found.config) == (store.USER, entry.config)
        assert all(us > 0 for us in entry.us.values()) and all(0 < share < 1.5 for share in entry.of_floor.values())
        assert max(behind for _, behind in outcome.choices) < 0.1
    x, weight = (
        torch.randn(64, 576, device=device, dtype=torch.bfloat16),
        torch.randn(3072, 576, device=device).bfloat16(),
    )
    whole = ops.linear_swiglu(x, weight)
    for rows in (1, 7, 32):
        assert torch.equal(ops.linear_swiglu(x[:rows], weight), whole[:rows])
    assert files.read_table(result.path).problems == []
