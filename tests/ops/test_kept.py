"""What the layers of a pass work out once: kept for this very tensor as it is now, and for nothing else."""

from __future__ import annotations

import gc

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.ops._kept import Kept


@pytest.fixture
def kept() -> Kept[float]:
    return Kept()


def total(kept: Kept[float], tensor: torch.Tensor, **options: bool) -> float:
    return kept.get(tensor, "sum", lambda: tensor.sum().item(), **options)


def test_an_answer_is_worked_out_once(kept: Kept[float]) -> None:
    tensor = torch.ones(3)
    assert total(kept, tensor) == 3
    assert kept.get(tensor, "sum", lambda: pytest.fail("worked out again")) == 3
    assert kept.get(tensor, "another question", lambda: 5.0) == 5
    assert total(kept, tensor.clone() + 1) == 6


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_was_written_to_is_looked_at_again(kept: Kept[float], mode: type) -> None:
    base = torch.ones(2, 3)
    row = base[1]
    assert total(kept, row) == 3
    with mode():
        writes = [
            lambda: row.add_(1), lambda: base.fill_(4), lambda: base[1, :2].zero_(), lambda: row.detach().mul_(2),
            lambda: torch.add(row, 1, out=row), lambda: row.copy_(torch.full((3,), 7.0)),
        ]  # fmt: skip
        for write in writes:
            write()
            assert total(kept, row) == row.sum().item()


def test_nothing_is_kept_of_tensors_that_do_not_count_writes(kept: Kept[float]) -> None:
    with torch.inference_mode():
        tensor = torch.ones(3)
        assert total(kept, tensor) == 3
        assert total(kept, tensor.add_(1)) == 6
    tensor = torch.ones(3)
    assert total(kept, tensor, keep=False) == 3
    tensor.data.add_(1)
    assert total(kept, tensor, keep=False) == 6


def test_answers_go_with_their_tensors(kept: Kept[float]) -> None:
    tensors = [torch.ones(n) for n in range(5)]
    for tensor in tensors:
        total(kept, tensor)
    assert len(kept._answers) == 5
    del tensors, tensor
    gc.collect()
    assert len(kept._answers) == 0


@pytest.mark.usefixtures("with_and_without_c")
@torch.no_grad()
def test_ops_see_buffers_that_are_used_again() -> None:
    """Angles, slots and limits of the next pass, written into the tensors of the last one."""
    qkv, q, cache = torch.randn(2, 3, 4 * 8), torch.randn(2, 3, 2, 8), torch.randn(2, 2, 1, 16, 8)
    cos, sin = torch.empty(2, 2, 3, 4)
    slots, limit = torch.empty(2, 2, 3, dtype=torch.int32)
    for start in (0, 5, 14):  # the last reaches past the end
        cos.normal_()
        sin.normal_()
        slots.copy_(start + torch.arange(3))
        limit.copy_(slots + 1)

        def run(*of_the_pass: torch.Tensor) -> list[torch.Tensor]:
            k, v = cache.clone()
            cos, sin, slots, limit = of_the_pass
            rotated = ops.rope_cache(qkv, cos, sin, k, v, slots, impl="torch")
            return [rotated, k, v, ops.dual_view_attention(q, k, v, limit, impl="torch")]

        again, afresh = run(cos, sin, slots, limit), run(*(x.clone() for x in (cos, sin, slots, limit)))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, afresh, strict=True))
