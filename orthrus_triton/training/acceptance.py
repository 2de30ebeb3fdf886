"""What held-out drafts are worth without decoding: leading matches at fixed anchors, by domain and block position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def acceptance(
    matches: np.ndarray, domain_ids: np.ndarray, domains: Sequence[str], anchor_rows: int = 0
) -> dict[str, float]:
    """Tokens per cycle and match rates.

    A block counts its leading matches, the token that comes free, and the frozen view's own where that reads the
    anchor. Anchors stand evenly in the text; decoding visits hard places more often, so its tokens per cycle are lower
    than these.

    Args:
        matches: [N, A, K-1]: 1 where the draft is the text's token, 0 where not, -1 beyond the text's end.
        domain_ids: [N], indices into `domains`.
        domains: names.
        anchor_rows: 1 where the frozen view reads the anchor.

    Returns:
        `tokens_per_cycle`, the same with `_<domain>`, and `match_<i>` for draft positions 1..K-1.
    """
    per_block = 1 + anchor_rows + np.cumprod(matches == 1, axis=-1).sum(axis=-1)
    metrics = {"tokens_per_cycle": float(per_block.mean())}
    for n, domain in enumerate(domains):
        if (domain_ids == n).any():
            metrics[f"tokens_per_cycle_{domain}"] = float(per_block[domain_ids == n].mean())
    counted = matches >= 0
    rates = (matches == 1).sum(axis=(0, 1)) / np.maximum(counted.sum(axis=(0, 1)), 1)
    return metrics | {f"match_{i}": float(rate) for i, rate in enumerate(rates, start=1)}
