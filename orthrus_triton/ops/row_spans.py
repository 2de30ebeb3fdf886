"""A row of logits spread over many programs: each takes SPAN of them, the next kernel puts their results together.
Maxima, counts and integer masses have no order that could matter, so the spans change no token."""

from __future__ import annotations

from typing import NamedTuple

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, next_power_of_2, tl, triton
from orthrus_triton.ops._dispatch import on_its_device
from orthrus_triton.ops.logits_filter import load_scaled, order_key

SPAN, BLOCK, NUM_WARPS = 8192, 1024, 8  # a span is a multiple of a block
DIGITS = 4  # bytes of a key
# a slot's own tensors begin anywhere in those of all slots: see `consensus`
OF_A_SLOT = ("positions_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "sequence_ptr")


class RowSpans(NamedTuple):
    """What the first kernels leave of rows in SPANS spans each.

    tops [rows, SPANS] fp32 and top_ids [rows, SPANS] int32: a span's largest scaled logit and the lowest id that has
    it. digits [rows, DIGITS, 2] int32: the bytes of the k-th largest key before this one, and how many keys are still
    wanted of those that begin so. counts [rows, 2, SPANS, 256] int32: keys that begin so, by this byte (odd and even
    bytes apart, for one kernel reads what the one before it wrote).
    """

    tops: torch.Tensor
    top_ids: torch.Tensor
    digits: torch.Tensor
    counts: torch.Tensor


@triton.jit
def row_top(top_ptr, top_id_ptr, row, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr):
    """Largest scaled logit of a row and the lowest id that has it; VOID where no logit is larger than -inf."""
    spans = tl.arange(0, SPANS_PADDED)
    # [SPANS_PADDED] each
    tops = tl.load(top_ptr + row * SPANS + spans, mask=spans < SPANS, other=float("-inf"))
    ids = tl.load(top_id_ptr + row * SPANS + spans, mask=spans < SPANS, other=-2)
    best = tl.max(tops, axis=0)
    return best, tl.min(tl.where(tops == best, ids, 2147483647), axis=0)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=OF_A_SLOT)
def row_tops_kernel(
    logits_ptr, temperature_ptr, top_ptr, top_id_ptr, T,
    V: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, SPANS)."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperature_ptr + row // T)
    lanes = tl.arange(0, BLOCK)
    # [BLOCK] each: the best of every lane, brought together once
    bests, best_ids = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((BLOCK,), -2, tl.int32)
    for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), BLOCK):
        z = load_scaled(logits_ptr + row * V, start + lanes, temperature, V)
        better = z > bests
        best_ids = tl.where(better, start + lanes, best_ids)
        bests = tl.where(better, z, bests)
    best = tl.max(bests, axis=0)
    best_id = tl.min(tl.where(bests == best, best_ids, 2147483647), axis=0)
    tl.store(top_ptr + row * SPANS + span, best)
    tl.store(top_id_ptr + row * SPANS + span, best_id)


@triton.jit
def narrowed(
    digits_ptr, counts_ptr, row, DIGIT: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr
):  # fmt: skip
    """(first DIGIT + 1 bytes of the k-th largest key, how many keys are wanted of those that begin so)."""
    state_ptr = digits_ptr + (row * 4 + DIGIT) * 2
    prefix, wanted = tl.load(state_ptr).to(tl.uint32, bitcast=True), tl.load(state_ptr + 1)
    spans, bytes_ = tl.arange(0, SPANS_PADDED)[:, None], tl.arange(0, 256)
    # [SPANS_PADDED, 256]
    counts_ptr += (row * 2 + DIGIT % 2) * SPANS * 256
    counts = tl.load(counts_ptr + spans * 256 + bytes_[None, :], mask=spans < SPANS, other=0)
    counts = tl.sum(counts, axis=0)
    above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
    chosen = (above < wanted) & (above + counts >= wanted)
    wanted -= tl.sum(tl.where(chosen, above, 0), axis=0)
    return (prefix << 8) | tl.sum(tl.where(chosen, bytes_, 0), axis=0).to(tl.uint32), wanted


@triton.jit
def top_k_key(
    digits_ptr, counts_ptr, row, top_k, V: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr
):  # fmt: skip
    """Key of the k-th largest scaled logit of a row; 0 keeps all."""
    key = tl.full((), 0, tl.uint32)
    if (top_k > 0) & (top_k < V):
        key, _ = narrowed(digits_ptr, counts_ptr, row, 3, SPANS, SPANS_PADDED)
    return key


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=OF_A_SLOT)
def top_k_digit_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, digits_ptr, counts_ptr, T,
    DIGIT: tl.constexpr, V: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, SPANS), once for each byte of the key, the highest first: how many keys that begin as the k-th
    largest does have which byte next."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top_k = tl.load(top_k_ptr + row // T)
    temperature = tl.load(temperature_ptr + row // T)
    if (temperature > 0) & (top_k > 0) & (top_k < V):
        if DIGIT == 0:
            prefix, wanted = tl.full((), 0, tl.uint32), top_k
        else:
            prefix, wanted = narrowed(digits_ptr, counts_ptr, row, DIGIT - 1, SPANS, SPANS_PADDED)
        shift = 24 - 8 * DIGIT
        counts = tl.zeros((256,), tl.int32)
        for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), BLOCK):
            ids = start + tl.arange(0, BLOCK)
            key = order_key(load_scaled(logits_ptr + row * V, ids, temperature, V))
            # in the first pass nothing is left of the key, and the prefix is 0
            counted = (ids < V) & (((key >> shift) >> 8) == prefix)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=counted)
        tl.store(counts_ptr + ((row * 2 + DIGIT % 2) * SPANS + span) * 256 + tl.arange(0, 256), counts)
        if span == 0:
            state_ptr = digits_ptr + (row * 4 + DIGIT) * 2
            tl.store(state_ptr, prefix.to(tl.int32, bitcast=True))
            tl.store(state_ptr + 1, wanted)


def span_constants(vocab_size: int) -> dict[str, int]:
    """V, SPANS and the power of two they fit in, as kernels take them."""
    spans = cdiv(vocab_size, SPAN)
    return {"V": vocab_size, "SPANS": spans, "SPANS_PADDED": next_power_of_2(spans)}


@on_its_device
def launch_row_spans(logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor) -> RowSpans:
    """Tops and top-k keys of contiguous logits [B, T, V]."""
    B, T, V = logits.shape
    constants = span_constants(V)
    spans, launch = constants["SPANS"], {"SPAN": SPAN, "BLOCK": BLOCK, "num_warps": NUM_WARPS, **EXACT_LAUNCH}
    sizes = {"tops": (spans,), "top_ids": (spans,), "digits": (DIGITS, 2), "counts": (2, spans, 256)}
    parts = RowSpans(**{
        name: logits.new_empty(B * T, *size, dtype=torch.float32 if name == "tops" else torch.int32)
        for name, size in sizes.items()
    })  # fmt: skip
    row_tops_kernel[(B * T, spans)](logits, temperature, parts.tops, parts.top_ids, T, V=V, SPANS=spans, **launch)
    for digit in range(DIGITS):
        top_k_digit_kernel[(B * T, spans)](
            logits, temperature, top_k, parts.digits, parts.counts, T, DIGIT=digit, **constants, **launch
        )
    return parts
