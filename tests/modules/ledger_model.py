"""A dual-view model without layers: the cache is a ledger of tokens, logits are a table looked up by all of it.
Exact in any batch and cheap, so thousands of runs can be compared with an oracle of plain Python."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from orthrus_triton.modules import SharedKVCache, ViewPass
from orthrus_triton.modules.sampling_params import SamplingParams
from orthrus_triton.ops import SamplingTensors, greedy_choice
from orthrus_triton.ops.gumbel import CHOICE
from orthrus_triton.ops.sample_torch import sample_choice_torch

SUMS, PERIOD = 101, 7


class LedgerModel:
    """The AR view's logits depend on every token in the cache up to the row's own; the draft's on the position only,
    which is part of the truth, so that some drafts are accepted.

    Args:
        vocab_size, block_size: as in `DualViewModel`.
        seed: of the tables.
        certainty: how much of the logits the draft can know.
        poison: a token after which the AR view gives NaN, or None.
        anchor_rows: 1 where the AR view reads the anchor of a draft.
    """

    def __init__(
        self,
        vocab_size: int = 17,
        block_size: int = 6,
        seed: int = 0,
        certainty: float = 2.0,
        poison: int | None = None,
        anchor_rows: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size, self.block_size, self.mask_token_id = vocab_size, block_size, vocab_size - 1
        self.anchor_rows = anchor_rows
        self.eos_token_ids: list[int] = []
        self.by_sum = torch.randn(SUMS, vocab_size, generator=generator)
        self.by_position = torch.randn(PERIOD, vocab_size, generator=generator) * certainty
        self.poison = poison

    def new_cache(self, batch_size: int, max_len: int, block_size: int) -> SharedKVCache:
        cache = SharedKVCache(
            1, 1, 1, batch_size=batch_size, max_len=max_len, block_size=block_size, dtype=torch.float32
        )
        for buffer in cache.layers[0]:
            buffer.fill_(torch.nan)
        return cache

    def forward_view(self, input_ids: torch.Tensor, cache: SharedKVCache, view_pass: ViewPass) -> torch.Tensor:
        """Hidden states are the logits."""
        if view_pass.anchor_rows:
            rows = input_ids.split([1, input_ids.shape[1] - 1], dim=1)
            return torch.cat([self.forward_view(ids, cache, part) for ids, part in zip(rows, view_pass.parts)], dim=1)
        hidden = self.by_position[(view_pass.positions.long() + 1) % PERIOD]
        if view_pass.view == "diffusion":
            return hidden
        ledger = cache.layers[0].k[:, 0, :, 0]
        inside = view_pass.slots < ledger.shape[1]  # what reaches past the cache's end is lost
        ledger[inside.nonzero()[:, 0], view_pass.slots[inside].long()] = input_ids[inside].float()
        columns = torch.arange(ledger.shape[1])
        # what lies beyond a limit must not be looked at: a NaN there would spoil the sum
        entries = torch.where(columns < view_pass.key_limit[..., None], ledger[:, None], -1.0)
        sums = ((entries.long() + 1) * (1 + columns * 37 % 89)).sum(-1)
        hidden = hidden + self.by_sum[sums % SUMS]
        return hidden if self.poison is None else torch.where((input_ids == self.poison)[..., None], torch.nan, hidden)

    def compute_logits(self, hidden: torch.Tensor, linear_impl: str = "auto") -> torch.Tensor:
        return hidden

    def next_logits(self, ids: Sequence[int]) -> torch.Tensor:
        """[V]: what the AR view says after `ids`, from the definition."""
        total = sum((token + 1) * (1 + j * 37 % 89) for j, token in enumerate(ids))
        return self.by_position[len(ids) % PERIOD] + self.by_sum[total % SUMS]


def oracle(
    model: LedgerModel, prompt: Sequence[int], max_new_tokens: int, params: SamplingParams, eos: Sequence[int] = ()
) -> list[int]:
    """The new tokens of plain AR decoding, one sequence, one token at a time, processors in plain Python."""
    how = SamplingTensors(*(
        torch.tensor([value], dtype=dtype) for value, dtype in (
            (params.temperature, torch.float32), (params.top_k, torch.int32), (params.top_p, torch.float32),
            (params.min_p, torch.float32), (params.seed, torch.int64), (params.sequence, torch.int32),
        )
    ))  # fmt: skip
    ids, new = list(prompt), []
    while len(new) < max_new_tokens:
        logits = model.next_logits(ids)
        if params.repetition_penalty != 1:
            penalty = torch.tensor(params.repetition_penalty)
            for token in set(ids):
                logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        for token in set(new):
            logits[token] -= torch.tensor(params.frequency_penalty) * new.count(token)
            logits[token] -= params.presence_penalty
        for token, bias in params.logit_bias.items():
            logits[token] += bias
        if len(new) < params.min_new_tokens:
            logits[list(eos)] = -torch.inf
        if params.logits_processor is not None:
            logits = params.logits_processor(torch.tensor([ids]), logits[None])[0]
        if params.temperature == 0:
            token = int(greedy_choice(logits[None], impl="torch"))
        else:
            positions = torch.tensor([[len(ids)]], dtype=torch.int32)
            token = int(sample_choice_torch(logits[None, None], positions, *how, CHOICE))
        ids.append(token)
        new.append(token)
        if token in eos:
            break
    return new
