"""Built-in configurations per GPU family, chosen by compiling them with Triton 3.6 and 3.7.1: they fit shared memory
and do not spill. Only MANY_ROWS_TILES were measured. What the tuner measured on a GPU takes precedence."""

from __future__ import annotations

import torch

FAMILIES = ("sm80", "sm90", "sm100", "gfx942")

# Shared memory one block may use, bytes.
SHARED_MEMORY_LIMIT = {"sm80": 166_912, "sm90": 232_448, "sm100": 232_448, "gfx942": 65_536}

# Programs that fill the family's largest chip about twice: enough bytes in flight to stream weights.
TARGET_PROGRAMS = {"sm80": 216, "sm90": 264, "sm100": 296, "gfx942": 608}

Rule = tuple[dict[str, int], dict[str, int]]


# (BLOCK_M, BLOCK_N, num_warps, num_stages) for half precision, by head_dim up to 64, 128 and 256.
ATTENTION_TILES = {
    "sm80": {64: (64, 32, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 8, 3)},
    "sm90": {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 3)},
    "sm100": {64: (64, 64, 8, 3), 128: (64, 64, 8, 3), 256: (64, 32, 8, 3)},
    "gfx942": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 4, 2)},
}
# fp32 products run on FMA units, operands in registers: small tiles everywhere.
FP32_TILES = {128: (16, 16, 4, 3), 256: (16, 16, 8, 2)}
ATTENTION_TILES_FP32 = {
    "sm80": {64: (16, 16, 8, 2), **FP32_TILES, 128: (16, 16, 8, 3)},
    "sm90": {64: (16, 32, 8, 1), **FP32_TILES},
    "sm100": FP32_TILES,
    "gfx942": FP32_TILES,
}
SPLIT_SIZE = 256  # keys in each of the first splits; later ones are longer


def count_splits(length: int, split_size: int) -> int:
    """How many splits the first `length` keys lie in: `splits_of` of attention's kernels, on the host."""
    if length <= 8 * split_size:
        return -(-length // split_size)
    if length <= 64 * split_size:
        return 8 - (8 * split_size - length) // (4 * split_size)
    return 22 - (64 * split_size - length) // (8 * split_size)


def attention_rule(dtype: torch.dtype, family: str, *, head_dim: int, group: int) -> Rule:
    """dual_view_attention: key is head_dim and the number of query heads per KV head."""
    tiles = (ATTENTION_TILES_FP32 if dtype == torch.float32 else ATTENTION_TILES)[family]
    block_m, block_n, num_warps, num_stages = tiles[min(width for width in tiles if head_dim <= width)]
    constants = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT_SIZE": SPLIT_SIZE}
    return constants, {"num_warps": num_warps, "num_stages": num_stages}


def linear_rule(dtype: torch.dtype, family: str, *, N: int, K: int) -> Rule:
    """linear: key is the weight's shape. K is split where N alone gives too few programs to fill the chip."""
    if dtype == torch.float32:
        constants = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}
        launch = {"num_warps": 4, "num_stages": 2}
    elif family == "gfx942":
        constants = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64}
        launch = {"num_warps": 4, "num_stages": 2}
    else:
        constants = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 128}
        launch = {"num_warps": 4, "num_stages": 4 if family != "sm80" else 3}
    column_tiles = -(-N // constants["BLOCK_N"])
    depth_tiles = -(-K // constants["BLOCK_K"])
    split_k = 1
    while column_tiles * split_k < TARGET_PROGRAMS[family] and split_k < 8 and depth_tiles >= split_k * 8:
        split_k *= 2
    return constants | {"SPLIT_K": split_k}, launch


# Tiles of half-precision products of many rows, largest first, and how many programs they must leave: two thirds of an
# H200's multiprocessors. Only where their bits were compared with those of small tiles. Measured on an H200.
MANY_ROWS_TILES: dict[str, tuple[Rule, ...]] = {
    "sm90": (
        ({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}, {"num_warps": 8, "num_stages": 4}),
        ({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, {"num_warps": 8, "num_stages": 4}),
        ({"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}, {"num_warps": 4, "num_stages": 4}),
    )
}
MANY_ROWS_PROGRAMS = 88


RULES = {"dual_view_attention": attention_rule, "linear": linear_rule}
