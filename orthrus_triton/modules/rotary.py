"""Rotary angles per position, computed element by element: a row's angles never depend on the call's other rows.
Covers the frequency rules that change with length (longrope, dynamic NTK) as a function of position alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import nn

from orthrus_triton import ops
from orthrus_triton.ops._dispatch import require_head_dim


class RotaryEmbedding(nn.Module):
    """cos and sin of `position * inv_freq`, in fp32.

    Args:
        inv_freq: [D // 2] frequencies; a pair of frequency 0 is left as it is.
        attention_scaling: multiplies cos and sin (yarn, longrope), except those of frequency 0.
        long_inv_freq: [D // 2] frequencies for sequences longer than `original_max_len` (longrope), or None.
        dynamic_ntk: (theta, factor) to stretch the base past `original_max_len` (dynamic NTK), or None.
        original_max_len: length the frequencies were trained for; needed by the two rules above.

    The two rules that look at the sequence's length take it to be `max(position + 1, prompt_len)`: what a
    token-by-token decoder sees at that position, so a verify row and the same row decoded alone agree.
    """

    inv_freq: torch.Tensor
    scaling: torch.Tensor | None
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
        scaling = torch.full_like(self.inv_freq, attention_scaling).masked_fill_(self.inv_freq == 0, 1.0)
        self.register_buffer("scaling", None if attention_scaling == 1.0 else scaling, persistent=False)
        self.register_buffer(
            "long_inv_freq", None if long_inv_freq is None else long_inv_freq.float(), persistent=False
        )

    @classmethod
    def from_theta(cls, head_dim: int, theta: float = 10_000.0) -> RotaryEmbedding:
        """The plain rule: `theta ** (-2i / head_dim)`.

        Raises:
            ValueError: `head_dim` is odd or no size, or `theta` is not positive.
        """
        require_head_dim(head_dim)
        if not isinstance(theta, Real) or not 0 < theta < math.inf:
            raise ValueError(f"theta must be positive, but got {theta!r}")
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
        return ops.rotary_angles(
            positions, prompt_len, self.inv_freq, self.scaling, long_inv_freq=self.long_inv_freq,
            dynamic_ntk=self.dynamic_ntk, original_max_len=self.original_max_len,
        )  # fmt: skip

    def extra_repr(self) -> str:
        rule = "longrope" if self.long_inv_freq is not None else "dynamic" if self.dynamic_ntk else "static"
        return f"head_dim={2 * self.inv_freq.shape[0]}, rule={rule}, attention_scaling={self.attention_scaling:g}"


class RotarySets(nn.Module):
    """Several rotary embeddings over one head size, for layers that do not all rotate alike (OLMo 3, where those with a
    window keep the frequencies that the others stretch). `OrthrusDecoderLayer(rope_set=i)` takes the i-th.

    Args:
        sets: two or more; a rule that looks at the length must be that of one `original_max_len`.

    Raises:
        ValueError: fewer, or sets of several head sizes or of several `original_max_len`.
    """

    def __init__(self, sets: Sequence[RotaryEmbedding]) -> None:
        super().__init__()
        sizes = [2 * one.inv_freq.shape[0] for one in sets]
        if len(sizes) < 2 or len(set(sizes)) > 1:
            raise ValueError(f"sets must be two or more of one head size, but got sizes {sizes}")
        self.sets = nn.ModuleList(sets)
        lengths = {one.original_max_len for one in sets} - {None}
        if len(lengths) > 1:
            raise ValueError(f"sets must be of one original_max_len, but got {sorted(lengths)}")
        self.original_max_len = max(lengths, default=None)

    def forward(self, positions: torch.Tensor, prompt_len: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B, T] int32, prompt_len [B] int32 -> (cos, sin), each [sets, B, T, D // 2] fp32."""
        cos, sin = zip(*(one(positions, prompt_len) for one in self.sets))
        return torch.stack(cos), torch.stack(sin)


def angles_of(rope: tuple[torch.Tensor, torch.Tensor], number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of one set, [B, T, D // 2] each; all there are where there are no sets."""
    cos, sin = rope
    if cos.dim() != 4:
        return rope
    if number >= len(cos):
        raise ValueError(f"rope_set must be in 0..{len(cos) - 1}, for the model has {len(cos)} sets, but got {number}")
    return cos[number], sin[number]
