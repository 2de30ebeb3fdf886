"""DualViewAttention: one attention layer, two sets of projections, one KV cache.
In state dicts, names are those of the published Orthrus checkpoints: {q,k,v,o}_proj, {q,k}_norm, and each with _diff.
As parameters, q, k and v are one, `qkv_proj`, and so are gate and up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from orthrus_triton import ops
from orthrus_triton.modules.kv_cache import CacheLayer, View, ViewPass
from orthrus_triton.modules.projection import FusedLinear, Linear, LowRankDelta, require_residual
from orthrus_triton.modules.rms_norm import RMSNorm
from orthrus_triton.ops._dispatch import require_head_dim, require_size

SUFFIX = {"ar": "", "diffusion": "_diff"}


class DualViewAttention(nn.Module):
    """Attention with a frozen autoregressive view and a trained diffusion view over one KV cache.

    Args:
        hidden_size: width of the residual stream.
        num_heads, num_kv_heads, head_dim: query heads, KV heads (a divisor), size of a head: even, and for Triton one
            that `orthrus_triton.ops.dual_view_attention` names.
        qk_norm: RMSNorm of q and k before the rotation: True for one of each head (Qwen3), "whole" for one of all heads
            together (OLMo 2).
        qkv_bias, o_bias: biases of the projections.
        norm_eps, norm_offset: of the q/k norms, as in `orthrus_triton.ops.rms_norm`.
        window: sliding window in tokens, or None.
        use_rope: False for a layer that rotates nothing (every fourth of SmolLM3).
        scale: multiplies the scores, by default head_dim ** -0.5.
        view_rank: None gives the diffusion view full matrices of its own, as in the paper; r stores each of its
            projections as the frozen AR weight plus a rank-r delta.

    Raises:
        ValueError: a size that cannot be.

    Source: Orthrus, arXiv 2605.12825.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: bool | Literal["whole"] = False,
        qkv_bias: bool = False,
        o_bias: bool = False,
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        window: int | None = None,
        use_rope: bool = True,
        scale: float | None = None,
        view_rank: int | None = None,
    ) -> None:
        super().__init__()
        require_head_dim(head_dim)
        shape = {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        for name, value in shape.items() if window is None else (*shape.items(), ("window", window)):
            require_size(name, value)
        if qk_norm not in (False, True, "whole"):
            raise ValueError(f"qk_norm must be False, True or 'whole', but got {qk_norm!r}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, but got {num_heads}")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.qk_norm, self.norm_eps, self.norm_offset = head_dim, qk_norm, norm_eps, norm_offset
        self.window, self.use_rope, self.scale, self.view_rank = window, use_rope, scale, view_rank
        sizes = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
        for suffix in SUFFIX.values():
            if suffix and view_rank is not None:
                for name, size in sizes.items():
                    setattr(self, f"{name}_proj{suffix}", LowRankDelta(hidden_size, size, view_rank))
                setattr(self, f"o_proj{suffix}", LowRankDelta(sizes["q"], hidden_size, view_rank))
            else:
                parts = {f"{name}_proj{suffix}": size for name, size in sizes.items()}
                FusedLinear(hidden_size, parts, qkv_bias).register_with(self, f"qkv_proj{suffix}")
                setattr(self, f"o_proj{suffix}", Linear(sizes["q"], hidden_size, o_bias))
            if qk_norm:
                for name in "qk":
                    size = sizes[name] if qk_norm == "whole" else head_dim
                    setattr(self, f"{name}_norm{suffix}", RMSNorm(size, norm_eps, norm_offset))

    def forward(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache_layer: CacheLayer,
        view_pass: ViewPass,
        residual: torch.Tensor | None = None,
        next_norm: RMSNorm | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Write this pass's K/V, attend, project.

        Args:
            hidden: [B, T, hidden_size], normed.
            rope: (cos, sin), each [B, T, head_dim // 2] fp32.
            cache_layer: this layer's buffers.
            view_pass: which view, where the rows stand and what they see.
            residual: [B, T, hidden_size], which the projection adds, or None.
            next_norm: the norm after that sum, for a projection that takes it along, too.

        Returns:
            [B, T, hidden_size], plus `residual`; with `next_norm` (the norm of that sum, the sum).

        Raises:
            ValueError: shapes or dtypes that do not fit, or `next_norm` without `residual`. TypeError: `cache_layer` is
                no layer of a cache.
        """
        require_residual(residual, next_norm)
        if hidden.dim() != 3:
            raise ValueError(f"hidden must be [B, T, {self.hidden_size}], but got shape {tuple(hidden.shape)}")
        self._require_layer(cache_layer, hidden.dtype)
        if view_pass.parts:
            return self._draft(hidden, rope, cache_layer, view_pass, residual, next_norm)
        drafting = view_pass.view == "diffusion"
        impl, B, T = view_pass.impl, *hidden.shape[:2]
        k_block = v_block = None
        k_out, v_out = cache_layer.k, cache_layer.v
        if drafting:
            k_block, v_block = cache_layer.k_block[:, :T], cache_layer.v_block[:, :T]
            k_out, v_out = k_block.transpose(1, 2), v_block.transpose(1, 2)
        q = self._rotate_and_store(hidden, rope, k_out, v_out, view_pass.slots, view_pass)
        # prefill, and AR decoding with exact=False: where the library's product serves, so does its attention
        inexact = impl == "torch" and view_pass.linear_impl == "library"
        attended = ops.dual_view_attention(
            q, cache_layer.k, cache_layer.v, view_pass.key_limit, k_block, v_block,
            block_size=T if drafting else None, window=self.window, scale=self.scale,
            impl="library" if inexact else impl,
        ).view(B, T, -1)  # fmt: skip
        return self._project_out(attended, view_pass, residual, next_norm)

    def _draft(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache_layer: CacheLayer,
        view_pass: ViewPass,
        residual: torch.Tensor | None,
        next_norm: RMSNorm | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """A whole draft in one attention; where the frozen view reads the anchor, by each row's own projections."""
        impl, parts = view_pass.impl, view_pass.parts
        if self.window is not None:
            pieces = zip(*_split(parts, hidden, *rope, residual), parts)
            return _join([
                self(rows, (cos, sin), cache_layer, part, rest, next_norm) for rows, cos, sin, rest, part in pieces
            ])  # fmt: skip
        k, v = cache_layer.k, cache_layer.v
        if self.qk_norm:  # each view has norms of its own
            pieces = zip(*_split(parts, hidden, *rope), parts)
            q = _join([
                self._rotate_and_store(rows, (cos, sin), k, v, part.positions, part) for rows, cos, sin, part in pieces
            ])  # fmt: skip
        else:
            qkv = self._by_view(
                lambda rows, part: self._project_qkv(rows, part.view == "diffusion", impl), hidden, parts
            )
            q = ops.rope_cache(qkv, *self._angles(rope), k, v, view_pass.slots, impl=impl)
        attended = ops.dual_view_attention(q, k, v, view_pass.key_limit, scale=self.scale, impl=impl).flatten(2)
        if next_norm is not None and impl == "torch":  # one norm of all rows is less work, and the same
            return next_norm(self._by_view(self._project_out, attended, parts), residual, impl=impl)
        pieces = zip(*_split(parts, attended, residual), parts)
        return _join([self._project_out(rows, part, rest, next_norm) for rows, rest, part in pieces])

    def _require_layer(self, cache_layer: CacheLayer, dtype: torch.dtype) -> None:
        if not isinstance(cache_layer, CacheLayer):
            raise TypeError(f"cache_layer must be one of cache.layers, but got a {type(cache_layer).__name__}")
        heads, size = cache_layer.k.shape[1], cache_layer.k.shape[3]
        if (heads, size, cache_layer.k.dtype) != (self.num_kv_heads, self.head_dim, dtype):
            raise ValueError(
                f"cache_layer must hold {self.num_kv_heads} KV heads of size {self.head_dim} in {dtype}, but holds "
                f"{heads} of {size} in {cache_layer.k.dtype}"
            )

    def _by_view(
        self, project: Callable[[torch.Tensor, ViewPass], torch.Tensor], rows: torch.Tensor, parts: Sequence[ViewPass]
    ) -> torch.Tensor:
        """rows [B, T, ...] -> [B, T, ...], each part's rows as `project` has them."""
        if len(parts) == 1:
            return project(rows, parts[0])
        anchor, masks = parts
        first = anchor.positions.shape[1]
        of_anchor = project(rows[:, :first], anchor)
        # a CPU multiplies eight rows at a time in any case: the anchor's may as well be among them
        of_masks = project(rows, masks)[:, first:] if masks.impl == "torch" else project(rows[:, first:], masks)
        return torch.cat((of_anchor, of_masks), dim=1)

    def _rotate_and_store(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        k_out: torch.Tensor,
        v_out: torch.Tensor,
        slots: torch.Tensor,
        view_pass: ViewPass,
    ) -> torch.Tensor:
        """hidden [B, T, hidden_size] -> q [B, T, HQ, D]; k and v to `slots`."""
        drafting, impl = view_pass.view == "diffusion", view_pass.impl
        q_norm, k_norm, eps = self._norms(view_pass.view)
        where = (*self._angles(rope), k_out, v_out, slots)
        if self.qk_norm == "whole":
            qkv = self._project_qkv(hidden, drafting, view_pass.linear_impl)
            qkv = ops.norm_spans(qkv, q_norm, k_norm, eps, norm_offset=self.norm_offset, impl=impl)
            return ops.rope_cache(qkv, *where, impl=impl)
        where = (*where, q_norm, k_norm, eps)
        options = {"norm_offset": self.norm_offset, "impl": impl}
        if impl == view_pass.linear_impl and not (drafting and self.view_rank is not None):
            projection = self.qkv_proj_diff if drafting else self.qkv_proj
            weight, how = projection.factor(drafting)
            return ops.qkv_rope_cache(hidden, weight, projection.bias, *where, **options, **how)
        return ops.rope_cache(self._project_qkv(hidden, drafting, view_pass.linear_impl), *where, **options)

    def _angles(self, rope: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return rope if self.use_rope else (None, None)

    def _norms(self, view: View) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
        """Weights of the view's q and k norm, and their epsilon."""
        if not self.qk_norm:
            return None, None, self.norm_eps
        suffix = SUFFIX[view]
        return getattr(self, f"q_norm{suffix}").weight, getattr(self, f"k_norm{suffix}").weight, self.norm_eps

    def _project_qkv(self, hidden: torch.Tensor, drafting: bool, impl: str) -> torch.Tensor:
        if not drafting:
            return self.qkv_proj(hidden, impl=impl)
        if self.view_rank is None:
            return self.qkv_proj_diff(hidden, impl=impl, draft=True)
        frozen = self.qkv_proj(hidden, impl=impl, draft=True).split(list(self.qkv_proj.parts.values()), dim=-1)
        deltas = (self.q_proj_diff, self.k_proj_diff, self.v_proj_diff)
        return torch.cat([delta(hidden, part, impl=impl) for delta, part in zip(deltas, frozen)], dim=-1)

    def _project_out(
        self,
        attended: torch.Tensor,
        view_pass: ViewPass,
        residual: torch.Tensor | None = None,
        next_norm: RMSNorm | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        drafting, impl, linear_impl = view_pass.view == "diffusion", view_pass.impl, view_pass.linear_impl
        if drafting and self.view_rank is not None:
            frozen = self.o_proj(attended, impl=linear_impl, draft=True)
            out = self.o_proj_diff(attended, frozen, impl=linear_impl)
            if next_norm is None:
                return out if residual is None else out + residual
            return next_norm(out, residual, impl=impl)
        projection = self.o_proj_diff if drafting else self.o_proj
        if next_norm is None:
            return projection(attended, residual, impl=linear_impl, draft=drafting)
        return projection.add_and_norm(
            attended, residual, next_norm, impl=impl, linear_impl=linear_impl, draft=drafting
        )  # fmt: skip

    def quantize_for_drafts(self) -> None:
        """Let the diffusion view's full projections be read as int8 copies; those of a low-rank view stay."""
        if self.view_rank is None:
            self.qkv_proj_diff.quantize_for_drafts()
            self.o_proj_diff.quantize_for_drafts()

    @torch.no_grad()
    def copy_ar_to_diffusion(self) -> None:
        """Start the diffusion view as a copy of the AR view (for a low-rank view: a zero delta)."""
        for name, parameter in self.named_parameters():
            if ".up." in name:
                parameter.zero_()
            elif "_diff" in name and ".down." not in name:
                parameter.copy_(self.get_parameter(name.replace("_diff", "")))

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, qk_norm={self.qk_norm}, "
            f"window={self.window}, use_rope={self.use_rope}, scale={self.scale}, view_rank={self.view_rank}"
        )


def _join(pieces: list) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Pieces of rows [B, T, ...] as one; of pairs of them, each of the pair."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], tuple):
        return tuple(torch.cat(of, dim=1) for of in zip(*pieces))
    return torch.cat(pieces, dim=1)


def _split(parts: Sequence[ViewPass], *tensors: torch.Tensor | None) -> list[Sequence[torch.Tensor | None]]:
    """Each of the tensors [B, T, ...] in pieces of the parts' rows; None in pieces of None."""
    if len(parts) == 1:
        return [[tensor] for tensor in tensors]
    widths = [part.positions.shape[1] for part in parts]
    return [[None] * len(parts) if tensor is None else tensor.split(widths, dim=1) for tensor in tensors]
