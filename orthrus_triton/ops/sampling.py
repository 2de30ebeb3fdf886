"""Coupled sampling: the token with the largest logit / temperature + Gumbel noise among those the filters keep.
The noise belongs to the position, not to the pass, so drafts, the AR view and any batch see the same one."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import on_its_device, require_same, resolve_impl
from orthrus_triton.ops.gumbel import CHOICE, exponential, gumbel_torch, noise_words, row_key, row_key_torch
from orthrus_triton.ops.logits_filter import (
    SamplingTensors,
    kept_reference,
    load_scaled,
    mass_of,
    order_key,
    row_max_torch,
    scaled_torch,
)
from orthrus_triton.ops.portable_math import portable_exp, portable_log
from orthrus_triton.ops.row_spans import (
    BLOCK,
    NUM_WARPS,
    OF_A_SLOT,
    SPAN,
    launch_row_spans,
    row_top,
    span_constants,
    top_k_key,
)
from orthrus_triton.ops.sample_torch import sample_choice_torch
from orthrus_triton.ops.void_rows import VOID

ROUNDS = 3  # of the search that all spans of a row take part in


def sample_choice(
    logits: torch.Tensor,
    positions: torch.Tensor,
    sampling: SamplingTensors,
    *,
    stream: int = CHOICE,
    impl: str = "auto",
) -> torch.Tensor:
    """One token per row, a function of that row, its position and its sequence's parameters alone.

    Filters as transformers orders them: temperature, top-k, top-p (of what top-k kept), min-p. A token is kept by
    top-k if it is as large as the k-th largest, by top-p if those strictly likelier have less than `top_p` of the
    mass, by min-p if it is at least `min_p` times as likely as the likeliest.

    Args:
        logits: [B, T, V] floating point. NaN is never chosen; a row of NaN and -inf alone gives VOID, no token.
        positions: [B, T] int32, where the chosen token will stand.
        sampling: see `SamplingTensors`, tensors [B].
        stream: which of the independent draws at a position.
        impl: "auto", "triton", "torch" or "reference". All but the last give the same ids on any device.

    Returns:
        [B, T] int64.

    Raises:
        ValueError: shapes or dtypes that do not agree. TypeError: logits are not floating point.
    """
    check_sampling(logits, positions, sampling)
    return torch.ops.orthrus_triton.sample_choice(logits, positions, *sampling, stream, resolve_impl(impl, logits))


def check_sampling(logits: torch.Tensor, positions: torch.Tensor, sampling: SamplingTensors) -> None:
    """Raise what is wrong with the arguments of a sampling op, by name."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, but got {logits.dtype}")
    if logits.dim() != 3:
        raise ValueError(f"logits must be [B, T, V], but got {tuple(logits.shape)}")
    require_same("positions", tuple(positions.shape), tuple(logits.shape[:2]), "shape")
    require_same("positions", positions.dtype, torch.int32, "dtype")
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int32)
    for (name, tensor), dtype in zip(sampling._asdict().items(), dtypes):
        require_same(name, tuple(tensor.shape), (logits.shape[0],), "shape")
        require_same(name, tensor.dtype, dtype, "dtype")
        require_same(name, tensor.device, logits.device, "device")


@triton.jit
def best_above(
    row_ptr, row, b, first, last, bound, temperature, z_max, top_id,
    positions_ptr, top_k_ptr, min_p_ptr, seed_ptr, sequence_ptr, digits_ptr, counts_ptr,
    STREAM: tl.constexpr, V: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Among tokens first..last-1 whose scaled logit exceeds `bound`: the mass kept by top-k, and the kept one with the
    best score, unless another of the row has a better one for sure.

    Returns (mass int64, score, id int32); the id is -1 if there is none.
    """
    min_p = tl.load(min_p_ptr + b)
    key_min = top_k_key(digits_ptr, counts_ptr, row, tl.load(top_k_ptr + b), V, SPANS, SPANS_PADDED)
    key0, key1 = row_key(tl.load(seed_ptr + b), tl.load(sequence_ptr + b), tl.load(positions_ptr + row), STREAM)
    # A token beats the likeliest one, which every filter keeps, if its exponential noise is below weight * luck; and
    # that noise is at least high / 2**32. Few tokens pass, so most blocks need no logarithm. One hundredth covers what
    # scores are rounded by, unless they are large.
    top_high, top_low = noise_words(top_id, key0, key1)
    luck = tl.where(tl.abs(z_max) < 1024.0, exponential(top_high, top_low) * 1.01, 3.0e38)
    total = tl.full((), 0, tl.int64)
    best, best_id = tl.full((), float("-inf"), tl.float32), tl.full((), -1, tl.int32)
    for start in range(first, last, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        # [BLOCK] each
        z = load_scaled(row_ptr, ids, temperature, V)
        weight = portable_exp(z - z_max)
        above = (z > bound) & (order_key(z) >= key_min)
        total += tl.sum(tl.where(above, mass_of(weight), 0), axis=0)
        high, low = noise_words(ids, key0, key1)
        hopeful = above & (weight >= min_p) & (high.to(tl.float32) * 2.3283064365386963e-10 <= weight * luck)
        if tl.max(hopeful.to(tl.int32), axis=0) > 0:
            score = tl.where(hopeful, z - portable_log(exponential(high, low)), float("-inf"))
            block_best = tl.max(score, axis=0)
            block_id = tl.min(tl.where(score == block_best, ids, V), axis=0)
            best_id = tl.where(block_best > best, block_id, best_id)
            best = tl.maximum(best, block_best)
    return total, best, best_id


@triton.jit
def round_result(mass_ptr, score_ptr, id_ptr, place, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr):
    """What a round found in all spans of a row: (mass, id)."""
    spans = tl.arange(0, SPANS_PADDED)
    at, mask = place * SPANS + spans, spans < SPANS
    # [SPANS_PADDED] each
    total = tl.sum(tl.load(mass_ptr + at, mask=mask, other=0), axis=0)
    scores = tl.load(score_ptr + at, mask=mask, other=float("-inf"))
    ids = tl.load(id_ptr + at, mask=mask, other=-1)
    # equal scores: the lowest id; no score at all: -1, which every span has then
    return total, tl.min(tl.where(scores == tl.max(scores, axis=0), ids, 2147483647), axis=0)


@triton.jit
def rounds_so_far(
    row_ptr, row, temperature, top_p, mass_ptr, score_ptr, id_ptr,
    ROUND: tl.constexpr, ROUNDS: tl.constexpr, V: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr,
):  # fmt: skip
    """(whether the search goes on after ROUND >= 1 rounds, the choice so far, its scaled logit, the least mass above a
    choice that top-p drops)."""
    total, choice = round_result(mass_ptr, score_ptr, id_ptr, row * ROUNDS, SPANS, SPANS_PADDED)
    enough = top_p * total.to(tl.float32)
    looking = top_p < 1.0
    for earlier in tl.static_range(1, ROUND):
        if looking:
            likelier, found = round_result(mass_ptr, score_ptr, id_ptr, row * ROUNDS + earlier, SPANS, SPANS_PADDED)
            looking = (found >= 0) & (likelier.to(tl.float32) >= enough)
            choice = tl.where(looking, found, choice)
    return looking, choice, load_scaled(row_ptr, choice, temperature, V), enough


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=OF_A_SLOT)
def search_kernel(
    logits_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, sequence_ptr,
    top_ptr, top_id_ptr, digits_ptr, counts_ptr, mass_ptr, score_ptr, id_ptr, T,
    ROUND: tl.constexpr, ROUNDS: tl.constexpr, STREAM: tl.constexpr, V: tl.constexpr, SPAN: tl.constexpr,
    SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, SPANS). Round 0 looks for the best score of all. That token may be outside top-p; then so is
    everything not likelier than it, and the next round looks above it: one or two rounds, instead of a sort."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = row // T
    row_ptr = logits_ptr + row * V
    temperature = tl.load(temperature_ptr + b)
    z_max, top_id = row_top(top_ptr, top_id_ptr, row, SPANS, SPANS_PADDED)
    looking = (temperature > 0) & (z_max > float("-inf"))
    bound = tl.full((), float("-inf"), tl.float32)
    if ROUND > 0:
        if looking:
            looking, _, bound, _ = rounds_so_far(
                row_ptr, row, temperature, tl.load(top_p_ptr + b), mass_ptr, score_ptr, id_ptr,
                ROUND, ROUNDS, V, SPANS, SPANS_PADDED,
            )  # fmt: skip
    if looking:
        total, best, best_id = best_above(
            row_ptr, row, b, span * SPAN, tl.minimum(span * SPAN + SPAN, V), bound, temperature, z_max, top_id,
            positions_ptr, top_k_ptr, min_p_ptr, seed_ptr, sequence_ptr, digits_ptr, counts_ptr,
            STREAM, V, SPANS, SPANS_PADDED, BLOCK,
        )  # fmt: skip
        at = (row * ROUNDS + ROUND) * SPANS + span
        tl.store(mass_ptr + at, total)
        tl.store(score_ptr + at, best)
        tl.store(id_ptr + at, best_id)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=OF_A_SLOT)
def choose_kernel(
    logits_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, sequence_ptr,
    top_ptr, top_id_ptr, digits_ptr, counts_ptr, mass_ptr, score_ptr, id_ptr, out_ptr, T,
    ROUNDS: tl.constexpr, STREAM: tl.constexpr, V: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the choice after all rounds; the rare row that still looks goes on alone."""
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    row_ptr = logits_ptr + row * V
    temperature = tl.load(temperature_ptr + b)
    z_max, top_id = row_top(top_ptr, top_id_ptr, row, SPANS, SPANS_PADDED)
    choice = top_id
    if (temperature > 0) & (z_max > float("-inf")):
        looking, choice, bound, enough = rounds_so_far(
            row_ptr, row, temperature, tl.load(top_p_ptr + b), mass_ptr, score_ptr, id_ptr,
            ROUNDS, ROUNDS, V, SPANS, SPANS_PADDED,
        )  # fmt: skip
        while looking:
            likelier, _, found = best_above(
                row_ptr, row, b, 0, V, bound, temperature, z_max, top_id,
                positions_ptr, top_k_ptr, min_p_ptr, seed_ptr, sequence_ptr, digits_ptr, counts_ptr,
                STREAM, V, SPANS, SPANS_PADDED, BLOCK,
            )  # fmt: skip
            looking = (found >= 0) & (likelier.to(tl.float32) >= enough)
            choice = tl.where(looking, found, choice)
            bound = load_scaled(row_ptr, choice, temperature, V)
    tl.store(out_ptr + row, choice.to(tl.int64))


@on_its_device
def launch_sample_choice(
    logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream
) -> torch.Tensor:  # fmt: skip
    logits, positions = logits.contiguous(), positions.contiguous()
    sampling = (temperature, top_k, top_p, min_p, seed, sequence)
    temperature, top_k, top_p, min_p, seed, sequence = (tensor.contiguous() for tensor in sampling)
    B, T, V = logits.shape
    spans = launch_row_spans(logits, temperature, top_k)
    constants = span_constants(V)
    launch = {"STREAM": stream, "ROUNDS": ROUNDS, "BLOCK": BLOCK, "num_warps": NUM_WARPS, **EXACT_LAUNCH}
    # [rows, ROUNDS, spans]: mass, score and id
    found = [
        logits.new_empty(B * T, ROUNDS, constants["SPANS"], dtype=dtype)
        for dtype in (torch.int64, torch.float32, torch.int32)
    ]
    of_row = (logits, positions, temperature, top_k, top_p, min_p, seed, sequence, *spans, *found)
    for number in range(ROUNDS):
        search_kernel[(B * T, constants["SPANS"])](*of_row, T, ROUND=number, SPAN=SPAN, **constants, **launch)
    out = torch.empty(B, T, dtype=torch.int64, device=logits.device)
    choose_kernel[(B * T,)](*of_row, out, T, **constants, **launch)
    return out


def sample_choice_reference(
    logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream
) -> torch.Tensor:  # fmt: skip
    """The definition: filter in fp64, then the best score."""
    sampling = SamplingTensors(temperature, top_k, top_p, min_p, seed, sequence)
    z = scaled_torch(logits, temperature)
    noise = gumbel_torch(z.shape[-1], *row_key_torch(seed[:, None], sequence[:, None], positions, stream))
    score = torch.where(kept_reference(logits, sampling), z.double() + noise.double(), -torch.inf)
    greedy = row_max_torch(z)[1]
    return torch.where((temperature > 0)[:, None] & (greedy != VOID), score.argmax(-1), greedy)


@torch.library.custom_op(
    "orthrus_triton::sample_choice",
    mutates_args=(),
    schema="(Tensor logits, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor seed, Tensor sequence, int stream, str impl) -> Tensor",
)
def _sample_choice_op(logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream, impl):
    run = {"triton": launch_sample_choice, "torch": sample_choice_torch, "reference": sample_choice_reference}[impl]
    return run(logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream)


@_sample_choice_op.register_fake
def _(logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream, impl):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)
