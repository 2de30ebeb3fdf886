"""x @ weight.T on a CPU with row bits that do not depend on the row count: products of eight rows, or of more rows
where a bit test on this very machine shows that they are the same."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

ROW_TILE = 8  # libraries take other kernels for fewer rows
MAX_ROWS = 128  # of one product


def tiled_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N] -> [M, N]: every row has the bits that it would have alone.

    Rows are filled up to whole tiles. A product of one tile has one shape, and so one kernel, for every M. Taller ones
    read the weight once for all their rows; see `has_tile_bits`.
    """
    M = x.shape[0]
    if M % ROW_TILE:
        x = F.pad(x, (0, 0, 0, -M % ROW_TILE))
    parts = [_rows_product(rows, weight, bias) for rows in x.split(MAX_ROWS)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:M]


def library_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """All rows in one call of the fastest library there is; x [..., K] -> [..., N]."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _has_onednn():
        # oneDNN also for fp32, where F.linear takes MKL: about a third faster for few rows, and alike for all counts
        flat = x.reshape(-1, x.shape[-1])
        return torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "").view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _rows_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.shape[0]
    if rows == ROW_TILE or has_tile_bits(rows, *weight.shape, weight.dtype, torch.get_num_threads()):
        return library_product(x, weight, bias)
    return torch.cat([library_product(tile, weight, bias) for tile in x.split(ROW_TILE)])


@cache
def has_tile_bits(rows: int, N: int, K: int, dtype: torch.dtype, num_threads: int) -> bool:
    """Whether one product of `rows` rows has, here and now, the bits of the same rows in tiles of eight.

    A library chooses its kernel by shape, dtype and threads, not by the numbers, so random ones decide for all.
    """
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, K, generator=generator).to(dtype)
    some = torch.randn(min(N, 512), K, generator=generator).to(dtype)
    weight = some.repeat(-(-N // len(some)), 1)[:N].contiguous()
    tiles = torch.cat([library_product(tile, weight, None) for tile in x.split(ROW_TILE)])
    return torch.equal(library_product(x, weight, None), tiles)


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
