"""What top-k, top-p and min-p leave of rows of logits, each row spread over many programs: the smallest key they keep
and the mass. The end of top-p is searched for sixteen ways at once, and blocks that cannot hold it are passed over."""

from __future__ import annotations

from typing import NamedTuple

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import on_its_device
from orthrus_triton.ops.logits_filter import load_scaled, mass, mass_of, order_key
from orthrus_triton.ops.portable_math import portable_exp
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

WAYS = 16
PASSES = 9  # one by value, and one for each 4 bits of a key
PASS_BLOCK = 256  # its sums for sixteen keys are in registers at once


class KeptSpans(NamedTuple):
    """tops [rows, SPANS] fp32 and top_ids [rows, SPANS] int32 as in `RowSpans`; keys [rows] int64, the smallest that
    top-k and top-p keep; masses [rows, SPANS] int64, what all three keep of each span. Of rows that sample, and have
    a logit above -inf: keys and masses of others are not written."""

    tops: torch.Tensor
    top_ids: torch.Tensor
    keys: torch.Tensor
    masses: torch.Tensor


@triton.jit
def middle_keys(low, high, z_max, PASS, WAYS: tl.constexpr):
    """WAYS ascending keys from `low` to below `high`, the first of which is `low`."""
    ways = tl.arange(0, WAYS)
    even = low + (high - low) * ways // WAYS
    # most keys belong to tiny numbers: the first pass divides the 28 below the largest logit, beyond which is no mass
    by_value = order_key(z_max - 1.75 * (WAYS - ways).to(tl.float32)).to(tl.int64) - 1
    return tl.where(PASS == 0, tl.minimum(tl.maximum(by_value, low), high - 1), even)


@triton.jit
def range_after(
    ranges_ptr, found_ptr, row, top_p, z_max, PASS,
    WAYS: tl.constexpr, SPANS: tl.constexpr, SPANS_PADDED: tl.constexpr,
):  # fmt: skip
    """(low, high, mass above `high`, mass of the row) after a pass: top-p drops the key `low`, if there is one, and
    keeps `high`."""
    at = row * 2 + PASS % 2
    low, high = tl.load(ranges_ptr + at * 4), tl.load(ranges_ptr + at * 4 + 1)
    above_high, total = tl.load(ranges_ptr + at * 4 + 2), tl.load(ranges_ptr + at * 4 + 3)
    if (PASS == 0) | (high - low > 1):
        middles = middle_keys(low, high, z_max, PASS, WAYS)
        spans, ways = tl.arange(0, SPANS_PADDED)[:, None], tl.arange(0, WAYS)
        # [SPANS_PADDED, WAYS]
        found = tl.load(found_ptr + (at * SPANS + spans) * WAYS + ways[None, :], mask=spans < SPANS, other=0)
        above = above_high + tl.sum(found, axis=0)
        # nothing is below the first `low`
        total = tl.where(PASS == 0, tl.max(above, axis=0), total)
        kept = above.to(tl.float32) < top_p * total.to(tl.float32)
        low = tl.max(tl.where(kept, low, middles), axis=0)
        above_high = tl.max(tl.where(kept, above, above_high), axis=0)
        high = tl.min(tl.where(kept, middles, high), axis=0)
    return low, high, above_high, total


@triton.jit(do_not_specialize=["T", "PASS"], do_not_specialize_on_alignment=OF_A_SLOT)
def top_p_pass_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, top_ptr, top_id_ptr, digits_ptr, counts_ptr, ranges_ptr,
    found_ptr, T, PASS,
    WAYS: tl.constexpr, V: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
    SPANS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, SPANS), PASSES times: how much mass of the span is above each of the middle keys."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_p = tl.load(temperature_ptr + row // T), tl.load(top_p_ptr + row // T)
    z_max, _top_id = row_top(top_ptr, top_id_ptr, row, SPANS, SPANS_PADDED)
    if (temperature > 0) & (top_p < 1.0) & (z_max > float("-inf")):
        # odd and even passes apart: one reads what the one before it wrote
        at = row * 2 + PASS % 2
        if PASS == 0:
            key_min = top_k_key(digits_ptr, counts_ptr, row, tl.load(top_k_ptr + row // T), V, SPANS, SPANS_PADDED)
            low = tl.maximum(key_min.to(tl.int64), order_key(z_max - 28.0).to(tl.int64)) - 1
            high = order_key(z_max).to(tl.int64)
            above_high, total = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
        else:
            low, high, above_high, total = range_after(
                ranges_ptr, found_ptr, row, top_p, z_max, PASS - 1, WAYS, SPANS, SPANS_PADDED
            )
        if span == 0:
            tl.store(ranges_ptr + at * 4, low)
            tl.store(ranges_ptr + at * 4 + 1, high)
            tl.store(ranges_ptr + at * 4 + 2, above_high)
            tl.store(ranges_ptr + at * 4 + 3, total)
        if (PASS == 0) | (high - low > 1):
            middles = middle_keys(low, high, z_max, PASS, WAYS)
            found = tl.zeros((WAYS,), tl.int64)
            for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), BLOCK):
                # [BLOCK] each
                z = load_scaled(logits_ptr + row * V, start + tl.arange(0, BLOCK), temperature, V)
                key = order_key(z).to(tl.int64)
                inside = (key > low) & (key <= high)
                if tl.max(inside.to(tl.int32), axis=0) > 0:
                    masses = tl.where(inside, mass(z, z_max), 0)
                    found += tl.sum(tl.where(key[:, None] > middles[None, :], masses[:, None], 0), axis=0)
            tl.store(found_ptr + (at * SPANS + span) * WAYS + tl.arange(0, WAYS), found)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=OF_A_SLOT)
def kept_mass_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, top_ptr, top_id_ptr, digits_ptr, counts_ptr,
    ranges_ptr, found_ptr, key_ptr, mass_ptr, T,
    PASSES: tl.constexpr, WAYS: tl.constexpr, V: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
    SPANS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, SPANS), after all passes."""
    row, span = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = row // T
    temperature, top_p, min_p = tl.load(temperature_ptr + b), tl.load(top_p_ptr + b), tl.load(min_p_ptr + b)
    z_max, _top_id = row_top(top_ptr, top_id_ptr, row, SPANS, SPANS_PADDED)
    if (temperature > 0) & (z_max > float("-inf")):
        if top_p < 1.0:
            _low, key_min, _above, _total = range_after(
                ranges_ptr, found_ptr, row, top_p, z_max, PASSES - 1, WAYS, SPANS, SPANS_PADDED
            )
        else:
            key_min = top_k_key(
                digits_ptr, counts_ptr, row, tl.load(top_k_ptr + b), V, SPANS, SPANS_PADDED
            ).to(tl.int64)  # fmt: skip
        total = tl.full((), 0, tl.int64)
        for start in range(span * SPAN, tl.minimum(span * SPAN + SPAN, V), BLOCK):
            # [BLOCK] each
            z = load_scaled(logits_ptr + row * V, start + tl.arange(0, BLOCK), temperature, V)
            kept = order_key(z).to(tl.int64) >= key_min
            if tl.max(kept.to(tl.int32), axis=0) > 0:
                weight = portable_exp(z - z_max)
                total += tl.sum(tl.where(kept & (weight >= min_p), mass_of(weight), 0), axis=0)
        tl.store(mass_ptr + row * SPANS + span, total)
        if span == 0:
            tl.store(key_ptr + row, key_min)


@on_its_device
def launch_kept_spans(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> KeptSpans:
    """Filters of contiguous logits [B, T, V]; parameters as in `SamplingTensors`."""
    B, T, V = logits.shape
    constants = span_constants(V)
    spans = constants["SPANS"]
    launch = {**constants, "WAYS": WAYS, "SPAN": SPAN, "num_warps": NUM_WARPS, **EXACT_LAUNCH}
    of_row = launch_row_spans(logits, temperature, top_k)
    sizes = ((2, 4), (2, spans, WAYS), (), (spans,))
    ranges, found, keys, masses = (logits.new_empty(B * T, *size, dtype=torch.int64) for size in sizes)
    for number in range(PASSES):
        top_p_pass_kernel[(B * T, spans)](
            logits, temperature, top_k, top_p, *of_row, ranges, found, T, number, BLOCK=PASS_BLOCK, **launch
        )
    kept_mass_kernel[(B * T, spans)](
        logits, temperature, top_k, top_p, min_p, *of_row, ranges, found, keys, masses, T,
        PASSES=PASSES, BLOCK=BLOCK, **launch,
    )  # fmt: skip
    return KeptSpans(of_row.tops, of_row.top_ids, keys, masses)
