"""Noise as a function of (seed, sequence, position, token): counter-based, so it needs no state and no order.
Philox-2x32 in integers, then Gumbel noise in portable fp32: the same bits in Triton and torch, on every device."""

from __future__ import annotations

import torch

from orthrus_triton._triton import tl, triton
from orthrus_triton.ops.portable_math import (
    log_from_parts,
    log_from_parts_torch,
    portable_log,
    portable_log_torch,
    split_float,
    split_float_torch,
)

# streams: draws at one position that must be independent of each other
CHOICE, DRAFT, ACCEPT = 0, 1, 2
ROUNDS = 7  # the fewest with which Philox-2x32 passes BigCrush (Salmon et al., SC 2011)
MULTIPLIER, WEYL, WORD = 0xD256D193, 0x9E3779B9, 0xFFFFFFFF
SMALL = 0x4AFB0CCC  # (1 - sqrt(1/2)) * 2**32: below it 1 - w has exponent 0


@triton.jit
def philox(c0, c1, key):
    """Philox-2x32: counter (c0, c1) and key, all uint32 -> two uint32."""
    for _ in tl.static_range(7):
        high = tl.umulhi(c0, 0xD256D193)
        low = c0 * 0xD256D193
        c0 = high ^ key ^ c1
        c1 = low
        key = key + 0x9E3779B9
    return c0, c1


@triton.jit
def row_key(seed, sequence, position, stream: tl.constexpr):
    """Two uint32 for everything drawn in one row: seed int64, sequence and position int32."""
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1 = philox(position.to(tl.uint32), sequence.to(tl.uint32), low)
    return philox(c0, c1, high ^ stream)


@triton.jit
def noise_words(ids, key0, key1):
    """The two uint32 behind the noise of the tokens `ids`."""
    ids = ids.to(tl.uint32)
    return philox(ids, tl.zeros_like(ids) + key1, tl.zeros_like(ids) + key0)


@triton.jit
def exponential(high, low):
    """Standard exponential noise -log(1 - w) of noise words, w = (high, low) as a fraction; never less than w."""
    # 1 - w likewise from the complement: both ends keep their relative precision
    small = high < 0x4AFB0CCC
    high, low = tl.where(small, high, high ^ 0xFFFFFFFF), tl.where(small, low, low ^ 0xFFFFFFFF)
    w = high.to(tl.float32) * 2.3283064365386963e-10 + (low.to(tl.float32) + 0.5) * 5.421010862427522e-20
    m, e = split_float(w)
    return -log_from_parts(tl.where(small, -w, m - 1.0), tl.where(small, 0.0, e))


@triton.jit
def gumbel(ids, key0, key1):
    """Standard Gumbel noise of the tokens `ids`, fp32."""
    high, low = noise_words(ids, key0, key1)
    return -portable_log(exponential(high, low))


@triton.jit
def uniform(key0, key1):
    """One uniform number in [0, 1) per row key, fp32."""
    high, _ = philox(key0, key1, key0 ^ key1)
    return (high >> 8).to(tl.float32) * 5.960464477539063e-08


def philox_torch(c0: torch.Tensor, c1: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of `philox`, held in int64."""
    for _ in range(ROUNDS):
        product = c0 * MULTIPLIER  # wraps beyond 63 bits, and the bits are right
        # of the last product only the lower word counts: the upper one goes here
        c0 = (product >> 32).bitwise_xor_(c1).bitwise_xor_(key).bitwise_and_(WORD)
        c1 = product
        key = (key + WEYL).bitwise_and_(WORD)
    return c0, c1 & WORD


def row_key_torch(
    seed: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of `row_key`; the arguments broadcast."""
    position, sequence, seed = torch.broadcast_tensors(position.long(), sequence.long(), seed)
    c0, c1 = philox_torch(position & WORD, sequence & WORD, seed & WORD)
    return philox_torch(c0, c1, ((seed >> 32) & WORD) ^ stream)


def gumbel_torch(vocab_size: int, key0: torch.Tensor, key1: torch.Tensor) -> torch.Tensor:
    """Noise of every token for row keys of any shape [...] -> [..., V] fp32; the bits of `gumbel`."""
    ids = torch.arange(vocab_size, device=key0.device)
    return gumbel_of_torch(ids.expand(*key0.shape, vocab_size), key0, key1)


def noise_words_torch(ids: torch.Tensor, key0: torch.Tensor, key1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of `noise_words` of the tokens `ids` [..., C] for row keys [...], held in int64."""
    return philox_torch(ids, key1[..., None], key0[..., None])


def exponential_torch(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The bits of `exponential`."""
    small = high < SMALL
    high, low = torch.where(small, high, high ^ WORD), torch.where(small, low, low ^ WORD)
    w = high.to(torch.float32) * 2.0**-32 + (low.to(torch.float32) + 0.5) * 2.0**-64
    m, e = split_float_torch(w)
    return -log_from_parts_torch(torch.where(small, -w, m - 1.0), torch.where(small, 0.0, e))


def gumbel_of_torch(ids: torch.Tensor, key0: torch.Tensor, key1: torch.Tensor) -> torch.Tensor:
    """Noise of the tokens `ids` [..., C] for row keys [...], fp32."""
    return -portable_log_torch(exponential_torch(*noise_words_torch(ids, key0, key1)))


def uniform_torch(key0: torch.Tensor, key1: torch.Tensor) -> torch.Tensor:
    """The bits of `uniform`."""
    high, _ = philox_torch(key0, key1, key0 ^ key1)
    return (high >> 8).to(torch.float32) * 2.0**-24
