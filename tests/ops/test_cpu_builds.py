"""The C kernels as older CPUs have them: built here without the newest instructions of this machine."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.ops.cpu import kernels, library, token_kernels
from orthrus_triton.ops.int8_product import dequantize_rows
from orthrus_triton.testing import TinyDualViewModel
from tests.ops.attention_cases import make_case
from tests.ops.sampling_cases import make_logits, mixed_sampling, positions_of

FLAGS = {"AVX-512 without bf16": "-mno-avx512bf16", "AVX2": "-mno-avx512f"}
NO_TILES = "-U__AMX_BF16__"  # which compilers older than AMX take, too
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module", autouse=True, params=FLAGS.values(), ids=FLAGS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if platform.machine() != "x86_64" or library.c_library() is None:
        pytest.skip("needs a C compiler for x86")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(library, "FLAGS", (*library.FLAGS, NO_TILES, request.param))
        built = library.c_library.__wrapped__()
        patch.setattr(kernels, "c_library", lambda: built)
        assert built is not None and not hasattr(built, "orthrus_linear_bf16")
        yield


@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), M=st.integers(1, 140), N=st.integers(1, 90),
    K=st.integers(1, 150), biased=st.booleans(), in_int8=st.booleans(),
)  # fmt: skip
def test_products(seed, dtype, M, N, K, biased, in_int8) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((M, K), (N, K), (N,)))
    bias, exact, scale = bias if biased else None, weight.double(), None
    if in_int8:
        weight, scale = ops.quantize_rows(weight)
        exact = dequantize_rows(weight, scale, torch.float64)
    out = kernels.linear_cpu(x, weight, bias, scale)
    for rows in (1, 2, 5, 13):
        parts = [kernels.linear_cpu(part, weight, bias, scale) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), out), rows
    exact = torch.nn.functional.linear(x.double(), exact, bias if bias is None else bias.double())
    assert ((out - exact).abs() <= exact.abs() * ROUNDING[dtype] + 1e-5 * K).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_summed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    x, weight = torch.randint(-99, 99, (5, 71)).float(), torch.randint(-99, 99, (40, 71)).float()
    assert torch.equal(kernels.linear_cpu(x.to(dtype), weight.to(dtype), None), (x @ weight.T).to(dtype))
    in_int8 = kernels.linear_cpu(x.to(dtype), weight.to(torch.int8), None, torch.full((40,), 0.3))
    assert torch.equal(in_int8, (x @ weight.T * 0.3).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "head_dim", "block_size"), [(1, 64, None), (3, 80, 8), (16, 40, 3)])
def test_attention(dtype: torch.dtype, group: int, head_dim: int, block_size: int | None) -> None:
    case = make_case(
        1, dtype, CPU, batch=2, rows=24, kv_heads=2, group=group, head_dim=head_dim, capacity=400, context=200,
        block_size=block_size, window=None,
    )  # fmt: skip
    out = kernels.attention_cpu(*case.args(), head_dim**-0.5)
    expected = ops.dual_view_attention(*case.args(torch.float64), impl="reference")
    tolerance = ROUNDING[dtype] * 4 + 2e-5
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_operations(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(5, 70).to(dtype), torch.randn(5, 70).to(dtype), torch.randn(70).to(dtype))
    tolerance = dict.fromkeys(("atol", "rtol"), ROUNDING[dtype] * 4 + 1e-5)
    normed, hidden = kernels.rms_norm_cpu(x, weight, 1e-6, 1.0, residual)
    assert torch.equal(hidden, x + residual)
    torch.testing.assert_close(
        normed, ops.rms_norm(hidden, weight, 1e-6, norm_offset=1.0, impl="reference"), **tolerance
    )
    normed, hidden = kernels.add_normed_cpu(x, residual, weight, 1e-6, weight, 1e-2, 0.0)
    expected = ops.add_normed(x, residual, weight, 1e-6, weight, 1e-2, impl="reference")
    torch.testing.assert_close((normed, hidden), expected, **tolerance)
    spans = (x, weight[:40], weight[:20], 1e-6)
    expected = ops.norm_spans(*spans, impl="reference")
    torch.testing.assert_close(kernels.norm_spans_cpu(*spans, 0.0), expected, **tolerance)
    for op in (ops.swiglu, ops.geglu):
        torch.testing.assert_close(kernels.gated_cpu(x, op is ops.geglu), op(x, impl="reference"), **tolerance)
    logits = torch.randint(0, 9, (7, 333)).to(dtype)
    assert torch.equal(token_kernels.greedy_choice_cpu(logits, -1), logits.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampling(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, positions = make_logits(0, 8, 5, 301).to(dtype), positions_of(8, 5)
    how = mixed_sampling()
    ours = ops.sample_choice(logits, positions, how, impl="torch")
    monkeypatch.setattr(kernels, "c_library", lambda: None)
    assert torch.equal(ours, ops.sample_choice(logits, positions, how, impl="torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_consensus_gives_the_tokens_of_ar(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = TinyDualViewModel(qk_norm=True).to(dtype)
    prompts = [torch.arange(1, 9), torch.arange(20, 50)]
    both = [ConsensusDecoder(model, mode=mode).generate(prompts, max_new_tokens=60) for mode in ("consensus", "ar")]
    assert all(torch.equal(*pair) for pair in zip(*(output.sequences for output in both)))
