"""DraftChain: the masks of a block draft side by side; this lets each learn late which token stands at its own place.
Only drafts depend on it, so plain torch will do: verify says what is said."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from orthrus_triton.modules.projection import draw_weight
from orthrus_triton.ops import SamplingTensors
from orthrus_triton.ops.gumbel import CHOICE, gumbel_of_torch, row_key_torch

# tokens of each row that the chain chooses among; 8 cost the shipped view drafts, and 32 cost a CPU no time
CANDIDATES = 32
TOP_TILE = 128  # logits of which first only the largest counts
OTHERS_STRIDE = 8  # one of so many tells how likely tokens are that are no candidates


class DraftNoise(NamedTuple):
    """How T rows of a draft sample: choice [B, T], what each would draw by itself; positions [B, T] of these tokens;
    sampling, of the B slots."""

    choice: torch.Tensor
    positions: torch.Tensor
    sampling: SamplingTensors

    def perturb(self, scores: torch.Tensor, candidates: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """scores [B, T, C before, C] of candidates [B, T, C] as the AR view will draw among them: / T, and noise for
        those that the filters keep. `others`: what `mass_of_others` says."""
        key = row_key_torch(self.sampling.seed[:, None], self.sampling.sequence[:, None], self.positions, CHOICE)
        noise = gumbel_of_torch(candidates, *key)
        top_k, top_p, min_p = (of_slot[:, None, None, None] for of_slot in self.sampling[1:4])
        temperature = self._divisor()[..., None]
        again = (candidates[..., :, None] == candidates[..., None, :]).tril(-1).any(dim=-1)
        scaled = scores.masked_fill(again[:, :, None], -torch.inf) / temperature
        kept = _kept(scaled, others[..., None, None], top_k, top_p, min_p)
        drawn = torch.where(kept, scaled + noise[:, :, None], -torch.inf)
        return torch.where(self.sampling.temperature[:, None, None, None] > 0, drawn, scores)

    def mass_of_others(self, logits: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
        """log of the sum of exp(logit / T) [B, T] of those logits [B, T, V] that are smaller than `least` [B, T, 1]:
        about, from some of them, for a pass over all is what a cycle on a CPU would notice."""
        some = logits[..., ::OTHERS_STRIDE].float()
        return (torch.where(some < least, some, -torch.inf) / self._divisor()).logsumexp(-1) + math.log(OTHERS_STRIDE)

    def _divisor(self) -> torch.Tensor:
        temperature = self.sampling.temperature[:, None, None]
        return torch.where(temperature > 0, temperature, 1.0)


class Recalled(NamedTuple):
    """What followed the newest tokens earlier in the text (`ops.recall`): tokens [B, T] int64 and bonus [B, T] fp32."""

    tokens: torch.Tensor
    bonus: torch.Tensor

    def of_pairs(self, own: torch.Tensor, before: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """What pairs of neighbours are given: [B, T, C before, C] for `before` and `candidates` [B, T, C]. `own` [B] is
        the token before all of them."""
        told = before == torch.cat((own[:, None], self.tokens[:, :-1]), dim=1)[..., None]
        goes_on = candidates == self.tokens[..., None]
        return self.bonus[..., None, None] * (told[..., None] & goes_on[:, :, None])


class DraftChain(nn.Module):
    """Corrects a mask's final hidden state by the token that the row before it proposes for the mask's own position:
    `h + out(silu(hidden(h) + token(e)))`, e being that token's embedding, normed.

    A pass of the diffusion view knows no token behind the anchor, so its drafts may each be likely and not go together.

    Args:
        hidden_size: of the model.
        width: of the layer in between.

    Source: the idea of heads that depend on the draft so far is Hydra's (arXiv 2402.05109); here one small layer serves
    all positions, and all pairs of candidates at once.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.hidden_proj = nn.Linear(hidden_size, width, bias=False)
        self.token_proj = nn.Linear(hidden_size, width, bias=False)
        self.out_proj = nn.Linear(width, hidden_size, bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Start anew, changing nothing yet, with the same numbers in every process and every run."""
        generator = torch.Generator().manual_seed(0)
        for layer in (self.hidden_proj, self.token_proj):
            draw_weight(layer.weight, generator)
        self.out_proj.weight.zero_()

    def correction(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """What to add to `hidden` [..., H], given the embeddings [..., H] of the tokens at its rows' own positions."""
        dtype = embedded.dtype
        embedded = F.rms_norm(embedded, embedded.shape[-1:])
        # trained weights are fp32 masters where the frozen ones are bf16
        layers = (self.hidden_proj, self.token_proj, self.out_proj)
        of_hidden, of_token, out = (layer.weight.to(dtype) for layer in layers)
        return F.linear(F.silu(F.linear(hidden, of_hidden) + F.linear(embedded, of_token)), out)

    def choose(
        self, hidden: torch.Tensor, logits: torch.Tensor, own: torch.Tensor, embedding: torch.Tensor,
        head_rows: Callable[[torch.Tensor], torch.Tensor], noise: DraftNoise | None = None,
        recalled: Recalled | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Draft row by row, each row knowing what the one before it drafted.

        All pairs of the candidates of neighbouring rows are scored at once. What is left is looking up along the rows,
        which takes as many steps as it takes doublings to reach the last of them.

        Args:
            hidden: [B, T, H], final hidden states of T masks in a row.
            logits: [B, T, V], what they say by themselves.
            own: [B], the token at the first mask's own position.
            embedding: [V, H].
            head_rows: from tokens [...] to the LM head's rows [..., H].
            noise: None for a greedy draft.
            recalled: T tokens that followed `own` before; each gains its bonus behind the one before it.

        Returns:
            [B, T] int64.
        """
        # [B, T, C]
        scores, candidates = _top(logits, CANDIDATES)
        least = scores[..., -1:]
        if noise is not None:
            candidates = torch.cat((noise.choice[..., None].clamp(min=0), candidates[..., :-1]), dim=-1)
        if recalled is not None:
            candidates = torch.cat((candidates[..., :-1], recalled.tokens[..., None]), dim=-1)
        if noise is not None or recalled is not None:
            scores = logits.gather(-1, candidates)
        before = torch.cat((own[:, None, None].expand(-1, 1, CANDIDATES), candidates[:, :-1]), dim=1)
        # [B, T, C before, H]
        correction = self.correction(hidden[:, :, None], F.embedding(before, embedding))
        # [B, T, C before, C]
        scores = scores[:, :, None] + (correction @ head_rows(candidates).transpose(-1, -2)).float()
        if recalled is not None:
            scores = scores + recalled.of_pairs(own, before, candidates)
        if noise is not None:
            scores = noise.perturb(scores, candidates, noise.mass_of_others(logits, least))
        best = scores.argmax(dim=-1)
        # best[t] maps the candidate before row t to its own; after a step each map goes twice as far back
        step = 1
        while step < best.shape[1]:
            best = torch.cat((best[:, :step], best[:, step:].gather(-1, best[:, :-step])), dim=1)
            step *= 2
        return candidates.gather(-1, best[..., :1])[..., 0]


def _kept(
    scaled: torch.Tensor, others: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:  # fmt: skip
    """Which of C candidates [..., C] the filters of `ops.sample_choice` keep, all other tokens being less likely and
    having exp(others) of the mass."""
    ordered = scaled.sort(dim=-1, descending=True).values
    likeliest, rank = ordered[..., :1], torch.arange(scaled.shape[-1], device=scaled.device)
    weight = (ordered - likeliest).exp()
    in_top_k = (rank < top_k) | (top_k == 0)
    mass = torch.where(in_top_k, weight, 0.0).cumsum(dim=-1)
    total = mass[..., -1:] + torch.where(in_top_k[..., -1:], (others - likeliest).exp(), 0.0)
    # in this order, filters keep a beginning: not less than the likeliest, whatever rounding says
    kept = in_top_k & (mass - weight < top_p * total) & (weight >= min_p)
    last = kept.sum(dim=-1, keepdim=True).clamp(min=1) - 1
    return scaled >= ordered.gather(-1, last)


def _top(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of [..., V] and their indices. They lie in the `count` tiles of the largest maxima, and on a
    CPU maxima are far cheaper than an order."""
    missing = -logits.shape[-1] % TOP_TILE
    # padded by nothing, they would be copied all the same
    tiles = (F.pad(logits, (0, missing), value=-torch.inf) if missing else logits).unflatten(-1, (-1, TOP_TILE))
    chosen = tiles.amax(dim=-1).topk(min(count, tiles.shape[-2])).indices
    values, places = tiles.take_along_dim(chosen[..., None], dim=-2).flatten(-2).topk(count)
    tile_of = chosen.take_along_dim(places // TOP_TILE, dim=-1)
    return values, (tile_of * TOP_TILE + places % TOP_TILE).clamp(max=logits.shape[-1] - 1)
