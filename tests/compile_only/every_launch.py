"""Run as a program, without TRITON_INTERPRET: compiles the kernels the library launches, for some GPU families.
Prints one JSON line per variant and exits non-zero if any fails to compile, overflows shared memory or spills."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch

from orthrus_triton.autotune.aot import TARGETS, CompileReport, Launch, compile_launch, record_launches
from orthrus_triton.autotune.defaults import MANY_ROWS_TILES, RULES
from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.ops.add_normed import launch_add_normed
from orthrus_triton.ops.block_attention.launch import launch_backward, launch_forward
from orthrus_triton.ops.consensus import launch_consensus
from orthrus_triton.ops.dual_view_attention.api import HEAD_DIMS
from orthrus_triton.ops.dual_view_attention.launch import launch as launch_attention
from orthrus_triton.ops.linear import launch_linear
from orthrus_triton.ops.linear_kl.chunks import Target
from orthrus_triton.ops.linear_kl.launch import launch_rows, launch_teacher
from orthrus_triton.ops.linear_norm import launch_linear_norm
from orthrus_triton.ops.linear_swiglu import launch_linear_swiglu
from orthrus_triton.ops.lm_head import launch_lm_head_choice
from orthrus_triton.ops.norm_spans import launch_norm_spans
from orthrus_triton.ops.qkv_rope_cache import launch_qkv_rope_cache
from orthrus_triton.ops.rms_norm import launch_rms_norm
from orthrus_triton.ops.rope_cache import launch_rope_cache
from orthrus_triton.ops.sample import launch_greedy_choice
from orthrus_triton.ops.swiglu import launch_gated
from tests.compile_only.problems import that_count
from tests.compile_only.sampling_launches import sampling

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What tests have time for. fp16 takes the tiles and registers of bf16, heads of 96 the tile of 80 and 128; what is
# wrong with those of one family alone, `--every` finds
SOME_HEADS = {torch.bfloat16: (64, 80, 128, 256), torch.float32: (64, 128, 256), torch.float16: (128,)}
FEWER_HEADS = {torch.bfloat16: (64, 128, 256), torch.float32: (128, 256), torch.float16: (128,)}
OF_ONE_MAKER = ("sm80", "sm90", "sm100")
# [N, K] of SmolLM2-135M's and Qwen3-8B's layers: K a multiple of the tile and not, K split and whole
WEIGHTS = ((576, 1536), (49152, 576), (6144, 4096), (24576, 4096))


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def config(op: str, dtype: torch.dtype, family: str, **key: int) -> KernelConfig:
    return KernelConfig(*RULES[op](dtype, family, **key))


def heads(family: str, dtype: torch.dtype, every: bool) -> tuple[int, ...]:
    if every:
        return HEAD_DIMS
    return (SOME_HEADS if family == "sm90" else FEWER_HEADS)[dtype]


def attention(family: str, dtype: torch.dtype, every: bool) -> None:
    for head_dim in heads(family, dtype, every):
        # grouped heads, a window, block keys: the union of the branches; then the plain verify pass, whose branches are
        # a part of them
        plain = every or (head_dim, dtype) == (128, torch.bfloat16)
        for group, window, block_size in ((4, 4096, 32), (3, None, None))[: 1 + plain]:
            q = meta(2, 32, 2 * group, head_dim, dtype=dtype)
            cache, block = meta(2, 2, 4096, head_dim, dtype=dtype), meta(2, 32, 2, head_dim, dtype=dtype)
            block = block if block_size else None
            launch_attention(
                q, cache, cache, meta(2, 32, dtype=torch.int32), block, block, block_size, window, head_dim**-0.5,
                config("dual_view_attention", dtype, family, head_dim=head_dim, group=group),
            )  # fmt: skip


def projections(family: str, dtype: torch.dtype, every: bool) -> None:
    for n, k in WEIGHTS if every or dtype != torch.float16 else WEIGHTS[:1]:
        for out_dtype, extras in ((dtype, True), (torch.float32, False)):
            launch_linear(
                meta(32, k, dtype=dtype), meta(n, k, dtype=dtype), meta(n, dtype=dtype) if extras else None,
                meta(32, n, dtype=out_dtype) if extras else None, out_dtype,
                config("linear", dtype, family, N=n, K=k),
            )  # fmt: skip


def int8_products(family: str) -> None:
    """A weight whose depth ends inside a tile, and qkv of Qwen3-8B."""
    for n, k, dtype in ((576, 1504, torch.float32), (576, 1504, torch.float16), (6144, 4096, torch.bfloat16)):
        launch_linear(
            meta(32, k, dtype=dtype), meta(n, k, dtype=torch.int8), None, None, dtype,
            config("linear", dtype, family, N=n, K=k), meta(n, dtype=torch.float32),
        )  # fmt: skip


def many_rows(family: str, dtype: torch.dtype) -> None:
    """The larger tiles, where a family has them, with what is fused behind a product of a model."""
    n, k = 4096, 4096
    x, weight = meta(300, k, dtype=dtype), meta(n, k, dtype=dtype)
    values, scale = meta(n, k, dtype=torch.int8), meta(n, dtype=torch.float32)
    for constants, launch in MANY_ROWS_TILES.get(family, ()):
        whole, split = (KernelConfig({**constants, "SPLIT_K": split_k}, launch) for split_k in (1, 4))
        launch_linear(x, weight, None, None, dtype, whole)
        launch_linear(x, weight, None, None, dtype, split)
        launch_linear(x, values, None, None, dtype, split, scale)
        launch_linear_swiglu(x, weight, None, whole)
        launch_lm_head_choice(x, weight, whole)


def fused_products(family: str, dtype: torch.dtype) -> None:
    bf16 = dtype == torch.bfloat16
    # o of SmolLM2-135M, whose depth is whole, and down of Qwen3-8B, whose depth is split
    for n, k in ((576, 576), (4096, 12288)):
        launch_linear_norm(
            meta(2, 8, k, dtype=dtype), meta(n, k, dtype=dtype), meta(n, dtype=dtype), meta(2, 8, n, dtype=dtype),
            meta(n, dtype=dtype), 1e-6, float(n == 576), config("linear", dtype, family, N=n, K=k),
        )  # fmt: skip
    # qkv of Qwen3-8B
    cache, angles = meta(2, 8, 512, 128, dtype=dtype), meta(2, 8, 64, dtype=torch.float32)
    launch_qkv_rope_cache(
        meta(2, 8, 4096, dtype=dtype), meta(6144, 4096, dtype=dtype), meta(6144, dtype=dtype), angles, angles, cache,
        cache, meta(2, 8, dtype=torch.int32), meta(128, dtype=dtype), meta(128, dtype=dtype), 1e-6, 0.0,
        config("linear", dtype, family, N=6144, K=4096),
    )  # fmt: skip
    # gate/up of Qwen3-32B, whose depth is whole on every chip, and of 0.6B, whose depth is split
    for n, k in ((51200, 5120), (6144, 1024))[: 1 + bf16]:
        shape = config("linear", dtype, family, N=n, K=k)
        launch_linear_swiglu(meta(32, k, dtype=dtype), meta(n, k, dtype=dtype), meta(n, dtype=dtype), shape)
    # heads of Qwen3-8B and SmolLM2-135M
    n, k = (151_936, 4096) if bf16 else (49152, 576)
    shape = config("linear", dtype, family, N=n, K=k)
    launch_lm_head_choice(meta(32, k, dtype=dtype), meta(n, k, dtype=dtype), shape)


def small_ops(family: str, dtype: torch.dtype, every: bool) -> None:
    for hidden in (576, 4096) if every or dtype != torch.float16 else (576,):
        x, weight = meta(4, hidden, dtype=dtype), meta(hidden, dtype=dtype)
        launch_rms_norm(x, x, weight, 1e-6, 0.0)
        launch_rms_norm(x, None, weight, 1e-6, 1.0)
        launch_add_normed(x, x, weight, 1e-6, weight, 1e-6, 1.0)
        launch_add_normed(x, x, weight, 1e-6, None, 0.0, 0.0)
        launch_norm_spans(meta(4, 3 * hidden, dtype=dtype), weight, weight, 1e-6, 0.0)
    for gelu in (False, True):
        launch_gated(meta(4, 2 * 1536, dtype=dtype), gelu)
    for head_dim in heads(family, dtype, every):
        qkv, cache = meta(2, 4, 8 * head_dim, dtype=dtype), meta(2, 2, 512, head_dim, dtype=dtype)
        angles, slots = meta(2, 4, head_dim // 2, dtype=torch.float32), meta(2, 4, dtype=torch.int32)
        for norm in (meta(head_dim, dtype=dtype), None)[: 1 + (every or head_dim == 64)]:
            launch_rope_cache(qkv, angles, angles, cache, cache, slots, norm, norm, 1e-6, float(head_dim == 256))
    launch_rope_cache(qkv, None, None, cache, cache, slots, None, None, 1e-6, 0.0)
    launch_greedy_choice(meta(4, 49152, dtype=dtype))


def training(family: str, dtype: torch.dtype, head_dims: tuple[int, ...]) -> None:
    for head_dim in head_dims:
        q, block = meta(2, 64, 8, head_dim, dtype=dtype), meta(2, 64, 2, head_dim, dtype=dtype)
        context, limit = meta(2, 2, 4096, head_dim, dtype=dtype), meta(2, 64, dtype=torch.int32)
        options = (32, 4096, head_dim**-0.5, family)
        _, lse = launch_forward(q, context, context, limit, block, block, *options)
        launch_backward(q, q, context, context, limit, block, block, q, lse, *options)
    logits, ids = meta(4, 49152, dtype=torch.float32), meta(4, 32, dtype=torch.int64)
    launch_teacher(logits)
    for target in (Target(logits, line=ids[:, 0]), Target(logits[:, :32], ids=ids)):
        launch_rows(logits, target, meta(4, 49152, dtype=dtype))


def choice_and_consensus() -> None:
    launch_greedy_choice(meta(4, 151_936, dtype=torch.float32))
    for rows in (1, 8, 32):
        ids, ints = meta(2, rows, dtype=torch.int64), meta(2, dtype=torch.int32)
        launch_consensus(
            ids, ids, meta(3, dtype=torch.int64), ints, 151_669, ints, meta(2, 100, dtype=torch.int64), ints,
            meta(2, dtype=torch.bool), meta(2, 32, dtype=torch.int64), meta(2, 32, dtype=torch.int32),
        )  # fmt: skip


def decoding(family: str, every: bool) -> None:
    choice_and_consensus()
    sampling()
    int8_products(family)
    for dtype in (torch.bfloat16, torch.float16)[: 1 + every]:
        many_rows(family, dtype)
    for dtype in DTYPES:
        small_ops(family, dtype, every)
        attention(family, dtype, every)
        projections(family, dtype, every)
        fused_products(family, dtype)


@cache
def variants(family: str, every: bool = False, only_training: bool = False) -> dict[str, Launch]:
    """Every kernel with the default configurations of the family, each variant once: of every shape and dtype, or of
    those that tests have time for. Of the training kernels, which are many and slow to compile, one head size in bf16,
    unless they are asked for alone: then all."""
    with record_launches() as launches:
        if only_training:
            for dtype in DTYPES:
                training(family, dtype, HEAD_DIMS)
        else:
            training(family, torch.bfloat16, (128,))
            decoding(family, every)
    found: dict[str, Launch] = {}
    for launch in launches:
        kinds = {k: v.dtype if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
        found.setdefault(repr((launch.kernel.__name__, launch.options, kinds)), launch)
    return found


def on_tensor_cores(launch: Launch) -> bool:
    """Does it multiply matrices in half precision, with the instructions of one generation of GPUs?"""
    tensors = [value for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    return "PRECISION" in launch.arguments and any(
        tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors
    )


def chosen(family: str) -> Iterator[Launch]:
    """What tests compile. Without tensor cores, a compiler does the same for each generation of a maker's GPUs: a
    variant of several is compiled for one of them, within the limits of all (`problems`)."""
    own = variants(family)
    others = variants("sm90") if family in OF_ONE_MAKER and family != "sm90" else {}
    return (launch for variant, launch in own.items() if on_tensor_cores(launch) or variant not in others)


def problems(launch: Launch, report: CompileReport) -> list[str]:
    families = OF_ONE_MAKER if report.family == "sm90" and not on_tensor_cores(launch) else (report.family,)
    return sorted({problem for family in families for problem in replace(report, family=family).problems()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="+", choices=sorted(TARGETS), metavar="|".join(sorted(TARGETS)))
    parser.add_argument("--every", action="store_true", help="every shape in every dtype, not what tests have time for")
    parser.add_argument("--training", action="store_true", help="every head size and dtype of training, nothing else")
    options = parser.parse_args()
    failed, whole = 0, options.every or options.training
    launches = (
        (family, launch)
        for family in options.families
        for launch in (variants(family, options.every, options.training).values() if whole else chosen(family))
    )
    for family, launch in launches:
        constants = {k: v for k, v in launch.arguments.items() if not isinstance(v, torch.Tensor)}
        line = {"family": family, "kernel": launch.kernel.__name__}
        line["arguments"] = {name: str(value) for name, value in constants.items()}
        try:
            report = compile_launch(launch, family)
            found = that_count(problems(launch, report))
            line |= {"shared": report.shared, "registers": report.registers, "problems": found}
        except Exception as error:  # the compiler raises many types; each is a finding
            line["problems"] = [f"{type(error).__name__}: {error}"]
        failed += bool(line["problems"])
        print(json.dumps(line), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
