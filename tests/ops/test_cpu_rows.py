"""Tier A on a CPU: the torch implementations of product and attention give a row the bits it has alone.
Rows come in eights, because libraries pick their kernels by the row count; keys in whole tiles, for the same reason."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton.ops import _cpu_packing, _cpu_product
from orthrus_triton.ops.dual_view_attention.torch_impl import attention_torch
from tests.ops.test_surroundings import forget_bit_tests

pytestmark = pytest.mark.usefixtures("with_and_without_c")
torch_impl = sys.modules[attention_torch.__module__]  # the package has a function of its own name
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@given(DTYPES, st.integers(1, 40), st.integers(0, 39), st.sampled_from([(33, 17), (96, 64), (130, 256)]), st.booleans())
def test_a_row_of_a_product_has_the_bits_it_has_alone(dtype, rows, at, shape, biased):
    N, K = shape
    at = at % rows
    x, weight = torch.randn(rows, K).to(dtype), torch.randn(N, K).to(dtype)
    bias = torch.randn(N).to(dtype) if biased else None
    together = ops.linear(x, weight, bias, impl="torch")
    alone = ops.linear(x[at : at + 1], weight, bias, impl="torch")
    assert torch.equal(together[at], alone[0])


@given(DTYPES, st.integers(1, 40), st.integers(0, 39), st.sampled_from([(33, 17), (96, 64), (130, 256)]), st.booleans())
def test_a_row_of_a_product_with_a_weight_in_int8_has_the_bits_it_has_alone(dtype, rows, at, shape, library):
    N, K = shape
    at = at % rows
    x, (values, scale) = torch.randn(rows, K).to(dtype), ops.quantize_rows(torch.randn(N, K))
    together = ops.linear(x, values, impl="torch", weight_scale=scale)
    alone = ops.linear(x[at : at + 1], values, impl="torch", weight_scale=scale)
    assert torch.equal(together[at], alone[0])
    exact = ops.linear(x, values, impl="reference", weight_scale=scale, out_dtype=torch.float64)
    got = ops.linear(x, values, impl="library", weight_scale=scale) if library else together
    assert ((got - exact).abs() <= exact.abs() * 2.0**-7 + K**0.5 * 2.0**-6).all()


@given(
    DTYPES, st.sampled_from([1, 2, 7, 8, 9, 17, 33, 70]), st.integers(0, 69), st.integers(0, 1670),
    st.sampled_from([(1, 16), (3, 64), (4, 24)]), st.sampled_from([None, 1, 300, 700]),
)  # fmt: skip
def test_a_row_of_attention_has_the_bits_it_has_alone(dtype, rows, at, context, heads, window):
    group, D = heads
    at = at % rows
    q = torch.randn(1, rows, 2 * group, D).to(dtype)
    k, v = torch.randn(2, 1, 2, 1740, D).to(dtype)
    key_limit = (context + 1 + torch.arange(rows, dtype=torch.int32))[None]
    together = ops.dual_view_attention(q, k, v, key_limit, window=window, impl="torch")
    row = slice(at, at + 1)
    alone = ops.dual_view_attention(q[:, row], k, v, key_limit[:, row], window=window, impl="torch")
    assert torch.equal(together[:, row], alone)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", [ops.swiglu, ops.geglu])
@pytest.mark.parametrize(("rows", "width"), [(9, 5000), (33, 1037), (3, 33000), (7, 131), (2, 5)])
def test_a_row_of_a_gated_mlp_has_the_bits_it_has_alone(rows, width, op, dtype, two_threads):
    """Also where threads share the rows."""
    for seed in range(3):
        gate_up = (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
        together = op(gate_up, impl="torch")
        assert torch.equal(together, op(gate_up[None], impl="torch")[0])
        assert torch.equal(together, torch.cat([op(row, impl="torch") for row in gate_up.split(1)]))


@pytest.mark.parametrize("width", [33129, 70001])
def test_a_row_of_a_norm_has_the_bits_it_has_alone_where_threads_would_share_it(width, two_threads):
    weight = torch.ones(width)
    for seed in range(8):
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
        together = ops.rms_norm(x, weight, 1e-6, impl="torch")
        assert torch.equal(together[1], ops.rms_norm(x[1], weight, 1e-6, impl="torch"))
        assert torch.equal(together[1:2], ops.rms_norm(x[1:2], weight, 1e-6, torch.zeros(1, width), impl="torch")[0])


@pytest.mark.parametrize("impl", ["library", "torch"])
def test_both_products_are_the_product(impl):
    x, weight, residual = torch.randn(3, 5, 64), torch.randn(24, 64), torch.randn(3, 5, 24)
    expected = x.double() @ weight.double().T + residual.double()
    assert torch.allclose(ops.linear(x, weight, None, residual, impl=impl).double(), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_no_rows_give_no_rows(dtype):
    weight, bias = torch.randn(24, 16).to(dtype), torch.randn(24).to(dtype)
    for shape in ((0,), (2, 0), (0, 3)):
        x = torch.empty(*shape, 16, dtype=dtype)
        for impl in ("torch", "library"):
            assert ops.linear(x, weight, bias, impl=impl).shape == (*shape, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("product", ["_plain", "_onednn"])
@torch.no_grad()
def test_taller_products_are_taken_only_where_they_have_the_bits_of_tiles(product, dtype, monkeypatch):
    monkeypatch.setattr(_cpu_product, "linear_cpu", lambda *_: None)  # which would take all rows
    x, weight = torch.randn(40, 96).to(dtype), torch.randn(64, 96).to(dtype)
    if product == "_onednn":
        if not _cpu_packing.has_onednn(dtype):
            pytest.skip("this torch has no oneDNN")
        weight = torch.nn.Parameter(weight)  # such are packed
    tiles = torch.cat([ops.linear(tile, weight, impl="torch") for tile in x.split(8)])
    shapes, multiply = [], getattr(_cpu_product, product)

    def uneven(x, weight, bias):
        """A library that rounds otherwise for more than eight rows."""
        shapes.append(len(x))
        out = multiply(x, weight, bias)
        return out if len(x) <= 8 else out * (1 + 2**-6)

    assert torch.equal(ops.linear(x, weight, impl="torch"), tiles)
    _cpu_product.has_tile_bits.cache_clear()
    monkeypatch.setattr(_cpu_product, product, uneven)
    together = ops.linear(x, weight, impl="torch")
    alone = torch.cat([ops.linear(row, weight, impl="torch") for row in x.split(1)])
    assert torch.equal(together, alone)
    tests = 2 if product == "_onednn" else 1  # of the packed weight, and of the weight as it is
    assert shapes.count(40) == tests  # and never again, unless there are other threads
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    ops.linear(x, weight, impl="torch")
    torch.set_num_threads(threads)
    _cpu_product.has_tile_bits.cache_clear()
    assert shapes.count(40) == 2 * tests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@torch.no_grad()
def test_rows_are_multiplied_one_by_one_where_their_place_in_a_tile_matters(packed, dtype, monkeypatch):
    monkeypatch.setattr(_cpu_product, "linear_cpu", lambda *_: None)  # which would take all rows
    x, weight = torch.randn(20, 96).to(dtype), torch.randn(64, 96).to(dtype)
    weight = torch.nn.Parameter(weight) if packed else weight
    expected = ops.linear(x, weight, impl="torch")

    def in_sixes(multiply):
        """As oneDNN does in fp32 on 64-bit ARM: rows beyond the last whole six are rounded otherwise."""

        def product(x, weight, bias):
            out = multiply(x, weight, bias)
            out[len(x) // 6 * 6 :] *= 1 + 2**-6
            return out

        return product

    for name in ("_plain", "_onednn"):
        monkeypatch.setattr(_cpu_product, name, in_sixes(getattr(_cpu_product, name)))
    forget_bit_tests()
    together = ops.linear(x, weight, impl="torch")
    alone = torch.cat([ops.linear(row, weight, impl="torch") for row in x.split(1)])
    forget_bit_tests()
    assert torch.equal(together, alone)
    assert torch.allclose(together.double(), expected.double(), rtol=2**-4)
    assert not torch.equal(together, expected)


@torch.no_grad()
def test_attention_gives_a_library_rows_that_lie_together(monkeypatch):
    """On 64-bit ARM, torch's kernel rounds rows that lie apart otherwise."""
    monkeypatch.setattr(torch_impl, "attention_cpu", lambda *_: None)
    attend, seen = torch_impl._sdpa, []
    monkeypatch.setattr(torch_impl, "_sdpa", lambda rows, *rest: seen.append(rows.stride()) or attend(rows, *rest))
    k, v = torch.randn(2, 1, 2, 512, 16)
    for tokens, group in ((8, 1), (1, 8), (3, 4), (16, 2)):
        limit = torch.full((1, tokens), 300, dtype=torch.int32)
        ops.dual_view_attention(torch.randn(1, tokens, 2 * group, 16), k, v, limit, impl="torch")
    assert [stride[2:] for stride in seen] == [(16, 1)] * 4


@pytest.mark.parametrize("rows", [3, 16])
@torch.no_grad()
def test_a_machine_may_be_tested_within_a_vmap(rows):
    x, weight = torch.randn(4, rows, 24), torch.nn.Parameter(torch.randn(10, 24))
    forget_bit_tests()
    out = torch.vmap(lambda tokens: ops.linear(tokens, weight, impl="torch"))(x)
    forget_bit_tests()
    torch.testing.assert_close(out, x @ weight.T)
