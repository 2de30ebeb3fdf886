"""The logits by which the frozen view chose tokens, after the fact: cycles do not keep them.
Its rows have the same bits in any pass, so the text is read again, many rows at a time, over the K/V that are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from orthrus_triton.modules.dual_view_model import DualViewModel, run_view
from orthrus_triton.modules.kv_cache import SharedKVCache

ROWS = 64  # tokens per pass: a large vocabulary's logits of them are some ten megabytes


def reread_logits(
    model: DualViewModel, tokens: Sequence[int], prompt_len: int, prompt_hidden: torch.Tensor, cache: SharedKVCache,
    impl: str, first: int, count: int,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Logits of `count` generated tokens, from the one numbered `first` on.

    A pass writes the K/V of its rows once more, with the bits that they have.

    Args:
        model: see `DualViewModel`.
        tokens: n of them, which were generated.
        prompt_len: tokens of the prompt before them.
        prompt_hidden: [1, 1, H], what prefill had of the prompt's last token: it may have read it with other products.
        cache: of one sequence, which holds the prompt and all tokens but the last.
        impl: of the passes that decoded it.
        first, count: 0 <= first, first + count <= n.

    Yields:
        [rows, V] fp32, before anything was done to them: penalties, temperature.
    """
    end = first + count
    if first == 0 < end:
        yield model.compute_logits(prompt_hidden, impl)[0]
        first = 1
    # a view of the cache that records nothing: passes like these seldom come again
    cache = cache.prefix(cache.capacity)
    for number in range(first, end, ROWS):
        # each is said by the row that reads the one before it
        read = tokens[number - 1 : min(number + ROWS, end) - 1]
        ids = torch.tensor([read], device=cache.context_len.device)
        start = torch.full_like(cache.context_len, prompt_len + number - 1)
        view_pass = cache.view_pass("ar", len(read), start, impl=impl)
        yield model.compute_logits(run_view(model, ids, cache, view_pass), impl)[0]
