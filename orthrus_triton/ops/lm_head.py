"""The greedy token of each row straight from hidden states and LM head: no [rows, vocab] logits in memory.
Products have the bits of `linear`, so the choice is the one its logits would give, near ties included."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, tl, triton
from orthrus_triton.autotune.store import KernelConfig, lookup
from orthrus_triton.ops._dispatch import on_its_device, require_kernel, resolve_impl
from orthrus_triton.ops.linear import check_product, launch_linear, linear_reference, linear_torch
from orthrus_triton.ops.product_tile import product_tile
from orthrus_triton.ops.row_tiles import tiles_for_rows
from orthrus_triton.ops.sample import greedy_choice_reference, greedy_choice_torch, launch_greedy_choice


def lm_head_choice(
    hidden: torch.Tensor, weight: torch.Tensor, *, impl: str = "auto", config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None, round_rows: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`greedy_choice(linear(hidden, weight, out_dtype=torch.float32))` without the logits.

    Args:
        hidden: [..., H], fp32, fp16 or bf16.
        weight: [V, H], the dtype of `hidden`, contiguous.
        impl: "auto", "triton", "torch" or "reference".
        config: kernel configuration, by default the one `linear` takes for this weight shape. Only with impl="triton".
        weight_scale, round_rows: [V] float, for a `weight` of int8, and what becomes of `hidden` then, as in `linear`.

    Returns:
        [...] int64: the id of the largest fp32 logit, the lowest among equals. A NaN never wins; a row of NaN and -inf
        alone gives VOID, no token.

    Raises:
        ValueError: shapes or dtypes that do not agree.
    """
    check_product(hidden, weight, None, weight_scale)
    impl = resolve_impl(impl, hidden)
    require_kernel(config, impl)
    if config is not None:
        return launch_lm_head_choice(hidden, weight, config, weight_scale)
    return torch.ops.orthrus_triton.lm_head_choice(hidden, weight, impl, weight_scale, round_rows)


@triton.jit(do_not_specialize=["M"])
def lm_head_kernel(
    hidden_ptr, weight_ptr, tile_best_ptr, tile_id_ptr, M,
    V: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column tiles): each row's largest logit among BLOCK_N ids, and the lowest id that has it."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_N)
    first_id = tl.program_id(1) * BLOCK_N
    ids = first_id + lanes
    row_mask = rows < M
    id_mask = ids < V
    # [BLOCK_M, BLOCK_N]
    logits = product_tile(
        hidden_ptr, weight_ptr, rows, ids, row_mask, id_mask, 0, H, H, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )
    logits = tl.where(id_mask[None, :] & (logits == logits), logits, float("-inf"))
    best = tl.max(logits, axis=1)
    best_id = first_id + tl.min(tl.where(logits == best[:, None], lanes[None, :], BLOCK_N), axis=1)
    slots = rows * tl.cdiv(V, BLOCK_N) + tl.program_id(1)
    tl.store(tile_best_ptr + slots, best, mask=row_mask)
    tl.store(tile_id_ptr + slots, best_id, mask=row_mask)


@triton.jit
def best_tile_kernel(
    tile_best_ptr, tile_id_ptr, out_ptr, V: tl.constexpr, NUM_TILES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (rows): `greedy_choice` over the column tiles' winners, whose ids ascend."""
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), -2, tl.int32)  # VOID, until a logit is larger than -inf
    for start in range(0, NUM_TILES, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        # [BLOCK], [BLOCK]
        logits = tl.load(tile_best_ptr + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=float("-inf"))
        ids = tl.load(tile_id_ptr + row * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=V)
        part_best = tl.max(logits, axis=0)
        part_id = tl.min(tl.where(logits == part_best, ids, V), axis=0)
        # strictly greater: an equal logit in a later tile has a higher id
        better = part_best > best
        best_id = tl.where(better, part_id, best_id)
        best = tl.where(better, part_best, best)
    tl.store(out_ptr + row, best_id.to(tl.int64))


BLOCK = 1024
NUM_WARPS = 4


@on_its_device
def launch_lm_head_choice(
    hidden: torch.Tensor, weight: torch.Tensor, config: KernelConfig | None = None,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Run the kernels with `linear`'s configuration of this weight shape."""
    V, H = weight.shape
    config = config or lookup("linear", hidden.dtype, hidden.device, N=V, K=H)
    if config["SPLIT_K"] > 1 or weight_scale is not None:  # no logit is whole before the splits are summed and scaled
        return launch_greedy_choice(launch_linear(hidden, weight, None, None, torch.float32, config, weight_scale))
    hidden = hidden.contiguous()
    M = hidden.numel() // H
    config = tiles_for_rows(config, M, weight)
    num_tiles = cdiv(V, config["BLOCK_N"])
    tile_best = hidden.new_empty(M, num_tiles, dtype=torch.float32)
    tile_id = hidden.new_empty(M, num_tiles, dtype=torch.int32)
    out = hidden.new_empty(hidden.shape[:-1], dtype=torch.int64)
    tiles = {name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    lm_head_kernel[(cdiv(M, config["BLOCK_M"]), num_tiles)](
        hidden, weight, tile_best, tile_id, M, V=V, H=H, PRECISION="ieee", **tiles, **config.launch, **EXACT_LAUNCH
    )
    best_tile_kernel[(M,)](
        tile_best, tile_id, out, V=V, NUM_TILES=num_tiles, BLOCK=BLOCK, num_warps=NUM_WARPS, **EXACT_LAUNCH
    )
    return out


@torch.library.custom_op(
    "orthrus_triton::lm_head_choice",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, str impl, Tensor? weight_scale=None, bool round_rows=False) -> Tensor",
)
def _lm_head_choice_op(hidden, weight, impl, weight_scale=None, round_rows=False):
    if impl == "triton":
        return launch_lm_head_choice(hidden, weight, weight_scale=weight_scale)
    if impl == "torch":
        # a CPU's product is rounded to its own dtype, and choosing among twice as many bytes takes five times as long
        dtype = hidden.dtype if hidden.is_cpu else torch.float32
        return greedy_choice_torch(linear_torch(hidden, weight, None, None, dtype, weight_scale, round_rows))
    return greedy_choice_reference(linear_reference(hidden, weight, None, weight_scale))


@_lm_head_choice_op.register_fake
def _(hidden, weight, impl, weight_scale=None, round_rows=False):
    return hidden.new_empty(hidden.shape[:-1], dtype=torch.int64)
