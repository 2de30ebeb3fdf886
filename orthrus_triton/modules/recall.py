"""recall: text repeats itself. What followed the newest tokens when they last stood together is likely to follow again,
and a chain of drafts prefers it. Only drafts depend on it, so plain torch will do."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

# newest tokens that are compared; also the most logits that a recalled draft is given ahead of others
LONGEST = 8


class Recalled(NamedTuple):
    """tokens [B, T] int64 that followed last time; bonus [B, T] fp32, what to add to their logits: 0 for none."""

    tokens: torch.Tensor
    bonus: torch.Tensor

    def of_pairs(self, own: torch.Tensor, before: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """What pairs of neighbours are given: [B, T, C before, C] for `before` and `candidates` [B, T, C]. `own` [B] is
        the token before all of them."""
        told = before == torch.cat((own[:, None], self.tokens[:, :-1]), dim=1)[..., None]
        goes_on = candidates == self.tokens[..., None]
        return self.bonus[..., None, None] * (told[..., None] & goes_on[:, :, None])


def recall(ids: torch.Tensor, last: torch.Tensor, count: int) -> Recalled:
    """Look for the newest tokens further left, the longest match first, of equally long ones the latest.

    A bonus is a logit for every token that agrees beyond the first, counting the recalled ones before it, up to
    `LONGEST`. Where less has followed than is asked for, the text is taken to go round.

    Args:
        ids: [B, L] int64, a sequence's tokens by position; behind `last` anything.
        last: [B], position of the newest token; beyond L - 1, where nothing is drafted any more, it is taken for that.
        count: T, tokens to recall.

    Source: the idea is prompt lookup's (Saxena, 2023; `prompt_lookup_num_tokens` in transformers), which drafts by it
    alone; here it only has a say in what the diffusion view drafts.
    """
    B, L = ids.shape
    at = torch.arange(L, device=ids.device)
    last = last.long().clamp(max=L - 1)[:, None]
    # [B, L, LONGEST]: the tokens that end at each position, and the newest ones
    padded = F.pad(ids, (LONGEST - 1, 0), value=-1).unfold(1, LONGEST, 1)
    newest = padded.take_along_dim(last[..., None], dim=1)
    agree = ((padded == newest) & (padded >= 0)).flip(-1).int().cumprod(-1).sum(-1)
    # [B]: the length of a match counts first, then its place
    best = torch.where(at < last, agree * L + at, 0).amax(dim=1, keepdim=True)
    length, place = best // L, best % L
    ahead = torch.arange(count, device=ids.device)
    tokens = ids.gather(1, place + 1 + ahead % (last - place).clamp(min=1))
    bonus = torch.where(length > 0, (length - 1 + ahead).clamp(max=LONGEST), 0).float()
    return Recalled(tokens.clamp(min=0), bonus)
