"""dual_view_attention against its fp64 reference, and against its own definition at the edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton.ops import dual_view_attention
from orthrus_triton.ops.dual_view_attention.reference import visible_keys
from orthrus_triton.testing import assert_within_budget
from tests.ops.attention_cases import DTYPES, SMALL, Case, make_case


def plain(case: Case, dtype: torch.dtype) -> torch.Tensor:
    """What PyTorch's own attention gives in this dtype, with the same mask."""
    q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window = case.args(dtype)
    cached, own = visible_keys(key_limit, k_cache.shape[2], block_size, window)
    keys, values, visible = k_cache.nan_to_num(0), v_cache.nan_to_num(0), cached
    if k_block is not None:
        keys = torch.cat((keys, k_block.transpose(1, 2)), dim=2)
        values = torch.cat((values, v_block.transpose(1, 2)), dim=2)
        visible = torch.cat((cached, own), dim=2)
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=visible[:, None], enable_gqa=True
    )
    return out.transpose(1, 2).nan_to_num(0)


def check(case: Case, impl: str, **options) -> torch.Tensor:
    actual = dual_view_attention(*case.args(), impl=impl, **options)
    reference = dual_view_attention(*case.args(torch.float64), impl="reference")
    assert_within_budget(actual, plain(case, case.q.dtype), reference)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_triton_matches_reference(head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(make_case(1, dtype, device, head_dim=head_dim, kv_heads=1), "triton", config=SMALL)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_default_config_matches_reference(dtype: torch.dtype, device: torch.device) -> None:
    check(make_case(2, dtype, device, kv_heads=1, group=2, capacity=600, context=530), "triton")


@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), batch=st.integers(1, 2), blocks=st.integers(0, 3),
    block_size=st.integers(1, 5), kv_heads=st.integers(1, 2), group=st.integers(1, 5), context=st.integers(0, 80),
    window=st.one_of(st.none(), st.integers(1, 70)),
)  # fmt: skip
def test_triton_fuzz(seed, dtype, batch, blocks, block_size, kv_heads, group, context, window) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = make_case(
        seed, dtype, device, batch=batch, rows=max(blocks, 1) * block_size, kv_heads=kv_heads, group=group,
        context=context, block_size=block_size if blocks else None, window=window,
    )  # fmt: skip
    check(case, "triton", config=SMALL)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("block_size", [None, 4])
def test_triton_reads_no_partial_result_that_was_not_written(
    block_size: int | None, window: int | None, device: torch.device
) -> None:
    """Splits that no row of a tile sees are left out; with a window shorter than a block, all of them. What nobody
    wrote is NaN here: see conftest."""
    for seed in range(4):
        case = make_case(seed, torch.float32, device, rows=8, kv_heads=1, block_size=block_size, window=window)
        check(case, "triton", config=SMALL)


@pytest.mark.usefixtures("with_and_without_c")
@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), batch=st.integers(1, 3), blocks=st.integers(0, 3),
    block_size=st.integers(1, 9), head_dim=st.sampled_from([8, 64, 80]), context=st.integers(0, 600),
    window=st.one_of(st.none(), st.integers(1, 300)),
)  # fmt: skip
def test_torch_fuzz(seed, dtype, batch, blocks, block_size, head_dim, context, window) -> None:
    case = make_case(
        seed, dtype, torch.device("cpu"), batch=batch, rows=max(blocks, 1) * block_size, head_dim=head_dim,
        capacity=650, context=context, block_size=block_size if blocks else None, window=window,
    )  # fmt: skip
    check(case, "torch")


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_row_without_keys_is_zero(impl: str, device: torch.device) -> None:
    case = make_case(3, torch.float32, device, rows=2)
    case.key_limit[:] = torch.tensor([0, 5], device=device)
    out = dual_view_attention(*case.args(), impl=impl)
    assert not out[:, 0].any() and out[:, 1].any()


@pytest.mark.parametrize("impl", ["torch", "library"])
def test_no_rows_give_no_rows(impl: str, device: torch.device) -> None:
    q, cache = torch.randn(2, 0, 4, 64, device=device), torch.randn(2, 2, 8, 64, device=device)
    limit = torch.zeros(2, 0, dtype=torch.int32, device=device)
    assert dual_view_attention(q, cache, cache, limit, impl=impl).shape == q.shape


@pytest.mark.parametrize("impl", ["torch", "library"])
def test_blocks_without_a_context_in_fp64(impl: str) -> None:
    case = make_case(3, torch.float64, torch.device("cpu"), context=0, block_size=2)
    expected = dual_view_attention(*case.args(), impl="reference")
    torch.testing.assert_close(dual_view_attention(*case.args(), impl=impl), expected)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_window_shorter_than_the_block_leaves_its_last_rows_the_block_alone(impl: str, device: torch.device) -> None:
    check(make_case(8, torch.float32, device, rows=8, block_size=8, window=3), impl)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_garbage_that_would_overflow_is_not_seen(impl: str, device: torch.device) -> None:
    case = make_case(9, torch.float32, device, rows=4)
    for cache in (case.k_cache, case.v_cache):
        cache.nan_to_num_(nan=3e38)
    check(case, impl)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_limits_are_clamped_to_the_cache(impl: str, device: torch.device) -> None:
    case = make_case(4, torch.float32, device, rows=3, capacity=40, context=20, poison=False)
    case.key_limit[:] = torch.tensor([-7, 40, 1_000_000], device=device)
    out = dual_view_attention(*case.args(), impl=impl)
    assert not out[:, 0].any()
    same_query = Case(case.q[:, 2:], case.k_cache, case.v_cache, case.key_limit[:, 1:2])
    torch.testing.assert_close(out[:, 2:], dual_view_attention(*same_query.args(), impl=impl))


@pytest.mark.usefixtures("with_and_without_c")
def test_window_sees_exactly_its_keys(device: torch.device) -> None:
    """With values that name their row, the average tells which rows were seen."""
    q = torch.zeros(1, 1, 1, 64, device=device)
    k_cache = torch.zeros(1, 1, 64, 64, device=device)
    v_cache = torch.arange(64, device=device).float()[:, None].expand(1, 1, 64, 64).contiguous()
    limit = torch.tensor([[40]], dtype=torch.int32, device=device)
    for impl in ("triton", "torch", "reference"):
        out = dual_view_attention(q, k_cache, v_cache, limit, window=5, impl=impl)
        # position 39 sees rows 35..39
        assert out[0, 0, 0, 0].item() == pytest.approx(37.0), impl


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_key_behind_a_rows_window_harms_no_row_of_its_block(impl: str, device: torch.device) -> None:
    """The first row of a block sees key 31, which is NaN, and the others do not."""
    case = make_case(4, torch.float32, device, group=2, context=0, block_size=4, window=10, poison=False)
    case.key_limit.fill_(40)
    expected = dual_view_attention(*case.args(), impl=impl)
    case.k_cache[:, :, 31] = torch.nan
    out = dual_view_attention(*case.args(), impl=impl)
    assert out[:, 0].isnan().all()
    torch.testing.assert_close(out[:, 1:], expected[:, 1:])


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(("rows", "block_size"), [(70, None), (60, 12), (40, 40)])
def test_torch_takes_whole_blocks_at_a_time(rows: int, block_size: int | None, window: int | None) -> None:
    """With four heads in a group a piece has 32 tokens, which neither block divides."""
    case = make_case(2, torch.float32, torch.device("cpu"), rows=rows, group=4, block_size=block_size, window=window)
    expected = dual_view_attention(*case.args(torch.float64), impl="reference")
    for impl in ("torch", "library"):
        out = dual_view_attention(*case.args(), impl=impl)
        torch.testing.assert_close(out.double(), expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "library"])
def test_what_is_not_finite_is_seen_where_no_key_is_hidden(impl: str) -> None:
    case = make_case(1, torch.float64, torch.device("cpu"), rows=1, capacity=9)
    case.k_cache[0, 1, 4] = torch.nan
    out = dual_view_attention(case.q, case.k_cache, case.v_cache, torch.tensor([[9]], dtype=torch.int32), impl=impl)
    assert out[:, :, 3:].isnan().all() and out[:, :, :3].isfinite().all()


def test_long_calls_are_cut_without_moving_bits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from orthrus_triton.ops.dual_view_attention import launch

    for block_size in (None, 2):
        case = make_case(5, torch.float32, device, rows=6, block_size=block_size)
        whole = dual_view_attention(*case.args(), impl="triton", config=SMALL)
        monkeypatch.setattr(launch, "WORKSPACE_LIMIT", 1)
        assert torch.equal(dual_view_attention(*case.args(), impl="triton", config=SMALL), whole)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_limit": torch.zeros(1, 4, dtype=torch.int64)}, TypeError, "key_limit must be int32"),
        ({"key_limit": torch.zeros(1, 5, dtype=torch.int32)}, ValueError, "key_limit must have shape"),
        ({"v_cache": torch.zeros(1, 2, 96, 32)}, ValueError, "v_cache must have shape"),
        ({"k_cache": torch.zeros(1, 4, 96, 64)}, ValueError, "multiple of num_kv_heads=4"),
        ({"k_cache": torch.zeros(1, 2, 96, 64).half()}, TypeError, "k_cache must have the dtype of q"),
        ({"k_block": torch.zeros(1, 4, 2, 64)}, ValueError, "given together"),
        ({"window": 0}, ValueError, "window must be >= 1"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type, message: str) -> None:
    case = make_case(6, torch.float32, torch.device("cpu"), poison=False)
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(error, match=message):
        dual_view_attention(*case.args(), impl="torch")


def test_triton_never_falls_back() -> None:
    case = make_case(7, torch.float32, torch.device("cpu"), head_dim=48)
    with pytest.raises(ValueError, match="head_dim must be one of"):
        dual_view_attention(*case.args(), impl="triton")
    with pytest.raises(ValueError, match="impl must be one of"):
        dual_view_attention(*case.args(), impl="cuda")
