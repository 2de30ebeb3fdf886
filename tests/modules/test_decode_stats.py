"""The figures of a run from the counts of its sequences, by hand; and where two answers part."""

from __future__ import annotations

import pytest

from orthrus_triton.modules.decode_stats import DecodeStats, first_difference


def test_figures_by_hand() -> None:
    """One sequence with a cycle of 4 and two of AR, one with four cycles of 4; each got its first token by prefill."""
    cycles, histogram = [{4: 1, 1: 2}, {4: 4}], [[2, 0, 1, 0], [0, 3, 0, 1]]
    assert DecodeStats.measure([5, 9], cycles, histogram, 1.0, 3.0) == DecodeStats(
        tokens=14, cycles=4, forward_passes=1 + 2 * 4, tokens_per_cycle=(4 + 8) / (3 + 4),
        tpf=14 / ((1 + 2 + 1 + 1) + (1 + 2 * 4)), accepted_histogram=[2, 3, 1, 1], sequence_tokens=[5, 9],
        sequence_cycles=[3, 4], prefill_seconds=1.0, decode_seconds=3.0, cycles_by_block_size={1: 2, 4: 5},
    )  # fmt: skip
    assert DecodeStats.measure([5, 9], cycles, histogram, 1.0, 3.0).tokens_per_second == 14 / 4
    prefill_alone = DecodeStats.measure([1], [{}], [[0, 0]], 0.0, 0.0)
    assert (prefill_alone.forward_passes, prefill_alone.tokens_per_cycle, prefill_alone.tpf) == (1, 0.0, 1.0)
    assert prefill_alone.tokens_per_second == 0.0


@pytest.mark.parametrize(
    ("ours", "theirs", "at"), [("", "", None), ("ab", "ab", None), ("abc", "aXY", 1), ("a", "ab", 1), ("ab", "a", 1)]
)
def test_answers_part_where_they_differ_or_where_one_ends(ours: str, theirs: str, at: int | None) -> None:
    assert first_difference(ours, theirs) == at
