"""Attention in plain torch, for any device: KV tiles at fixed absolute positions, rows in eights, combined in order.
A library SDPA re-tiles as the context grows, which moves a row's bits; it is given tiles and a mask (`key_tails`)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from orthrus_triton.ops._dispatch import accumulate_dtype, without_autocast
from orthrus_triton.ops.cpu.kernels import attention_cpu
from orthrus_triton.ops.dual_view_attention.visible_tiles import VisibleTiles, visible_tiles

ROW_CHUNK = 128  # packed rows at a time: torch's CPU kernel cuts fewer than 192 in one way, and masks stay small
TASK_ROWS = 32  # of those chunks, what torch's CPU kernel gives to a thread at once
LIBRARY_CHUNK = 768  # from here on it takes its largest tiles


@without_autocast
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
    keep: bool = False,
) -> torch.Tensor:
    """Same arguments as `dual_view_attention`. A row has the same bits whatever the context length, whatever lies
    beyond its limit, and, without a block, whether it comes alone or with others.

    With exact=False ("library") only the rows and keys there are go in, and more rows at a time: cheaper for one row
    and for many, with no such promise. With keep=True what is seen is kept for other calls with this very `key_limit`.
    """
    (_, T, HQ, D), (_, HKV, S, _) = q.shape, k_cache.shape
    if T == 0 or len(q) == 0:
        return q.new_empty(q.shape)
    out = attention_cpu(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale)
    if out is not None:
        return out
    group = HQ // HKV
    tokens = max((ROW_CHUNK if exact else LIBRARY_CHUNK) // group, 1)
    if block_size is not None:
        tokens = max(tokens // block_size, 1) * block_size
    pieces = []
    for t in range(0, T, tokens):
        rows = slice(t, t + tokens)
        seen = visible_tiles(key_limit, rows, S, group, block_size, window, exact, q.dtype, D, keep)
        packed = _pack(q if tokens >= T else q[:, rows], HKV)
        out, lse = _attend_cache(packed, k_cache, v_cache, seen, scale, exact)
        if block_size is not None:
            own = _attend_own_block(packed, k_block[:, rows], v_block[:, rows], block_size, scale)
            out = _merge(out, lse, *own).to(q.dtype)
        pieces.append(_unpack(out, HQ))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _pack(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[B, T, HQ, D] -> [B, HKV, T * group, D]: the heads of a group lie beside each other. So do the rows of a head:
    where they lie apart, a library may take another kernel (on 64-bit ARM it does)."""
    B, T, HQ, D = q.shape
    return q.view(B, T, num_kv_heads, -1, D).transpose(1, 2).reshape(B, num_kv_heads, -1, D).contiguous()


def _unpack(packed: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, HKV, T * group, D] -> [B, T, HQ, D]."""
    B, HKV, _, D = packed.shape
    return packed.view(B, HKV, -1, num_heads // HKV, D).transpose(1, 2).reshape(B, -1, num_heads, D).contiguous()


def _attend_cache(
    rows: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, seen: VisibleTiles, scale: float, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows over the cached keys: out, and log-sum-exp in fp32, -inf where a row sees none (and out is 0)."""
    B, num_kv_heads, num_rows, _ = rows.shape
    if seen.end == seen.start:
        return torch.zeros_like(rows), rows.new_full(rows.shape[:3], -torch.inf, dtype=torch.float32)
    if seen.filled:
        rows = F.pad(rows, (0, 0, 0, seen.filled))
    if exact and B * num_kv_heads == 1 and rows.shape[2] <= TASK_ROWS and rows.is_cpu and torch.get_num_threads() > 1:
        # several tasks have a thread each, but a single one is multiplied by all threads, which may round otherwise
        rows, k_cache, v_cache = (tensor.expand(2, -1, -1, -1) for tensor in (rows, k_cache, v_cache))
    keys, values = _tiles(k_cache, seen), _tiles(v_cache, seen)
    out, lse = _sdpa(rows, keys, values, seen.mask, scale)
    if not math.isfinite(out.sum(dtype=torch.float32).item()):
        # garbage that is not finite, or whose scores are not, outlives a mask
        keys, values = (_without_garbage(tiles, seen) for tiles in (keys, values))
        out, lse = _sdpa(rows, keys, values, seen.mask, scale)
        if seen.mask is not None and not math.isfinite(out.sum(dtype=torch.float32).item()):
            _mend_rows(out, lse, rows, keys, values, seen.mask, scale)
    if out.shape[:3] != (B, num_kv_heads, num_rows):
        out, lse = out[:B, :, :num_rows], lse[:B, :, :num_rows]
    if seen.blind is not None:
        out, lse = out.masked_fill(seen.blind, 0.0), lse.masked_fill(seen.blind[..., 0], -torch.inf)
    return out, lse


def _tiles(cache: torch.Tensor, seen: VisibleTiles) -> torch.Tensor:
    """The cache's own rows, filled up with zeros where its capacity is not a multiple of the tile."""
    tiles = cache[:, :, seen.start : seen.end]
    missing = seen.end - seen.start - tiles.shape[2]
    return F.pad(tiles, (0, 0, 0, missing)) if missing else tiles


def _without_garbage(tiles: torch.Tensor, seen: VisibleTiles) -> torch.Tensor:
    """A copy with 0 in what no row of a sequence sees."""
    visible = torch.arange(seen.start, seen.end, device=tiles.device) < seen.limit.amax(dim=1)[:, None]
    return torch.where(visible[:, None, :, None], tiles, 0)


def _mend_rows(
    out: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    mask: torch.Tensor, scale: float,
) -> None:  # fmt: skip
    """Give rows that see nothing but finite numbers, and are not finite themselves, what they are without the keys that
    only others see: a drafted token after which the model overflows must not reach the tokens before it."""
    bad_keys = ~(keys.isfinite().all(-1) & values.isfinite().all(-1))[:, :, None]
    seen = mask == 0
    ill = ~out.isfinite().all(-1) & rows.isfinite().all(-1) & ~(seen & bad_keys).any(-1)
    for r in ill.any(0).any(0).nonzero()[:, 0].tolist():
        # the same shapes, and so the same products, as before
        own = seen[:, :, r, :, None]
        alone = _sdpa(rows, torch.where(own, keys, 0), torch.where(own, values, 0), mask, scale)
        out[:, :, r] = torch.where(ill[:, :, r, None], alone[0][:, :, r], out[:, :, r])
        lse[:, :, r] = torch.where(ill[:, :, r], alone[1][:, :, r], lse[:, :, r])


def _sdpa(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of [B, HKV, R, D] with an additive mask [B, 1, R, keys] -> out, and log-sum-exp [B, HKV, R]."""
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
