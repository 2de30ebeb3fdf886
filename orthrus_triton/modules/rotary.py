"""Rotary angles per position, computed element by element: a row's angles never depend on the call's other rows.
Covers the frequency rules that change with length (longrope, dynamic NTK) as a function of position alone."""

from __future__ import annotations

import torch
from torch import nn


class RotaryEmbedding(nn.Module):
    """cos and sin of `position * inv_freq`, in fp32.

    Args:
        inv_freq: [D // 2] frequencies.
        attention_scaling: multiplies cos and sin (yarn, longrope).
        long_inv_freq: [D // 2] frequencies for sequences longer than `original_max_len` (longrope), or None.
        dynamic_ntk: (theta, factor) to stretch the base past `original_max_len` (dynamic NTK), or None.
        original_max_len: length the frequencies were trained for; needed by the two rules above.

    The two rules that look at the sequence's length take it to be `max(position + 1, prompt_len)`: what a
    token-by-token decoder sees at that position, so a verify row and the same row decoded alone agree.
    """

    inv_freq: torch.Tensor
    long_inv_freq: torch.Tensor | None

    def __init__(
        self,
        inv_freq: torch.Tensor,
        attention_scaling: float = 1.0,
        *,
        long_inv_freq: torch.Tensor | None = None,
        dynamic_ntk: tuple[float, float] | None = None,
        original_max_len: int | None = None,
    ) -> None:
        super().__init__()
        if original_max_len is None and (long_inv_freq is not None or dynamic_ntk is not None):
            raise ValueError("original_max_len is needed with long_inv_freq or dynamic_ntk, but got None")
        self.attention_scaling = attention_scaling
        self.dynamic_ntk = dynamic_ntk
        self.original_max_len = original_max_len
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)
        self.register_buffer(
            "long_inv_freq", None if long_inv_freq is None else long_inv_freq.float(), persistent=False
        )

    @classmethod
    def from_theta(cls, head_dim: int, theta: float = 10_000.0) -> RotaryEmbedding:
        """The plain rule: `theta ** (-2i / head_dim)`."""
        return cls(theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))

    def _apply(self, fn, recurse: bool = True):
        """Move with the model, but stay fp32: bf16 frequencies would be wrong from position 256 on."""
        frequencies = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in frequencies.items():
            if not buffer.is_meta:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def forward(self, positions: torch.Tensor, prompt_len: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B, T] int32, prompt_len [B] int32 -> (cos, sin), each [B, T, D // 2] fp32."""
        angles = positions.float()[..., None] * self._frequencies(positions, prompt_len)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def _frequencies(self, positions: torch.Tensor, prompt_len: torch.Tensor) -> torch.Tensor:
        if self.long_inv_freq is None and self.dynamic_ntk is None:
            return self.inv_freq
        length = torch.maximum(positions + 1, prompt_len[:, None])[..., None]
        beyond = length > self.original_max_len
        if self.long_inv_freq is not None:
            return torch.where(beyond, self.long_inv_freq, self.inv_freq)
        theta, factor = self.dynamic_ntk
        head_dim = 2 * self.inv_freq.shape[0]
        stretch = factor * length.float() / self.original_max_len - (factor - 1)
        base = theta * stretch.clamp(min=1.0) ** (head_dim / (head_dim - 2))
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
        return torch.where(beyond, base**-exponents, self.inv_freq)

    def extra_repr(self) -> str:
        rule = "longrope" if self.long_inv_freq is not None else "dynamic" if self.dynamic_ntk else "static"
        return f"head_dim={2 * self.inv_freq.shape[0]}, rule={rule}, attention_scaling={self.attention_scaling:g}"
