"""The protocol a model follows to be decoded: seven members, no base class.
And the one place where its hidden states are looked at before they are used."""

from __future__ import annotations

from typing import Protocol

import torch

from orthrus_triton.modules.kv_cache import SharedKVCache, ViewPass


class DualViewModel(Protocol):
    """What the decoder needs of a model.

    block_size: the block the diffusion view was trained for, the largest one that may be asked for.
    mask_token_id: the token that stands for a position to be drafted.
    vocab_size: ids are 0..vocab_size-1, and logits are of these, without padding.
    eos_token_ids: stop tokens when the caller names none; may be empty.

    A model may also have `choose(hidden [B, T, H], impl) -> [B, T]`, the greedy tokens of `compute_logits` with the
    same arithmetic and without the logits in memory (`orthrus_triton.ops.lm_head_choice`), VOID where there is none;
    it is then used. And it may have `anchor_rows`, 1 where the frozen view reads a draft block's anchor, by default 0;
    drafts then come with `ViewPass.parts`, which layers hand to `DualViewAttention` as it is. With `has_chain` true,
    drafts are `chain_drafts(hidden [B, T, H], logits [B, T, V], own [B], noise, recalled) -> [B, T]`; see
    `DraftChain.choose`. With `static_rope_len` n, the angles of a token depend on the prompt's length where that
    exceeds n; K/V of another prompt are then not used again.
    """

    block_size: int
    mask_token_id: int
    vocab_size: int
    eos_token_ids: list[int]

    def new_cache(self, batch_size: int, max_len: int, block_size: int) -> SharedKVCache:
        """Static buffers for this model on its device; arguments as in `SharedKVCache`."""
        ...

    def forward_view(self, input_ids: torch.Tensor, cache: SharedKVCache, view_pass: ViewPass) -> torch.Tensor:
        """input_ids [B, T] through one view -> final hidden states [B, T, H], normed."""
        ...

    def compute_logits(self, hidden: torch.Tensor, linear_impl: str = "auto") -> torch.Tensor:
        """hidden [B, T, H] -> logits [B, T, V], fp32."""
        ...


def run_view(
    model: DualViewModel, input_ids: torch.Tensor, cache: SharedKVCache, view_pass: ViewPass
) -> torch.Tensor:  # fmt: skip
    """`model.forward_view`; a ValueError if what it returns is not [B, T, H] for the tokens [B, T]."""
    hidden = model.forward_view(input_ids, cache, view_pass)
    if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[:2] != input_ids.shape:
        got = f"shape {tuple(hidden.shape)}" if isinstance(hidden, torch.Tensor) else f"a {type(hidden).__name__}"
        raise ValueError(
            "model.forward_view must return hidden states [B, T, H], one for each of its tokens of shape "
            f"{tuple(input_ids.shape)}, but got {got}"
        )
    return hidden
