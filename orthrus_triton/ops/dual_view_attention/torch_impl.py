"""Attention in plain torch, for any device: KV tiles at fixed absolute positions, rows in eights, combined in order.
A library SDPA re-tiles as the context grows, which moves a row's bits; it is given whole tiles and a mask instead."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from orthrus_triton.ops._dispatch import accumulate_dtype

KV_TILE = 512  # keys per tile, at multiples of it; torch's CPU kernel walks the keys in tiles of this length
ROW_TILE = 8  # packed rows (token x head in group) come in multiples of it: BLAS takes other kernels for fewer
ROW_CHUNK = 128  # packed rows at a time: torch's CPU kernel cuts fewer than 192 in one way, and masks stay small
HARMLESS = 1e15  # garbage up to here gives finite scores


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
    exact: bool = True,
) -> torch.Tensor:
    """Same arguments as `dual_view_attention`. A row has the same bits whatever the context length, whatever lies
    beyond its limit, and, without a block, whether it comes alone or with others.

    With exact=False ("library") only the rows and keys there are go in: cheaper for one row, with no such promise.
    """
    (B, T, HQ, D), HKV = q.shape, k_cache.shape[1]
    group = HQ // HKV
    tokens = max(ROW_CHUNK // group, 1)
    if block_size is not None:
        tokens = max(tokens // block_size, 1) * block_size
    out = q.new_empty(q.shape)
    for t in range(0, T, tokens):
        rows = slice(t, t + tokens)
        limit = key_limit[:, rows].clamp(0, k_cache.shape[2])
        lowest = None
        if window is not None:
            steps = torch.arange(limit.shape[1], device=limit.device, dtype=limit.dtype)
            position = limit - 1 if block_size is None else limit + steps % block_size
            lowest = (position + 1 - window).clamp(min=0)
        # [B, HKV, tokens * group, D]: the heads of a group lie beside each other
        packed = q[:, rows].view(B, -1, HKV, group, D).transpose(1, 2).reshape(B, HKV, -1, D)
        # [B, HKV, tokens * group, D] and [B, HKV, tokens * group]
        attended, lse = _attend_cache(packed, k_cache, v_cache, limit, lowest, group, scale, exact)
        if block_size is not None:
            own, own_lse = _attend_own_block(packed, k_block[:, rows], v_block[:, rows], block_size, scale)
            attended = _merge(attended, lse, own, own_lse)
        out[:, rows] = attended.view(B, HKV, -1, group, D).transpose(1, 2).reshape(B, -1, HQ, D)
    return out


def _attend_cache(
    rows: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, limit: torch.Tensor,
    lowest: torch.Tensor | None, group: int, scale: float, exact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Packed rows over the cached keys -> out, and log-sum-exp in fp32, -inf where a row sees none (and out is 0)."""
    num_rows, (shortest, longest) = rows.shape[2], (int(edge) for edge in limit.aminmax())
    if longest == 0:
        return torch.zeros_like(rows), rows.new_full(rows.shape[:3], -torch.inf, dtype=torch.float32)
    tile = KV_TILE if exact else 1
    start = 0 if lowest is None else int(lowest.min()) // tile * tile
    end = -(-longest // tile) * tile
    keys, values = (_tiles(cache, start, end, limit, shortest) for cache in (k_cache, v_cache))
    filled = -num_rows % ROW_TILE if exact else 0
    mask = None
    if exact or shortest < longest or lowest is not None:
        key_ids = torch.arange(start, end, device=rows.device, dtype=limit.dtype)
        # [B, rows, keys]
        hidden = key_ids >= _per_row(limit, group, filled)
        if lowest is not None:
            hidden |= key_ids < _per_row(lowest, group, filled)
        mask = torch.zeros(hidden.shape, dtype=rows.dtype, device=rows.device).masked_fill_(hidden, -torch.inf)
    if filled:
        rows = F.pad(rows, (0, 0, 0, filled))
    out, lse = _sdpa(rows, keys, values, mask, scale)
    out, lse = out[:, :, :num_rows], lse[:, :, :num_rows]
    if shortest == 0 or lowest is not None:
        sees_none = _per_row(limit if lowest is None else (limit - lowest).clamp(min=0), group, 0)[:, None] == 0
        out, lse = out.masked_fill(sees_none, 0.0), lse.masked_fill(sees_none[..., 0], -torch.inf)
    return out, lse


def _per_row(limit: torch.Tensor, group: int, filled: int) -> torch.Tensor:
    """[B, tokens] as a column of the packed rows [B, tokens * group + filled, 1]; rows that fill up have 0."""
    return F.pad(limit.repeat_interleave(group, dim=1), (0, filled))[..., None]


def _tiles(cache: torch.Tensor, start: int, end: int, limit: torch.Tensor, shortest: int) -> torch.Tensor:
    """Rows start..end-1 of a cache, in which nothing a row must not see is NaN, or so large that its score would
    overflow: that would outlive a mask.

    Usually these are the cache's own rows, garbage included; only where some of it is so bad are they copied.
    """
    tiles = cache[:, :, start:end]
    # from the shortest limit on, not every query row sees what is there
    garbage = tiles[:, :, max(shortest - start, 0) :]
    if garbage.shape[2] and not _all_within(garbage, HARMLESS):
        seen = torch.arange(start, start + tiles.shape[2], device=cache.device) < limit.amax(dim=1)[:, None]
        tiles = torch.where(seen[:, None, :, None], tiles, 0)
    if tiles.shape[2] < end - start:  # the end of a cache whose capacity is not a multiple of the tile
        tiles = F.pad(tiles, (0, 0, 0, end - start - tiles.shape[2]))
    return tiles


def _all_within(x: torch.Tensor, bound: float) -> bool:
    low, high = torch.aminmax(x)  # NaN if there is one
    return bool((low >= -bound) & (high <= bound))


def _sdpa(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, HKV, R, D] with an additive mask [B, R, keys] -> out, and log-sum-exp [B, HKV, R]."""
    mask = None if mask is None else mask[:, None]
    if rows.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, 0.0, False, attn_mask=mask, scale=scale
        )
    compute = accumulate_dtype(rows.dtype)
    scores = (rows.to(compute) * scale) @ keys.to(compute).transpose(-1, -2)
    if mask is not None:
        scores += mask.to(compute)
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return (weights @ values.to(compute)).to(rows.dtype), lse


def _attend_own_block(
    rows: torch.Tensor, k_block: torch.Tensor, v_block: torch.Tensor, block_size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows, each over the keys of its own block, in fp32 or more -> out, log-sum-exp."""
    compute, (B, HKV, _, D) = accumulate_dtype(rows.dtype), rows.shape
    # [B, HKV, blocks, block_size, D]
    keys, values = (x.view(B, -1, block_size, HKV, D).permute(0, 3, 1, 2, 4).to(compute) for x in (k_block, v_block))
    blocks = rows.view(B, HKV, keys.shape[2], -1, D).to(compute) * scale
    scores = blocks @ keys.transpose(-1, -2)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    out = torch.exp(scores - lse) @ values
    return out.view(rows.shape), lse.view(rows.shape[:3])


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention over two disjoint sets of keys from attention over each."""
    share = torch.sigmoid(lse.to(other.dtype) - other_lse)[..., None]
    return torch.lerp(other, out.to(other.dtype), share)
