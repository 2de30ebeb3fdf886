"""The C kernels: that they are used, and what the tests of the ops do not reach."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton.modules import SharedKVCache
from orthrus_triton.ops.cpu import kernels
from orthrus_triton.ops.cpu.library import c_library
from orthrus_triton.ops.int8_product import dequantize_rows
from tests.ops.attention_cases import make_case
from tests.ops.sampling_cases import sampling_of

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
needs_c = pytest.mark.skipif(c_library() is None, reason="no C kernels here")


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_of_a_cycle_takes_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    library = c_library()

    class Listening:
        def __getattr__(self, name: str):
            kernel = getattr(library, name)
            called.append(name)
            return kernel

    monkeypatch.setattr(kernels, "c_library", Listening)
    x, weight = torch.randn(1, 3, 64).to(dtype), torch.randn(192, 64).to(dtype)
    cache, slots = torch.zeros(2, 1, 1, 8, 64).to(dtype), torch.arange(3, dtype=torch.int32)[None]
    angles, norm = torch.rand(2, 1, 3, 32), torch.ones(64).to(dtype)
    with torch.no_grad():
        q = ops.qkv_rope_cache(x, weight, None, *angles, *cache, slots, norm, norm, impl="torch")
        ops.dual_view_attention(q, *cache, slots + 1, impl="torch")
        ops.rms_norm(x, norm, 1e-6, x, impl="torch")
        ops.add_normed(x, x, norm, 1e-6, norm, 1e-6, impl="torch")
        ops.norm_spans(x, norm[:40], norm[:24], 1e-6, impl="torch")
        ops.linear_norm(x, weight[:64], None, x, norm, 1e-6, impl="torch")
        ops.linear_swiglu(x, weight, impl="torch")
        ops.geglu(x, impl="torch")
        ops.lm_head_choice(x, weight, impl="torch")
        ops.sample_choice(x, slots, sampling_of(1), impl="torch")
    names = (
        "linear rope_cache attention rms_norm add_normed norm_spans linear gated greedy_choice sample_choice".split()
    )
    if dtype == torch.bfloat16 and not kernels.has_product(x):  # on CPUs with AMX
        names = [name for name in names if name != "linear"]
    called = ["orthrus_linear" if name.startswith("orthrus_linear") else name for name in called]
    assert list(dict.fromkeys(called)) == list(dict.fromkeys(f"orthrus_{name}" for name in names))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"), [(torch.float64, 64, 1), (torch.float32, 264, 1), (torch.float16, 264, 1),
                                     (torch.float32, 8, 129)]
)  # fmt: skip
def test_what_they_do_not_serve_is_done_without(dtype: torch.dtype, head_dim: int, group: int) -> None:
    case = make_case(1, dtype, CPU, rows=2, kv_heads=1, group=group, head_dim=head_dim)
    assert kernels.attention_cpu(*case.args(), head_dim**-0.5) is None
    expected = ops.dual_view_attention(*case.args(torch.float64), impl="reference")
    torch.testing.assert_close(
        ops.dual_view_attention(*case.args(), impl="torch").double(), expected, atol=2e-3, rtol=0
    )


@needs_c
@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2), group=st.integers(1, 40), blocks=st.integers(0, 3), block_size=st.integers(1, 12),
    context=st.integers(0, 150), window=st.one_of(st.none(), st.integers(1, 90)),
)  # fmt: skip
def test_the_number_of_threads_moves_no_bit_of_attention(
    seed, dtype, batch, kv_heads, group, blocks, block_size, context, window
) -> None:
    """Threads decide how many rows a task takes."""
    case = make_case(
        seed, dtype, CPU, batch=batch, rows=max(blocks, 1) * block_size, kv_heads=kv_heads, group=group, head_dim=40,
        capacity=200, context=context, block_size=block_size if blocks else None, window=window,
    )  # fmt: skip
    threads, outs = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            outs.append(ops.dual_view_attention(*case.args(), impl="torch"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out.view(torch.uint8), outs[0].view(torch.uint8)) for out in outs)


@needs_c
@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), M=st.integers(1, 140),
    N=st.integers(1, 90), K=st.integers(1, 150), biased=st.booleans(), leading=st.booleans(), in_int8=st.booleans(),
)  # fmt: skip
def test_a_product_of_any_shape_is_the_product_and_its_rows_are_their_own(
    seed, dtype, M, N, K, biased, leading, in_int8
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((M, K), (N, K), (N,)))
    bias, exact, scale = bias if biased else None, weight.double(), None
    if in_int8:
        weight, scale = ops.quantize_rows(weight)
        exact = dequantize_rows(weight, scale, torch.float64)
    if kernels.linear_cpu(x, weight, bias, scale) is None:
        pytest.skip("no product of bf16 in C on this CPU")
    threads, outs = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            outs.append(kernels.linear_cpu(x[None] if leading else x, weight, bias, scale).view(M, N))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*outs)
    for rows in (1, 2, 5, 13):
        parts = [kernels.linear_cpu(part, weight, bias, scale) for part in x.split(rows)]
        assert torch.equal(torch.cat(parts), outs[0]), rows
    exact = torch.nn.functional.linear(x.double(), exact, bias if bias is None else bias.double())
    assert ((outs[0] - exact).abs() <= exact.abs() * ROUNDING[dtype] + 1e-5 * K).all()


@needs_c
def test_the_librarys_product_is_taken_where_it_is_faster() -> None:
    """Of many rows in fp32, and of bf16 on CPUs with AMX."""
    rows = [(torch.float32, 8), (torch.float32, 9), (torch.float16, 1), (torch.float16, 500), (torch.float64, 1)]
    assert [kernels.has_product(torch.empty(0, dtype=dtype), n) for dtype, n in rows] == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert not kernels.has_product(torch.empty(0, device="meta"))
    cache = SharedKVCache(1, 1, 8, batch_size=2, max_len=9, block_size=9, dtype=torch.float32)
    passes = [cache.view_pass("ar", n, impl="torch", linear_impl="library") for n in (4, 5)]
    assert [view_pass.linear_impl for view_pass in passes] == ["torch", "library"]


@needs_c
@pytest.mark.parametrize("window", [None, 1, 40, 100])
@pytest.mark.parametrize("block_size", [None, 1, 2])
def test_any_number_of_rows_leaves_each_the_bits_it_has_alone(block_size: int | None, window: int | None) -> None:
    """Of panels that are full, or have one row more or less, and of windows that begin where no tile does."""
    rows = 40
    case = make_case(7, torch.float32, CPU, rows=rows, kv_heads=1, group=1, head_dim=16, capacity=300, context=230)
    if block_size is not None:
        case.k_block, case.v_block = torch.randn(2, 1, rows, 1, 16)
        case.key_limit = case.key_limit[:, ::block_size].repeat_interleave(block_size, dim=1)
    q, k, v, limit, k_block, v_block, *_ = case.args()

    def attend(first: int, end: int) -> torch.Tensor:
        parts = [None if part is None else part[:, first:end] for part in (q, limit, k_block, v_block)]
        return kernels.attention_cpu(parts[0], k, v, parts[1], *parts[2:], block_size, window, 0.25)

    step = block_size or 1
    alone = torch.cat([attend(row, row + step) for row in range(0, rows, step)], dim=1)
    for number in range(step, rows + 1, step):
        assert torch.equal(attend(rows - number, rows), alone[:, rows - number :]), number


@needs_c
def test_a_call_leaves_nothing_behind_for_the_next() -> None:
    """A thread's workspace still holds the last tile's values: here of 64 keys, all NaN."""
    case = make_case(8, torch.float32, CPU, rows=2, kv_heads=1, context=70, poison=False)
    few = torch.tensor([[3, 4]], dtype=torch.int32)
    expected = kernels.attention_cpu(case.q, case.k_cache, case.v_cache, few, None, None, None, None, 0.1)
    kernels.attention_cpu(
        case.q, case.k_cache * torch.nan, case.v_cache * torch.nan, few * 0 + 64, None, None, None, None, 0.1
    )
    again = kernels.attention_cpu(case.q, case.k_cache, case.v_cache, few, None, None, None, None, 0.1)
    assert expected.isfinite().all() and torch.equal(again, expected)


@needs_c
def test_a_wide_head_leaves_nothing_behind_for_a_narrow_one() -> None:
    slots, angles = torch.zeros(1, 1, dtype=torch.int32), (torch.ones(1, 1, 128), torch.zeros(1, 1, 128))

    def norm_of(qkv: torch.Tensor) -> torch.Tensor:
        D = qkv.shape[-1] // 3
        weight, cache = torch.ones(D), torch.zeros(2, 1, 1, 1, D)
        return kernels.rope_cache_cpu(
            qkv, *(a[..., : D // 2] for a in angles), *cache, slots, weight, weight, 1e-6, 0.0
        )

    narrow = torch.randn(1, 1, 3 * 18)
    expected = ops.rms_norm(narrow[..., :18], torch.ones(18), 1e-6, impl="reference").view(1, 1, 1, 18)
    norm_of(torch.full((1, 1, 3 * 256), 1e9))
    torch.testing.assert_close(norm_of(narrow), expected)


@needs_c
def test_attention_in_fp32_is_exact_to_a_few_units() -> None:
    """Its exponential is its own: over scores far apart and nearly equal ones."""
    case = make_case(3, torch.float32, CPU, rows=8, context=90)
    for scale in (0.01, 0.3):
        out = ops.dual_view_attention(*case.args(), scale=scale, impl="torch")
        exact = ops.dual_view_attention(*case.args(torch.float64), scale=scale, impl="reference")
        assert (out - exact).abs().max() < 2e-6, scale


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [3, 4])  # whose last key is an odd or an even one
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_reaches_the_rows_that_see_it_and_no_others(
    bad: float, first: int, dtype: torch.dtype
) -> None:
    """Of a query, of a key, and of a value, which 0 times itself would spread."""
    clean = make_case(5, dtype, CPU, rows=6, kv_heads=1, context=70, poison=False)
    expected = ops.dual_view_attention(*clean.args(), impl="torch")
    last = int(clean.key_limit[0, first]) - 1  # rows from `first` on see it
    for name in ("q", "k_cache", "v_cache"):
        case = make_case(5, dtype, CPU, rows=6, kv_heads=1, context=70, poison=False)
        spoilt = getattr(case, name)
        (spoilt[0, first:] if name == "q" else spoilt[0, :, last])[..., 0] = bad
        out = ops.dual_view_attention(*case.args(), impl="torch")
        assert torch.equal(out[:, :first], expected[:, :first]), name
        if name == "v_cache":
            assert not out[:, first:, :, 0].isfinite().any() and torch.equal(out[..., 1:], expected[..., 1:])
        elif bad != bad or (name == "q" and bad == torch.inf and dtype == torch.float32):  # else scores may be -inf
            assert out[:, first:].isnan().all(), name


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 15, 1024, 1025, 5000])
def test_the_lowest_of_equal_logits_is_chosen(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randint(-2, 3, (7, vocab), generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[0], logits[1, ::2], logits[2] = -torch.inf, torch.nan, torch.nan
    logits[3, vocab // 2] = torch.inf
    assert torch.equal(ops.greedy_choice(logits, impl="torch"), ops.greedy_choice(logits, impl="reference"))


@pytest.mark.usefixtures("with_and_without_c")
@torch.no_grad()
def test_an_argument_on_another_device_is_refused() -> None:
    """And its address is not one of this machine's memory: reading it ended the process."""
    x, norm, elsewhere = torch.randn(1, 3, 64), torch.ones(64), torch.ones(64, device="meta")
    cache, slots, angles = torch.zeros(2, 1, 1, 8, 16), torch.arange(3, dtype=torch.int32)[None], torch.rand(2, 1, 3, 8)
    for call in (
        lambda: ops.rms_norm(x, elsewhere, 1e-6, impl="torch"),
        lambda: ops.rms_norm(x, norm, 1e-6, x.to("meta"), impl="torch"),
        lambda: ops.rope_cache(x, *angles.to("meta"), *cache, slots, impl="torch"),
        lambda: ops.rope_cache(x, *angles, *cache, slots, elsewhere[:16], elsewhere[:16], impl="torch"),
    ):
        with pytest.raises(RuntimeError, match="meta"):
            call()
    assert kernels.linear_cpu(x.bfloat16(), torch.ones(4, 64, device="meta").bfloat16(), None) is None
    assert kernels.attention_cpu(x[:, :, None], *cache.to("meta"), slots, None, None, None, None, 1.0) is None


@pytest.mark.usefixtures("with_and_without_c")
@torch.no_grad()
def test_a_tensor_of_another_class_does_its_own_arithmetic() -> None:
    from torch.testing._internal.two_tensor import TwoTensor  # one that has no memory of its own

    x, weight, norm = torch.randn(3, 64).bfloat16(), torch.randn(8, 64).bfloat16(), torch.rand(64).bfloat16()
    result = ops.linear(x, TwoTensor(weight, 2 * weight), impl="torch")
    torch.testing.assert_close(result.b, 2 * x @ weight.T)
    result = ops.rms_norm(x, TwoTensor(norm, 2 * norm), 1e-6, impl="torch")
    torch.testing.assert_close(result.b, 2 * torch.rms_norm(x, (64,), norm, 1e-6))


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_what_torch_records_or_transforms_it_sees() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, other, ones = *torch.randn(2, 3, 64), torch.ones(3, 64)

    def norm(rows: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(rows, ones[0], 1e-6, impl="torch")

    expected = norm(other)
    torch.testing.assert_close(torch.jit.trace(norm, x, check_trace=False)(other), expected)
    torch.testing.assert_close(make_fx(norm)(x)(other), expected)
    torch.testing.assert_close(torch.vmap(norm)(other), expected)
    slope = (norm(other + 1e-2 * ones) - norm(other - 1e-2 * ones)) / 2e-2
    torch.testing.assert_close(torch.func.jvp(norm, (other,), (ones,))[1], slope, atol=1e-3, rtol=1e-3)
    with torch.autograd.forward_ad.dual_level():
        dual = norm(torch.autograd.forward_ad.make_dual(other, ones))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, slope, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("with_and_without_c")
def test_autograd_hears_of_keys_that_are_written_over() -> None:
    factor, keys = torch.ones(1, requires_grad=True), torch.ones(1, 1, 8, 16)
    product = (factor * keys).sum()
    with torch.no_grad():
        slots, angles = torch.arange(3, dtype=torch.int32)[None], torch.rand(2, 1, 3, 8)
        ops.rope_cache(torch.randn(1, 3, 64), *angles, keys, keys.clone(), slots, impl="torch")
        with pytest.raises(RuntimeError, match="single memory location"):
            ops.rope_cache(torch.randn(1, 3, 64), *angles, keys, keys[:, :, :1].expand_as(keys), slots, impl="torch")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.usefixtures("with_and_without_c")
@torch.no_grad()
def test_rows_without_numbers_have_norms() -> None:
    x = torch.ones(3, 0)
    assert ops.rms_norm(x, x[0], 1e-6, impl="torch").shape == x.shape
    assert [out.shape for out in ops.rms_norm(x, x[0], 1e-6, x, impl="torch")] == [x.shape, x.shape]
    assert [out.shape for out in ops.add_normed(x, x, x[0], 1e-6, x[0], 1e-6, impl="torch")] == [x.shape, x.shape]
