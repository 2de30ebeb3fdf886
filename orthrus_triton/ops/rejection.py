"""Rejection (speculative) sampling over a block: a drafted token d, drawn from q, is kept with probability
min(1, p(d) / q(d)), else replaced by a draw from max(p - q, 0). Exact in distribution, accepts as often as can be."""

from __future__ import annotations

import torch

from orthrus_triton.ops._dispatch import require_same, resolve_impl
from orthrus_triton.ops.gumbel import ACCEPT, CHOICE, gumbel_of_torch, row_key_torch, uniform_torch
from orthrus_triton.ops.logits_filter import (
    SamplingTensors,
    kept_reference,
    mass_torch,
    row_max_torch,
    scaled_torch,
    top_k_torch,
)
from orthrus_triton.ops.portable_math import portable_exp_torch, portable_log_torch
from orthrus_triton.ops.rejection_kernels import launch_rejection_choice
from orthrus_triton.ops.sample_torch import LISTED
from orthrus_triton.ops.sampling import check_sampling
from orthrus_triton.ops.void_rows import VOID


def rejection_choice(
    logits: torch.Tensor,
    draft_logits: torch.Tensor,
    candidate: torch.Tensor,
    positions: torch.Tensor,
    sampling: SamplingTensors,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """One token per row: the drafted one if it is accepted, else a draw from the residual, which is another one.

    So the longest prefix on which choice and draft agree is what was accepted, and `consensus_` commits it. The last
    row has no draft and draws from p: the bonus token. A sequence of temperature 0 gets its largest logit everywhere.
    A row of NaN and -inf alone gives VOID, no token; one of the draft's like that drafts nothing, and p is drawn from.

    Args:
        logits: [B, K, V] of the AR view, for p; K >= 2.
        draft_logits: [B, K - 1, V] of the diffusion view, for q; filtered by the same parameters.
        candidate: [B, K] int64: anchor, then drafts; draft t + 1 was drawn from row t of q (`sample_choice` with
            the stream DRAFT).
        positions: [B, K] int32, where the chosen token will stand.
        sampling: see `SamplingTensors`, tensors [B].
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        [B, K] int64.

    Raises:
        ValueError: shapes or dtypes that do not agree, or a single row. TypeError: logits are not floating point.
    """
    check_sampling(logits, positions, sampling)
    B, K, V = logits.shape
    if K < 2:
        raise ValueError(f"logits must have two rows or more, the last of which has no draft, but got {K}")
    require_same("draft_logits", tuple(draft_logits.shape), (B, K - 1, V), "shape")
    require_same("candidate", tuple(candidate.shape), (B, K), "shape")
    impl = resolve_impl(impl, logits)
    return torch.ops.orthrus_triton.rejection_choice(logits, draft_logits, candidate, positions, *sampling, impl)


def filtered_probs(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """The distribution a row samples from, [B, T, V] fp32: softmax over what the filters keep (see `sample_choice`)."""
    z = scaled_torch(logits, sampling.temperature)
    z_max = z.amax(-1, keepdim=True)
    masses = torch.where(z >= top_k_torch(z, sampling.top_k), mass_torch(z, z_max), 0)
    masses = torch.where(z >= _top_p_floor(z, masses, sampling.top_p), masses, 0)
    masses = torch.where(portable_exp_torch(z - z_max) >= sampling.min_p[:, None, None], masses, 0)
    return masses.to(torch.float32) / masses.sum(-1, keepdim=True).to(torch.float32)


def _top_p_floor(z: torch.Tensor, masses: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Smallest scaled logit [B, T, 1] with less than top_p of the mass strictly above it."""
    limited = (top_p < 1.0)[:, None, None]
    if not limited.any():
        return torch.full_like(z[..., :1], -torch.inf)
    bound = top_p[:, None, None] * masses.sum(-1, keepdim=True).to(torch.float32)
    for count in (min(LISTED, z.shape[-1]), z.shape[-1]):  # few tokens have most of the mass
        values, ids = z.topk(count)
        listed = masses.gather(-1, ids)
        # what is above a value is before the first of its equals
        above = (listed.cumsum(-1) - listed).gather(-1, torch.searchsorted(-values, -values))
        kept = above.to(torch.float32) < bound
        kept[..., 0] = True
        if not (kept[..., -1:] & limited).any():
            break
    return torch.where(limited, torch.where(kept, values, torch.inf).amin(-1, keepdim=True), -torch.inf)


def rejection_choice_torch(
    logits, draft_logits, candidate, positions, temperature, top_k, top_p, min_p, seed, sequence
) -> torch.Tensor:
    """The same algorithm on all rows at once, the same ids."""
    sampling = SamplingTensors(temperature, top_k, top_p, min_p, seed, sequence)
    p, q = filtered_probs(logits, sampling), filtered_probs(draft_logits, sampling)
    return _accept_or_replace(logits, p, q, candidate, positions, sampling)


def _accept_or_replace(logits, p, q, candidate, positions, sampling) -> torch.Tensor:
    drafts = ~q[..., 0].isnan()  # else the draft had no token to draw
    q = torch.where(drafts[..., None], q, 0.0)
    rest = p.clone()
    rest[:, :-1] -= q
    seed, sequence = sampling.seed[:, None], sampling.sequence[:, None]
    # noise only where something is left: with filters, next to nowhere
    at = (rest > 0).nonzero(as_tuple=True)
    key0, key1 = (key[at[:2]] for key in row_key_torch(seed, sequence, positions, CHOICE))
    score = torch.full_like(rest, -torch.inf)
    score[at] = portable_log_torch(rest[at]) + gumbel_of_torch(at[2][:, None], key0, key1)[:, 0]
    best, choice = score.max(dim=-1)
    u = uniform_torch(*row_key_torch(seed, sequence, positions[:, :-1], ACCEPT))
    drafted = candidate[:, 1:, None].clamp(min=0)  # VOID, where the draft had none
    accepted = u * q.gather(-1, drafted)[..., 0] < p[:, :-1].gather(-1, drafted)[..., 0]
    accepted |= best[:, :-1] == -torch.inf
    choice[:, :-1] = torch.where(accepted & drafts, candidate[:, 1:], choice[:, :-1])
    greedy = row_max_torch(scaled_torch(logits, sampling.temperature))[1]
    return torch.where((sampling.temperature > 0)[:, None] & (greedy != VOID), choice, greedy)


def rejection_choice_reference(
    logits, draft_logits, candidate, positions, temperature, top_k, top_p, min_p, seed, sequence
) -> torch.Tensor:
    """The definition over fp64 softmaxes of what `kept_reference` keeps."""
    sampling = SamplingTensors(temperature, top_k, top_p, min_p, seed, sequence)
    p, q = (
        torch.where(
            kept_reference(rows, sampling), scaled_torch(rows, temperature).double(), -torch.inf
        ).softmax(-1).float()
        for rows in (logits, draft_logits)
    )  # fmt: skip
    return _accept_or_replace(logits, p, q, candidate, positions, sampling)


@torch.library.custom_op(
    "orthrus_triton::rejection_choice",
    mutates_args=(),
    schema="(Tensor logits, Tensor draft_logits, Tensor candidate, Tensor positions, Tensor temperature, Tensor top_k, "
    "Tensor top_p, Tensor min_p, Tensor seed, Tensor sequence, str impl) -> Tensor",
)
def _rejection_choice_op(
    logits, draft_logits, candidate, positions, temperature, top_k, top_p, min_p, seed, sequence, impl
):  # fmt: skip
    run = {
        "triton": launch_rejection_choice, "torch": rejection_choice_torch, "reference": rejection_choice_reference,
    }[impl]  # fmt: skip
    return run(logits, draft_logits, candidate, positions, temperature, top_k, top_p, min_p, seed, sequence)


@_rejection_choice_op.register_fake
def _(logits, draft_logits, candidate, positions, temperature, top_k, top_p, min_p, seed, sequence, impl):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)
