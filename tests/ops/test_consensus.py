"""The end of a cycle: Triton and torch against the token-by-token definition, fuzzed, and cases worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_triton.ops import VOID, consensus_

pytestmark = pytest.mark.usefixtures("with_and_without_c")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MASK = 99


def run(
    impl: str, candidate: list[list[int]], choice: list[list[int]], eos: list[int], limits: list[int],
    written: list[int], finished: list[bool], width: int, capacity: int,
) -> dict[str, torch.Tensor]:  # fmt: skip
    def ints(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    batch = len(candidate)
    state = {
        "context_len": ints([10 + n for n in written], torch.int32),
        "output_ids": torch.full((batch, capacity), -1, dtype=torch.int64, device=DEVICE),
        "output_len": ints(written, torch.int32),
        "finished": ints(finished, torch.bool),
        "block": torch.full((batch, width), -5, dtype=torch.int64, device=DEVICE),
        "accepted_histogram": torch.zeros(batch, width, dtype=torch.int32, device=DEVICE),
    }
    consensus_(
        ints(candidate, torch.int64), ints(choice, torch.int64), ints(eos, torch.int64), ints(limits, torch.int32),
        MASK, **state, impl=impl,
    )  # fmt: skip
    return state


@settings(max_examples=60)
@given(data=st.data(), batch=st.integers(1, 3), rows=st.integers(1, 9), extra=st.integers(0, 3))
def test_matches_the_definition(data: st.DataObject, batch: int, rows: int, extra: int) -> None:
    token = st.integers(0, 3)  # a small alphabet: agreements and stops are frequent
    block = st.lists(token, min_size=rows, max_size=rows)
    candidate = data.draw(st.lists(block, min_size=batch, max_size=batch))
    choice = data.draw(st.lists(block, min_size=batch, max_size=batch))
    if data.draw(st.booleans()):  # all drafts right
        candidate = [[row[0], *picked[:-1]] for row, picked in zip(candidate, choice)]
    eos = data.draw(st.lists(token, max_size=2))
    limits = data.draw(st.lists(st.integers(1, 14), min_size=batch, max_size=batch))
    written = [data.draw(st.integers(0, limit)) for limit in limits]
    finished = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    args = (candidate, choice, eos, limits, written, finished, rows + extra, max(limits))
    expected = run("reference", *args)
    for impl in ("triton", "torch"):
        for name, value in run(impl, *args).items():
            assert torch.equal(value, expected[name]), (impl, name, value, expected[name])


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_worked_cases(impl: str) -> None:
    # drafts 1, 2 agree, 8 does not: two accepted and the bonus token 3
    state = run(impl, [[0, 1, 2, 8]], [[1, 2, 3, 4]], [], [10], [1], [False], 4, 10)
    assert state["output_ids"][0].tolist() == [-1, 1, 2, 3] + [-1] * 6
    assert state["output_len"].tolist() == [4] and state["context_len"].tolist() == [14]
    assert state["block"][0].tolist() == [3, MASK, MASK, MASK]
    assert state["accepted_histogram"][0].tolist() == [0, 0, 1, 0] and not state["finished"][0]
    # the limit cuts inside the accepted prefix
    state = run(impl, [[0, 1, 2, 3]], [[1, 2, 3, 4]], [], [3], [1], [False], 4, 10)
    assert state["output_len"].tolist() == [3] and state["finished"].tolist() == [True]
    # an EOS inside the accepted prefix is kept and ends the sequence
    state = run(impl, [[0, 1, 2, 3]], [[1, 2, 3, 4]], [7, 2], [9], [0], [False], 4, 10)
    assert state["output_ids"][0, :3].tolist() == [1, 2, -1] and state["finished"].tolist() == [True]
    # an EOS after the first disagreement was never said
    state = run(impl, [[0, 1, 9, 9]], [[1, 2, 7, 7]], [7], [9], [0], [False], 4, 10)
    assert state["output_ids"][0, :3].tolist() == [1, 2, -1] and state["finished"].tolist() == [False]


def test_mask_in_a_draft_is_a_token_like_any_other() -> None:
    """A drafted MASK that the AR view itself would say is accepted."""
    for impl in ("triton", "torch", "reference"):
        state = run(impl, [[0, MASK]], [[MASK, 5]], [], [9], [0], [False], 2, 9)
        assert state["output_ids"][0, :3].tolist() == [MASK, 5, -1], impl


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_what_ends_a_sequence_without_being_a_token_is_never_looked_up(impl: str) -> None:
    state = run(impl, [[1, 2, 3]], [[2, VOID, 3]], [VOID], [9], [0], [False], width=3, capacity=9)
    assert state["output_ids"][0, :2].tolist() == [2, VOID] and bool(state["finished"][0])
    assert state["block"].tolist() == [[0, MASK, MASK]]


def test_one_entry_for_each_sequence() -> None:
    """A kernel would read and write beyond the others' ends."""
    with pytest.raises(ValueError, match="limit must have batch size 2, but got 1"):
        run("torch", [[1, 2], [1, 2]], [[1, 2], [1, 2]], [], [9], [0, 0], [False, False], 2, 9)
    with pytest.raises(ValueError, match="finished must have batch size 1, but got 2"):
        run("torch", [[1, 2]], [[1, 2]], [], [9], [0], [False, False], 2, 9)


def test_what_is_read_may_lie_apart_and_what_is_written_may_not() -> None:
    def ints(*values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=DEVICE)

    def state_of() -> dict[str, torch.Tensor]:
        return {
            "context_len": ints(10, 10, dtype=torch.int32), "output_len": ints(0, 0, dtype=torch.int32),
            "output_ids": ints([-1] * 9, [-1] * 9), "finished": ints(False, False, dtype=torch.bool),
            "block": ints([0, 0], [0, 0]), "accepted_histogram": ints([0, 0], [0, 0], dtype=torch.int32),
        }  # fmt: skip

    candidate, choice = ints([1, 2], [1, 2]), ints([2, 3], [2, 3])
    eos, limit = ints([7, 2, 6, 2])[0, ::2], ints([9, 1], [1, 9], dtype=torch.int32)[:, 0]
    state = state_of()
    consensus_(candidate, choice, eos, limit, MASK, **state, impl="triton")
    assert state["output_len"].tolist() == [2, 1] and state["finished"].tolist() == [False, True]
    for name, tensor in state_of().items():
        state = state_of() | {name: torch.stack((tensor, tensor), dim=-1)[..., 0]}
        with pytest.raises(ValueError, match=f"{name} must be contiguous, but has strides"):
            consensus_(candidate, choice, eos, limit, MASK, **state, impl="triton")
