"""`rope_cache` in plain torch: as few and as plain steps as there are, for a CPU spends more time on starting them than
in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from orthrus_triton.ops._dispatch import without_autocast
from orthrus_triton.ops._kept import Kept
from orthrus_triton.ops.cpu.kernels import rope_cache_cpu

_angles: Kept[torch.Tensor] = Kept()
_placements: Kept[_Placement] = Kept()


@without_autocast
def rope_cache_torch(
    qkv, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset, compute, rounding, keep=False
) -> torch.Tensor:
    """Any device. `compute` is the dtype of the arithmetic, `rounding` that of norms and before rotation. With
    keep=True, what follows from the angles and from the slots is kept for other calls with these very tensors."""
    if (
        compute == torch.float32
        and (q := rope_cache_cpu(qkv, cos, sin, k_out, v_out, slots, q_norm, k_norm, eps, norm_offset)) is not None
    ):
        return q
    B, T, width = qkv.shape
    HKV, D = k_out.shape[1], k_out.shape[3]
    heads = qkv.contiguous().view(B, T, width // D, D)  # numbers that lie apart would be summed in another order
    HQ = heads.shape[2] - 2 * HKV
    q_and_k, v = heads[:, :, : HQ + HKV].to(compute), heads[:, :, HQ + HKV :]
    if q_norm is not None:
        weight = torch.cat((q_norm.expand(HQ, D), k_norm.expand(HKV, D)))
        q_and_k = _norm(q_and_k, weight, eps, norm_offset, rounding)
    if cos is None:
        rotated = q_and_k.to(qkv.dtype, copy=True)  # what an op returns must not be its input
    else:
        rotated = _rotate(q_and_k, cos, sin, keep).to(qkv.dtype)
    _write(k_out, rotated[:, :, HQ:], v_out, v, slots, keep)
    return rotated[:, :, :HQ]


def _norm(
    heads: torch.Tensor, weight: torch.Tensor, eps: float, norm_offset: float, rounding: torch.dtype
) -> torch.Tensor:
    """heads [..., H, D], weight [H, D]."""
    normed = F.rms_norm(heads, heads.shape[-1:], eps=eps)
    if norm_offset == 0:
        return (normed.to(rounding) * weight.to(rounding)).to(heads.dtype)
    return (normed * (weight.to(rounding).to(heads.dtype) + norm_offset)).to(rounding).to(heads.dtype)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keep: bool) -> torch.Tensor:
    """heads [B, T, H, D] in halves low and high -> low * cos - high * sin, high * cos + low * sin."""

    def over_both(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return torch.cat((low, high), dim=-1)[:, :, None].to(heads.dtype)

    # [B, T, 1, D]
    cosines = _angles.get(cos, ("cos", heads.dtype), lambda: over_both(cos, cos), keep)
    sines = _angles.get(sin, ("sin", heads.dtype), lambda: over_both(-sin, sin), keep)
    # [B, T, H, D]: high, low
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return (heads * cosines).add_(swapped.mul_(sines))  # no addcmul: it may fuse, which rounds otherwise


class _Placement(NamedTuple):
    """Where rows go: one run of slots from `first` on in the one sequence there is, or else (b, s) of all rows, or of
    the rows (b, t) that have a slot."""

    first: int | None
    b: torch.Tensor | None = None
    s: torch.Tensor | None = None
    t: torch.Tensor | None = None


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
    num_slots = k_out.shape[2]
    first, b, s, t = _placements.get(slots, num_slots, lambda: _place(slots, num_slots), keep)
    for out, rows in ((k_out, k), (v_out, v)):
        if first is not None:
            out[:, :, first : first + rows.shape[1]] = rows.transpose(1, 2)
        else:
            out.transpose(1, 2).index_put_((b, s), rows if t is None else rows[b, t])
