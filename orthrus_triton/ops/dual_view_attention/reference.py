"""The definition in fp64 with an explicit mask: the oracle of every test, never imported by a kernel."""

from __future__ import annotations

import torch
from einops import rearrange, repeat


def visible_keys(
    key_limit: torch.Tensor, num_cached: int, block_size: int | None, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boolean masks of what each row sees: [B, T, S] of the cache, [B, T, T] of the scratch rows."""
    T = key_limit.shape[1]
    rows = torch.arange(T, device=key_limit.device)
    limit = key_limit.clamp(0, num_cached)[..., None]
    keys = torch.arange(num_cached, device=key_limit.device)
    cached = keys < limit
    block_of = rows // (block_size or 1)
    if window is not None:
        position = limit - 1 if block_size is None else limit + (rows % block_size)[:, None]
        cached &= keys > position - window
    own_block = (block_of[:, None] == block_of) & (block_size is not None)
    return cached, own_block.expand(key_limit.shape[0], T, T)


def attention_reference(
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
    """Same arguments as `dual_view_attention`; the dense mask makes it quadratic in memory."""
    cached, own_block = visible_keys(key_limit, k_cache.shape[2], block_size, window)
    keys, values, visible = k_cache, v_cache, cached
    if k_block is not None:
        keys = torch.cat((k_cache, rearrange(k_block, "b t h d -> b h t d")), dim=2)
        values = torch.cat((v_cache, rearrange(v_block, "b t h d -> b h t d")), dim=2)
        visible = torch.cat((cached, own_block), dim=2)
    group = q.shape[2] // k_cache.shape[1]
    # garbage that no row sees must not reach the products: 0 * NaN is NaN
    seen = visible.any(dim=1)[:, None, :, None]
    keys = repeat(torch.where(seen, keys.double(), 0), "b h s d -> b (h g) s d", g=group)
    values = repeat(torch.where(seen, values.double(), 0), "b h s d -> b (h g) s d", g=group)
    scores = torch.einsum("bthd,bhsd->bhts", q.double(), keys) * scale
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return torch.einsum("bhts,bhsd->bthd", weights, values).to(q.dtype).contiguous()
