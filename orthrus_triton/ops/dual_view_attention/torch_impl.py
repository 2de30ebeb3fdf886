"""Attention in plain torch, for any device: KV tiles at fixed absolute positions, rows in eights, combined in order.
A library SDPA re-tiles as the context grows, which moves a row's bits; it is given whole tiles and a mask instead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange

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
    T, group = q.shape[1], q.shape[2] // k_cache.shape[1]
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
        packed = rearrange(q[:, rows], "b t (h g) d -> b h (t g) d", g=group)
        # [B, HKV, rows, D] and [B, HKV, rows]
        attended, lse = _attend_cache(packed, k_cache, v_cache, limit, lowest, group, scale, exact)
        if block_size is not None:
            own, own_lse = _attend_own_block(packed, k_block[:, rows], v_block[:, rows], block_size, scale)
            attended = _merge(attended, lse, own, own_lse)
        out[:, rows] = rearrange(attended.to(q.dtype), "b h (t g) d -> b t (h g) d", g=group)
    return out


def _attend_cache(
    rows: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, limit: torch.Tensor,
    lowest: torch.Tensor | None, group: int, scale: float, exact: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Packed rows over the cached keys -> out, and log-sum-exp in fp32, -inf where a row sees none (and out is 0)."""
    num_rows, longest = rows.shape[2], int(limit.max())
    if longest == 0:
        return torch.zeros_like(rows), rows.new_full(rows.shape[:3], -torch.inf, dtype=torch.float32)
    tile = KV_TILE if exact else 1
    start = 0 if lowest is None else int(lowest.min()) // tile * tile
    end = -(-longest // tile) * tile
    keys, values = (_tiles(cache, start, end, limit) for cache in (k_cache, v_cache))
    key_ids = torch.arange(start, end, device=rows.device, dtype=limit.dtype)
    hidden = key_ids >= limit[..., None]
    if lowest is not None:
        hidden |= key_ids < lowest[..., None]
    mask = torch.zeros(hidden.shape, dtype=rows.dtype, device=rows.device).masked_fill_(hidden, -torch.inf)
    # [B, 1, T * group, keys]
    mask = mask.repeat_interleave(group, dim=1)[:, None]
    filled = -num_rows % ROW_TILE if exact else 0
    if filled:
        rows, mask = F.pad(rows, (0, 0, 0, filled)), F.pad(mask, (0, 0, 0, filled))
    out, lse = _sdpa(rows, keys, values, mask, scale)
    sees_none = hidden.all(dim=-1).repeat_interleave(group, dim=1)[:, None]
    return (
        out[:, :, :num_rows].masked_fill(sees_none[..., None], 0.0),
        lse[:, :, :num_rows].masked_fill(sees_none, -torch.inf),
    )


def _tiles(cache: torch.Tensor, start: int, end: int, limit: torch.Tensor) -> torch.Tensor:
    """Rows start..end-1 of a cache, in which nothing a row must not see is NaN, or so large that its score would
    overflow: that would outlive a mask.

    Usually these are the cache's own rows, garbage included; only where some of it is so bad are they copied.
    """
    tiles = cache[:, :, start:end]
    # from here on, not every query row sees what is there
    garbage = tiles[:, :, max(int(limit.min()) - start, 0) :]
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
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, HKV, R, D] over whole tiles with an additive mask -> out, and log-sum-exp [B, HKV, R]."""
    if rows.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, keys, values, 0.0, False, attn_mask=mask, scale=scale
        )
    compute = accumulate_dtype(rows.dtype)
    scores = (rows.to(compute) * scale) @ keys.to(compute).transpose(-1, -2) + mask.to(compute)
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return weights @ values.to(compute), lse


def _attend_own_block(
    rows: torch.Tensor, k_block: torch.Tensor, v_block: torch.Tensor, block_size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows, each over the keys of its own block, in fp32 or more -> out, log-sum-exp."""
    compute = accumulate_dtype(rows.dtype)
    keys, values = (rearrange(x.to(compute), "b (n k) h d -> b h n k d", k=block_size) for x in (k_block, v_block))
    num_blocks = keys.shape[2]
    blocks = rearrange(rows.to(compute), "b h (n r) d -> b h n r d", n=num_blocks) * scale
    scores = blocks @ keys.transpose(-1, -2)
    lse = scores.logsumexp(dim=-1)
    out = torch.exp(scores - lse[..., None]) @ values
    return rearrange(out, "b h n r d -> b h (n r) d"), rearrange(lse, "b h n r -> b h (n r)")


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention over two disjoint sets of keys from attention over each."""
    share = torch.sigmoid(lse.to(other.dtype) - other_lse)[..., None]
    return out.to(other.dtype) * share + other * (1 - share)
