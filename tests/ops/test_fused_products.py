"""What is fused behind a product has the bits of the ops it stands for: SwiGLU, the norm after the residual, rotation
and K/V write, and the LM head's choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton._triton import is_interpreted
from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.testing import assert_within_budget
from tests.ops.attention_cases import DTYPES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = 32  # columns of a tile: vocabularies below cross several
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 9999)
offsets = st.sampled_from([0.0, 1.0])


def config(split_k: int = 1) -> KernelConfig:
    constants = {"BLOCK_M": 16, "BLOCK_N": TILE, "BLOCK_K": 32, "SPLIT_K": split_k}
    return KernelConfig(constants, {"num_warps": 4, "num_stages": 2})


def randn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)  # drawing on the host takes a GPU's tests minutes
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def assert_normed_alike(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal; but on a GPU two kernels may add the squares of a row in another order."""
    if is_interpreted():
        assert torch.equal(got, expected)
    else:
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, expected, rtol=8 * eps, atol=32 * eps)


@given(
    seed=seeds, dtype=dtypes, rows=st.integers(1, 20), width=st.integers(1, 24), k=st.integers(1, 70),
    split_k=st.sampled_from([1, 2, 3]), bias=st.booleans(),
)  # fmt: skip
def test_swiglu_is_the_unfused_pair(seed, dtype, rows, width, k, split_k, bias) -> None:
    x, weight = randn(seed, rows, k, dtype=dtype), randn(seed + 1, 2 * width, k, dtype=dtype)
    bias_vector = randn(seed + 2, 2 * width, dtype=dtype) if bias else None
    options = {"impl": "triton", "config": config(split_k)}
    fused = ops.linear_swiglu(x, weight, bias_vector, **options)
    assert torch.equal(fused, ops.swiglu(ops.linear(x, weight, bias_vector, **options), impl="triton"))
    row = seed % rows
    assert torch.equal(ops.linear_swiglu(x[row : row + 1], weight, bias_vector, **options)[0], fused[row])


@given(
    seed=seeds, dtype=dtypes, rows=st.integers(1, 9), width=st.integers(1, 90), k=st.integers(1, 70),
    split_k=st.sampled_from([1, 2, 3]), bias=st.booleans(), skip=st.integers(0, 2), offset=offsets,
)  # fmt: skip
def test_norm_is_the_unfused_pair(seed, dtype, rows, width, k, split_k, bias, skip, offset) -> None:
    """The residual is rows of a longer block, two sequences of it, as where a draft's parts are projected apart."""
    x, weight = randn(seed, 2, rows, k, dtype=dtype), randn(seed + 1, width, k, dtype=dtype)
    residual = randn(seed + 2, 2, rows + skip, width, dtype=dtype)[:, skip:]
    norm, bias = randn(seed + 3, width, dtype=dtype), randn(seed + 4, width, dtype=dtype) if bias else None
    options = {"impl": "triton", "config": config(split_k)}
    normed, hidden = ops.linear_norm(x, weight, bias, residual, norm, 1e-6, norm_offset=offset, **options)
    unfused = ops.linear(x, weight, bias, residual, **options)
    assert torch.equal(hidden, unfused)
    assert_normed_alike(normed, ops.rms_norm(unfused, norm, 1e-6, norm_offset=offset, impl="triton"))
    row = seed % rows
    alone = ops.linear_norm(
        x[1:, row : row + 1], weight, bias, residual[1:, row : row + 1], norm, 1e-6, norm_offset=offset, **options
    )  # fmt: skip
    assert torch.equal(alone[0][0, 0], normed[1, row]) and torch.equal(alone[1][0, 0], hidden[1, row])


@given(
    seed=seeds, dtype=dtypes, rows=st.integers(1, 6), head_dim=st.sampled_from([16, 80]), k=st.integers(1, 70),
    split_k=st.sampled_from([1, 2, 3]), bias=st.booleans(), norm=st.booleans(), offset=offsets,
)  # fmt: skip
def test_rotation_is_the_unfused_pair(seed, dtype, rows, head_dim, k, split_k, bias, norm, offset) -> None:
    width = 4 * head_dim  # two query heads, one of keys, one of values
    x, weight = randn(seed, 2, rows, k, dtype=dtype), randn(seed + 1, width, k, dtype=dtype)
    bias = randn(seed + 2, width, dtype=dtype) if bias else None
    angles = randn(seed + 3, 2, rows, head_dim // 2, dtype=torch.float32)
    norms = [randn(seed + 4 + i, head_dim, dtype=dtype) if norm else None for i in range(2)]
    slots = torch.arange(3, 3 + rows, dtype=torch.int32, device=DEVICE).expand(2, rows)
    options = {"impl": "triton", "config": config(split_k)}
    caches = torch.zeros(3, 2, 2, 1, 16, head_dim, dtype=dtype, device=DEVICE)

    def rope(cache: torch.Tensor, of: slice = slice(None)) -> tuple:
        return angles[:, of].cos(), angles[:, of].sin(), *cache, slots[:, of], *norms

    fused = ops.qkv_rope_cache(x, weight, bias, *rope(caches[0]), norm_offset=offset, **options)
    product = ops.linear(x, weight, bias, **options)
    unfused = ops.rope_cache(product, *rope(caches[1]), norm_offset=offset, impl="triton")
    alike = assert_normed_alike if norm else lambda *pair: torch.testing.assert_close(*pair, rtol=0, atol=0)
    alike(fused, unfused)
    alike(caches[0], caches[1])
    row = seed % rows
    one = slice(row, row + 1)
    alone = ops.qkv_rope_cache(x[:, one], weight, bias, *rope(caches[2], one), norm_offset=offset, **options)
    assert torch.equal(alone[:, 0], fused[:, row])
    assert torch.equal(caches[2][..., 3 + row, :], caches[0][..., 3 + row, :])


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_rotation_are_near_the_reference(dtype: torch.dtype, impl: str) -> None:
    """Through the registered ops too, with whatever configuration is looked up."""
    x, weight, bias = randn(1, 2, 3, 48, dtype=dtype), randn(2, 256, 48, dtype=dtype) / 7, randn(3, 256, dtype=dtype)
    residual, norm = randn(4, 2, 3, 256, dtype=dtype), randn(5, 256, dtype=dtype)
    double = [tensor.double() for tensor in (x, weight, bias, residual, norm)]
    expected = ops.linear_norm(*double, 1e-6, impl="reference")
    got = ops.linear_norm(x, weight, bias, residual, norm, 1e-6, impl=impl)
    plain = torch.nn.functional.linear(x, weight, bias) + residual
    assert_within_budget(got[1], plain, expected[1], what="hidden")
    assert_within_budget(got[0], torch.nn.functional.rms_norm(plain, (256,), norm, 1e-6), expected[0], what="norm")
    angles = randn(6, 2, 3, 32, dtype=torch.float32)
    slots = torch.arange(3, dtype=torch.int32, device=DEVICE).expand(2, 3)
    cache = torch.zeros(2, 2, 2, 1, 8, 64, dtype=dtype, device=DEVICE)
    q = ops.qkv_rope_cache(x, weight, bias, angles.cos(), angles.sin(), *cache[0], slots, impl=impl)
    product = ops.linear(x, weight, bias, impl=impl)
    assert torch.equal(q, ops.rope_cache(product, angles.cos(), angles.sin(), *cache[1], slots, impl=impl))
    assert torch.equal(cache[0], cache[1])


@pytest.mark.parametrize("split_k", [1, 2])
def test_vectors_may_lie_apart(split_k: int) -> None:
    """Biases and norm weights that are a column of something are read as what they are."""
    x, weight = randn(1, 1, 3, 48, dtype=torch.float32), randn(2, 64, 48, dtype=torch.float32)
    residual, angles = randn(3, 1, 3, 64, dtype=torch.float32), randn(4, 1, 3, 8, dtype=torch.float32)
    slots = torch.arange(3, dtype=torch.int32, device=DEVICE)[None]
    options = {"impl": "triton", "config": config(split_k)}

    def everything(bias: torch.Tensor, norm: torch.Tensor, q_norm: torch.Tensor, k_norm: torch.Tensor) -> list:
        cache = torch.zeros(2, 1, 1, 4, 16, device=DEVICE)
        rope = (angles.cos(), angles.sin(), *cache, slots, q_norm, k_norm)
        return [
            ops.linear(x, weight, bias, **options), ops.linear_swiglu(x, weight, bias, **options),
            *ops.linear_norm(x, weight, bias, residual, norm, 1e-6, **options),
            ops.rms_norm(residual, norm, 1e-6, impl="triton"),
            *ops.rms_norm(residual, norm, 1e-6, residual, impl="triton"),
            ops.qkv_rope_cache(x, weight, bias, *rope, **options),
            ops.rope_cache(residual, *rope, impl="triton"), cache,
        ]  # fmt: skip

    columns = [randn(5 + n, size, 3, dtype=torch.float32)[:, 1] for n, size in enumerate((64, 64, 16, 16))]
    one_number = [column[:1].expand(column.shape) for column in columns]
    for vectors in (columns, one_number):
        for got, expected in zip(everything(*vectors), everything(*(vector.contiguous() for vector in vectors))):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_is_near_the_reference(dtype: torch.dtype) -> None:
    x, weight = randn(1, 2, 5, 48, dtype=dtype), randn(2, 70, 48, dtype=dtype) / 7
    bias = randn(3, 70, dtype=dtype)
    gate, up = torch.nn.functional.linear(x, weight, bias).chunk(2, dim=-1)
    reference = ops.linear_swiglu(x.double(), weight.double(), bias.double(), impl="reference")
    for impl in ("triton", "torch"):
        fused = ops.linear_swiglu(x, weight, bias, impl=impl)
        assert_within_budget(fused, torch.nn.functional.silu(gate) * up, reference, what=impl)


@given(
    seed=seeds, dtype=dtypes, rows=st.integers(1, 20), vocab=st.integers(1, 4 * TILE), k=st.integers(1, 70),
    split_k=st.sampled_from([1, 1, 2]),
)  # fmt: skip
def test_choice_is_that_of_the_logits(seed, dtype, rows, vocab, k, split_k) -> None:
    hidden, weight = randn(seed, rows, k, dtype=dtype), randn(seed + 1, vocab, k, dtype=dtype)
    options = {"impl": "triton", "config": config(split_k)}
    choice = ops.lm_head_choice(hidden, weight, **options)
    logits = ops.linear(hidden, weight, out_dtype=torch.float32, **options)
    assert torch.equal(choice, ops.greedy_choice(logits, impl="triton"))
    row = seed % rows
    assert ops.lm_head_choice(hidden[row : row + 1], weight, **options)[0] == choice[row]


def logits_as_products(logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, weight) whose products are exactly these fp32 logits [rows, V], each a sum of values of `dtype`:
    hidden picks a part of every column, and the parts add up to the logit without rounding."""
    parts, rest = [], logits.double()
    for _ in range(4):  # four times the eight bits of bf16 hold every bit of an fp32
        part = rest.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        part = torch.where(rest.isfinite(), part, rest.to(dtype))
        parts.append(part)
        rest = torch.where(rest.isfinite(), rest - part.double(), 0.0)
    assert not rest.any()
    rows, vocab = logits.shape
    hidden = torch.zeros(rows, 4 * rows, dtype=dtype)
    weight = torch.zeros(vocab, 4 * rows, dtype=dtype)
    for row in range(rows):
        hidden[row, 4 * row : 4 * row + 4] = 1
        weight[:, 4 * row : 4 * row + 4] = torch.stack([part[row] for part in parts], dim=1)
    return hidden.to(DEVICE), weight.to(DEVICE)


NEXT_TO_ONE = 1.0 + 2.0**-23
# name -> ({id: logit} over a floor of -1 in a vocabulary of 4 tiles and a bit, the id that must win)
TIES = {
    "one ulp, higher id wins": ({3: 1.0, 100: NEXT_TO_ONE}, 100),
    "one ulp, lower id wins": ({3: NEXT_TO_ONE, 100: 1.0}, 3),
    "one ulp inside a tile": ({40: 1.0, 41: NEXT_TO_ONE}, 41),
    "equal inside a tile": ({41: 1.0, 45: 1.0}, 41),
    "equal on both sides of a tile's edge": ({TILE - 1: 1.0, TILE: 1.0}, TILE - 1),
    "one ulp on both sides of a tile's edge": ({TILE - 1: 1.0, TILE: NEXT_TO_ONE}, TILE),
    "equal in every tile": ({5 + TILE * n: 1.0 for n in range(4)}, 5),
    "equal first and last": ({0: 1.0, 4 * TILE + 4: 1.0}, 0),
    "last id, in a tile that is not full": ({4 * TILE + 4: 1.0}, 4 * TILE + 4),
    "all equal": ({}, 0),
    "minus one ulp": ({7: -1.0 + 2.0**-24, 50: -1.0 + 2.0**-23}, 50),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_ties(dtype: torch.dtype) -> None:
    """Each row's logits are exact in fp32, so that the choice is known: a logit rounded to `dtype` would lose it."""
    vocab = 4 * TILE + 5
    logits = torch.full((len(TIES), vocab), -1.0)
    for row, (values, _) in enumerate(TIES.values()):
        for token, value in values.items():
            logits[row, token] = value
    hidden, weight = logits_as_products(logits, dtype)
    options = {"impl": "triton", "config": config()}
    assert torch.equal(ops.linear(hidden, weight, out_dtype=torch.float32, **options).cpu(), logits)
    expected = dict(zip(TIES, (winner for _, winner in TIES.values())))
    assert dict(zip(TIES, ops.lm_head_choice(hidden, weight, **options).tolist())) == expected
    assert dict(zip(TIES, ops.lm_head_choice(hidden, weight, impl="reference").tolist())) == expected
    if dtype == torch.float32:  # the torch product of half precision rounds its logits
        assert dict(zip(TIES, ops.lm_head_choice(hidden, weight, impl="torch").tolist())) == expected


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_infinities_and_nan_follow_greedy_choice(impl: str) -> None:
    """One input column of ones: the weight is the row of logits."""
    inf, nan = torch.inf, torch.nan
    columns = {
        "all minus infinity": ([-inf] * 40, ops.VOID),
        "all NaN": ([nan] * 40, ops.VOID),
        "NaN and minus infinity": ([nan, -inf] * 20, ops.VOID),
        "minus infinity but one": ([-inf] * 35 + [-9.0] + [-inf] * 4, 35),
        "NaN never wins": ([nan] * 33 + [-9.0] + [nan] * 6, 33),
        "first infinity": ([1.0] * 20 + [inf] + [2.0] * 15 + [inf] * 4, 20),
        "NaN beside infinity": ([nan, inf] * 20, 1),
    }
    hidden = torch.ones(2, 1, device=DEVICE)
    for name, (logits, winner) in columns.items():
        weight = torch.tensor(logits, device=DEVICE)[:, None]
        options = {"config": config()} if impl == "triton" else {}
        assert ops.lm_head_choice(hidden, weight, impl=impl, **options).tolist() == [winner] * 2, name
        product = torch.tensor([logits] * 2, device=DEVICE)
        assert ops.greedy_choice(product, impl=impl).tolist() == [winner] * 2, name


def test_many_column_tiles_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from orthrus_triton.ops import lm_head

    monkeypatch.setattr(lm_head, "BLOCK", 4)
    hidden, weight = randn(1, 3, 16, dtype=torch.float32), randn(2, 9 * TILE + 1, 16, dtype=torch.float32)
    for row, token in enumerate((0, 4 * TILE, 9 * TILE)):  # the first tile of a part, and the very last
        weight[token] = 50 * hidden[row]
    weight[4 * TILE + 1] = weight[4 * TILE]
    assert ops.lm_head_choice(hidden, weight, impl="triton", config=config()).tolist() == [0, 4 * TILE, 9 * TILE]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.lm_head_choice(x, torch.ones(5, 9)), r"rows must be .* got shapes \(2, 8\) and \(5, 9\)"),
        (lambda x: ops.lm_head_choice(x, torch.ones(5, 8).half()), "weight must have dtype torch.float32"),
        (lambda x: ops.lm_head_choice(x, torch.ones(5, 8), impl="torch", config=config()), "config belongs to"),
        (lambda x: ops.lm_head_choice(x, torch.ones(8, 5).T), "weight must be contiguous"),
        (lambda x: ops.linear_swiglu(x, torch.ones(5, 8)), "weight must have an even number of rows"),
        (lambda x: ops.linear_swiglu(x, torch.ones(6, 8), torch.ones(3)), r"bias must have shape \(6,\)"),
        (lambda x: ops.linear_swiglu(x, torch.ones(6, 8), impl="torch", config=config()), "config belongs to"),
        (
            lambda x: ops.linear_norm(x, torch.ones(6, 8), None, torch.ones(3, 6), torch.ones(6), 1e-6),
            r"residual must have shape \(2, 6\), but got \(3, 6\)",
        ),
        (
            lambda x: ops.linear_norm(x, torch.ones(6, 8), None, torch.ones(2, 6), torch.ones(5), 1e-6),
            r"norm_weight must have shape \(6,\)",
        ),
        (
            lambda x: ops.linear_norm(x, torch.ones(6, 8), torch.ones(6).half(), torch.ones(2, 6), torch.ones(6), 1e-6),
            "bias must have dtype torch.float32",
        ),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6144, 1024), (12288, 2048), (24576, 4096)], ids=str)
def test_swiglu_on_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Gate/up of Qwen3-0.6B, 1.7B and 8B with their default configurations."""
    x, weight = randn(1, 256, shape[1], dtype=dtype), randn(2, *shape, dtype=dtype) * shape[1] ** -0.5
    fused = ops.linear_swiglu(x, weight, impl="triton")
    assert torch.equal(fused, ops.swiglu(ops.linear(x, weight, impl="triton"), impl="triton"))
    for rows in (1, 8, 33, 128):
        assert torch.equal(ops.linear_swiglu(x[:rows], weight, impl="triton"), fused[:rows]), rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1024, 2048), (2048, 6144), (4096, 12288)], ids=str)
def test_norm_on_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """o of Qwen3-0.6B, down of 1.7B and 8B with their default configurations."""
    x, weight = randn(1, 128, shape[1], dtype=dtype), randn(2, *shape, dtype=dtype) * shape[1] ** -0.5
    residual, norm = randn(3, 128, shape[0], dtype=dtype), randn(4, shape[0], dtype=dtype)
    normed, hidden = ops.linear_norm(x, weight, None, residual, norm, 1e-6, impl="triton")
    assert torch.equal(hidden, ops.linear(x, weight, None, residual, impl="triton"))
    assert_normed_alike(normed, ops.rms_norm(hidden, norm, 1e-6, impl="triton"))
    for rows in (1, 8, 33):
        some = ops.linear_norm(x[:rows], weight, None, residual[:rows], norm, 1e-6, impl="triton")
        assert torch.equal(some[0], normed[:rows]) and torch.equal(some[1], hidden[:rows]), rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(49152, 576), (151_936, 1024), (151_936, 4096)], ids=str)
def test_choice_on_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """LM heads of SmolLM2-135M, Qwen3-0.6B and 8B; duplicated rows of the weight make exact ties."""
    hidden, weight = randn(1, 64, shape[1], dtype=dtype), randn(2, *shape, dtype=dtype)
    weight[shape[0] // 2 :] = weight[: shape[0] - shape[0] // 2]
    choice = ops.lm_head_choice(hidden, weight, impl="triton")
    logits = ops.linear(hidden, weight, out_dtype=torch.float32, impl="triton")
    assert torch.equal(choice, ops.greedy_choice(logits, impl="reference"))
    assert int(choice.max()) < shape[0] // 2
    for rows in (1, 7, 32):
        assert torch.equal(ops.lm_head_choice(hidden[:rows], weight, impl="triton"), choice[:rows]), rows
