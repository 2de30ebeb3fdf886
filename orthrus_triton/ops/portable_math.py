"""exp and log in fp32 from additions, products and correctly rounded divisions alone: Triton, its interpreter and
torch give the same bits on every device, which no library function promises. Accurate to about two units."""

from __future__ import annotations

import torch

from orthrus_triton._triton import tl, triton

LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
EXP_TERMS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
LOG_TERMS = (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)  # of 2 atanh(s) / s in s * s
EXP_MIN = -87.0  # below it exp is taken as 0; it is 1.6e-38 there
SQRT_HALF_BITS = 0x3F3504F3


@triton.jit
def portable_exp(x):
    """exp of x <= 0, fp32."""
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    n = tl.maximum(n, -126.0)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    p = r * 0.001388888888888889 + 0.008333333333333333
    p = p * r + 0.041666666666666664
    p = p * r + 0.16666666666666666
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    scale = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x >= -87.0, p * scale, 0.0)


@triton.jit
def split_float(x):
    """x > 0, normal, as (m, e): x = m * 2**e with sqrt(1/2) <= m < sqrt(2)."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    return m, e.to(tl.float32)


@triton.jit
def log_from_parts(m_minus_1, e):
    """log(m * 2**e), from m - 1 with sqrt(1/2) <= m < sqrt(2)."""
    s = tl.div_rn(m_minus_1, m_minus_1 + 2.0)
    s2 = s * s
    p = s2 * 0.2222222222222222 + 0.2857142857142857
    p = p * s2 + 0.4
    p = p * s2 + 0.6666666666666666
    p = p * s2 + 2.0
    return (s * p + e * -2.12194440e-4) + e * 0.693359375


@triton.jit
def portable_log(x):
    """log of a positive normal fp32 number."""
    m, e = split_float(x)
    return log_from_parts(m - 1.0, e)


def portable_exp_torch(x: torch.Tensor) -> torch.Tensor:
    """exp of x <= 0, fp32; the bits of `portable_exp`."""
    n = (x * LOG2E).add_(0.5).floor_().clamp_(min=-126.0)
    r = (x - n * LN2_HIGH).sub_(n * LN2_LOW)
    p = (r * EXP_TERMS[0]).add_(EXP_TERMS[1])
    for term in EXP_TERMS[2:]:
        p.mul_(r).add_(term)
    scale = n.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    return torch.where(x >= EXP_MIN, p.mul_(scale), 0.0)


def split_float_torch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of `split_float`."""
    bits = x.contiguous().view(torch.int32)
    e = (bits - SQRT_HALF_BITS) >> 23
    return (bits - (e << 23)).view(torch.float32), e.to(torch.float32)


def log_from_parts_torch(m_minus_1: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The bits of `log_from_parts`."""
    s = m_minus_1 / (m_minus_1 + 2.0)
    s2 = s * s
    p = s2 * LOG_TERMS[0] + LOG_TERMS[1]
    for term in LOG_TERMS[2:]:
        p = p * s2 + term
    return (s * p + e * LN2_LOW) + e * LN2_HIGH


def portable_log_torch(x: torch.Tensor) -> torch.Tensor:
    """log of positive normal fp32 numbers; the bits of `portable_log`."""
    m, e = split_float_torch(x)
    return log_from_parts_torch(m - 1.0, e)
