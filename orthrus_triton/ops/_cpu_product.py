"""x @ weight.T on a CPU with row bits that do not depend on the row count: products of eight rows, or of more rows or
one, as bit tests on this very machine allow."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from orthrus_triton.ops._cpu_packing import has_onednn, pack, packed_weight
from orthrus_triton.ops.cpu.kernels import has_product, linear_cpu
from orthrus_triton.ops.int8_product import dequantize_rows

ROW_TILE = 8  # libraries take other kernels for fewer rows
MAX_ROWS = 128  # of one product


def tiled_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor:  # fmt: skip
    """x [..., K], weight [N, K], bias [N] -> [..., N]: every row has the bits that it would have alone. With
    `weight_scale` [N], the weight is in int8, and with `round_rows` x may be rounded to it.

    Rows are filled up to whole tiles. A product of one tile has one shape, and so one kernel, for every number of rows;
    see `row_tile`. Taller ones read the weight once for all their rows; see `has_tile_bits`.
    """
    if (out := linear_cpu(x, weight, bias, weight_scale, round_rows)) is not None:
        return out
    if weight_scale is not None:
        weight = dequantize_rows(weight, weight_scale, x.dtype)
    x, M = x.contiguous(), x.shape[:-1].numel()  # a library may have another kernel for rows that lie apart
    if missing := -M % row_tile(*weight.shape, weight.dtype, torch.get_num_threads()):
        filled = F.pad(x.reshape(M, -1), (0, 0, 0, missing))
        return tiled_product(filled, weight, bias)[:M].view(*x.shape[:-1], -1)
    if M > MAX_ROWS:
        pieces = [_rows_product(rows, weight, bias) for rows in x.reshape(M, -1).split(MAX_ROWS)]
        return torch.cat(pieces).view(*x.shape[:-1], -1)
    return _rows_product(x, weight, bias)


def library_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor:  # fmt: skip
    """All rows in one call of the fastest library there is; x [..., K] -> [..., N]. No library multiplies int8."""
    if weight_scale is not None:
        if (out := linear_cpu(x, weight, bias, weight_scale, round_rows)) is not None:
            return out
        weight = dequantize_rows(weight, weight_scale, x.dtype)
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
    packed, M, tile = packed_weight(weight), x.shape[:-1].numel(), row_tile(*of)
    for rows in (M, tile):
        if packed is not None and has_tile_bits(rows, *of, True):
            product, factor = _onednn, packed
        elif rows == tile or has_tile_bits(rows, *of, False):
            product, factor = _plain, weight
        else:
            continue
        break
    if rows == M:
        return product(x, factor, bias)
    return torch.cat([product(some, factor, bias) for some in x.reshape(M, -1).split(tile)]).view(*x.shape[:-1], -1)


@cache
def row_tile(N: int, K: int, dtype: torch.dtype, num_threads: int) -> int:
    """Rows of a tile, here and now: eight, or one where it matters to a row which of the eight it is. On 64-bit ARM,
    oneDNN multiplies six rows of fp32 together and then two, which it sums in another order."""
    x, weight = _numbers(ROW_TILE, N, K, dtype)
    tile = _plain(x, weight, None)
    shifted = (_plain(x.roll(by, 0), weight, None).roll(-by, 0) for by in range(1, ROW_TILE))
    return ROW_TILE if all(torch.equal(tile, other) for other in shifted) else 1


@cache
def has_tile_bits(rows: int, N: int, K: int, dtype: torch.dtype, num_threads: int, packed: bool) -> bool:
    """Whether one product of `rows` rows has, here and now, the bits of the same rows in tiles, times the weight as it
    is."""
    x, weight = _numbers(rows, N, K, dtype)
    tiles = torch.cat([_plain(some, weight, None) for some in x.split(row_tile(N, K, dtype, num_threads))])
    return torch.equal(_onednn(x, pack(weight), None) if packed else _plain(x, weight, None), tiles)


def _numbers(rows: int, N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, K] and a weight [N, K]: a library chooses its kernel by shape, layout, dtype and threads, not by the
    numbers, so random ones decide for all."""
    random = np.random.default_rng(rows)  # torch's would depend on its default device, and vmap forbids it
    x, some = (random.standard_normal((count, K), dtype=np.float32) for count in (rows, min(N, 512) or 1))
    weight = torch.from_numpy(some).to(dtype).repeat(-(-N // len(some)), 1)[:N]
    return torch.from_numpy(x).to(dtype), weight.contiguous()


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if has_onednn(x.dtype):
        return _onednn(x, weight, bias)
    return F.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # of a bias it only looks at where it begins
    bias = bias if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
