"""Rotary angles: against fp64, rows that do not know of each other, and positions of long contexts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton import ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ints(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def frequencies(half: int) -> torch.Tensor:
    return (1e6 ** (-torch.arange(half) / half)).to(DEVICE)


@given(
    positions=st.lists(st.integers(0, 131_071), min_size=1, max_size=5), half=st.sampled_from([8, 20, 32, 64]),
    scales=st.booleans(),
)  # fmt: skip
def test_against_fp64_and_alone(positions: list[int], half: int, scales: bool) -> None:
    inv_freq = frequencies(half)
    scaling = torch.linspace(1.0, 1.3, half, device=DEVICE) if scales else None
    out = torch.stack(ops.rotary_angles(ints([positions]), ints([1]), inv_freq, scaling))
    # the angle is an fp32 product by definition; its cosine and sine must be exact to fp32
    angles = (ints([positions])[..., None] * inv_freq).double()
    expected = torch.stack((angles.cos(), angles.sin())) * (1 if scaling is None else scaling.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-7)
    for t, position in enumerate(positions):
        alone = torch.stack(ops.rotary_angles(ints([[position]]), ints([1]), inv_freq, scaling))
        assert torch.equal(out[:, 0, t], alone[:, 0, 0])


@pytest.mark.parametrize("options", [(None, None, None, None), (None, 1e4, 2.0, 4)], ids=["static", "dynamic"])
def test_opcheck(options: tuple) -> None:
    arguments = (ints([[0, 3, 9]]), ints([5]), frequencies(32), torch.full((32,), 1.5, device=DEVICE), *options)
    torch.library.opcheck(torch.ops.orthrus_triton.rotary_angles.default, arguments)


def test_what_callers_get_wrong() -> None:
    ids, inv_freq = ints([[0, 1]]), frequencies(4)
    with pytest.raises(ValueError, match="positions must have dtype torch.int32"):
        ops.rotary_angles(ids.long(), ids[:, 0], inv_freq)
    with pytest.raises(ValueError, match="prompt_len must have shape"):
        ops.rotary_angles(ids, ids[0], inv_freq)
    with pytest.raises(ValueError, match=r"positions must be \[B, T\], but got shape"):
        ops.rotary_angles(ids[0], ids[:, 0], inv_freq)
    with pytest.raises(ValueError, match="inv_freq must have dtype torch.float32"):
        ops.rotary_angles(ids, ids[:, 0], inv_freq.double())
    with pytest.raises(ValueError, match="scaling must have shape"):
        ops.rotary_angles(ids, ids[:, 0], inv_freq, inv_freq[:1])
    with pytest.raises(ValueError, match="long_inv_freq must have shape"):
        ops.rotary_angles(ids, ids[:, 0], inv_freq, long_inv_freq=frequencies(5), original_max_len=4)
    for rule in ({"long_inv_freq": inv_freq}, {"dynamic_ntk": (1e4, 2.0)}):
        with pytest.raises(ValueError, match="original_max_len must be given"):
            ops.rotary_angles(ids, ids[:, 0], inv_freq, **rule)
    with pytest.raises(ValueError, match="are two rules"):
        ops.rotary_angles(ids, ids[:, 0], inv_freq, long_inv_freq=inv_freq, dynamic_ntk=(1e4, 2.0), original_max_len=4)


def test_stretched_angles_of_a_position_are_its_own() -> None:
    """Torch's powers on a CPU round by where a number stands in a vector."""
    options = {"dynamic_ntk": (1e4, 2.0), "original_max_len": 64}
    positions = ints([list(range(first, first + 64)) for first in range(100, 450, 70)])
    together = torch.stack(ops.rotary_angles(positions, ints([9] * 5), frequencies(32), **options))
    for b, t in itertools.product(range(5), range(64)):
        alone = torch.stack(ops.rotary_angles(positions[b : b + 1, t : t + 1], ints([9]), frequencies(32), **options))
        assert torch.equal(together[:, b, t], alone[:, 0, 0]), (b, t)
