"""Splits of the keys lie at absolute positions and grow with them: where they begin, and results across their edges."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton._triton import tl, triton
from orthrus_triton.autotune.defaults import count_splits
from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.ops import dual_view_attention
from orthrus_triton.ops.dual_view_attention.kernels import split_start, splits_of
from orthrus_triton.testing import assert_within_budget
from tests.ops.attention_cases import Case, make_case

SPLIT = 16  # so that edges lie at 128 keys and at 1,024
CONFIG = KernelConfig({"BLOCK_M": 16, "BLOCK_N": 16, "SPLIT_SIZE": SPLIT}, {"num_warps": 4, "num_stages": 2})


@triton.jit
def count_kernel(starts_ptr, counts_ptr, SPLIT_SIZE: tl.constexpr):
    n = tl.program_id(0)
    tl.store(starts_ptr + n, split_start(n, SPLIT_SIZE))
    tl.store(counts_ptr + n, splits_of(n, SPLIT_SIZE))


def test_starts_counts_and_the_host_agree(device: torch.device) -> None:
    starts, counts = torch.empty(2, 1600, dtype=torch.int32, device=device)
    count_kernel[(1600,)](starts, counts, SPLIT_SIZE=SPLIT)
    starts, counts = starts.tolist(), counts.tolist()
    assert starts[:10] == [0, 16, 32, 48, 64, 80, 96, 112, 128, 192]
    assert starts[21:25] == [960, 1024, 1152, 1280]
    for length in range(1600):
        assert counts[length] == count_splits(length, SPLIT) == sum(start < length for start in starts)


@pytest.mark.parametrize("window", [None, 40, 900])
@pytest.mark.parametrize("context", [126, 127, 190, 1022, 1023, 1150, 1300])
def test_results_across_the_edges(context: int, window: int | None, device: torch.device) -> None:
    case = make_case(
        context, torch.float32, device, rows=4, kv_heads=1, group=2, head_dim=64, capacity=context + 200,
        context=context, window=window,
    )  # fmt: skip
    got = dual_view_attention(*case.args(), impl="triton", config=CONFIG)
    expected = dual_view_attention(*case.args(torch.float64), impl="reference")
    assert_within_budget(got, dual_view_attention(*case.args(), impl="torch"), expected)
    # a row's bits do not depend on the capacity, nor on rows that see more
    for row in range(4):
        limit = int(case.key_limit[0, row])
        alone = Case(
            case.q[:, row : row + 1], case.k_cache[:, :, :limit].contiguous(), case.v_cache[:, :, :limit].contiguous(),
            case.key_limit[:, row : row + 1], window=window,
        )  # fmt: skip
        assert torch.equal(dual_view_attention(*alone.args(), impl="triton", config=CONFIG)[:, 0], got[:, row])
