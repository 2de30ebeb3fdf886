"""What the interpreter fuzzes, once on a GPU at a real size: every example of a fuzz would be compiled anew there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.ops import test_attention, test_block_attention, test_fused_products, test_linear_kl, test_small_ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES: list[tuple[Callable, dict]] = [
    (test_small_ops.test_rms_norm, {"rows": 32, "width": 4096, "add": True, "offset": 1.0}),
    (test_small_ops.test_add_normed, {"rows": 32, "width": 4096, "is_last": False, "offset": 1.0}),
    (test_small_ops.test_norm_spans, {"rows": 32, "queries": 4096, "keys": 1024, "rest": 1024, "offset": 0.0}),
    (test_small_ops.test_gated, {"rows": 32, "width": 12_288, "gelu": False}),
    (test_small_ops.test_gated, {"rows": 32, "width": 12_288, "gelu": True}),
    (test_small_ops.test_linear, {
        "rows": 32, "n": 1536, "k": 1024, "split_k": 2, "bias": True, "add": True, "wide": False,
    }),
    (test_small_ops.test_rope_cache, {"norm": True, "head_dim": 80, "batch": 2, "offset": 0.0}),
    (test_fused_products.test_swiglu_is_the_unfused_pair, {
        "rows": 32, "width": 1536, "k": 1024, "split_k": 1, "bias": False,
    }),
    (test_fused_products.test_norm_is_the_unfused_pair, {
        "rows": 16, "width": 1024, "k": 1024, "split_k": 2, "bias": False, "skip": 1, "offset": 0.0,
    }),
    (test_fused_products.test_rotation_is_the_unfused_pair, {
        "rows": 6, "head_dim": 80, "k": 1024, "split_k": 2, "bias": True, "norm": True, "offset": 1.0,
    }),
    (test_attention.test_triton_fuzz, {
        "batch": 2, "blocks": 3, "block_size": 32, "kv_heads": 8, "group": 4, "context": 80, "window": None,
    }),
    (test_block_attention.test_triton_fuzz, {
        "blocks": 8, "block_size": 32, "kv_heads": 2, "group": 2, "context": 40, "window": None,
    }),
    (test_linear_kl.test_fuzz, {"kind": "hidden", "rows": 200, "width": 1024, "vocab": 5000, "positions": 9, "top": 8}),
    (test_linear_kl.test_fuzz, {"kind": "top-k", "rows": 200, "width": 576, "vocab": 5000, "positions": 90, "top": 32}),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("fuzz", "example"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_gpu_against_fp64(fuzz: Callable, example: dict, dtype: torch.dtype) -> None:
    fuzz.hypothesis.inner_test(seed=1, dtype=dtype, **example)
