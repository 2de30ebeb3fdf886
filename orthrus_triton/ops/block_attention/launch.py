"""From tensors to launches: tiles per GPU family, grids and workspace of the training kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, next_power_of_2
from orthrus_triton.autotune.store import device_family
from orthrus_triton.ops._dispatch import on_its_device
from orthrus_triton.ops.block_attention.kernels import (
    block_attention_forward_kernel,
    block_attention_grad_kv_kernel,
    block_attention_grad_q_kernel,
)

LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """BLOCK_M rows times BLOCK_N keys, and how a program runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Forward, gradient of q, gradient of the block's keys and values, by head_dim up to 64, 128 and 256. Chosen by
# compiling with Triton 3.7.1: they fit and do not spill (with 3.6 a few of fp32 and of 256 spill up to 32 bytes). Not
# tuned on a GPU yet.
HALF_TILES = {
    "sm80": {
        64: (Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2)),
        128: (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
        256: (Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
    "sm90": {
        64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2)),
        128: (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
        256: (Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
    "sm100": {
        64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2)),
        128: (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 2)),
        256: (Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1)),
    },
    "gfx942": {
        64: (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2)),
        128: (Tiles(64, 32, 4, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2)),
        256: (Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 32, 4, 1)),
    },
}
# fp32 products run on FMA units with operands in registers: small tiles everywhere.
FP32_TILES_128 = (Tiles(16, 16, 4, 2), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1))
FP32_TILES_256 = (Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 2), Tiles(16, 16, 8, 2))
FP32_TILES = dict.fromkeys(("sm80", "sm90", "sm100"), {128: FP32_TILES_128, 256: FP32_TILES_256}) | {
    "gfx942": {128: FP32_TILES_128, 256: (*FP32_TILES_256[:2], Tiles(16, 16, 4, 1))}
}


def tiles_for(dtype: torch.dtype, family: str, head_dim: int) -> tuple[Tiles, Tiles, Tiles]:
    """Tiles of the three kernels."""
    table = (FP32_TILES if dtype == torch.float32 else HALF_TILES)[family]
    return table[min(width for width in table if head_dim <= width)]


@on_its_device
def launch_forward(
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor,
    v_block: torch.Tensor,
    block_size: int,
    window: int | None,
    scale: float,
    family: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, T, HQ, D] and the base-2 log-sum-exp [B, T, HQ]."""
    (B, T, HQ, D), (HKV, S) = q.shape, k_context.shape[1:3]
    tiles = tiles_for(q.dtype, family or device_family(q.device), D)[0]
    q, key_limit, k_block, v_block = (x.contiguous() for x in (q, key_limit, k_block, v_block))
    out, lse = torch.empty_like(q), q.new_empty(B, T, HQ, dtype=torch.float32)
    num_tiles = cdiv(T * (HQ // HKV), tiles.block_m)
    block_attention_forward_kernel[(num_tiles, B * HKV)](
        q, k_context, v_context, key_limit, k_block, v_block, out, lse, T, S, block_size, num_tiles,
        *k_context.stride()[:3], *v_context.stride()[:3], WINDOW=window or 0, **_shape(q, HKV, scale, tiles),
    )  # fmt: skip
    return out, lse


@on_its_device
def launch_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor,
    v_block: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_size: int,
    window: int | None,
    scale: float,
    family: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k_block and v_block."""
    (B, T, HQ, D), (HKV, S) = q.shape, k_context.shape[1:3]
    _, q_tiles, kv_tiles = tiles_for(q.dtype, family or device_family(q.device), D)
    grad_out, q, key_limit = grad_out.contiguous(), q.contiguous(), key_limit.contiguous()
    k_block, v_block = k_block.contiguous(), v_block.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k_block), torch.empty_like(v_block)
    delta = torch.empty_like(lse)
    num_tiles = cdiv(T * (HQ // HKV), q_tiles.block_m)
    block_attention_grad_q_kernel[(num_tiles, B * HKV)](
        grad_out, q, k_context, v_context, key_limit, k_block, v_block, out, lse, delta, grad_q, T, S, block_size,
        num_tiles, *k_context.stride()[:3], *v_context.stride()[:3], WINDOW=window or 0, SCALE=scale,
        **_shape(q, HKV, scale, q_tiles),
    )  # fmt: skip
    block_attention_grad_kv_kernel[(T // block_size, cdiv(block_size, kv_tiles.block_n), B * HKV)](
        grad_out, q, k_block, v_block, lse, delta, grad_k, grad_v, T, block_size, SCALE=scale,
        **_shape(q, HKV, scale, kv_tiles),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def _shape(q: torch.Tensor, HKV: int, scale: float, tiles: Tiles) -> dict:
    """Constants and launch options that the three kernels share."""
    HQ, D = q.shape[2:]
    return {
        "HKV": HKV, "GROUP": HQ // HKV, "D": D, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BLOCK_D": max(next_power_of_2(D), 16), "SCALE_LOG2": scale * LOG2_E, "PRECISION": "ieee",
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **EXACT_LAUNCH,
    }  # fmt: skip
