"""Products of many rows run in larger tiles: which, that the splits stay where they are, and that the bits do."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from orthrus_triton.autotune.config import KernelConfig
from orthrus_triton.autotune.defaults import MANY_ROWS_TILES
from orthrus_triton.autotune.store import device_family
from orthrus_triton.ops.linear import launch_linear, launch_partial
from orthrus_triton.ops.linear_swiglu import launch_linear_swiglu
from orthrus_triton.ops.lm_head import launch_lm_head_choice
from orthrus_triton.ops.row_tiles import choose_tiles, depth_per_split, tiles_for_rows

LAUNCH = {"num_warps": 4, "num_stages": 3}


def config(block_m: int = 32, block_n: int = 64, block_k: int = 128, split_k: int = 1) -> KernelConfig:
    return KernelConfig({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT_K": split_k}, LAUNCH)


@pytest.mark.parametrize(
    ("rows", "N", "K", "base", "tile"),
    [
        (1, 24576, 4096, config(), (32, 64)),
        (32, 24576, 4096, config(), (32, 64)),
        (64, 24576, 4096, config(), (64, 128)),
        (64, 24576, 4096, config(block_m=64), (64, 64)),  # the weight's own tile has room for them
        (256, 24576, 4096, config(), (128, 256)),
        (256, 6144, 4096, config(), (128, 128)),  # 48 larger tiles would leave most of the GPU idle
        (256, 4096, 12288, config(split_k=4), (128, 256)),
        (256, 576, 576, config(), (32, 64)),  # no tile gives enough programs
        (256, 4096, 4128, config(block_k=32, split_k=4), (32, 64)),  # 1,056 a split: no whole number of tiles of 64
    ],
)
def test_the_largest_tile_that_fills_the_gpu(rows: int, N: int, K: int, base: KernelConfig, tile: tuple) -> None:
    chosen = choose_tiles(base, rows, N, K, "sm90")
    assert (chosen["BLOCK_M"], chosen["BLOCK_N"]) == tile
    assert chosen["SPLIT_K"] == base["SPLIT_K"]
    assert depth_per_split(base, K) % chosen["BLOCK_K"] == 0
    assert (chosen is base) == (tile == (base["BLOCK_M"], base["BLOCK_N"]))


def test_other_families_and_devices_keep_theirs() -> None:
    assert choose_tiles(config(), 4096, 24576, 4096, "sm80") == config()
    assert tiles_for_rows(config(), 4096, torch.empty(24576, 4096, device="meta")) == config()


def test_a_split_ends_where_the_configuration_says(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Tiles half as deep as the configuration's: with splits of their own they would add other parts up."""
    base = config(16, 16, 64, split_k=2)
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.randn(n, 320, device=device, generator=generator) for n in (40, 48))  # splits of 192 and 128
    expected = launch_partial(x, weight, base)
    tile = KernelConfig({**base.constants, "BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, LAUNCH)
    monkeypatch.setattr(import_module("orthrus_triton.ops.linear"), "tiles_for_rows", lambda *_: tile)
    torch.testing.assert_close(launch_partial(x, weight, base), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(expected[0], x[:, :192] @ weight[:, :192].T, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K", "split_k"), [(4096, 4096, 4), (6144, 4096, 1), (8192, 4160, 2), (24500, 1024, 1)])
def test_gpu_every_tile_has_the_bits_of_the_smallest(dtype: torch.dtype, N: int, K: int, split_k: int) -> None:
    device = torch.device("cuda")
    if device_family(device) not in MANY_ROWS_TILES:
        pytest.skip("this GPU's family has no tiles for many rows")
    torch.manual_seed(N)
    x = torch.randn(1000, K, device=device, dtype=dtype)
    weight = torch.randn(N, K, device=device, dtype=dtype) * K**-0.5
    base = config(split_k=split_k)
    ops = [
        lambda x: launch_linear(x, weight, None, None, torch.float32, base),
        lambda x: launch_linear_swiglu(x, weight, None, base),
        lambda x: launch_lm_head_choice(x, weight, base),
    ]
    tiles = {tiles_for_rows(base, rows, weight)["BLOCK_M"] for rows in (1, 64, 129, 1000)}
    assert {32, 128} <= tiles
    for op in ops:
        few = torch.cat([op(rows) for rows in x.split(32)])
        for rows in (33, 64, 65, 129, 256, 300, 1000):
            assert torch.equal(op(x[:rows]), few[:rows]), f"{rows} rows"
