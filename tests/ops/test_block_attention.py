"""block_attention, forward and backward: against fp64 autograd, and what a frozen context may and may not change."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton.ops import block_attention
from orthrus_triton.ops.dual_view_attention.reference import attention_reference, visible_keys
from orthrus_triton.testing import assert_within_budget
from tests.ops.attention_cases import DTYPES, Case, make_case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("out", "grad q", "grad k_block", "grad v_block")


def run(case: Case, impl: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """out and the gradients of q, k_block and v_block, for a fixed random gradient of out."""
    q, k_context, v_context, key_limit, k_block, v_block, block_size, window = case.args(dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k_block, v_block)]
    out = block_attention(
        leaves[0], k_context, v_context, key_limit, *leaves[1:], block_size=block_size, window=window, impl=impl
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out(case).to(out.dtype))]


def plain(case: Case) -> list[torch.Tensor]:
    """The same from PyTorch's own attention and autograd, in the dtype of the case."""
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k_block, case.v_block)]
    cached, own = visible_keys(case.key_limit, case.k_cache.shape[2], case.block_size, case.window)
    keys = torch.cat((case.k_cache.nan_to_num(0), leaves[1].transpose(1, 2)), dim=2)
    values = torch.cat((case.v_cache.nan_to_num(0), leaves[2].transpose(1, 2)), dim=2)
    out = torch.nn.functional.scaled_dot_product_attention(
        leaves[0].transpose(1, 2), keys, values, attn_mask=torch.cat((cached, own), dim=2)[:, None], enable_gqa=True
    ).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out(case))]


def grad_out(case: Case) -> torch.Tensor:
    return torch.randn(case.q.shape, generator=torch.Generator().manual_seed(1)).to(case.q)


def check(case: Case, impl: str) -> None:
    reference = run(case, "reference", torch.float64)
    for name, actual, simple, exact in zip(NAMES, run(case, impl), plain(case), reference):
        # In half precision the budget is the rounding of operands, the same for both. In fp32 it is the order of sums
        # over a few keys, where plain PyTorch may be nearly exact, and ours reads its weights from a rounded
        # log-sum-exp.
        factor = 10 if actual.dtype == torch.float32 else 2
        assert_within_budget(actual, simple, exact, factor=factor, what=f"{impl}, {name}")


@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), blocks=st.integers(1, 3), block_size=st.integers(2, 9),
    kv_heads=st.integers(1, 2), group=st.integers(1, 3), context=st.integers(0, 40),
    window=st.one_of(st.none(), st.integers(1, 40)),
)  # fmt: skip
def test_triton_fuzz(seed, dtype, blocks, block_size, kv_heads, group, context, window) -> None:
    case = make_case(
        seed, dtype, DEVICE, rows=blocks * block_size, kv_heads=kv_heads, group=group, capacity=50, context=context,
        block_size=block_size, window=window,
    )  # fmt: skip
    check(case, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_pads_the_head(dtype: torch.dtype) -> None:
    """80 channels in a tile of 128, two sequences, a block longer than a tile of keys."""
    case = make_case(1, dtype, DEVICE, batch=2, rows=33, kv_heads=1, group=1, head_dim=80, context=30, block_size=33)
    check(case, "triton")


@given(
    seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES), batch=st.integers(1, 3), blocks=st.integers(1, 9),
    block_size=st.integers(2, 17), head_dim=st.sampled_from([8, 64]), group=st.integers(1, 4),
    context=st.integers(0, 90), window=st.one_of(st.none(), st.integers(1, 80)),
)  # fmt: skip
def test_torch_fuzz(seed, dtype, batch, blocks, block_size, head_dim, group, context, window) -> None:
    case = make_case(
        seed, dtype, torch.device("cpu"), batch=batch, rows=blocks * block_size, head_dim=head_dim, group=group,
        context=context, block_size=block_size, window=window,
    )  # fmt: skip
    check(case, "torch")


@pytest.mark.parametrize("window", [None, 6])
def test_torch_gradcheck(window: int | None) -> None:
    case = make_case(
        2, torch.float64, torch.device("cpu"), batch=2, rows=6, kv_heads=1, group=2, head_dim=4, capacity=9, context=7,
        block_size=3, window=window,
    )  # fmt: skip
    leaves = [x.requires_grad_() for x in (case.q, case.k_block, case.v_block)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_attention(
            q, case.k_cache, case.v_cache, case.key_limit, k, v, block_size=3, window=window, impl="torch"
        ),
        leaves,
    )


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_an_anchor_at_the_start_sees_its_block_alone(impl: str) -> None:
    case = make_case(3, torch.float32, DEVICE, rows=8, kv_heads=1, group=2, block_size=4)
    case.key_limit.zero_()
    case.k_cache.fill_(torch.nan)
    case.v_cache.fill_(torch.nan)
    out = run(case, impl)[0]
    q, k, v = (x.unflatten(1, (2, 4)).transpose(2, 3) for x in (case.q, case.k_block, case.v_block))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(2, 3).flatten(1, 2))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_limits_are_clamped_to_the_context(impl: str, window: int | None) -> None:
    case = make_case(
        3, torch.float32, DEVICE, rows=4, kv_heads=1, capacity=9, block_size=2, window=window, poison=False
    )
    found = []
    for limits in ([-7, -7, 12, 12], [0, 0, 9, 9]):
        case.key_limit = torch.tensor([limits], dtype=torch.int32, device=DEVICE)
        found.append(run(case, impl))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_repeat_and_ignore_what_nobody_sees(dtype: torch.dtype, impl: str) -> None:
    case = make_case(4, dtype, DEVICE, batch=2, rows=10, kv_heads=1, capacity=70, context=60, block_size=5)
    first = run(case, impl)
    assert all(torch.equal(*pair) for pair in zip(first, run(case, impl)))
    for b, limit in enumerate(case.key_limit.amax(dim=1).tolist()):
        assert case.k_cache[b, :, limit:].isnan().all() and limit < 70
        case.k_cache[b, :, limit:], case.v_cache[b, :, limit:] = 3.0, -torch.inf
    for name, before, after in zip(NAMES, first, run(case, impl)):
        assert torch.equal(before, after), name


def test_a_block_has_the_same_bits_alone_and_among_others() -> None:
    case = make_case(5, torch.float32, DEVICE, rows=15, kv_heads=1, context=60, block_size=5)
    together = run(case, "triton")
    seed = grad_out(case)
    for block in range(3):
        rows = slice(block * 5, block * 5 + 5)
        leaves = [x[:, rows].clone().requires_grad_() for x in (case.q, case.k_block, case.v_block)]
        out = block_attention(
            leaves[0], case.k_cache, case.v_cache, case.key_limit[:, rows], *leaves[1:], block_size=5, impl="triton"
        )
        alone = [out, *torch.autograd.grad(out, leaves, seed[:, rows])]
        for name, one, all_of_them in zip(NAMES, alone, together):
            assert torch.equal(one, all_of_them[:, rows]), (name, block)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_the_context_gets_no_gradient(impl: str) -> None:
    case = make_case(6, torch.float32, DEVICE, rows=4, kv_heads=1, block_size=2, poison=False)
    frozen = run(case, impl)
    case.k_cache.requires_grad_()
    case.v_cache.requires_grad_()
    asked = run(case, impl)
    assert all(torch.equal(*pair) for pair in zip(frozen, asked))
    out = block_attention(case.q.requires_grad_(), *case.args()[1:6], block_size=2, impl=impl)
    out.sum().backward()
    assert case.q.grad.any() and case.k_cache.grad is None and case.v_cache.grad is None


def test_leaving_the_context_out_changes_no_other_gradient() -> None:
    """Autograd through everything, context included, gives the other gradients the same bits."""
    case = make_case(7, torch.float64, DEVICE, rows=6, block_size=3, poison=False)
    without = run(case, "reference")
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k_block, case.v_block, case.k_cache, case.v_cache)]
    q, k_block, v_block, k_context, v_context = leaves
    out = attention_reference(q, k_context, v_context, case.key_limit, k_block, v_block, 3, None, 64**-0.5)
    *grads, grad_k_context, grad_v_context = torch.autograd.grad(out, leaves, grad_out(case))
    assert grad_k_context.any() and grad_v_context.any()
    assert all(torch.equal(*pair) for pair in zip(without, [out, *grads]))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_opcheck(impl: str) -> None:
    case = make_case(8, torch.float32, DEVICE, rows=4, kv_heads=1, group=2, capacity=12, context=9, block_size=2)
    tensors = [case.q, case.k_cache, case.v_cache, case.key_limit, case.k_block, case.v_block]
    options = (2, 5, 0.125, impl)
    ops = torch.ops.orthrus_triton
    out, lse = ops.block_attention(*tensors, *options)
    torch.library.opcheck(ops.block_attention_backward.default, (out, *tensors, out, lse, *options))
    for x in (case.q, case.k_block, case.v_block):
        x.requires_grad_()
    torch.library.opcheck(ops.block_attention.default, (*tensors, *options))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_limit": torch.zeros(1, 4, dtype=torch.int64)}, TypeError, "key_limit must be int32"),
        ({"v_cache": torch.zeros(1, 2, 96, 32)}, ValueError, "v_context must have shape"),
        ({"k_cache": torch.zeros(1, 4, 96, 64)}, ValueError, "multiple of num_kv_heads=4"),
        ({"k_block": torch.zeros(1, 4, 2, 64).half()}, TypeError, "k_block must have the dtype of q"),
        ({"v_block": torch.zeros(1, 5, 2, 64)}, ValueError, "v_block must have shape"),
        ({"block_size": 3}, ValueError, "block_size must be >= 1 and divide"),
        ({"window": 0}, ValueError, "window must be >= 1"),
    ],
)
def test_errors_name_the_argument(change: dict, error: type, message: str) -> None:
    case = make_case(9, torch.float32, torch.device("cpu"), block_size=2, poison=False)
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(error, match=message):
        run(case, "torch")
