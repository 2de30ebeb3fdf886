"""Arguments whose numbers lie apart in memory are read as others: one at a time, in every op that takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.autotune.store import KernelConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SPLIT = KernelConfig({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "SPLIT_K": 2}, {"num_warps": 4, "num_stages": 2})
WHOLE = KernelConfig({**SPLIT.constants, "SPLIT_K": 1}, dict(SPLIT.launch))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def rope_cache(**arguments: object) -> tuple[torch.Tensor, ...]:
    caches = torch.zeros(2, 2, 1, 8, 16, device=DEVICE)
    return ops.rope_cache(k_out=caches[0], v_out=caches[1], **arguments), caches


PRODUCT = {"x": randn(2, 3, 32), "weight": randn(32, 32), "bias": randn(32)}
INT8 = {
    "x": randn(2, 3, 32),
    "bias": randn(32),
    **dict(zip(("weight", "weight_scale"), ops.quantize_rows(randn(32, 32)))),
}
RESIDUAL, NORM = {"residual": randn(2, 3, 32) + 1}, {"norm_weight": randn(32), "eps": 1e-6}
ATTENTION = {
    "q": randn(2, 4, 4, 64), "key_limit": torch.tensor([[3, 3, 9, 9], [5, 5, 12, 12]], dtype=torch.int32),
    "k_block": randn(2, 4, 2, 64), "v_block": randn(2, 4, 2, 64) + 1, "block_size": 2,
}  # fmt: skip
CALLS: dict[str, tuple[Callable, dict]] = {
    "linear": (ops.linear, PRODUCT | RESIDUAL),
    "linear in int8": (ops.linear, INT8 | RESIDUAL),
    "linear_norm": (ops.linear_norm, PRODUCT | RESIDUAL | NORM),
    "linear_norm in int8": (ops.linear_norm, INT8 | RESIDUAL | NORM),
    "linear_swiglu": (ops.linear_swiglu, PRODUCT),
    "linear_swiglu in int8": (ops.linear_swiglu, INT8),
    "lm_head_choice": (ops.lm_head_choice, {"hidden": randn(2, 3, 32), "weight": randn(32, 32)}),
    "rms_norm": (ops.rms_norm, {"x": randn(2, 3, 32), "weight": randn(32), "eps": 1e-6, **RESIDUAL}),
    "dual_view_attention": (
        ops.dual_view_attention, ATTENTION | {"k_cache": randn(2, 2, 40, 64), "v_cache": randn(2, 2, 40, 64) + 1}
    ),
    "block_attention": (
        ops.block_attention, ATTENTION | {"k_context": randn(2, 2, 40, 64), "v_context": randn(2, 2, 40, 64) + 1}
    ),
    "rope_cache": (
        rope_cache,
        {
            "qkv": randn(2, 3, 64), "cos": randn(2, 3, 8), "sin": randn(2, 3, 8) + 1, "q_norm": randn(16),
            "k_norm": randn(16) + 1, "slots": torch.tensor([[4, 5, 6], [0, 1, 2]], dtype=torch.int32),
        },
    ),
}  # fmt: skip
TOGETHER = ("weight", "k_cache", "v_cache", "k_context", "v_context")  # as arguments are checked to be
CASES = [
    pytest.param(*call, argument, id=f"{name}: {argument}")
    for name, call in CALLS.items()
    for argument, value in call[1].items()
    if isinstance(value, torch.Tensor) and (argument not in TOGETHER or name == "rms_norm")
]


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("op", "arguments", "argument"), CASES)
@torch.no_grad()
def test_an_argument_whose_numbers_lie_apart_is_read_as_another(
    op: Callable, arguments: dict, argument: str, impl: str
) -> None:
    arguments = {name: a.to(DEVICE) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
    dim = 1 if argument in ("k_block", "v_block") else -1  # heads are checked to lie together
    apart = arguments[argument].repeat_interleave(2, dim=dim)
    apart.select(dim, 1).fill_(7)  # something that lies between
    apart = apart[:, ::2] if dim == 1 else apart[..., ::2]
    assert not apart.is_contiguous()
    by_config = op in (ops.linear, ops.linear_norm, ops.linear_swiglu, ops.lm_head_choice) and impl == "triton"
    for how in ({"config": WHOLE}, {"config": SPLIT}) if by_config else ({},):
        results = [op(**arguments | given, impl=impl, **how) for given in ({}, {argument: apart})]
        ours, theirs = (result if isinstance(result, tuple) else (result,) for result in results)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs))
