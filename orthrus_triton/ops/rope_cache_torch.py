"""`rope_cache` in plain torch: as few and as plain steps as there are, for a CPU spends more time on starting them than
in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary


def rope_cache_torch(
    qkv, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, compute, rounding, keep=False
) -> torch.Tensor:
    """Any device. `compute` is the dtype of the arithmetic, `rounding` that between norm, weight and rotation. With
    keep=True where the slots lie is kept for other calls with this very tensor; not for compiled code, which writes new
    numbers into old tensors and tells nobody."""
    B, T, width = qkv.shape
    HKV, D = k_out.shape[1], k_out.shape[3]
    heads = qkv.view(B, T, width // D, D)
    HQ = heads.shape[2] - 2 * HKV
    q_and_k, v = heads[:, :, : HQ + HKV].to(compute), heads[:, :, HQ + HKV :]
    if q_norm is not None:
        weight = torch.cat((q_norm.expand(HQ, D), k_norm.expand(HKV, D)))
        q_and_k = _norm(q_and_k, weight, eps, rounding)
    rotated = _rotate(q_and_k, cos.to(compute), sin.to(compute)).to(qkv.dtype)
    _write(k_out, rotated[:, :, HQ:], v_out, v, slots, keep)
    return rotated[:, :, :HQ]


def _norm(heads: torch.Tensor, weight: torch.Tensor, eps: float, rounding: torch.dtype) -> torch.Tensor:
    """heads [..., H, D], weight [H, D]."""
    normed = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.to(rounding) * weight.to(rounding)).to(heads.dtype)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads [B, T, H, D] in halves low and high -> low * cos - high * sin, high * cos + low * sin."""
    low, high = heads.chunk(2, dim=-1)
    # [B, T, 1, D]
    cos, sin = torch.cat((cos, cos), dim=-1)[:, :, None], torch.cat((-sin, sin), dim=-1)[:, :, None]
    return (heads * cos).add_(torch.cat((high, low), dim=-1).mul_(sin))


class _Placement(NamedTuple):
    """Where rows go: one run of slots from `first` on in the one sequence there is, or else (b, s) of all rows, or of
    the rows (b, t) that have a slot."""

    first: int | None
    b: torch.Tensor | None = None
    s: torch.Tensor | None = None
    t: torch.Tensor | None = None


_placements: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _placement(slots: torch.Tensor, num_slots: int, keep: bool) -> _Placement:
    """All layers of a pass write to the same slots, so the answer is kept as long as the tensor lives."""
    if not keep or slots.is_inference():  # inference tensors do not tell whether they changed
        return _place(slots, num_slots)
    of, placement = _placements.get(slots, (None, None))
    if of != (slots._version, num_slots):
        placement = _place(slots, num_slots)
        _placements[slots] = ((slots._version, num_slots), placement)
    return placement


def _place(slots: torch.Tensor, num_slots: int) -> _Placement:
    B, T = slots.shape
    if B == 1:
        first = int(slots[0, 0])
        run = torch.arange(first, first + T, dtype=slots.dtype, device=slots.device)
        if 0 <= first <= num_slots - T and torch.equal(slots[0], run):
            return _Placement(first)
    exists = (slots >= 0) & (slots < num_slots)
    if bool(exists.all()):
        return _Placement(None, torch.arange(B, device=slots.device)[:, None], slots.long())
    b, t = exists.nonzero(as_tuple=True)
    return _Placement(None, b, slots[b, t].long(), t)


def _write(
    k_out: torch.Tensor, k: torch.Tensor, v_out: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, keep: bool
) -> None:
    """out[b, :, slots[b, t]] = rows[b, t] wherever the slot exists."""
    first, b, s, t = _placement(slots, k_out.shape[2], keep)
    for out, rows in ((k_out, k), (v_out, v)):
        if first is not None:
            out[:, :, first : first + rows.shape[1]] = rows.transpose(1, 2)
        else:
            out.transpose(1, 2).index_put_((b, s), rows if t is None else rows[b, t])
