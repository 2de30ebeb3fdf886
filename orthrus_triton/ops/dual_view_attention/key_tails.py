"""How short the last KV tile may be cut without moving a bit: found out on the machine at hand, once.
A context of 100 tokens then costs a CPU 128 keys instead of 512."""

from __future__ import annotations

from functools import cache

import torch

KV_TILE = 512  # keys per tile, at multiples of it; torch's CPU kernel walks the keys in tiles of this length
TAIL_STEP = 64
HEADS, ROWS = 6, (40, 48, 56, 64)  # packed rows that end in a tile of 8, 16, 24 and 32: the kernel's heights


def tiles_end(longest: int, dtype: torch.dtype, head_dim: int, device: torch.device) -> int:
    """Keys to walk so that `longest` of them are seen: whole tiles, the last one cut where that changes no bit."""
    whole = longest // KV_TILE * KV_TILE
    needed = longest - whole
    if needed == 0 or device.type != "cpu":
        return whole if needed == 0 else whole + KV_TILE
    tails = safe_tails(dtype, head_dim, torch.get_num_threads())
    return whole + next(tail for tail in tails if tail >= needed)


@cache
def safe_tails(dtype: torch.dtype, head_dim: int, num_threads: int) -> tuple[int, ...]:
    """Lengths of a last tile with which the kernel gives what it gives for a whole tile whose rest is masked.

    Its products choose how to cut the keys by their number (by 256 and 320 on one machine otherwise than by 512), not
    by their values, so random ones decide for all.
    """
    cut = [tail for tail in range(TAIL_STEP, KV_TILE, TAIL_STEP) if _has_whole_bits(tail, dtype, head_dim)]
    return (*cut, KV_TILE)


@torch.no_grad()
def _has_whole_bits(tail: int, dtype: torch.dtype, head_dim: int) -> bool:
    """As the only tile, and as one that adds to the result of the tile before it."""
    generator = torch.Generator().manual_seed(tail)
    cpu = {"device": "cpu"}  # whatever torch.set_default_device says
    for before in (0, KV_TILE):
        for num_rows in ROWS:
            whole, end = before + KV_TILE, before + tail
            q, k, v = (
                torch.randn(1, HEADS, length, head_dim, generator=generator, **cpu).to(dtype)
                for length in (num_rows, whole, whole)
            )
            limit = torch.randint(end - TAIL_STEP + 1, end + 1, (num_rows, 1), generator=generator, **cpu)
            mask = torch.zeros(num_rows, whole, dtype=dtype, **cpu)
            mask.masked_fill_(torch.arange(whole, **cpu) >= limit, -torch.inf)
            results = [
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q, k[:, :, :n], v[:, :, :n], 0.0, False, attn_mask=mask[None, None, :, :n], scale=head_dim**-0.5
                )
                for n in (whole, end)
            ]
            if not all(torch.equal(a, b) for a, b in zip(*results)):
                return False
    return True
