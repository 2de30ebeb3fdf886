"""Tier A: row i of a call has the bits of that row alone, for every Triton op, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton.autotune.store import KernelConfig
from tests.ops.attention_cases import DTYPES, SMALL, Case, make_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)  # drawing on the host takes a GPU's tests minutes
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 9999)
offsets = st.sampled_from([0.0, 1.0])


@given(seed=seeds, dtype=dtypes, rows=st.integers(2, 40), width=st.integers(1, 130), offset=offsets)
def test_rms_norm(seed: int, dtype: torch.dtype, rows: int, width: int, offset: float) -> None:
    x, residual = randn(seed, 1, rows, width, dtype=dtype), randn(seed + 1, 1, rows, width, dtype=dtype)
    weight = randn(seed + 2, width, dtype=dtype)
    normed, hidden = ops.rms_norm(x, weight, 1e-6, residual, norm_offset=offset, impl="triton")
    row = seed % rows
    one = (x[:, row : row + 1], weight, 1e-6, residual[:, row : row + 1])
    alone = ops.rms_norm(*one, norm_offset=offset, impl="triton")
    assert torch.equal(alone[0], normed[:, row : row + 1]) and torch.equal(alone[1], hidden[:, row : row + 1])


@given(
    seed=seeds, dtype=dtypes, rows=st.integers(2, 40), width=st.integers(1, 130), is_last=st.booleans(), offset=offsets
)
def test_add_normed(seed: int, dtype: torch.dtype, rows: int, width: int, is_last: bool, offset: float) -> None:
    x, residual = randn(seed, 1, rows, width, dtype=dtype), randn(seed + 1, 1, rows, width, dtype=dtype)
    weight, row = randn(seed + 2, width, dtype=dtype), seed % rows
    norms = (weight, 1e-6) if is_last else (weight, 1e-6, weight, 1e-2)
    options = {"norm_offset": offset, "impl": "triton"}
    together = ops.add_normed(x, residual, *norms, **options)
    alone = ops.add_normed(x[:, row : row + 1], residual[:, row : row + 1], *norms, **options)
    assert all(torch.equal(one, all_rows[:, row : row + 1]) for one, all_rows in zip(alone, together))


@given(seed=seeds, dtype=dtypes, rows=st.integers(2, 40), queries=st.integers(1, 130), keys=st.integers(1, 40))
def test_norm_spans(seed: int, dtype: torch.dtype, rows: int, queries: int, keys: int) -> None:
    qkv, row = randn(seed, rows, queries + 2 * keys, dtype=dtype), seed % rows
    norms = randn(seed + 1, queries, dtype=dtype), randn(seed + 2, keys, dtype=dtype), 1e-6
    alone = ops.norm_spans(qkv[row : row + 1], *norms, impl="triton")
    assert torch.equal(alone[0], ops.norm_spans(qkv, *norms, impl="triton")[row])


@given(
    seed=seeds, dtype=dtypes, rows=st.integers(2, 40), n=st.integers(1, 80), k=st.integers(1, 150),
    split_k=st.sampled_from([1, 2, 3]), extras=st.booleans(),
)  # fmt: skip
def test_linear(seed: int, dtype: torch.dtype, rows: int, n: int, k: int, split_k: int, extras: bool) -> None:
    config = KernelConfig(
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "SPLIT_K": split_k}, {"num_warps": 4, "num_stages": 2}
    )
    x, weight = randn(seed, rows, k, dtype=dtype), randn(seed + 1, n, k, dtype=dtype)
    bias = randn(seed + 2, n, dtype=dtype) if extras else None
    residual = randn(seed + 3, rows, n, dtype=dtype) if extras else None
    whole = ops.linear(x, weight, bias, residual, impl="triton", config=config)
    row = seed % rows
    one = None if residual is None else residual[row : row + 1]
    assert torch.equal(ops.linear(x[row : row + 1], weight, bias, one, impl="triton", config=config)[0], whole[row])


@given(
    op=st.sampled_from([ops.swiglu, ops.geglu]),
    seed=seeds,
    dtype=dtypes,
    rows=st.integers(2, 40),
    width=st.integers(1, 70),
)
def test_gated(op: Callable, seed: int, dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = randn(seed, rows, 2 * width, dtype=dtype)
    row = seed % rows
    assert torch.equal(op(gate_up[row : row + 1], impl="triton")[0], op(gate_up, impl="triton")[row])


@given(
    seed=seeds,
    dtype=dtypes,
    rows=st.integers(2, 9),
    norm=st.booleans(),
    head_dim=st.sampled_from([64, 80]),
    offset=offsets,
)
def test_rope_cache(seed: int, dtype: torch.dtype, rows: int, norm: bool, head_dim: int, offset: float) -> None:
    heads, kv_heads, capacity = 3, 1, 32
    qkv = randn(seed, 1, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = randn(seed + 1, 1, rows, head_dim // 2, dtype=torch.float32)
    norms = [randn(seed + 2 + i, head_dim, dtype=dtype) if norm else None for i in range(2)]
    slots = torch.arange(5, 5 + rows, dtype=torch.int32, device=DEVICE)[None]

    def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        cache = torch.zeros(2, 1, kv_heads, capacity, head_dim, dtype=dtype, device=DEVICE)
        q = ops.rope_cache(
            qkv[:, rows], angles[:, rows].cos(), angles[:, rows].sin(), cache[0], cache[1], slots[:, rows], *norms,
            norm_offset=offset, impl="triton",
        )  # fmt: skip
        return q, cache

    row = seed % rows
    q, cache = run(slice(None))
    q_alone, cache_alone = run(slice(row, row + 1))
    assert torch.equal(q_alone[0, 0], q[0, row])
    assert torch.equal(cache_alone[..., 5 + row, :], cache[..., 5 + row, :])
    assert not cache_alone[..., 5 + (row + 1) % rows, :].any()


@given(
    seed=seeds, dtype=dtypes, batch=st.integers(1, 2), rows=st.integers(2, 12), group=st.integers(1, 5),
    context=st.integers(0, 80), window=st.one_of(st.none(), st.integers(1, 60)),
)  # fmt: skip
def test_attention_verify_row_is_the_decode_row(seed, dtype, batch, rows, group, context, window) -> None:
    case = make_case(
        seed, dtype, DEVICE, batch=batch, rows=rows, kv_heads=1, group=group, context=context, window=window
    )
    whole = ops.dual_view_attention(*case.args(), impl="triton", config=SMALL)
    b, row = seed % batch, seed % rows
    # decoded alone, the rows after it are not in the cache yet
    limit = int(case.key_limit[b, row])
    k_cache, v_cache = case.k_cache[b : b + 1].clone(), case.v_cache[b : b + 1].clone()
    k_cache[:, :, limit:] = torch.nan
    v_cache[:, :, limit:] = torch.nan
    alone = Case(
        case.q[b : b + 1, row : row + 1], k_cache, v_cache, case.key_limit[b : b + 1, row : row + 1], window=window
    )
    assert torch.equal(ops.dual_view_attention(*alone.args(), impl="triton", config=SMALL)[0, 0], whole[b, row])


@given(
    seed=seeds, dtype=dtypes, blocks=st.integers(2, 4), block_size=st.integers(1, 20), group=st.integers(1, 3),
    window=st.one_of(st.none(), st.integers(1, 60)),
)  # fmt: skip
def test_attention_block_is_the_block_alone(seed, dtype, blocks, block_size, group, window) -> None:
    case = make_case(
        seed, dtype, DEVICE, rows=blocks * block_size, kv_heads=1, group=group, block_size=block_size, window=window
    )
    whole = ops.dual_view_attention(*case.args(), impl="triton", config=SMALL)
    first = seed % blocks * block_size
    rows = slice(first, first + block_size)
    alone = Case(
        case.q[:, rows], case.k_cache, case.v_cache, case.key_limit[:, rows], case.k_block[:, rows],
        case.v_block[:, rows], block_size, window,
    )  # fmt: skip
    assert torch.equal(ops.dual_view_attention(*alone.args(), impl="triton", config=SMALL), whole[:, rows])


@given(seed=seeds, rows=st.integers(2, 9), vocab=st.integers(2, 200), dtype=dtypes)
def test_greedy_choice_of_near_ties(seed: int, rows: int, vocab: int, dtype: torch.dtype) -> None:
    """The two highest logits are equal or one ulp apart: the choice is the higher, else the lower id."""
    logits = randn(seed, rows, vocab, dtype=dtype)
    low, high = sorted(torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[:2].tolist())
    top = torch.tensor(8.0, dtype=dtype, device=DEVICE)
    logits[:, low] = logits[:, high] = top
    logits[0, high] = torch.nextafter(top, top + 1)
    for impl in ("triton", "torch", "reference"):
        assert ops.greedy_choice(logits, impl=impl).tolist() == [high] + [low] * (rows - 1), impl


@settings(max_examples=8)
@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 19), split_k=st.sampled_from([1, 2]),
    biased=st.booleans(),
)  # fmt: skip
def test_products_of_a_weight_in_int8(seed: int, dtype: torch.dtype, rows: int, split_k: int, biased: bool) -> None:
    n, k = 96, 80
    x, residual = randn(seed, rows, k, dtype=dtype), randn(seed + 1, rows, n, dtype=dtype)
    values, scale = ops.quantize_rows(randn(seed + 2, n, k, dtype=dtype))
    bias = randn(seed + 3, n, dtype=dtype) if biased else None
    norm, angles = randn(seed + 4, n, dtype=dtype), randn(seed + 5, 1, rows, 8, dtype=torch.float32)
    constants = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "SPLIT_K": split_k}
    config = KernelConfig(constants, {"num_warps": 4, "num_stages": 2})
    options = {"impl": "triton", "config": config, "weight_scale": scale}

    def run(part: slice) -> tuple[torch.Tensor, ...]:
        count = len(x[part])
        cache = torch.zeros(2, 1, 1, rows, 16, dtype=dtype, device=DEVICE)
        slots = torch.arange(count, dtype=torch.int32, device=DEVICE)[None]
        rope = (angles[:, part].cos(), angles[:, part].sin(), *cache, slots)
        q = ops.qkv_rope_cache(x[None, part], values, bias, *rope, **options)[0]
        return (
            ops.linear(x[part], values, bias, residual[part], **options),
            ops.linear_swiglu(x[part], values, bias, **options),
            *ops.linear_norm(x[part], values, bias, residual[part], norm, 1e-6, **options),
            q, *cache[:, 0, 0, :count],
        )  # fmt: skip

    for row in {0, rows // 2, rows - 1}:
        for together, alone in zip(run(slice(None)), run(slice(row, row + 1)), strict=True):
            assert torch.equal(together[row : row + 1], alone)


def test_the_check_can_fail() -> None:
    """A different K tile is a different order of summation: if this were equal too, the tests above would be blind."""
    x, weight = randn(1, 8, 512, dtype=torch.float32), randn(2, 64, 512, dtype=torch.float32)
    results = []
    for block_k in (32, 128):
        constants = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": block_k, "SPLIT_K": 1}
        config = KernelConfig(constants, {"num_warps": 4, "num_stages": 2})
        results.append(ops.linear(x, weight, impl="triton", config=config))
    if not torch.cuda.is_available():  # on a GPU the FMA chain may happen to be the same
        assert not torch.equal(*results)
    torch.testing.assert_close(*results, atol=1e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (3072, 2048)])
def test_linear_on_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Qwen3 layer shapes with their default configuration: 1, 7, 32, 33, 64 and 256 rows give the same bits."""
    x, weight = randn(1, 256, shape[1], dtype=dtype), randn(2, *shape, dtype=dtype) * shape[1] ** -0.5
    for factor, scale in ((weight, None), ops.quantize_rows(weight)):
        whole = ops.linear(x, factor, weight_scale=scale, impl="triton")
        for rows in (1, 7, 32, 33, 64):
            assert torch.equal(ops.linear(x[:rows], factor, weight_scale=scale, impl="triton"), whole[:rows]), rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("context", [0, 1, 511, 2048, 8191, 32_000])
def test_attention_on_gpu(context: int, dtype: torch.dtype) -> None:
    """Qwen3-8B's heads with the default configuration: every verify row has the decode row's bits."""
    case = make_case(
        1, dtype, DEVICE, batch=2, rows=32, kv_heads=8, group=4, head_dim=128, context=context, capacity=32_768,
        poison=False,
    )  # fmt: skip
    whole = ops.dual_view_attention(*case.args(), impl="triton")
    for row in (0, 1, 15, 31):
        alone = Case(case.q[:, row : row + 1], case.k_cache, case.v_cache, case.key_limit[:, row : row + 1])
        assert torch.equal(ops.dual_view_attention(*alone.args(), impl="triton")[:, 0], whole[:, row]), row
