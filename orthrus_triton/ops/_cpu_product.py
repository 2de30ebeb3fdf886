"""x @ weight.T on a CPU with row bits that do not depend on the row count: products of eight rows, or of more rows
where a bit test on this very machine shows that they are the same."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from orthrus_triton.ops._cpu_packing import has_onednn, pack, packed_weight
from orthrus_triton.ops.cpu.kernels import has_product, linear_cpu

ROW_TILE = 8  # libraries take other kernels for fewer rows
MAX_ROWS = 128  # of one product


def tiled_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]: every row has the bits that it would have alone.

    Rows are filled up to whole tiles. A product of one tile has one shape, and so one kernel, for every number of rows.
    Taller ones read the weight once for all their rows; see `has_tile_bits`.
    """
    if (out := linear_cpu(x, weight, bias)) is not None:
        return out
    x, M = x.contiguous(), x.shape[:-1].numel()  # a library may have another kernel for rows that lie apart
    if M % ROW_TILE:
        filled = F.pad(x.reshape(M, -1), (0, 0, 0, -M % ROW_TILE))
        return tiled_product(filled, weight, bias)[:M].view(*x.shape[:-1], -1)
    if M > MAX_ROWS:
        pieces = [_rows_product(rows, weight, bias) for rows in x.reshape(M, -1).split(MAX_ROWS)]
        return torch.cat(pieces).view(*x.shape[:-1], -1)
    return _rows_product(x, weight, bias)


def library_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """All rows in one call of the fastest library there is; x [..., K] -> [..., N]."""
    if has_product(x, x.shape[:-1].numel()) and (out := linear_cpu(x, weight, bias)) is not None:
        return out
    if x.device.type != "cpu" or not has_onednn(x.dtype):
        return F.linear(x, weight, bias)
    # oneDNN also for fp32, where F.linear takes MKL, which is slower for few rows and rounds them by their number
    packed = packed_weight(weight)
    return _onednn(x, weight if packed is None else packed, bias)


def _rows_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] of whole tiles."""
    of = (*weight.shape, weight.dtype, torch.get_num_threads())
    packed, M = packed_weight(weight), x.shape[:-1].numel()
    for rows in (M, ROW_TILE):
        if packed is not None and has_tile_bits(rows, *of, True):
            product, factor = _onednn, packed
        elif rows == ROW_TILE or has_tile_bits(rows, *of, False):
            product, factor = _plain, weight
        else:
            continue
        break
    if rows == M:
        return product(x, factor, bias)
    tiles = x.reshape(M, -1).split(ROW_TILE)
    return torch.cat([product(tile, factor, bias) for tile in tiles]).view(*x.shape[:-1], -1)


@cache
def has_tile_bits(rows: int, N: int, K: int, dtype: torch.dtype, num_threads: int, packed: bool) -> bool:
    """Whether one product of `rows` rows has, here and now, the bits of the same rows in tiles of eight, times the
    weight as it is.

    A library chooses its kernel by shape, layout, dtype and threads, not by the numbers, so random ones decide for all.
    """
    generator = torch.Generator().manual_seed(rows)
    # on the CPU, whatever torch.set_default_device says
    x = torch.randn(rows, K, generator=generator, device="cpu").to(dtype)
    some = torch.randn(min(N, 512), K, generator=generator, device="cpu").to(dtype)
    weight = some.repeat(-(-N // len(some)), 1)[:N].contiguous()
    tiles = torch.cat([_plain(tile, weight, None) for tile in x.split(ROW_TILE)])
    return torch.equal(_onednn(x, pack(weight), None) if packed else _plain(x, weight, None), tiles)


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if has_onednn(x.dtype):
        return _onednn(x, weight, bias)
    return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
