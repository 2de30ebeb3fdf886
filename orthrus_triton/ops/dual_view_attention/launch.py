"""From tensors to launches: the configuration, the grid and the workspace of the attention kernels."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, next_power_of_2
from orthrus_triton.autotune.defaults import count_splits
from orthrus_triton.autotune.store import KernelConfig, lookup
from orthrus_triton.ops._dispatch import on_its_device
from orthrus_triton.ops.dual_view_attention.kernels import combine_splits_kernel, dual_view_attention_kernel

LOG2_E = 1.4426950408889634
WORKSPACE_LIMIT = 256 * 1024 * 1024  # bytes of partial results; more rows than fit are taken in turns
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
) -> torch.Tensor:
    """Run the kernels. Row count and capacity reach grid, masks and workspace, never the configuration."""
    B, T, HQ, D = q.shape
    config = config or lookup("dual_view_attention", q.dtype, q.device, head_dim=D, group=HQ // k_cache.shape[1])
    slots = count_splits(k_cache.shape[2], config["SPLIT_SIZE"]) + (k_block is not None)
    tokens = max(WORKSPACE_LIMIT // (B * HQ * slots * D * 4), 1)
    if block_size is not None:
        tokens = max(tokens // block_size, 1) * block_size
    if T <= tokens:
        return _launch_rows(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, config)
    # a row's bits do not depend on the rows beside it, so a long prefill may be cut anywhere
    parts = [tensor.split(tokens, dim=1) if tensor is not None else None for tensor in (q, key_limit, k_block, v_block)]
    outs = [
        _launch_rows(
            parts[0][n], k_cache, v_cache, parts[1][n], parts[2] and parts[2][n], parts[3] and parts[3][n],
            block_size, window, scale, config,
        )
        for n in range(len(parts[0]))
    ]  # fmt: skip
    return torch.cat(outs, dim=1)


@on_its_device
def _launch_rows(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, config) -> torch.Tensor:
    (B, T, HQ, D), (HKV, S) = q.shape, k_cache.shape[1:3]
    group, has_block = HQ // HKV, k_block is not None
    num_splits = count_splits(S, config["SPLIT_SIZE"])
    slots = num_splits + has_block
    q, key_limit = q.contiguous(), key_limit.contiguous()
    out = torch.empty_like(q)
    partial = torch.empty(B * T * HQ, slots, D, dtype=torch.float32, device=q.device)
    partial_max = torch.empty(B * T * HQ, slots, dtype=torch.float32, device=q.device)
    partial_sum = torch.empty_like(partial_max)
    shape = {
        "D": D, "WINDOW": window or 0, "HAS_BLOCK": has_block, "BLOCK_D": max(next_power_of_2(D), 16),
        "SPLIT_SIZE": config["SPLIT_SIZE"],
    }  # fmt: skip
    dual_view_attention_kernel[(cdiv(T * group, config["BLOCK_M"]), B * HKV, slots)](
        q, k_cache, v_cache, key_limit, k_block.contiguous() if has_block else q,
        v_block.contiguous() if has_block else q, partial, partial_max, partial_sum,
        T, S, num_splits, block_size or 1, *k_cache.stride()[:3], *v_cache.stride()[:3],
        HKV=HKV, GROUP=group, BLOCK_M=config["BLOCK_M"], BLOCK_N=config["BLOCK_N"], SCALE_LOG2=scale * LOG2_E,
        PRECISION="ieee", **shape, **config.launch, **EXACT_LAUNCH,
    )  # fmt: skip
    combine_splits_kernel[(B * T * HQ,)](
        partial, partial_max, partial_sum, key_limit, out, T, S, num_splits, block_size or 1,
        HQ=HQ, num_warps=COMBINE_WARPS, **shape, **EXACT_LAUNCH,
    )  # fmt: skip
    return out
