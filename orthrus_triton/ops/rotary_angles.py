"""cos and sin of every position's rotary angles, element by element: a row's angles depend on its position alone.
An op, so that compilers leave it alone: their cosines round differently, and a cache would then hold other bits.
Torch on every device: a Triton kernel would save three launches per pass, and its accurate cosine needs a stack."""

from __future__ import annotations

import torch

from orthrus_triton.ops._dispatch import require_same


def rotary_angles(
    positions: torch.Tensor,
    prompt_len: torch.Tensor,
    inv_freq: torch.Tensor,
    scaling: torch.Tensor | None = None,
    *,
    long_inv_freq: torch.Tensor | None = None,
    dynamic_ntk: tuple[float, float] | None = None,
    original_max_len: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `position * frequency`, times `scaling`.

    The frequency is `inv_freq`, except under the two rules for sequences longer than `original_max_len`, where the
    sequence's length counts as `max(position + 1, prompt_len)`: what a token-by-token decoder sees at that position.

    Args:
        positions: [B, T] int32.
        prompt_len: [B] int32.
        inv_freq: [D // 2] fp32.
        scaling: [D // 2] fp32 that multiplies cos and sin, or None.
        long_inv_freq: [D // 2] fp32 frequencies of longer sequences (longrope), or None.
        dynamic_ntk: (theta, factor) to stretch the base for longer sequences (dynamic NTK), or None.
        original_max_len: needed by both rules, of which at most one may be asked for.

    Returns:
        (cos, sin), each [B, T, D // 2] fp32.

    Raises:
        ValueError: shapes or dtypes that do not agree, both rules, or a rule without `original_max_len`.
    """
    if positions.dim() != 2:
        raise ValueError(f"positions must be [B, T], but got shape {tuple(positions.shape)}")
    require_same("positions", positions.dtype, torch.int32, "dtype")
    require_same("prompt_len", tuple(prompt_len.shape), (positions.shape[0],), "shape")
    require_same("inv_freq", inv_freq.dtype, torch.float32, "dtype")
    if scaling is not None:
        require_same("scaling", tuple(scaling.shape), tuple(inv_freq.shape), "shape")
        require_same("scaling", scaling.dtype, torch.float32, "dtype")
    if long_inv_freq is not None:
        require_same("long_inv_freq", tuple(long_inv_freq.shape), tuple(inv_freq.shape), "shape")
        if dynamic_ntk is not None:
            raise ValueError("long_inv_freq and dynamic_ntk are two rules for longer sequences: give one of them")
    if original_max_len is None and (long_inv_freq is not None or dynamic_ntk is not None):
        raise ValueError("original_max_len must be given with long_inv_freq or dynamic_ntk, but is None")
    theta, factor = dynamic_ntk or (None, None)
    return torch.ops.orthrus_triton.rotary_angles(
        positions, prompt_len, inv_freq, scaling, long_inv_freq, theta, factor, original_max_len
    )


def _frequencies(positions, prompt_len, inv_freq, long_inv_freq, theta, factor, original_max_len) -> torch.Tensor:
    """[D // 2], or [B, T, D // 2] where they depend on the length."""
    if long_inv_freq is None and theta is None:
        return inv_freq
    length = torch.maximum(positions + 1, prompt_len[:, None])[..., None]
    beyond = length > original_max_len
    if long_inv_freq is not None:
        return torch.where(beyond, long_inv_freq, inv_freq)
    stretched = _stretched_on_cpu if length.is_cpu else _stretched
    return torch.where(beyond, stretched(length, inv_freq.shape[0], theta, factor, original_max_len), inv_freq)


def _stretched(length: torch.Tensor, half: int, theta: float, factor: float, original_max_len: int) -> torch.Tensor:
    """Frequencies [..., D // 2] of dynamic NTK for lengths [..., 1]."""
    head_dim = 2 * half
    stretch = factor * length.float() / original_max_len - (factor - 1)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, device=length.device, dtype=torch.float32) / head_dim
    return base**-exponents


def _stretched_on_cpu(
    length: torch.Tensor, half: int, theta: float, factor: float, original_max_len: int
) -> torch.Tensor:  # fmt: skip
    """The same, length by length: a CPU's powers round by where they stand in a vector."""
    lengths, places = length.unique(return_inverse=True)
    rows = [_stretched(one, half, theta, factor, original_max_len) for one in lengths.view(-1, 1)]
    return torch.stack(rows)[places[..., 0]]


@torch.library.custom_op(
    "orthrus_triton::rotary_angles",
    mutates_args=(),
    schema="(Tensor positions, Tensor prompt_len, Tensor inv_freq, Tensor? scaling, Tensor? long_inv_freq, "
    "float? theta, float? factor, int? original_max_len) -> (Tensor, Tensor)",
)
def _rotary_angles_op(positions, prompt_len, inv_freq, scaling, long_inv_freq, theta, factor, original_max_len):
    frequencies = _frequencies(positions, prompt_len, inv_freq, long_inv_freq, theta, factor, original_max_len)
    angles = positions[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if scaling is None else (cos * scaling, sin * scaling)


@_rotary_angles_op.register_fake
def _(positions, prompt_len, inv_freq, scaling, long_inv_freq, theta, factor, original_max_len):
    shape = (*positions.shape, inv_freq.shape[0])
    return inv_freq.new_empty(shape), inv_freq.new_empty(shape)
