"""Products that only drafts read, on CPUs that multiply integers: rows rounded to int8 and exact sums, so every bit is
known. And who asks for them."""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton.ops.cpu import kernels, library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AVX2 = ("-U__AMX_BF16__", "-mno-avx512f", "-include", str(Path(__file__).parent / "integer_products.h"))


@pytest.fixture(scope="module")
def avx2(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The product with AVX2's instruction, which C stands in for."""
    if platform.machine() != "x86_64" or library.c_library() is None:
        pytest.skip("needs a C compiler for x86")
    sources = tmp_path_factory.mktemp("sources")
    for path in (*library.SOURCES.glob("*.h"), *library.SOURCES.glob("*_draft.c")):
        shutil.copy(path, sources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(library, "SOURCES", sources)
        patch.setattr(library, "FLAGS", (*library.FLAGS, *AVX2))
        return library.c_library.__wrapped__()


@pytest.fixture(params=["this CPU's", "AVX2's"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "AVX2's":
        built = request.getfixturevalue("avx2")
        monkeypatch.setattr(kernels, "c_library", lambda: built)
        assert kernels.has_draft_product()
    elif not kernels.has_draft_product():
        pytest.skip("no product of integers in C on this CPU")


def expected_draft(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    """x [M, K], values [N, K] int8, scale [N], bias [N] -> [M, N] in the dtype of x."""
    largest = x.float().abs().amax(dim=1, keepdim=True)
    factor = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)  # `127 / x` is 127 * (1 / x)
    integers = (x.float() * factor).round()
    sums = (integers.double() @ values.double().T).float()
    out = sums * (largest / 127) * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


@pytest.mark.usefixtures("product")
@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), M=st.integers(1, 140), N=st.integers(1, 90),
    K=st.integers(1, 300), biased=st.booleans(), size=st.integers(-3, 3),
)  # fmt: skip
@example(seed=1, dtype=torch.bfloat16, M=129, N=21, K=65, biased=True, size=0)  # a row that a panel has left over
def test_every_bit_is_known_and_rows_are_their_own(seed, dtype, M, N, K, biased, size) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=generator) * 10.0**size for s in ((M, K), (N, K), (N,)))
    x[seed % M] *= seed % 2  # a row of zeros now and then
    (values, scale), x = ops.quantize_rows(weight), x.to(dtype)
    bias = bias.to(dtype) if biased else None
    expected = expected_draft(x, values, scale, bias)
    threads = torch.get_num_threads()
    try:
        for number, rows in ((1, M), (3, M), (1, 1), (1, 2), (1, 5), (1, 13)):
            torch.set_num_threads(number)
            parts = [kernels.linear_cpu(part, values, bias, scale, draft=True) for part in x.split(rows)]
            assert torch.equal(torch.cat(parts), expected), (number, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("product")
def test_a_row_that_is_not_finite_harms_no_other() -> None:
    x, (values, scale) = torch.randn(9, 70), ops.quantize_rows(torch.randn(20, 70))
    expected = kernels.linear_cpu(x, values, None, scale, draft=True)
    for wrong, place in ((torch.nan, 0), (torch.inf, 69), (-torch.inf, 33)):
        broken = x.clone()
        broken[4, place] = wrong
        out = kernels.linear_cpu(broken, values, None, scale, draft=True)
        assert out[4].isnan().all()
        out[4] = expected[4]
        assert torch.equal(out, expected)


@pytest.mark.usefixtures("product")
def test_the_largest_sums_are_exact() -> None:
    """Four bytes must hold them."""
    values, scale = torch.full((3, kernels.DRAFT_DEPTH), 127, dtype=torch.int8), torch.ones(3)
    x = torch.ones(2, kernels.DRAFT_DEPTH)
    x[1] = -1
    out = kernels.linear_cpu(x, values, None, scale, draft=True)
    assert torch.equal(out, expected_draft(x, values, scale))


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_next_to_nothing_is_nothing(dtype: torch.dtype) -> None:
    """What it would be divided by is larger than any number."""
    values, scale = torch.randint(-128, 128, (20, 70)).to(torch.int8), torch.ones(20)
    x = torch.randn(3, 70, dtype=dtype)
    x[0], x[1] = x[0] * 1e-38, x[1] * 1e-20
    expected = expected_draft(x, values, scale)
    expected[0] = 0
    assert torch.equal(kernels.linear_cpu(x, values, None, scale, draft=True), expected)


def test_sums_of_nothing_are_zeros() -> None:
    x, values, scale = torch.ones(3, 0), torch.ones(5, 0, dtype=torch.int8), torch.ones(5)
    assert torch.equal(ops.linear(x, values, weight_scale=scale, impl="torch", draft=True), torch.zeros(3, 5))


def test_longer_sums_are_multiplied_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (values, scale) = torch.randn(2, 70), ops.quantize_rows(torch.randn(20, 70))
    monkeypatch.setattr(kernels, "DRAFT_DEPTH", 69)
    out = ops.linear(x, values, weight_scale=scale, impl="torch", draft=True)
    assert torch.equal(out, ops.linear(x, values, weight_scale=scale, impl="torch"))


@torch.no_grad()
def test_only_drafts_round_their_rows() -> None:
    """Every op that takes a weight in int8, with and without `draft`; and registered, as torch.compile sees it."""
    x, residual, norm = torch.randn(1, 4, 96), torch.randn(1, 4, 64), torch.ones(64)
    (values, scale), cache = ops.quantize_rows(torch.randn(64, 96)), torch.zeros(2, 1, 1, 8, 16)
    slots, registered = torch.arange(4, dtype=torch.int32)[None], torch.ops.orthrus_triton
    rope = (None, None, *cache, slots)
    calls = {
        "linear": lambda *how: ops.linear(x, values, None, residual, **options(*how)),
        "linear_swiglu": lambda *how: ops.linear_swiglu(x, values, **options(*how)),
        "linear_norm": lambda *how: ops.linear_norm(x, values, None, residual, norm, 1e-6, **options(*how))[1],
        "qkv_rope_cache": lambda *how: ops.qkv_rope_cache(x, values, None, *rope, **options(*how)),
    }
    others = {
        "linear": lambda *how: registered.linear(x, values, None, residual, x.dtype, *how),
        "linear_swiglu": lambda *how: registered.linear_swiglu(x, values, None, *how),
        "linear_norm": lambda *how: registered.linear_norm(x, values, None, residual, norm, 1e-6, 0.0, *how)[1],
        "qkv_rope_cache": lambda *how: registered.qkv_rope_cache(x, values, None, *rope, None, None, 1e-6, 0.0, *how),
    }

    def options(impl: str, scale: torch.Tensor, draft: bool) -> dict:
        return {"impl": impl, "weight_scale": scale, "draft": draft}

    for name, op in calls.items():
        exact = op("reference", scale, True)
        plain, draft = op("torch", scale, False), op("torch", scale, True)
        assert (plain - exact).abs().max() < 1e-4 * exact.abs().max(), name
        assert (draft - exact).abs().max() < 0.05 * exact.abs().max(), name
        assert torch.equal(draft, plain) != kernels.has_draft_product(), name
        assert torch.equal(others[name]("torch", scale, False), plain), name
        assert torch.equal(others[name]("torch", scale, True), draft), name
