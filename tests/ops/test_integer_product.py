"""Products in integers, on CPUs with instructions for it: rows rounded to int8, exact sums over spans, so every bit is
known. And who asks for them."""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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
    for path in (*library.SOURCES.glob("*.h"), *library.SOURCES.glob("*_integers.c")):
        shutil.copy(path, sources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(library, "SOURCES", sources)
        patch.setattr(library, "FLAGS", (*library.FLAGS, *AVX2))
        return library.c_library.__wrapped__()


@pytest.fixture(params=["this CPU's", "AVX2's"])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many sums a vector has, in this CPU's product or in that with AVX2's instruction."""
    if request.param == "AVX2's":
        built = request.getfixturevalue("avx2")
        monkeypatch.setattr(kernels, "c_library", lambda: built)
        assert kernels.has_integer_product()
        return 8
    if not kernels.has_integer_product():
        pytest.skip("no product of integers in C on this CPU")
    if platform.machine() == "aarch64":
        return 4
    return 16 if "avx512_vnni" in Path("/proc/cpuinfo").read_text() else 8


def expected_product(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, lanes: int
) -> torch.Tensor:
    """x [M, K], values [N, K] int8, scale [N], bias [N] -> [M, N] in the dtype of x."""
    span = 16 * 4 * lanes
    missing = -x.shape[1] % span
    # [M, spans, vectors, lanes, 4]: four numbers of each vector are a lane's, and its numbers in a span have one scale
    rows, columns = (F.pad(of.float(), (0, missing)).unflatten(1, (-1, 16, lanes, 4)) for of in (x, values))
    largest = rows.abs().amax(dim=(2, 4), keepdim=True)
    factor = torch.where(largest >= 2**-100, torch.full_like(largest, 127) / largest, 0.0)  # 127 / x is 127 * (1 / x)
    sums = torch.einsum("msvlf,nsvlf->mnsl", (rows * factor).round(), columns).numpy()
    scales = torch.where(factor > 0, largest / 127, 0.0)[:, :, 0, :, 0].numpy()
    total = np.zeros((len(x), len(values), lanes), dtype=np.float32)
    for i in range(sums.shape[2]):  # multiplied and added with one rounding
        total = (sums[:, :, i].astype(np.longdouble) * scales[:, None, i] + total).astype(np.float32)
    while total.shape[-1] > 4:
        total = sum_of_halves(total)
    total = total[..., 0::2] + total[..., 1::2] if lanes == 4 else sum_of_halves(total)
    out = torch.from_numpy(total.sum(-1)) * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def sum_of_halves(of: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    half = of.shape[-1] // 2
    return of[..., :half] + of[..., half:]


@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), M=st.integers(1, 140), N=st.integers(1, 90),
    K=st.integers(1, 300) | st.integers(500, 1100), biased=st.booleans(), size=st.integers(-3, 3),
)  # fmt: skip
@example(seed=1, dtype=torch.bfloat16, M=129, N=21, K=65, biased=True, size=0)  # a row that a panel has left over
@example(seed=3, dtype=torch.float32, M=5, N=9, K=2500, biased=False, size=0)  # several spans
def test_every_bit_is_known_and_rows_are_their_own(lanes, seed, dtype, M, N, K, biased, size) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=generator) * 10.0**size for s in ((M, K), (N, K), (N,)))
    x[seed % M] *= seed % 2  # a row of zeros now and then
    (values, scale), x = ops.quantize_rows(weight), x.to(dtype)
    bias = bias.to(dtype) if biased else None
    expected = expected_product(x, values, scale, bias, lanes)
    threads = torch.get_num_threads()
    try:
        for number, rows in ((1, M), (3, M), (1, 1), (1, 2), (1, 5), (1, 13)):
            torch.set_num_threads(number)
            parts = [kernels.linear_cpu(part, values, bias, scale, round_rows=True) for part in x.split(rows)]
            assert torch.equal(torch.cat(parts), expected), (number, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("lanes")
def test_a_row_that_is_not_finite_harms_no_other() -> None:
    x, (values, scale) = torch.randn(9, 70), ops.quantize_rows(torch.randn(20, 70))
    expected = kernels.linear_cpu(x, values, None, scale, round_rows=True)
    for wrong, place in ((torch.nan, 0), (torch.inf, 69), (-torch.inf, 33)):
        broken = x.clone()
        broken[4, place] = wrong
        out = kernels.linear_cpu(broken, values, None, scale, round_rows=True)
        assert out[4].isnan().all()
        out[4] = expected[4]
        assert torch.equal(out, expected)


def test_the_largest_sums_are_exact(lanes: int) -> None:
    """Floats must hold them."""
    values, scale = torch.full((3, 1 << 16), 127, dtype=torch.int8), torch.ones(3)
    x = torch.ones(2, 1 << 16)
    x[1] = -1
    out = kernels.linear_cpu(x, values, None, scale, round_rows=True)
    assert torch.equal(out, expected_product(x, values, scale, None, lanes))
    torch.testing.assert_close(out, x[:, :3] * (127 << 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_next_to_nothing_is_nothing(dtype: torch.dtype, lanes: int) -> None:
    """What it would be divided by is larger than any number. But in the third row it is not next to nothing."""
    values, scale = torch.randint(-128, 128, (20, 70)).to(torch.int8), torch.ones(20)
    x = torch.randn(3, 70, dtype=dtype)
    x[0], x[1] = x[0] * 1e-38, x[1] * 1e-20
    x[2, 4:8] = 1e-38
    expected = expected_product(x, values, scale, None, lanes)
    assert expected[0].eq(0).all() and expected[1:].ne(0).any(dim=1).all()
    assert torch.equal(kernels.linear_cpu(x, values, None, scale, round_rows=True), expected)


def test_sums_of_nothing_are_zeros() -> None:
    x, values, scale = torch.ones(3, 0), torch.ones(5, 0, dtype=torch.int8), torch.ones(5)
    assert torch.equal(ops.linear(x, values, weight_scale=scale, impl="torch", round_rows=True), torch.zeros(3, 5))


@torch.no_grad()
def test_rows_are_rounded_where_that_is_asked_for() -> None:
    """Every op that takes a weight in int8, with and without `round_rows`; and registered, as torch.compile sees it."""
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

    def options(impl: str, scale: torch.Tensor, round_rows: bool) -> dict:
        return {"impl": impl, "weight_scale": scale, "round_rows": round_rows}

    for name, op in calls.items():
        exact = op("reference", scale, True)
        plain, rounded = op("torch", scale, False), op("torch", scale, True)
        assert (plain - exact).abs().max() < 1e-4 * exact.abs().max(), name
        assert (rounded - exact).abs().max() < 0.05 * exact.abs().max(), name
        assert torch.equal(rounded, plain) != kernels.has_integer_product(), name
        assert torch.equal(others[name]("torch", scale, False), plain), name
        assert torch.equal(others[name]("torch", scale, True), rounded), name
