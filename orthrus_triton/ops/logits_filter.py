"""Which tokens a row may give: top-k, then top-p, then min-p, each by comparing values, so that equal logits stand or
fall together. No sort: counts and fixed-point masses are integers, and integer sums have no order that could matter."""

from __future__ import annotations

from typing import NamedTuple

import torch

from orthrus_triton._triton import tl, triton
from orthrus_triton.ops.portable_math import portable_exp, portable_exp_torch
from orthrus_triton.ops.void_rows import VOID

LARGEST = 3.0e38  # +inf logits are this: a difference of two of them must not be NaN
MASS_ONE = 2.0**40  # mass of the likeliest token; 2**20 of them still fit int64


class SamplingTensors(NamedTuple):
    """How each sequence samples: tensors [B] on the device.

    temperature fp32, 0 is greedy; top_k int32, 0 is off; top_p fp32, 1 is off; min_p fp32, 0 is off; seed int64 and
    sequence int32 key the noise.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    sequence: torch.Tensor


@triton.jit
def load_scaled(row_ptr, ids, temperature, V: tl.constexpr):
    """logits / temperature (temperature 0: the logits), NaN and beyond V as -inf; zero has one sign."""
    z = tl.load(row_ptr + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    z = tl.where(z == z, z, float("-inf"))
    z = tl.div_rn(z, tl.zeros_like(z) + tl.where(temperature > 0, temperature, 1.0))
    z = tl.minimum(z, 3.0e38)
    return tl.where(z == 0.0, 0.0, z)


@triton.jit
def order_key(z):
    """uint32 that orders as the float does."""
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | (-2147483647 - 1))).to(tl.uint32, bitcast=True)


@triton.jit
def mass_of(weight):
    """Fixed-point exp(z - z_max), int64, from the weight in fp32; the largest is 2**40."""
    return (weight * 1099511627776.0).to(tl.int64)


@triton.jit
def mass(z, z_max):
    return mass_of(portable_exp(z - z_max))


def scaled_torch(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """logits [B, T, V] -> [B, T, V] fp32; the bits of `load_scaled`."""
    z = logits.to(torch.float32)
    z = torch.where(z.isnan(), -torch.inf, z)
    return divided_torch(z, torch.where(temperature > 0, temperature, 1.0)[:, None, None])


def divided_torch(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """logits / temperature > 0, which broadcasts, for logits fp32 without NaN."""
    z = (logits / temperature).clamp(max=LARGEST)
    return torch.where(z == 0.0, 0.0, z)


def row_max_torch(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled logits [B, T, V] -> the largest [B, T] and the lowest id that has it; VOID where no logit is
    larger than -inf."""
    best, ids = z.max(dim=-1)
    return best, torch.where(best > -torch.inf, ids, VOID)


def mass_of_torch(weight: torch.Tensor) -> torch.Tensor:
    """The masses of `mass_of`."""
    return (weight * MASS_ONE).long()


def mass_torch(z: torch.Tensor, z_max: torch.Tensor) -> torch.Tensor:
    """The masses of `mass`; z_max [..., 1]."""
    masses = mass_of_torch(portable_exp_torch(z - z_max))
    return torch.where(z_max > -torch.inf, masses, 0)  # a row of -inf alone has none


def top_k_torch(z: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The k-th largest of each row [B, T, 1], -inf where all are kept. Looks at top_k on the host."""
    largest = int(top_k.max())
    V = z.shape[-1]
    active = ((top_k > 0) & (top_k < V))[:, None, None]
    if largest <= 0:
        return torch.full_like(z[..., :1], -torch.inf)
    values = z.topk(min(largest, V), dim=-1).values
    at = (top_k.long() - 1).clamp(0, values.shape[-1] - 1)[:, None, None].expand(*z.shape[:2], 1)
    return torch.where(active, values.gather(-1, at), -torch.inf)


def kept_reference(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor:
    """The definition, in fp64, row by row: [B, T, V] bool."""
    z = scaled_torch(logits, sampling.temperature).double()
    kept = torch.ones_like(z, dtype=torch.bool)
    for b, rows in enumerate(z):
        for t, row in enumerate(rows):
            keep = torch.ones_like(row, dtype=torch.bool)
            k = int(sampling.top_k[b])
            if 0 < k < row.numel():
                keep &= row >= row.sort(descending=True).values[k - 1]
            weights = torch.where(keep, (row - row.max()).exp(), 0.0)
            above = torch.stack([weights[row > value].sum() for value in row])
            keep &= above < sampling.top_p[b] * weights.sum()
            keep &= (row - row.max()).exp() >= sampling.min_p[b]
            kept[b, t] = keep
    return kept
