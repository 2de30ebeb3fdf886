"""A decoder that multiplies with the library: what exactness costs, and how texts part without it.
The graph, the attention and the small kernels are ours; only the products are cuBLAS's, or a BLAS's on a CPU."""

from __future__ import annotations

from typing import Any

from orthrus_triton.modules import ConsensusDecoder, SharedKVCache
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.kv_cache import ViewPass


class LibraryProducts(ConsensusDecoder):
    """`ConsensusDecoder` with the library's products in every pass, and in kernels of its own what ours take along.
    Its rows have no bits to rely on."""

    def run_cycle(self, cache: SharedKVCache, state: DecodeState, block_size: int, impl: str) -> None:
        library = _LibraryPasses.__new__(_LibraryPasses)  # the very buffers, planning other passes
        library.__dict__.update(cache.__dict__)
        super().run_cycle(library, state, block_size, impl)


class _LibraryPasses(SharedKVCache):
    def view_pass(self, *arguments: Any, **options: Any) -> ViewPass:
        return super().view_pass(*arguments, **options | {"linear_impl": "library"})

    def draft_pass(self, *arguments: Any, **options: Any) -> ViewPass:
        return super().draft_pass(*arguments, **options)._replace(linear_impl="library")
