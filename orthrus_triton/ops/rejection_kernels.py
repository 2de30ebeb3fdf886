"""Rejection sampling in Triton: the residual max(p - q, 0) of a row spread over many programs, then one for the row
that accepts the draft or takes the best of the residual."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import on_its_device
from orthrus_triton.ops.gumbel import ACCEPT, CHOICE, gumbel, row_key, uniform
from orthrus_triton.ops.kept_spans import launch_kept_spans
from orthrus_triton.ops.logits_filter import load_scaled, mass_of, order_key
from orthrus_triton.ops.portable_math import portable_exp, portable_log
from orthrus_triton.ops.row_spans import BLOCK, NUM_WARPS, OF_A_SLOT, SPAN, row_top, span_constants


@triton.jit
def row_filter(
    top_ptr, top_id_ptr, key_ptr, mass_ptr, row, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr
):  # fmt: skip
    """(largest scaled logit, its id, smallest kept key, kept mass in fp32)."""
    z_max, top_id = row_top(top_ptr, top_id_ptr, row, SPANS, SPANS_PADDED)
    spans = tl.arange(0, SPANS_PADDED)
    # [SPANS_PADDED]
    masses = tl.load(mass_ptr + row * SPANS + spans, mask=spans < SPANS, other=0)
    return z_max, top_id, tl.load(key_ptr + row), tl.sum(masses, axis=0).to(tl.float32)


@triton.jit
def kept_probs(z, min_p, z_max, key_min, total):
    """Probabilities of tokens with scaled logits `z` in a row with this `row_filter`."""
    weight = portable_exp(z - z_max)
    kept = (order_key(z).to(tl.int64) >= key_min) & (weight >= min_p)
    masses = tl.where(kept, mass_of(weight), 0).to(tl.float32)
    return tl.div_rn(masses, tl.zeros_like(masses) + total)


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=OF_A_SLOT)
def residual_kernel(
    logits_ptr, draft_ptr, positions_ptr, temperature_ptr, min_p_ptr, seed_ptr, sequence_ptr,
    p_top_ptr, p_top_id_ptr, p_key_ptr, p_mass_ptr, q_top_ptr, q_top_id_ptr, q_key_ptr, q_mass_ptr,
    score_ptr, id_ptr, K,
    STREAM: tl.constexpr, V: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, SPANS): the best score of log max(p - q, 0) + noise in a span; of log p in the last row."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = row // K, row % K
    temperature, min_p = tl.load(temperature_ptr + b), tl.load(min_p_ptr + b)
    p_max, _, p_key, p_total = row_filter(
        p_top_ptr, p_top_id_ptr, p_key_ptr, p_mass_ptr, row, SPANS, SPANS_PADDED
    )  # fmt: skip
    if (temperature > 0) & (p_max > float("-inf")):
        # the last row reads some row of q and drops it
        q_row = b * (K - 1) + tl.minimum(t, K - 2)
        q_max, _, q_key, q_total = row_filter(
            q_top_ptr, q_top_id_ptr, q_key_ptr, q_mass_ptr, q_row, SPANS, SPANS_PADDED
        )  # fmt: skip
        has_q = (t < K - 1) & (q_max > float("-inf"))
        seed, sequence, position = tl.load(seed_ptr + b), tl.load(sequence_ptr + b), tl.load(positions_ptr + row)
        key0, key1 = row_key(seed, sequence, position, STREAM)
        best, best_id = tl.full((), float("-inf"), tl.float32), tl.full((), V, tl.int32)
        for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            # [BLOCK] each
            z = load_scaled(logits_ptr + row * V, ids, temperature, V)
            if tl.max((order_key(z).to(tl.int64) >= p_key).to(tl.int32), axis=0) > 0:
                z_draft = load_scaled(draft_ptr + q_row * V, ids, temperature, V)
                rest = kept_probs(z, min_p, p_max, p_key, p_total)
                rest -= tl.where(has_q, kept_probs(z_draft, min_p, q_max, q_key, q_total), 0.0)
                score = portable_log(tl.where(rest > 0, rest, 1.0)) + gumbel(ids, key0, key1)
                score = tl.where(rest > 0, score, float("-inf"))
                block_best = tl.max(score, axis=0)
                block_id = tl.min(tl.where(score == block_best, ids, V), axis=0)
                best_id = tl.where(block_best > best, block_id, best_id)
                best = tl.maximum(best, block_best)
        tl.store(score_ptr + row * SPANS + span, best)
        tl.store(id_ptr + row * SPANS + span, best_id)


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=OF_A_SLOT)
def accept_kernel(
    logits_ptr, draft_ptr, candidate_ptr, positions_ptr, temperature_ptr, min_p_ptr, seed_ptr, sequence_ptr,
    p_top_ptr, p_top_id_ptr, p_key_ptr, p_mass_ptr, q_top_ptr, q_top_id_ptr, q_key_ptr, q_mass_ptr,
    score_ptr, id_ptr, out_ptr, K,
    STREAM: tl.constexpr, V: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    b, t = row // K, row % K
    temperature, min_p = tl.load(temperature_ptr + b), tl.load(min_p_ptr + b)
    p_max, choice, p_key, p_total = row_filter(
        p_top_ptr, p_top_id_ptr, p_key_ptr, p_mass_ptr, row, SPANS, SPANS_PADDED
    )  # fmt: skip
    if (temperature > 0) & (p_max > float("-inf")):
        spans = tl.arange(0, SPANS_PADDED)
        # [SPANS_PADDED] each
        scores = tl.load(score_ptr + row * SPANS + spans, mask=spans < SPANS, other=float("-inf"))
        ids = tl.load(id_ptr + row * SPANS + spans, mask=spans < SPANS, other=V)
        best = tl.max(scores, axis=0)
        is_empty = best == float("-inf")
        choice = tl.where(is_empty, choice, tl.min(tl.where(scores == best, ids, V), axis=0))
        if t < K - 1:
            q_row = b * (K - 1) + t
            q_max, _, q_key, q_total = row_filter(
                q_top_ptr, q_top_id_ptr, q_key_ptr, q_mass_ptr, q_row, SPANS, SPANS_PADDED
            )  # fmt: skip
            drafted = tl.load(candidate_ptr + row + 1).to(tl.int32)
            if (q_max > float("-inf")) & (drafted >= 0):
                id_ = drafted + tl.arange(0, 1)
                z = load_scaled(logits_ptr + row * V, id_, temperature, V)
                z_draft = load_scaled(draft_ptr + q_row * V, id_, temperature, V)
                p = tl.sum(kept_probs(z, min_p, p_max, p_key, p_total), axis=0)
                q = tl.sum(kept_probs(z_draft, min_p, q_max, q_key, q_total), axis=0)
                seed, sequence = tl.load(seed_ptr + b), tl.load(sequence_ptr + b)
                key0, key1 = row_key(seed, sequence, tl.load(positions_ptr + row), STREAM)
                # a residual that is empty but for rounding means p is q
                accepted = (uniform(key0, key1) * q < p) | is_empty
                choice = tl.where(accepted, drafted, choice)
    tl.store(out_ptr + row, choice.to(tl.int64))


@on_its_device
def launch_rejection_choice(
    logits, draft_logits, candidate, positions, temperature, top_k, top_p, min_p, seed, sequence
) -> torch.Tensor:
    B, K, V = logits.shape
    constants = span_constants(V)
    launch = {**constants, "num_warps": NUM_WARPS, **EXACT_LAUNCH}
    logits, draft_logits = logits.contiguous(), draft_logits.contiguous()
    candidate, positions = candidate.contiguous(), positions.contiguous()
    sampling = (temperature, top_k, top_p, min_p, seed, sequence)
    temperature, top_k, top_p, min_p, seed, sequence = (tensor.contiguous() for tensor in sampling)
    filters = (temperature, top_k, top_p, min_p)
    kept = (*launch_kept_spans(logits, *filters), *launch_kept_spans(draft_logits, *filters))
    # [rows, spans]
    scores, ids = (logits.new_empty(B * K, constants["SPANS"], dtype=dtype) for dtype in (torch.float32, torch.int32))
    of_sequence = (positions, temperature, min_p, seed, sequence)
    residual_kernel[(B * K, constants["SPANS"])](
        logits, draft_logits, *of_sequence, *kept, scores, ids, K, STREAM=CHOICE, SPAN=SPAN, BLOCK=BLOCK, **launch
    )
    out = torch.empty(B, K, dtype=torch.int64, device=logits.device)
    accept_kernel[(B * K,)](
        logits, draft_logits, candidate, *of_sequence, *kept, scores, ids, out, K, STREAM=ACCEPT, **launch
    )
    return out
