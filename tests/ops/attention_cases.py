"""Random attention problems for the tests of this folder: ragged limits, garbage beyond them, optional blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orthrus_triton.autotune.store import KernelConfig

# small tiles and splits, so that short contexts cross many edges
SMALL = KernelConfig({"BLOCK_M": 16, "BLOCK_N": 16, "SPLIT_SIZE": 32}, {"num_warps": 4, "num_stages": 2})
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass
class Case:
    """Arguments of dual_view_attention."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    key_limit: torch.Tensor
    k_block: torch.Tensor | None = None
    v_block: torch.Tensor | None = None
    block_size: int | None = None
    window: int | None = None

    def args(self, dtype: torch.dtype | None = None) -> tuple:
        """Positional arguments, the floating ones in `dtype`."""

        def cast(x: torch.Tensor | None) -> torch.Tensor | None:
            return x if x is None or dtype is None else x.to(dtype)

        return (
            cast(self.q), cast(self.k_cache), cast(self.v_cache), self.key_limit, cast(self.k_block),
            cast(self.v_block), self.block_size, self.window,
        )  # fmt: skip


def make_case(
    seed: int, dtype: torch.dtype, device: torch.device, *, batch: int = 1, rows: int = 4, kv_heads: int = 2,
    group: int = 3, head_dim: int = 64, capacity: int = 96, context: int = 50, block_size: int | None = None,
    window: int | None = None, poison: bool = True,
) -> Case:  # fmt: skip
    """A verify pass of `rows` rows at `context` (ragged over the batch), or with block_size a draft or training pass
    whose blocks each have their own limit. Cache rows no row may see are NaN."""
    generator, on_device = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=on_device, device=device).to(dtype)

    q = randn(batch, rows, kv_heads * group, head_dim)
    k_cache, v_cache = randn(batch, kv_heads, capacity, head_dim), randn(batch, kv_heads, capacity, head_dim)
    start = torch.randint(max(context - 20, 0), context + 1, (batch,), generator=generator).to(torch.int32)
    if block_size is None:
        key_limit = start[:, None] + torch.arange(1, rows + 1, dtype=torch.int32)
    else:
        anchors = torch.randint(0, context + 1, (batch, rows // block_size), generator=generator).to(torch.int32)
        key_limit = anchors.repeat_interleave(block_size, dim=1)
    key_limit = key_limit.to(device)
    if poison:
        for b in range(batch):
            k_cache[b, :, int(key_limit[b].max()) :] = torch.nan
            v_cache[b, :, int(key_limit[b].max()) :] = torch.nan
    k_block = randn(batch, rows, kv_heads, head_dim) if block_size is not None else None
    v_block = randn(batch, rows, kv_heads, head_dim) if block_size is not None else None
    return Case(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window)
