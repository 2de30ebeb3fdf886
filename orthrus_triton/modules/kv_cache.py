"""The one KV cache both views read: static buffers, lengths on the device, drafts in the rows behind them.
Rolling back rejected tokens is a smaller `context_len`; nothing is copied, concatenated or erased."""

from __future__ import annotations

import copy
from typing import Literal, NamedTuple

import torch

from orthrus_triton.modules.recorded_passes import RecordedPasses
from orthrus_triton.ops._dispatch import require_same, require_size
from orthrus_triton.ops.cpu.kernels import has_product

View = Literal["ar", "diffusion"]
CAPACITY_QUANTUM = 512  # capacities are multiples of it: no KV tile of any implementation is cut by the cache's end


class CacheLayer(NamedTuple):
    """One layer's buffers: k, v [B, HKV, S, D]; k_block, v_block [B, K, HKV, D], scratch that all layers share, for
    blocks that must not lie in the cache."""

    k: torch.Tensor
    v: torch.Tensor
    k_block: torch.Tensor
    v_block: torch.Tensor


class ViewPass(NamedTuple):
    """What one pass over T tokens reads and writes, computed once and handed to every layer.

    positions [B, T] int32 for the rotary angles; slots [B, T] int32, the row each token's K/V goes to (of the cache,
    or of the scratch block in a pass of the diffusion view that is no draft); key_limit [B, T] int32 for the attention;
    prompt_len [B] int32 for length-dependent rotary rules; impl and linear_impl choose the implementations.
    parts: of a draft, the passes of its rows by the view that reads them; see `SharedKVCache.draft_pass`.
    """

    view: View
    positions: torch.Tensor
    slots: torch.Tensor
    key_limit: torch.Tensor
    prompt_len: torch.Tensor
    impl: str = "auto"
    linear_impl: str = "auto"
    parts: tuple[ViewPass, ...] = ()

    @property
    def anchor_rows(self) -> int:
        """Leading rows of a draft that the frozen view reads: 0 or 1."""
        return int(len(self.parts) == 2)

    @property
    def only_drafts(self) -> bool:
        """Whether the diffusion view reads every row, so that nothing said depends on this pass."""
        return self.view == "diffusion" and self.anchor_rows == 0


class SharedKVCache:
    """Static K/V buffers of all layers, and how many tokens of each sequence they hold.

    Args:
        num_layers, num_kv_heads, head_dim: shape of the model's attention.
        batch_size: sequences.
        max_len: tokens each sequence may hold; rounded up to a multiple of 512 as `capacity`. K/V of rows beyond that
            are lost without a word, for only the device knows where a row stands: whoever drives passes himself counts.
        block_size: most rows of one draft block; sizes the scratch that windowed layers share. The paper's O(1)
            overhead keeps one block per layer; here drafts lie in the cache's free rows, or in one block for all.
        dtype, device: of the buffers.

    Attributes:
        context_len: [B] int32 on the device, tokens in the cache. Rows beyond it are garbage by design.
        prompt_len: [B] int32 on the device, set at prefill.
        recorded: where a decoder has passes over these buffers recorded, or None.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        batch_size: int,
        max_len: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        sizes |= {"batch_size": batch_size, "max_len": max_len, "block_size": block_size}
        for name, value in sizes.items():
            require_size(name, value)
        self.batch_size, self.block_size = batch_size, block_size
        self.recorded: RecordedPasses | None = None
        self.capacity = -(-max_len // CAPACITY_QUANTUM) * CAPACITY_QUANTUM
        # zeros: rows nobody has written are finite, which lets attention on a CPU mask them instead of copying
        on = {"dtype": dtype, "device": device}
        k_block = torch.zeros(batch_size, block_size, num_kv_heads, head_dim, **on)
        v_block = torch.zeros_like(k_block)
        shape = (batch_size, num_kv_heads, self.capacity, head_dim)
        self.layers = [
            CacheLayer(torch.zeros(shape, **on), torch.zeros(shape, **on), k_block, v_block) for _ in range(num_layers)
        ]
        self.context_len = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.prompt_len = torch.zeros(batch_size, dtype=torch.int32, device=device)

    def view_pass(
        self,
        view: View,
        num_rows: int,
        start: torch.Tensor | None = None,
        *,
        impl: str = "auto",
        linear_impl: str | None = None,
    ) -> ViewPass:
        """Plan a pass over `num_rows` tokens per sequence that begins at position `start` [B] (default: context_len).

        AR view: row t writes cache row start + t and sees everything up to itself. Diffusion view: row t writes
        scratch row t and sees the `start` cached tokens and, beside them, its whole block.

        Raises:
            ValueError: no such view, a number of rows that cannot be, or a `start` that is not [B] int32.
        """
        require_size("num_rows", num_rows)
        if view not in ("ar", "diffusion"):
            raise ValueError(f"view must be 'ar' or 'diffusion', but got {view!r}")
        if view == "diffusion" and num_rows > self.block_size:
            raise ValueError(f"num_rows must be at most block_size={self.block_size} to draft, but got {num_rows}")
        if num_rows > self.capacity:  # rows that reach past it later are lost, for only the device knows where they are
            raise ValueError(f"num_rows must be at most the cache's capacity={self.capacity}, but got {num_rows}")
        if start is None:
            start = self.context_len
        else:
            if not isinstance(start, torch.Tensor):
                raise ValueError(f"start must be a tensor [B] int32 or None, but got {start!r}")
            require_same("start", tuple(start.shape), tuple(self.context_len.shape), "shape")
            require_same("start", start.dtype, torch.int32, "dtype")
        rows = torch.arange(num_rows, dtype=torch.int32, device=start.device)
        positions = start[:, None] + rows
        if view == "ar":
            slots, key_limit = positions, positions + 1
        else:
            # laid out once here, not by every layer's kernels
            slots, key_limit = rows.repeat(start.shape[0], 1), start[:, None].repeat(1, num_rows)
        if linear_impl is None:
            linear_impl = impl
        elif (linear_impl, impl) == ("library", "torch") and has_product(self.layers[0].k, positions.numel()):
            linear_impl = impl  # the library's is not taken where ours is the fastest there is
        return ViewPass(view, positions, slots, key_limit, self.prompt_len, impl, linear_impl)

    def draft_pass(self, block_size: int, anchor_rows: int = 0, *, impl: str = "auto") -> ViewPass:
        """Plan the pass that drafts a block [B, K] at context_len: each row sees the cached tokens and the whole block.

        The block's K/V go to the cache rows behind context_len, where nobody looks until verify has written them anew:
        attention then is the verify pass's own, with other limits. A block that reaches past the cache's end loses
        what lies there. `parts` are for layers with a window, which is counted from each row's own position, as
        limits do not tell; there the block stays in scratch.

        With `anchor_rows=1` the frozen view reads the anchor: its row sees and writes what it would in AR decoding, so
        that it says the token after it, exactly, and the masks see it as they see the tokens before it.

        Raises:
            ValueError: `anchor_rows` is not 0 or 1, or the block has no row for a mask or more than there is room for.
        """
        if anchor_rows not in (0, 1):
            raise ValueError(f"anchor_rows must be 0 or 1, but got {anchor_rows!r}")
        require_size("block_size", block_size)
        if block_size <= anchor_rows:
            raise ValueError(f"block_size must be at least 2 with anchor_rows=1, but got {block_size}")
        first = self.context_len + 1 if anchor_rows else None
        masks = self.view_pass("diffusion", block_size - anchor_rows, first, impl=impl)
        positions, key_limit, parts = masks.positions, masks.key_limit + (block_size - anchor_rows), (masks,)
        if anchor_rows:
            anchor = self.view_pass("ar", 1, impl=impl)
            positions = torch.cat((anchor.positions, positions), dim=1)
            key_limit = torch.cat((anchor.key_limit, key_limit), dim=1)
            parts = (anchor, masks)
        return ViewPass("diffusion", positions, positions, key_limit, self.prompt_len, impl, impl, parts)

    def sequences(self, first: int, count: int) -> SharedKVCache:
        """The buffers of `count` sequences in a row as a cache, all views: what is written to it is written here."""
        only = slice(first, first + count)
        view = copy.copy(self)
        view.batch_size = count
        view.layers = [CacheLayer(*(buffer[only] for buffer in layer)) for layer in self.layers]
        view.context_len, view.prompt_len = self.context_len[only], self.prompt_len[only]
        return view

    def copy_sequence(self, source: int, target: int, rows: int) -> None:
        """Sequence `target` then holds the first `rows` tokens of sequence `source`, and nothing else."""
        for layer in self.layers:
            for buffer in (layer.k, layer.v):
                buffer[target, :, :rows].copy_(buffer[source, :, :rows])
        self.context_len[target : target + 1].fill_(rows)

    def prefix(self, rows: int) -> SharedKVCache:
        """The first `rows` of every sequence as a cache, rounded up to a multiple of 512: views, as in `sequences`."""
        view = copy.copy(self)
        view.recorded = None  # what reads a prompt seldom comes again
        view.capacity = min(-(-rows // CAPACITY_QUANTUM) * CAPACITY_QUANTUM, self.capacity)
        view.layers = [
            layer._replace(k=layer.k[:, :, : view.capacity], v=layer.v[:, :, : view.capacity]) for layer in self.layers
        ]
        return view

    def nbytes(self) -> int:
        """Bytes of K/V buffers, scratch included."""
        scratch = self.layers[0].k_block.nbytes + self.layers[0].v_block.nbytes
        return scratch + sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    def __repr__(self) -> str:
        k = self.layers[0].k
        return (
            f"SharedKVCache(layers={len(self.layers)}, batch={self.batch_size}, kv_heads={k.shape[1]}, "
            f"capacity={self.capacity}, head_dim={k.shape[3]}, block={self.block_size}, dtype={k.dtype}, "
            f"device={k.device})"
        )
