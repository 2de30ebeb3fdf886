"""The prompt through the AR view, chunk by chunk, one sequence at a time.
A sequence's bits then depend on its own prompt alone, whatever GEMM runs and whoever its batch neighbours are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from orthrus_triton.modules.dual_view_model import DualViewModel, run_view
from orthrus_triton.modules.kv_cache import SharedKVCache

CPU_CHUNK, GPU_CHUNK = 512, 4096  # prompt tokens per pass: enough rows to be bound by arithmetic
ROW_QUANTUM = 8  # passes have whole eights of rows: below that a library may switch to kernels of another order


def prefill(
    model: DualViewModel, prompt: torch.Tensor, cache: SharedKVCache, chunk: int, impl: str, linear_impl: str,
    cached: int = 0, on_hidden: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Write a prompt's K/V into a one-sequence cache.

    Memory grows with `chunk`, not with the prompt: a pass keeps activations of one chunk, and hidden states only of
    the last row. Rows past the prompt's end compute garbage and write it past its length, where nobody looks.

    Args:
        model: see `DualViewModel`.
        prompt: [L] int64.
        cache: of one sequence (`SharedKVCache.sequences`). `prompt_len` and `context_len` are set to L; the choice that
            follows has the last prompt token as its anchor, so that committing it advances past that.
        chunk: prompt tokens per pass.
        impl, linear_impl: of the attention and small ops, and of the products.
        cached: how many of the prompt's first tokens the cache holds already, < L.
        on_hidden: called with the final hidden states [1, n, H] of each chunk's n tokens, which are there until then.

    Returns:
        The final hidden state of the last prompt token [1, 1, H].
    """
    length = prompt.numel()
    for start in range(cached, length, chunk):
        hidden = prefill_chunk(model, prompt, cache, start, min(chunk, length - start), impl, linear_impl)
        if on_hidden is not None:
            on_hidden(hidden)
    return hidden[:, -1:]


def prefill_chunk(
    model: DualViewModel, prompt: torch.Tensor, cache: SharedKVCache, start: int, tokens: int, impl: str,
    linear_impl: str,
) -> torch.Tensor:  # fmt: skip
    """Write the K/V of `tokens` prompt tokens from `start` on, behind those before them -> their final hidden states
    [1, tokens, H]. `context_len` is start + tokens then. Other arguments as in `prefill`."""
    rows = -(-tokens // ROW_QUANTUM) * ROW_QUANTUM
    read = prompt[start : start + rows]
    ids = torch.zeros(1, rows, dtype=torch.int64, device=cache.context_len.device)
    ids[0, : read.numel()].copy_(read)
    cache.prompt_len.fill_(prompt.numel())
    cache.context_len.fill_(start)
    view_pass = cache.view_pass("ar", rows, impl=impl, linear_impl=linear_impl)
    # attention makes room for what a cache can hold, and the host knows that nobody looks further than this yet
    hidden = run_view(model, ids, cache.prefix(start + rows), view_pass)[:, :tokens]
    cache.context_len.fill_(start + tokens)
    return hidden
