"""Which KV tiles some query rows see, and the mask over them.
The layers of a pass all ask for the same, so the answer is kept as long as the pass's key limits live."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from orthrus_triton.ops._kept import Kept
from orthrus_triton.ops.dual_view_attention.key_tails import KV_TILE, tiles_end

ROW_TILE = 8  # packed rows (token x head in group) come in multiples of it: BLAS takes other kernels for fewer
KEPT_TOKENS = 1024  # of a pass whose masks are kept, at most


@dataclass(frozen=True)
class VisibleTiles:
    """Cache rows start..end-1 hold all keys that packed rows [B, R] see, R being tokens * heads in a group.

    limit [B, tokens] int32, clamped to the cache. filled: rows to add, which see nothing. mask [B, 1, R + filled,
    end - start] additive, or None where every row sees every key. blind [B, 1, R, 1] bool: rows that see nothing, None
    where there is none.
    """

    start: int
    end: int
    limit: torch.Tensor
    filled: int
    mask: torch.Tensor | None
    blind: torch.Tensor | None


_kept: Kept[VisibleTiles] = Kept()


def visible_tiles(
    key_limit: torch.Tensor, rows: slice, capacity: int, group: int, block_size: int | None, window: int | None,
    exact: bool, dtype: torch.dtype, head_dim: int, keep: bool,
) -> VisibleTiles:  # fmt: skip
    """What the tokens `rows` of a call see; `capacity` is that of the cache, `dtype` that of the mask and the heads.

    With exact=False the tiles end where the longest row's keys end. With keep=True the answer is kept.
    """
    key = (rows.start, rows.stop, capacity, group, block_size, window, exact, dtype, head_dim)
    keep = keep and key_limit.shape[1] <= KEPT_TOKENS
    return _kept.get(key_limit, key, lambda: _look(key_limit[:, rows], *key[2:]), keep)


def _look(
    key_limit: torch.Tensor, capacity: int, group: int, block_size: int | None, window: int | None, exact: bool,
    dtype: torch.dtype, head_dim: int,
) -> VisibleTiles:  # fmt: skip
    limit = key_limit.clamp(0, capacity)
    shortest, longest = (int(edge) for edge in limit.aminmax())
    filled = -limit.shape[1] * group % ROW_TILE if exact else 0
    start, lowest, blind = 0, None, None
    if window is not None:
        steps = torch.arange(limit.shape[1], device=limit.device, dtype=limit.dtype)
        position = limit - 1 if block_size is None else limit + steps % block_size
        lowest = (position + 1 - window).clamp(min=0)
        start = int(lowest.min()) // KV_TILE * KV_TILE if exact else int(lowest.min())
    end = tiles_end(longest, dtype, head_dim, limit.device) if exact else longest
    end = max(end, start)
    if shortest == 0 or lowest is not None:
        seen = limit if lowest is None else limit - lowest
        blind = _per_row(seen, group, 0)[:, None] <= 0
    mask = None
    if exact or shortest < longest or lowest is not None:
        mask = _mask(start, end, limit, lowest, group, filled, dtype)
    return VisibleTiles(start, end, limit, filled, mask, blind)


def _mask(
    start: int, end: int, limit: torch.Tensor, lowest: torch.Tensor | None, group: int, filled: int, dtype: torch.dtype
) -> torch.Tensor:
    """0 where a row sees a key, -inf elsewhere."""
    key_ids = torch.arange(start, end, device=limit.device, dtype=limit.dtype)
    hidden = key_ids >= _per_row(limit, group, filled)
    if lowest is not None:
        hidden |= key_ids < _per_row(lowest, group, filled)
    return torch.zeros(hidden.shape, dtype=dtype, device=limit.device).masked_fill_(hidden, -torch.inf)[:, None]


def _per_row(limit: torch.Tensor, group: int, filled: int) -> torch.Tensor:
    """[B, tokens] as a column of the packed rows [B, tokens * group + filled, 1]; rows that fill up have 0."""
    return F.pad(limit.repeat_interleave(group, dim=1), (0, filled))[..., None]
