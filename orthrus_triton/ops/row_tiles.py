"""Larger tiles for products of many rows: batches, drafts of batches, prefill. A result's bits come from the order
along K, which a tile of rows and columns leaves alone, so they are those of the weight's configuration."""

from __future__ import annotations

import torch

from orthrus_triton._triton import cdiv
from orthrus_triton.autotune.defaults import MANY_ROWS_PROGRAMS, MANY_ROWS_TILES
from orthrus_triton.autotune.store import KernelConfig, device_family


def depth_per_split(config: KernelConfig, K: int) -> int:
    """How much of K each split adds up; the last may have less."""
    return cdiv(K, config["BLOCK_K"] * config["SPLIT_K"]) * config["BLOCK_K"]


def tiles_for_rows(config: KernelConfig, rows: int, weight: torch.Tensor) -> KernelConfig:
    """`config`; for more rows than it was made for, the largest tiles that still give most of the GPU a program.

    The splits stay, and along K tensor cores add up in steps of 16, in ascending order, in every tile. Hopper has two
    instructions for that, one for small tiles and one for large; `tests/ops/test_row_tiles.py` shows on a GPU that they
    round alike, and the tuner's gate looks again.

    Args:
        config: of the weight's shape.
        rows: of the product.
        weight: [N, K].
    """
    if weight.device.type != "cuda" or weight.dtype == torch.float32:
        return config
    return choose_tiles(config, rows, *weight.shape, device_family(weight.device))


def choose_tiles(config: KernelConfig, rows: int, N: int, K: int, family: str) -> KernelConfig:
    """The choice of `tiles_for_rows`, of half-precision tiles."""
    for constants, launch in MANY_ROWS_TILES.get(family, ()):
        programs = cdiv(rows, constants["BLOCK_M"]) * cdiv(N, constants["BLOCK_N"]) * config["SPLIT_K"]
        larger = config["BLOCK_M"] < constants["BLOCK_M"] < 2 * rows
        if larger and programs >= MANY_ROWS_PROGRAMS and depth_per_split(config, K) % constants["BLOCK_K"] == 0:
            return KernelConfig({**config.constants, **constants}, launch)
    return config
