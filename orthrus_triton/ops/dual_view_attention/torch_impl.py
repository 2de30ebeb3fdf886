"""Attention in plain torch, for any device: KV tiles at fixed absolute positions, summed in order.
A library SDPA re-tiles as the context grows, which moves a row's bits; here a tile beyond a row's limit adds zeros."""

from __future__ import annotations

import torch
from einops import rearrange

from orthrus_triton.ops._dispatch import accumulate_dtype

KV_TILE = 256  # keys per tile; tiles start at multiples of it
ROW_TILE = 8  # query rows (tokens) come in multiples of it
ROW_CHUNK = 128  # query rows (tokens) at a time, so that the scores of a long prefill stay small


def attention_torch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor | None,
    v_block: torch.Tensor | None,
    block_size: int | None,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """Same arguments as `dual_view_attention`. A row has the same bits whatever the context length, whatever lies
    beyond its limit, and, without a block, whether it comes alone or with others: BLAS takes other kernels for fewer
    than `ROW_TILE` rows, so those are filled up with rows that see nothing."""
    T = q.shape[1]
    if block_size is None and T % ROW_TILE:
        filled = (0, 0, 0, 0, 0, -T % ROW_TILE)
        q, key_limit = torch.nn.functional.pad(q, filled), torch.nn.functional.pad(key_limit, filled[4:])
        return attention_torch(q, k_cache, v_cache, key_limit, None, None, None, window, scale)[:, :T].contiguous()
    chunk = ROW_CHUNK if block_size is None else max(ROW_CHUNK // block_size, 1) * block_size
    if q.shape[1] <= chunk:
        return _attend(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale)
    out = q.new_empty(q.shape)
    for t in range(0, q.shape[1], chunk):
        rows = slice(t, t + chunk)
        keys, values = (None, None) if k_block is None else (k_block[:, rows], v_block[:, rows])
        out[:, rows] = _attend(
            q[:, rows], k_cache, v_cache, key_limit[:, rows], keys, values, block_size, window, scale
        )
    return out


def _attend(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale) -> torch.Tensor:
    (B, T, HQ, D), (HKV, S) = q.shape, k_cache.shape[1:3]
    group = HQ // HKV
    compute = accumulate_dtype(q.dtype)
    rows = rearrange(q.to(compute) * scale, "b t (h g) d -> b h (t g) d", g=group)
    limit = key_limit.clamp(0, S)
    longest = int(limit.max())
    first = 0
    position = limit - 1
    if block_size is not None:
        position = limit + torch.arange(T, device=q.device, dtype=limit.dtype) % block_size
    lowest = torch.zeros_like(limit)
    if window is not None:
        lowest = (position + 1 - window).clamp(min=0)
        first = int(lowest.min()) // KV_TILE * KV_TILE
    num_tiles = -(-max(longest - first, 0) // KV_TILE)
    width = num_tiles * KV_TILE
    block_keys = T if block_size is not None else 0
    scores = rows.new_empty(B, HKV, T * group, width + block_keys)
    for n in range(num_tiles):
        keys = _tile(k_cache, first + n * KV_TILE, limit, compute)
        scores[..., n * KV_TILE : (n + 1) * KV_TILE] = rows @ keys.transpose(-1, -2)
    key_ids = first + torch.arange(width, device=q.device)
    visible = (key_ids < limit[..., None]) & (key_ids >= lowest[..., None])
    if block_size is not None:
        block_of = torch.arange(T, device=q.device) // block_size
        scores[..., width:] = rows @ rearrange(k_block.to(compute), "b t h d -> b h d t")
        own = (block_of[:, None] == block_of).expand(B, T, T)
        visible = torch.cat((visible, own), dim=-1)
    # [B, 1, T * group, keys]
    visible = visible.repeat_interleave(group, dim=1)[:, None]
    scores.masked_fill_(~visible, -torch.inf)
    if scores.shape[-1] == 0:
        return q.new_zeros(q.shape)
    row_max = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - row_max.masked_fill(row_max == -torch.inf, 0.0))
    accumulator = rows.new_zeros(B, HKV, T * group, D)
    row_sum = rows.new_zeros(B, HKV, T * group, 1)
    for n in range(num_tiles):
        tile_weights = weights[..., n * KV_TILE : (n + 1) * KV_TILE].contiguous()
        accumulator += tile_weights @ _tile(v_cache, first + n * KV_TILE, limit, compute)
        row_sum += tile_weights.sum(dim=-1, keepdim=True)
    if block_size is not None:
        block_weights = weights[..., width:].contiguous()
        accumulator += block_weights @ rearrange(v_block.to(compute), "b t h d -> b h t d")
        row_sum += block_weights.sum(dim=-1, keepdim=True)
    out = accumulator / row_sum.masked_fill(row_sum == 0, 1.0)
    return rearrange(out, "b h (t g) d -> b t (h g) d", g=group).to(q.dtype).contiguous()


def _tile(cache: torch.Tensor, start: int, limit: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """[B, HKV, KV_TILE, D] of the cache in the dtype of the arithmetic, with 0 where no row of the sequence looks."""
    tile = cache[:, :, start : start + KV_TILE].to(compute)
    if tile.shape[2] < KV_TILE:  # the end of a cache whose capacity is not a multiple of the tile
        tile = torch.nn.functional.pad(tile, (0, 0, 0, KV_TILE - tile.shape[2]))
    if start + KV_TILE > int(limit.amax(dim=1).min()):
        seen = torch.arange(start, start + KV_TILE, device=cache.device) < limit.amax(dim=1)[:, None]
        tile = torch.where(seen[:, None, :, None], tile, 0)
    return tile
