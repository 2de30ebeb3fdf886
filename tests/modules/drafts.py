"""Decoders whose drafts are chosen by the test: exactness must not depend on what is drafted."""

from __future__ import annotations

import torch

from orthrus_triton.modules import ConsensusDecoder, SharedKVCache
from orthrus_triton.modules.decode_state import DecodeState


class ScriptedDrafts(ConsensusDecoder):
    """Drafts from the known AR continuation: right for `right[n]` tokens in cycle n, then wrong, or random.

    Args:
        answers: the AR tokens generated for each prompt, first token included.
        right: how many drafted tokens are right, by cycle; -1 stands for random drafts.
    """

    needs_all_slots = True  # as on a GPU; and the script knows sequences by their slot

    def __init__(self, model, answers: list[torch.Tensor], right: list[int], **options) -> None:
        super().__init__(model, **{"cuda_graph": False} | options)  # the script reads lengths on the host
        self.answers, self.right, self.drafted = answers, right, 0
        self.generator = torch.Generator().manual_seed(0)

    def draft(self, cache: SharedKVCache, state: DecodeState, block_size: int, impl: str) -> torch.Tensor:
        # the real pass must run too: it writes scratch and must disturb nothing
        super().draft(cache, state, block_size, impl)
        right = self.right[self.drafted % len(self.right)]
        self.drafted += 1
        batch, rows = state.block.shape[0], block_size
        candidate = torch.randint(0, self.model.vocab_size, (batch, rows), generator=self.generator).to(state.block)
        candidate[:, 0] = state.block[:, 0]
        for b in range(batch):
            known = self.answers[b][int(state.output_len[b]) :][: rows - 1].to(candidate)
            if right >= 0:
                # wrong everywhere, then right for the wanted prefix
                candidate[b, 1 : 1 + len(known)] = (known + 1) % self.model.vocab_size
                candidate[b, 1 : 1 + min(right, len(known))] = known[:right]
        return candidate
