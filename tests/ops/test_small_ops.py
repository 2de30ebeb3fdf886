"""Norm, projection, rotation and activation: Triton and torch against fp64, and what callers get wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.testing import assert_within_budget
from tests.ops.attention_cases import DTYPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 9999)
offsets = st.sampled_from([0.0, 1.0])


def randn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.usefixtures("with_and_without_c")
@given(seed=seeds, dtype=dtypes, rows=st.integers(1, 5), width=st.integers(1, 200), add=st.booleans(), offset=offsets)
def test_rms_norm(seed: int, dtype: torch.dtype, rows: int, width: int, add: bool, offset: float) -> None:
    x, weight = randn(seed, rows, width, dtype=dtype), randn(seed + 1, width, dtype=dtype)
    residual = randn(seed + 2, rows, width, dtype=dtype) if add else None
    hidden = x + residual if add else x
    reference = ops.rms_norm(hidden.double(), weight.double(), 1e-6, norm_offset=offset, impl="reference")
    plain = hidden.float() * torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    # as transformers' Gemma, or as its Llama
    plain = (plain * (offset + weight.float())).to(dtype) if offset else plain.to(dtype) * weight
    for impl in ("triton", "torch"):
        out = ops.rms_norm(x, weight, 1e-6, residual, norm_offset=offset, impl=impl)
        if add:
            out, new_residual = out
            assert torch.equal(new_residual, hidden), "the new residual must be the plain sum, rounded once"
        assert_within_budget(out, plain, reference, what=impl)


@pytest.mark.usefixtures("with_and_without_c")
@given(
    seed=seeds, dtype=dtypes, rows=st.integers(1, 5), width=st.integers(1, 1100), is_last=st.booleans(), offset=offsets
)
def test_add_normed(seed: int, dtype: torch.dtype, rows: int, width: int, is_last: bool, offset: float) -> None:
    x, residual = randn(seed, rows, width, dtype=dtype) * 3, randn(seed + 1, rows, width, dtype=dtype)
    weight, following = randn(seed + 2, width, dtype=dtype), randn(seed + 3, width, dtype=dtype)
    options = () if is_last else (following, 1e-2)
    for impl in ("triton", "torch"):
        how = {"norm_offset": offset, "impl": impl}
        normed, hidden = ops.add_normed(x, residual, weight, 1e-6, *options, **how)
        # the kernels' own steps, in which roundings are those of the norm alone
        assert torch.equal(hidden, residual + ops.rms_norm(x, weight, 1e-6, **how)), impl
        expected = hidden if is_last else ops.rms_norm(hidden, following, 1e-2, **how)
        assert torch.equal(normed, expected), impl
        reference = ops.add_normed(
            *(t.double() for t in (x, residual, weight)), 1e-6, *(t.double() for t in options[:1]), *options[1:],
            norm_offset=offset, impl="reference",
        )  # fmt: skip
        plain = residual + torch.nn.functional.rms_norm(x, (width,), eps=1e-6) * (offset + weight)
        assert_within_budget(hidden, plain, reference[1], what=impl)


@pytest.mark.usefixtures("with_and_without_c")
@given(
    seed=seeds, dtype=dtypes, rows=st.integers(1, 5), queries=st.integers(1, 600), keys=st.integers(1, 90),
    rest=st.integers(0, 40), offset=offsets,
)  # fmt: skip
def test_norm_spans(
    seed: int, dtype: torch.dtype, rows: int, queries: int, keys: int, rest: int, offset: float
) -> None:
    qkv = randn(seed, rows, queries + keys + rest, dtype=dtype)
    weights = randn(seed + 1, queries, dtype=dtype), randn(seed + 2, keys, dtype=dtype)
    q, k, others = qkv.split([queries, keys, rest], dim=-1)
    exact = ops.norm_spans(
        qkv.double(), *(weight.double() for weight in weights), 1e-6, norm_offset=offset, impl="reference"
    )
    for impl in ("triton", "torch"):
        how = {"norm_offset": offset, "impl": impl}
        normed = [ops.rms_norm(span.contiguous(), w, 1e-6, **how) for span, w in zip((q, k), weights)]
        out = ops.norm_spans(qkv, *weights, 1e-6, **how)
        assert_within_budget(out, torch.cat((*normed, others), dim=-1), exact, what=impl)
        assert torch.equal(out[:, queries + keys :], others)


@pytest.mark.usefixtures("with_and_without_c")
@given(seed=seeds, dtype=dtypes, rows=st.integers(1, 5), width=st.integers(1, 2100), gelu=st.booleans())
def test_gated(seed: int, dtype: torch.dtype, rows: int, width: int, gelu: bool) -> None:
    gate_up = randn(seed, rows, 2 * width, dtype=dtype) * 4
    gate, up = gate_up.chunk(2, dim=-1)
    op, plain = ops.swiglu, torch.nn.functional.silu(gate)
    exact = torch.nn.functional.silu(gate.double())
    if gelu:
        op, plain = ops.geglu, torch.nn.functional.gelu(gate, approximate="tanh")
        exact = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    for impl in ("triton", "torch"):
        assert_within_budget(op(gate_up, impl=impl), plain * up, exact * up.double(), what=impl)
    torch.testing.assert_close(op(gate_up.double(), impl="reference"), exact * up.double())


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("op", [ops.swiglu, ops.geglu])
def test_gated_at_the_ends_of_the_range(op: Callable) -> None:
    gate_up = torch.tensor([[-3e4, -100.0, 0.0, 100.0, 3e4, 1.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    for impl in ("triton", "torch"):
        assert op(gate_up, impl=impl).tolist() == [[0.0, 0.0, 0.0, 100.0, 3e4]], impl


@given(
    seed=seeds, dtype=dtypes, rows=st.integers(1, 40), n=st.integers(1, 90), k=st.integers(1, 200),
    split_k=st.sampled_from([1, 2, 4]), bias=st.booleans(), add=st.booleans(), wide=st.booleans(),
)  # fmt: skip
def test_linear(seed, dtype, rows, n, k, split_k, bias, add, wide) -> None:
    constants = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "SPLIT_K": split_k}
    config = KernelConfig(constants, {"num_warps": 4, "num_stages": 2})
    out_dtype = torch.float32 if wide else dtype
    x, weight = randn(seed, rows, k, dtype=dtype), randn(seed + 1, n, k, dtype=dtype)
    bias_vector = randn(seed + 2, n, dtype=dtype) if bias else None
    residual = randn(seed + 3, rows, n, dtype=out_dtype) if add else None
    product = torch.nn.functional.linear(x, weight, bias_vector).to(out_dtype)
    reference = ops.linear(
        x.double(), weight.double(), None if bias_vector is None else bias_vector.double(), impl="reference"
    )
    plain = product if residual is None else product + residual
    reference = reference if residual is None else reference + residual.double()
    triton = ops.linear(x, weight, bias_vector, residual, out_dtype=out_dtype, impl="triton", config=config)
    assert triton.dtype == out_dtype
    assert_within_budget(triton, plain, reference, what="triton")
    torch_out = ops.linear(x, weight, bias_vector, residual, out_dtype=out_dtype, impl="torch")
    assert_within_budget(torch_out, plain, reference, what="torch")


@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 6), slice(2, 4)], ids=str)
def test_a_part_of_every_sequence_s_rows_is_taken_where_it_lies(rows: slice) -> None:
    """Rows 0 and the others of a draft go through different weights: neither is copied first, and no bit differs."""
    x, weight, residual = (
        randn(n, *shape, dtype=torch.float32) for n, shape in enumerate(((3, 6, 32), (24, 32), (3, 6, 24)))
    )
    part, added = x[:, rows], residual[:, rows]
    assert not part.is_contiguous()
    expected = ops.linear(part.contiguous(), weight, None, added, impl="triton")
    assert torch.equal(ops.linear(part, weight, None, added, impl="triton"), expected)
    odd = torch.cat((part.flatten(1), x[:, 0, :5]), dim=1)[:, :-5].view(part.shape)  # sequences begin between rows
    assert torch.equal(ops.linear(odd, weight, None, added, impl="triton"), expected)
    qkv, angles = randn(7, 3, 6, 4 * 16, dtype=torch.float32), randn(8, 3, 6, 8, dtype=torch.float32)
    slots = torch.arange(6, dtype=torch.int32, device=DEVICE).repeat(3, 1)[:, rows]
    found = []
    for whole in ((), ("cos",), ("cos", "sin")):
        cache = torch.zeros(2, 3, 1, 9, 16, device=DEVICE)
        parts = {"cos": angles.cos()[:, rows], "sin": angles.sin()[:, rows]}
        cos, sin = (part.contiguous() if name in whole else part for name, part in parts.items())
        q = ops.rope_cache(qkv[:, rows], cos, sin, cache[0], cache[1], slots, impl="triton")
        found.append((q, cache))
    for again in found[:2]:
        assert all(torch.equal(a, b) for a, b in zip(again, found[2]))


@pytest.mark.usefixtures("with_and_without_c")
@given(
    seed=seeds, dtype=dtypes, norm=st.booleans(), head_dim=st.sampled_from([64, 80, 96]), batch=st.integers(1, 2),
    offset=offsets,
)  # fmt: skip
def test_rope_cache(seed: int, dtype: torch.dtype, norm: bool, head_dim: int, batch: int, offset: float) -> None:
    rows, heads, kv_heads, capacity = 3, 4, 2, 11
    qkv = randn(seed, batch, rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = randn(seed + 1, batch, rows, head_dim // 2, dtype=torch.float32) * 100
    norms = [randn(seed + 2 + i, head_dim, dtype=dtype) if norm else None for i in range(2)]
    # distinct slots, some of them outside the cache
    slots = torch.stack([torch.randperm(capacity + 4, generator=torch.Generator().manual_seed(seed + b))[:rows] - 2
                         for b in range(batch)]).to(DEVICE, torch.int32)  # fmt: skip

    def run(impl: str, compute: torch.dtype) -> list[torch.Tensor]:
        cache = torch.full((2, batch, kv_heads, capacity, head_dim), 7.0, dtype=compute, device=DEVICE)
        weights = [None if weight is None else weight.to(compute) for weight in norms]
        args = (qkv.to(compute), angles.cos(), angles.sin(), cache[0], cache[1], slots, *weights, 1e-6)
        return [ops.rope_cache(*args, norm_offset=offset, impl=impl), cache]

    reference = run("reference", torch.float64)
    plain = run("torch", dtype)
    for name, actual, torch_out, expected in zip(("q", "cache"), run("triton", dtype), plain, reference):
        assert_within_budget(actual, torch_out, expected, what=name)
    written = (reference[1] != 7.0).any(-1).any(2).any(0)
    expected_rows = [{s for s in row if 0 <= s < capacity} for row in slots.tolist()]
    assert [set(row.nonzero().flatten().tolist()) for row in written] == expected_rows


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("first", [-5, -1, 0, 2, 3, 4])
def test_a_run_of_slots_may_begin_before_the_cache_and_end_behind_it(first: int, impl: str) -> None:
    """Of one sequence: nothing is written for what has no place."""
    qkv, angles = randn(first + 5, 1, 2, 3 * 8, dtype=torch.float32), torch.zeros(1, 2, 4, device=DEVICE)
    cache, slots = torch.full((2, 1, 1, 4, 8), 7.0, device=DEVICE), torch.tensor([[first, first + 1]], device=DEVICE)
    ops.rope_cache(qkv, angles.cos(), angles.sin(), *cache, slots.int(), impl=impl)
    expected = torch.full((2, 4, 8), 7.0, device=DEVICE)
    for row in range(2):
        if 0 <= first + row < 4:
            expected[:, first + row] = qkv[0, row, 8:].view(2, 8)
    assert torch.equal(cache[:, 0, 0], expected)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_no_angles_are_angles_of_zero(impl: str, dtype: torch.dtype, norm: bool) -> None:
    """What a layer without a rotation gets, for one row, too, where a slice of its input would be all of a tensor."""
    weight = randn(1, 64, dtype=dtype) if norm else None
    for rows in (1, 3):
        qkv = randn(rows, 1, rows, 4 * 64, dtype=dtype)
        before, slots = qkv.clone(), torch.arange(rows, dtype=torch.int32, device=DEVICE)[None]
        angles = torch.zeros(1, rows, 32, device=DEVICE)
        found = []
        for cos, sin in ((angles.cos(), angles.sin()), (None, None)):
            cache = torch.zeros(2, 1, 1, 4, 64, device=DEVICE, dtype=dtype)
            q = ops.rope_cache(qkv, cos, sin, *cache, slots, weight, weight, impl=impl)
            found.append((q, cache))
        assert all(torch.equal(a, b) for a, b in zip(*found))
        q.fill_(7)
        assert torch.equal(qkv, before)


def test_the_reference_of_rope_cache_computes_in_fp64_whatever_it_is_given() -> None:
    qkv, angles, norm = (randn(seed, 1, 3, n, dtype=torch.float32) for seed, n in ((0, 4 * 64), (1, 32), (2, 64)))
    slots, found = torch.arange(3, dtype=torch.int32, device=DEVICE)[None], []
    for dtype in (torch.float32, torch.float64):
        cache, weight = torch.zeros(2, 1, 1, 4, 64, dtype=dtype, device=DEVICE), norm[0, 0].to(dtype)
        of_pass = (angles.cos(), angles.sin(), *cache, slots, weight, weight, 1e-6)
        found.append(ops.rope_cache(qkv.to(dtype), *of_pass, impl="reference").float())
    assert torch.equal(*found)


def test_angles_are_given_together() -> None:
    qkv, angles, cache = torch.ones(1, 2, 12), torch.ones(1, 2, 2), torch.zeros(2, 1, 1, 4, 4)
    for cos, sin in ((angles, None), (None, angles)):
        with pytest.raises(ValueError, match="cos and sin must be given together"):
            ops.rope_cache(qkv, cos, sin, *cache, torch.zeros(1, 2, dtype=torch.int32))


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_are_rounded_before_their_weight(dtype: torch.dtype) -> None:
    x, weight = randn(0, 9, 64, dtype=dtype), randn(1, 64, dtype=dtype)
    qkv, angles = randn(2, 1, 9, 3 * 64, dtype=dtype), torch.tensor([1.0, 0.0], device=DEVICE)
    cos, sin = angles.view(2, 1, 1, 1).expand(2, 1, 9, 32)
    slots = torch.arange(9, dtype=torch.int32, device=DEVICE)[None]

    def heads(weight: torch.Tensor) -> torch.Tensor:
        cache = torch.zeros(2, 1, 1, 9, 64, device=DEVICE, dtype=dtype)
        q = ops.rope_cache(qkv, cos, sin, *cache, slots, weight, weight, impl="triton")
        return torch.stack((q[:, :, 0], cache[0, :, 0]))

    ones = torch.ones_like(weight)
    for impl in ("triton", "torch"):
        normed = ops.rms_norm(x, ones, 1e-6, impl=impl)
        assert torch.equal(ops.rms_norm(x, weight, 1e-6, impl=impl), normed * weight)
    assert torch.equal(heads(weight), heads(ones) * weight)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
@torch.no_grad()
def test_the_norm_of_a_sum_is_of_the_sum_as_it_is_stored(impl: str, dtype: torch.dtype) -> None:
    x, residual, weight = (randn(seed, *shape, dtype=dtype) for seed, shape in enumerate([(9, 64), (9, 64), (64,)]))
    normed, hidden = ops.rms_norm(x, weight, 1e-6, residual, impl=impl)
    assert torch.equal(hidden, x + residual)
    assert torch.equal(normed, ops.rms_norm(hidden, weight, 1e-6, impl=impl))


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@torch.no_grad()
def test_rope_cache_in_torch_rounds_norms_as_the_norm_itself_does(dtype: torch.dtype, offset: float) -> None:
    qkv, weights = randn(0, 1, 9, 4 * 64, dtype=dtype), [randn(seed, 64, dtype=dtype) for seed in (1, 2)]
    cos, sin = torch.ones(1, 9, 32, device=DEVICE), torch.zeros(1, 9, 32, device=DEVICE)
    k_out, v_out = torch.zeros(2, 1, 1, 9, 64, device=DEVICE, dtype=dtype)
    slots = torch.arange(9, dtype=torch.int32, device=DEVICE)[None]
    how = {"norm_offset": offset, "impl": "torch"}
    q = ops.rope_cache(qkv, cos, sin, k_out, v_out, slots, *weights, **how)
    heads = qkv.view(1, 9, 4, 64)
    assert torch.equal(q, ops.rms_norm(heads[:, :, :2], weights[0], 1e-6, **how))
    assert torch.equal(k_out[:, 0], ops.rms_norm(heads[:, :, 2], weights[1], 1e-6, **how))


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("offset", [0.0, 1.0])
@torch.no_grad()
def test_weights_of_head_norms_are_rounded_to_the_dtype_of_what_they_norm(offset: float) -> None:
    qkv, weights = randn(0, 1, 9, 4 * 64, dtype=torch.bfloat16), [randn(n, 64, dtype=torch.float32) for n in (1, 2)]
    slots = torch.arange(9, dtype=torch.int32, device=DEVICE)[None]
    found = [
        ops.rope_cache(
            qkv, None, None, *torch.zeros(2, 1, 1, 9, 64, device=DEVICE, dtype=torch.bfloat16), slots, *norms,
            norm_offset=offset, impl="torch",
        )
        for norms in (weights, [weight.bfloat16() for weight in weights])
    ]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("at", [0, 15], ids=["first", "last"])
@pytest.mark.parametrize("number", [torch.inf, torch.nan], ids=str)
def test_a_value_that_is_not_finite_makes_its_key_one_and_harms_no_other(number: float, at: int) -> None:
    qkv, angles = randn(3, 1, 2, 3 * 16, dtype=torch.float32), torch.ones(2, 1, 2, 8, device=DEVICE)
    qkv[0, 1, 32 + at] = number
    cache = torch.zeros(2, 1, 1, 4, 16, device=DEVICE)
    ops.rope_cache(qkv, *angles, *cache, torch.tensor([[0, 2]], dtype=torch.int32, device=DEVICE), impl="triton")
    k, v = cache[:, 0, 0]
    assert k[2].isnan().all() and k[[0, 1, 3]].isfinite().all() and v.isfinite().all()
    assert v[2, at] == 0 and v[2].count_nonzero() == 15


@pytest.mark.usefixtures("with_and_without_c")
def test_rope_cache_in_torch_rounds_products_before_their_sum() -> None:
    """As the kernels do: a fused multiply-add would be another number, wherever a machine has one."""
    qkv, cos, sin = (randn(seed, 1, 9, width, dtype=torch.float32) for seed, width in ((0, 4 * 20), (1, 10), (2, 10)))
    k_out, v_out = torch.zeros(2, 1, 1, 9, 20, device=DEVICE)
    slots = torch.arange(9, dtype=torch.int32, device=DEVICE)[None]
    low, high = qkv.view(1, 9, 4, 20)[:, :, :3].chunk(2, dim=-1)
    cosines, sines = cos[:, :, None], sin[:, :, None]
    rotated = torch.cat((low * cosines - high * sines, high * cosines + low * sines), dim=-1)
    with torch.no_grad():
        for _ in range(2):  # the second finds the angles kept
            q = ops.rope_cache(qkv, cos, sin, k_out, v_out, slots, impl="torch")
            assert torch.equal(q, rotated[:, :, :2]) and torch.equal(k_out[0, 0], rotated[0, :, 2])


def test_rope_cache_needs_whole_rows() -> None:
    """A kernel would write to places that belong to others."""
    angles, slots = torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.int32)
    whole, apart = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 8)[..., ::2]
    for name, out in (("k_out", (apart, whole)), ("v_out", (whole, apart))):
        with pytest.raises(ValueError, match=f"{name} must be contiguous in its last dimension"):
            ops.rope_cache(torch.ones(1, 2, 12), angles, angles, *out, slots)


@pytest.mark.usefixtures("with_and_without_c")
def test_rope_cache_rotates_by_halves() -> None:
    """A quarter turn sends the first half to minus the second, and the second to the first."""
    qkv = torch.zeros(1, 1, 3 * 64, device=DEVICE)
    qkv[0, 0, :32], qkv[0, 0, 32:64] = 1.0, 2.0
    quarter = torch.zeros(1, 1, 32, device=DEVICE), torch.ones(1, 1, 32, device=DEVICE)
    cache = torch.zeros(2, 1, 1, 4, 64, device=DEVICE)
    slots = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    for impl in ("triton", "torch", "reference"):
        q = ops.rope_cache(qkv, *quarter, cache[0], cache[1], slots, impl=impl)
        assert q[0, 0, 0, :32].tolist() == [-2.0] * 32 and q[0, 0, 0, 32:].tolist() == [1.0] * 32, impl


@pytest.mark.usefixtures("with_and_without_c")
def test_greedy_choice_ignores_nan() -> None:
    logits = torch.full((3, 10), -1.0, device=DEVICE)
    logits[0, 3], logits[0, 5] = torch.nan, 2.0
    logits[1] = torch.nan
    logits[2] = -torch.inf
    for impl in ("triton", "torch", "reference"):
        assert ops.greedy_choice(logits, impl=impl).tolist() == [5, ops.VOID, ops.VOID], impl


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.add_normed(x[0, 0], x, torch.ones(8), 1e-6), r"x must be \[..., H\], but got shape \(\)"),
        (
            lambda x: ops.add_normed(x, x[:1], torch.ones(8), 1e-6),
            r"residual must have shape \(2, 8\), but got \(1, 8\)",
        ),
        (lambda x: ops.add_normed(x, x, torch.ones(9), 1e-6), r"weight must have shape \(8,\), but got \(9,\)"),
        (lambda x: ops.add_normed(x, x, x[0], 1e-6, x[0].half(), 1e-6), "next_weight must have dtype torch.float32"),
        (lambda x: ops.add_normed(x, x, x[0], 1e-6, x[0]), "next_weight and next_eps must be given together"),
        (lambda x: ops.norm_spans(x, torch.ones(5), torch.ones(4), 1e-6), r"qkv must be \[..., 5 \+ 4 \+ rest\], but"),
        (lambda x: ops.norm_spans(x, x, x[0], 1e-6), r"q_weight must be a vector, but got shape \(2, 8\)"),
        (lambda x: ops.norm_spans(x, x[0, :4], x[0, :4].half(), 1e-6), "k_weight must have dtype torch.float32, but"),
        (lambda x: ops.rms_norm(x, torch.ones(9), 1e-6), r"weight \[H\], but got shapes \(2, 8\) and \(9,\)"),
        (lambda x: ops.rms_norm(x[0, 0], torch.ones(8), 1e-6), r"got shapes \(\) and \(8,\)"),
        (lambda x: ops.rms_norm(x, torch.ones(8).half(), 1e-6), "must have dtype torch.float32, that of x, but got"),
        (lambda x: ops.swiglu(x[:, :7]), "even last dimension"),
        (lambda x: ops.linear(x, torch.ones(3, 9)), r"weight \[N, K\], but got shapes \(2, 8\) and \(3, 9\)"),
        (lambda x: ops.linear(x, torch.ones(3, 8).half()), "must have dtype torch.float32, that of the rows, but got"),
        (lambda x: ops.linear(x, torch.ones(8)), r"weight \[N, K\], but got shapes \(2, 8\) and \(8,\)"),
        (lambda x: ops.linear_swiglu(x, torch.ones(2, 3, 8)), r"got shapes \(2, 8\) and \(2, 3, 8\)"),
        (lambda x: ops.linear(x[0, 0], torch.ones(3, 8)), r"got shapes \(\) and \(3, 8\)"),
        (lambda x: ops.linear(x, torch.ones(3, 8), torch.ones(4)), r"bias must have shape \(3,\)"),
        (lambda x: ops.linear(x, torch.ones(8, 3).T), r"weight must be contiguous, but has strides \(1, 3\)"),
        (lambda x: ops.linear(x, torch.ones(3, 8), impl="torch", config=KernelConfig({})), "config belongs to"),
        (lambda x: ops.greedy_choice(x.long()), "must be floating point"),
        (lambda x: ops.swiglu(x, impl="cpu"), "impl must be one of"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.ones(2, 8))


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
@torch.no_grad()
def test_rows_that_are_not_finite_have_no_token(impl: str, dtype: torch.dtype) -> None:
    hidden, choice = randn(0, 2, 70, 37, dtype=dtype), torch.arange(140, device=DEVICE).view(2, 70)
    bad = {(0, 0): (0, torch.nan), (0, 5): (36, torch.inf), (1, 69): (16, -torch.inf)}
    for (b, row), (at, number) in bad.items():
        hidden[b, row, at] = number
    expected = choice.clone()
    for place in bad:
        expected[place] = ops.VOID
    assert torch.equal(ops.void_rows(choice, hidden, impl=impl), expected)
    assert torch.equal(ops.void_rows(choice.t(), hidden.transpose(0, 1), impl=impl), expected.t())
    if impl == "torch":  # tokens in another dtype are not read as int64
        assert torch.equal(ops.void_rows(choice.int(), hidden, impl=impl), expected.int())
