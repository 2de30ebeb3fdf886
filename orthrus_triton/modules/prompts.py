"""From what callers pass (a padded batch with its mask, or a list of ragged prompts) to checked 1-D prompts.
And the cache rows that a prompt and its answer need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def split_prompts(
    input_ids: torch.Tensor | Sequence[torch.Tensor], attention_mask: torch.Tensor | None, vocab_size: int
) -> list[torch.Tensor]:
    """One 1-D LongTensor of its own per sequence, padding removed.

    Args:
        input_ids: [B, L] integers, or a list of 1-D tensors (or lists) of any lengths.
        attention_mask: [B, L] of 0 and 1, each row's ones in one run (left or right padding), or None.
        vocab_size: ids must lie in 0..vocab_size-1.

    Raises:
        ValueError: no prompt, an empty prompt, a mask with holes, or what is no id of the vocabulary.
    """
    if isinstance(input_ids, torch.Tensor):
        if input_ids.dim() == 1:
            input_ids = input_ids[None]
        if input_ids.dim() != 2:
            raise ValueError(
                f"input_ids must be [B, L] or a list of 1-D tensors, but got shape {tuple(input_ids.shape)}"
            )
        rows = _unpad(input_ids, attention_mask)
    elif input_ids is None or isinstance(input_ids, (str, Mapping)):
        raise ValueError(f"input_ids must be [B, L] or a list of 1-D tensors, but got a {type(input_ids).__name__}")
    else:
        if attention_mask is not None:
            raise ValueError("attention_mask goes with a [B, L] tensor, but input_ids is a list of prompts")
        try:
            rows = [torch.as_tensor(row) for row in input_ids]
        except (TypeError, ValueError) as error:  # texts, or lists in a prompt
            raise ValueError(f"input_ids must be [B, L] or a list of 1-D prompts of integers, but: {error}") from error
    if not rows:
        raise ValueError("input_ids must hold at least one prompt, but got none")
    for b, row in enumerate(rows):
        if row.dim() != 1 or row.numel() == 0:
            raise ValueError(f"input_ids: prompt {b} must be 1-D with at least one token, but got {tuple(row.shape)}")
        if row.is_floating_point() or row.dtype == torch.bool:
            raise ValueError(f"input_ids: prompt {b} must hold integers, but got {row.dtype}")
        low, high = int(row.min()), int(row.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"input_ids: prompt {b} must hold ids in 0..{vocab_size - 1}, but got {low if low < 0 else high}"
            )
    # copies: slots remember what they hold by them, and the caller may write other prompts into the same tensor
    return [row.to(torch.int64, copy=True) for row in rows]


def _unpad(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    if attention_mask is None:
        return list(input_ids)
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"attention_mask must be a tensor [B, L], but got a {type(attention_mask).__name__}")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"but got {tuple(attention_mask.shape)}"
        )
    if attention_mask.device != input_ids.device:
        raise ValueError(
            f"attention_mask must be on the device of input_ids, {input_ids.device}, but got {attention_mask.device}"
        )
    rows = []
    for b, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool())):
        kept = mask.nonzero().flatten()
        if kept.numel() and int(kept[-1] - kept[0]) + 1 != kept.numel():
            raise ValueError(f"attention_mask: row {b} must have its ones in one run, but it has holes")
        rows.append(ids[mask])
    return rows


def tokens_to_cache(prompt_tokens: int, max_new_tokens: int) -> int:
    """Cache rows a sequence may need; the newest token is never cached."""
    return prompt_tokens + max_new_tokens - 1
