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


@pytest.mark.usefixtures("without_c")
@pytest.mark.parametrize("impl", ["torch", "library"])
@torch.no_grad()
def test_layers_that_differ_ask_the_same_limits_for_different_masks(impl: str) -> None:
    limit, other_impl = torch.tensor([[3, 9, 14, 17]], dtype=torch.int32), {"torch": "library", "library": "torch"}
    for dtype, capacity, group, block_size, window in (
        (torch.bfloat16, 20, 1, None, None), (torch.float32, 20, 1, None, None), (torch.float32, 12, 1, None, None),
        (torch.float32, 20, 2, None, None), (torch.float32, 20, 1, None, 4), (torch.float32, 20, 1, None, 5),
        (torch.float32, 20, 1, 2, 5), (torch.float32, 20, 1, 4, 5),
    ):  # fmt: skip
        q, cache = torch.randn(1, 4, group, 8).to(dtype), torch.randn(1, 1, capacity, 8).to(dtype)
        own = None if block_size is None else torch.randn(1, 4, 1, 8).to(dtype)
        again, afresh = (
            ops.dual_view_attention(q, cache, cache, of, own, own, block_size, window, impl=impl)
            for of in (limit, limit.clone())
        )
        assert torch.equal(again, afresh), (dtype, capacity, group, block_size, window)
        ops.dual_view_attention(q, cache, cache, limit, own, own, block_size, window, impl=other_impl[impl])


@pytest.mark.usefixtures("without_c")
@torch.no_grad()
def test_layers_that_differ_take_the_same_angles_and_slots_to_their_own_caches() -> None:
    cos, sin, slots = torch.rand(1, 3, 4), torch.rand(1, 3, 4), torch.tensor([[2, 3, 4]], dtype=torch.int32)
    for dtype, capacity in ((torch.float64, 8), (torch.float32, 8), (torch.float32, 4), (torch.float32, 5)):
        qkv, found = torch.randn(1, 3, 3 * 8, dtype=dtype), []
        for of_the_pass in ((cos, sin, slots), (cos.clone(), sin.clone(), slots.clone())):
            cache = torch.zeros(2, 1, 1, capacity, 8, dtype=dtype)
            q = ops.rope_cache(qkv, *of_the_pass[:2], *cache, of_the_pass[2], impl="torch")
            found.append((q, cache))
        assert all(map(torch.equal, *found)), (dtype, capacity)


@pytest.mark.usefixtures("without_c")
@torch.no_grad()
def test_an_op_that_is_part_of_compiled_code_looks_each_time() -> None:
    """Such code writes new numbers into old tensors and does not count it."""
    qkv, (cos, sin), slots = torch.randn(1, 3, 24), torch.rand(2, 1, 3, 4), torch.arange(3, dtype=torch.int32)[None]

    def run() -> list[torch.Tensor]:
        cache = torch.ones(2, 1, 1, 9, 8)
        q = torch.ops.orthrus_triton.rope_cache(qkv, cos, sin, *cache, slots, None, None, 1e-6, 0.0, "torch")
        out = torch.ops.orthrus_triton.dual_view_attention(q, *cache, slots, None, None, None, None, 0.3, "torch")
        return [q, cache, out]

    run()
    for tensor in (cos, sin, slots):
        tensor.data.add_(1)
    again, cos, sin, slots = run(), cos.clone(), sin.clone(), slots.clone()
    assert all(map(torch.equal, again, run()))
