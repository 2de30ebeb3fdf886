"""From tensors to launches: the configuration, the grid and the workspace of the attention kernels."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, next_power_of_2
from orthrus_triton.autotune.store import KernelConfig, lookup
from orthrus_triton.ops.dual_view_attention.kernels import combine_splits_kernel, dual_view_attention_kernel

LOG2_E = 1.4426950408889634
SPLIT_MODES = ("auto", "grid", "loop")
WORKSPACE_LIMIT = 256 * 1024 * 1024  # bytes of partial results beyond which one program takes all splits of its rows
COMBINE_WARPS = 1


def launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor | None,
    v_block: torch.Tensor | None,
    block_size: int | None,
    window: int | None,
    scale: float,
    config: KernelConfig | None = None,
    split_mode: str = "auto",
) -> torch.Tensor:
    """Run the kernels. Row count and capacity reach grid, masks and workspace, never the configuration: both split
    modes merge the same splits in the same order, so the choice between them does not move a bit."""
    (B, T, HQ, D), (HKV, S) = q.shape, k_cache.shape[1:3]
    group = HQ // HKV
    config = config or lookup("dual_view_attention", q.dtype, q.device, head_dim=D, group=group)
    q, key_limit = q.contiguous(), key_limit.contiguous()
    out = torch.empty_like(q)
    has_block = k_block is not None
    num_splits = cdiv(S, config["SPLIT_SIZE"])
    slots = num_splits + has_block
    rows = B * T * HQ
    in_grid = rows * slots * D * 4 <= WORKSPACE_LIMIT if split_mode == "auto" else split_mode == "grid"
    if in_grid:
        partial = torch.empty(rows, slots, D, dtype=torch.float32, device=q.device)
        partial_max = torch.empty(rows, slots, dtype=torch.float32, device=q.device)
        partial_sum = torch.empty_like(partial_max)
    else:
        partial = partial_max = partial_sum = out
    shape = {
        "D": D, "WINDOW": window or 0, "HAS_BLOCK": has_block, "BLOCK_D": max(next_power_of_2(D), 16),
        "BLOCK_N": config["BLOCK_N"], "SPLIT_SIZE": config["SPLIT_SIZE"],
    }  # fmt: skip
    grid = (cdiv(T * group, config["BLOCK_M"]), B * HKV, slots if in_grid else 1)
    dual_view_attention_kernel[grid](
        q, k_cache, v_cache, key_limit, k_block.contiguous() if has_block else q,
        v_block.contiguous() if has_block else q, out, partial, partial_max, partial_sum,
        T, S, num_splits, block_size or 1, *k_cache.stride()[:3], *v_cache.stride()[:3],
        HKV=HKV, GROUP=group, SPLIT_IN_GRID=in_grid, BLOCK_M=config["BLOCK_M"], SCALE_LOG2=scale * LOG2_E,
        PRECISION="ieee", **shape, **config.launch, **EXACT_LAUNCH,
    )  # fmt: skip
    if in_grid:
        combine_splits_kernel[(rows,)](
            partial, partial_max, partial_sum, key_limit, out, T, S, num_splits, block_size or 1,
            HQ=HQ, num_warps=COMBINE_WARPS, **shape, **EXACT_LAUNCH,
        )  # fmt: skip
    return out
