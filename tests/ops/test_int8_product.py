"""Products with a weight in int8: what quantizing loses, and each product that takes such a weight against the same
one with the weight that it stands for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.ops.int8_product import dequantize_rows
from orthrus_triton.testing import assert_within_budget
from tests.ops.attention_cases import DTYPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("triton", "torch", "reference")
seeds = st.integers(0, 9999)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def config(split_k: int) -> KernelConfig:
    constants = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "SPLIT_K": split_k}
    return KernelConfig(constants, {"num_warps": 4, "num_stages": 2})


@given(seed=seeds, rows=st.integers(1, 9), width=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
def test_values_are_the_nearest_multiples_of_their_rows_scale(seed, rows, width, dtype) -> None:
    weight = randn(seed, rows, width, dtype=dtype) * torch.logspace(-3, 3, rows, device=DEVICE)[:, None].to(dtype)
    weight[seed % rows] *= seed % 2  # a row of zeros now and then
    values, scale = ops.quantize_rows(weight)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32 and values.abs().max() <= 127
    error = (dequantize_rows(values, scale, torch.float64) - weight.double()).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    # rounded once
    assert torch.equal(dequantize_rows(values, scale, dtype), dequantize_rows(values, scale, torch.float32).to(dtype))
    largest = weight.abs().amax(dim=1).float()
    torch.testing.assert_close(scale * values.abs().amax(dim=1), largest)


def test_a_head_of_many_rows_is_its_rows() -> None:
    weight = randn(4, 8200, 3)
    values, scale = ops.quantize_rows(weight)
    few = [ops.quantize_rows(rows) for rows in weight.split(100)]
    assert all(torch.equal(ours, torch.cat(of)) for ours, of in zip((values, scale), zip(*few)))


def test_a_weight_may_lie_as_it_will_and_there_may_be_no_rows() -> None:
    weight, x = randn(1, 6, 4), randn(2, 3, 6)
    values, scale = ops.quantize_rows(weight.T)
    assert values.is_contiguous() and torch.equal(values, ops.quantize_rows(weight.T.contiguous())[0])
    with torch.no_grad():
        for impl in IMPLS:
            assert ops.linear(x, values, weight_scale=scale, impl=impl).shape == (3, 4)
            assert ops.linear(x[None, :0], values, weight_scale=scale, impl=impl).shape == (1, 0, 4)


@torch.no_grad()
def test_weights_may_be_mapped_over() -> None:
    x, (values, scale) = randn(1, 3, 8), ops.quantize_rows(randn(2, 12, 8))
    mapped = torch.vmap(lambda one, of: ops.linear(x, one, impl="torch", weight_scale=of))
    together = mapped(values.view(2, 6, 8), scale.view(2, 6))
    torch.testing.assert_close(
        torch.cat(tuple(together), dim=1), ops.linear(x, values, impl="torch", weight_scale=scale)
    )


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[N, K\]"):
        ops.quantize_rows(torch.ones(3))
    with pytest.raises(ValueError, match="weight must be finite"):
        ops.quantize_rows(torch.tensor([[1.0, torch.inf]]))
    with pytest.raises(ValueError, match="weight must be finite"):
        ops.quantize_rows(torch.tensor([[1.0, torch.nan]]))
    x, (values, scale) = torch.ones(2, 4), ops.quantize_rows(torch.ones(6, 4))
    with pytest.raises(ValueError, match="weight must have dtype torch.int8"):
        ops.linear(x, torch.ones(6, 4), weight_scale=scale)
    with pytest.raises(ValueError, match="weight must have dtype torch.float32"):
        ops.linear(x, values)
    with pytest.raises(ValueError, match=r"weight_scale must have shape \(6,\)"):
        ops.linear(x, values, weight_scale=scale[:5])


@given(
    seed=seeds, dtype=st.sampled_from(DTYPES), rows=st.integers(1, 20), width=st.integers(1, 70),
    k=st.integers(1, 100), split_k=st.sampled_from([1, 2, 3]), bias=st.booleans(), skip=st.integers(0, 2),
)  # fmt: skip
def test_the_kernel_is_near_the_reference(seed, dtype, rows, width, k, split_k, bias, skip) -> None:
    """x is rows of a longer block of two sequences, as where a draft's parts are projected apart."""
    x = randn(seed, 2, rows + skip, k, dtype=dtype)[:, skip:]
    values, scale = ops.quantize_rows(randn(seed + 1, width, k, dtype=dtype))
    bias = randn(seed + 2, width, dtype=dtype) if bias else None
    residual = randn(seed + 3, 2, rows, width, dtype=dtype)
    got = ops.linear(x, values, bias, residual, impl="triton", config=config(split_k), weight_scale=scale)
    exact = ops.linear(x, values, bias, residual, impl="reference", weight_scale=scale)
    plain = torch.nn.functional.linear(x, dequantize_rows(values, scale, dtype), bias) + residual
    assert_within_budget(got, plain, exact.double(), factor=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_product_takes_it(impl: str, dtype: torch.dtype) -> None:
    """As the op, where gradients are on, and as the torch implementation, where they are not."""
    x, norm = randn(1, 2, 3, 48, dtype=dtype), randn(2, 256, dtype=dtype)
    values, scale = ops.quantize_rows(randn(3, 256, 48, dtype=dtype) / 7)
    bias, residual = randn(4, 256, dtype=dtype), randn(5, 2, 3, 256, dtype=dtype)
    angles = randn(6, 2, 3, 32)
    slots = torch.arange(3, dtype=torch.int32, device=DEVICE).expand(2, 3)

    def results(dtype: torch.dtype, weight: torch.Tensor, **options) -> list[torch.Tensor]:
        cache = torch.zeros(2, 2, 1, 8, 64, dtype=dtype, device=DEVICE)
        row, vector, rest, gain = (tensor.to(dtype) for tensor in (x, bias, residual, norm))
        rope = (angles.cos(), angles.sin(), *cache, slots)
        return [
            ops.linear(row, weight, vector, rest, **options),
            ops.linear_swiglu(row, weight, vector, **options),
            *ops.linear_norm(row, weight, vector, rest, gain, 1e-6, **options),
            ops.qkv_rope_cache(row, weight, vector, *rope, **options), cache,
        ]  # fmt: skip

    expected = results(torch.float64, dequantize_rows(values, scale, torch.float64), impl="reference")
    plain = results(dtype, dequantize_rows(values, scale, dtype), impl="torch")
    with torch.no_grad():
        direct = results(dtype, values, impl=impl, weight_scale=scale)
    for got in (results(dtype, values, impl=impl, weight_scale=scale), direct):
        for one, rounded, exact in zip(got, plain, expected, strict=True):
            assert one.dtype == dtype
            assert_within_budget(one, rounded, exact, factor=3.0)
