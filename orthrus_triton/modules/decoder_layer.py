"""OrthrusDecoderLayer: dual-view attention and a gated MLP that both views share; and a stack of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from orthrus_triton import ops
from orthrus_triton.modules.attention import DualViewAttention
from orthrus_triton.modules.kv_cache import CacheLayer, SharedKVCache, ViewPass
from orthrus_triton.modules.projection import FusedLinear, Linear, require_residual
from orthrus_triton.modules.rms_norm import RMSNorm
from orthrus_triton.modules.rotary import angles_of
from orthrus_triton.ops._dispatch import require_size

NORMS = ("before", "behind", "both")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # as transformers' configurations name them


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`, gate and up as one product.

    Args:
        hidden_size, intermediate_size: widths.
        bias: biases on all three projections.
        activation: "silu", in which the product takes the rest along, or "gelu_pytorch_tanh", a kernel of its own.

    Raises:
        ValueError: a size or an activation that cannot be.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        activation: Literal["silu", "gelu_pytorch_tanh"] = "silu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, but got {activation!r}")
        self.activation = activation
        require_size("intermediate_size", intermediate_size)
        parts = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        FusedLinear(hidden_size, parts, bias).register_with(self, "gate_up_proj")
        self.down_proj = Linear(intermediate_size, hidden_size, bias)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        next_norm: RMSNorm | None = None,
        *,
        impl: str = "auto",
        linear_impl: str = "auto",
        draft: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x [B, T, H] -> [B, T, H], plus `residual`; with `next_norm` (the norm of that sum, the sum). A `draft` reads
        the int8 copies of the weights, if there are any, and may round to int8 what it multiplies with int8.

        Raises:
            ValueError: shapes or dtypes that do not agree, or `next_norm` without `residual`.
        """
        require_residual(residual, next_norm)
        gate_up = self.gate_up_proj
        if self.activation == "gelu_pytorch_tanh":
            activated = ops.geglu(gate_up(x, impl=linear_impl, draft=draft), impl=impl)
        elif impl == linear_impl:
            weight, how = gate_up.factor(draft)
            activated = ops.linear_swiglu(x, weight, gate_up.bias, impl=impl, **how)
        else:  # a product that is not ours has no epilogue to put it in
            activated = ops.swiglu(gate_up(x, impl=linear_impl, draft=draft), impl=impl)
        if next_norm is None:
            return self.down_proj(activated, residual, impl=linear_impl, draft=draft)
        return self.down_proj.add_and_norm(
            activated, residual, next_norm, impl=impl, linear_impl=linear_impl, draft=draft
        )  # fmt: skip

    def quantize_for_drafts(self) -> None:
        """Keep int8 copies of the weights beside them, for drafts."""
        self.gate_up_proj.quantize_for_drafts()
        self.down_proj.quantize_for_drafts()


class OrthrusDecoderLayer(nn.Module):
    """One Transformer layer with two attention views, for inference: its kernels have no gradient, so run it under
    `torch.no_grad`; `backward` raises. What trains a view is in `orthrus_triton.training.student`.

    Args:
        hidden_size: width of the residual stream.
        num_heads, num_kv_heads, head_dim: attention shape.
        intermediate_size: width of the MLP.
        norm_eps: of all norms.
        norms: where attention and MLP have theirs: "before" them, as most models; "behind" them, normed before it is
            added to the residual stream (OLMo 2, EXAONE 4); or "both" (GLM-4-0414, Gemma 3).
        norm_offset: added to the weights of all norms (1 in Gemma).
        mlp_bias, activation: of the MLP, as in `GatedMLP`.
        rope_set: which angles are this layer's where the model has a `RotarySets`.
        **attention: further options of `DualViewAttention`.

    Raises:
        ValueError: a size or an option that cannot be.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        intermediate_size: int,
        *,
        norm_eps: float = 1e-6,
        norms: Literal["before", "behind", "both"] = "before",
        norm_offset: float = 0.0,
        mlp_bias: bool = False,
        activation: Literal["silu", "gelu_pytorch_tanh"] = "silu",
        rope_set: int = 0,
        **attention: Any,
    ) -> None:
        super().__init__()
        if norms not in NORMS:
            raise ValueError(f"norms must be one of {NORMS}, but got {norms!r}")

        def norm_if(there: bool) -> RMSNorm | None:
            return RMSNorm(hidden_size, norm_eps, norm_offset) if there else None

        if type(rope_set) is not int or rope_set < 0:
            raise ValueError(f"rope_set must be an integer >= 0, but got {rope_set!r}")
        before, behind = norms != "behind", norms != "before"
        self.rope_set = rope_set
        self.input_layernorm = norm_if(before)
        self.self_attn = DualViewAttention(
            hidden_size, num_heads, num_kv_heads, head_dim, norm_eps=norm_eps, norm_offset=norm_offset, **attention
        )
        self.post_self_attn_layernorm = norm_if(behind)
        self.post_attention_layernorm = norm_if(before)  # the MLP's own: other models' name for it
        self.mlp = GatedMLP(hidden_size, intermediate_size, mlp_bias, activation)
        self.post_mlp_layernorm = norm_if(behind)

    def forward(
        self,
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache_layer: CacheLayer,
        view_pass: ViewPass,
        normed: torch.Tensor | None = None,
        next_norm: RMSNorm | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The residual stream [B, T, hidden_size] through attention and MLP.

        Args:
            hidden, rope, cache_layer, view_pass: as in `DualViewAttention`; rope may be that of a `RotarySets`.
            normed: `input_layernorm(hidden)`, if the layer before has it already.
            next_norm: the norm after this layer, which its last product then takes along.

        Returns:
            hidden; with `next_norm` (next_norm(hidden), hidden).
        """
        impl, linear_impl, rope = view_pass.impl, view_pass.linear_impl, angles_of(rope, self.rope_set)
        options = {"impl": impl, "linear_impl": linear_impl, "draft": view_pass.only_drafts}
        if normed is None:
            normed = hidden if self.input_layernorm is None else self.input_layernorm(hidden, impl=impl)
        if self.post_mlp_layernorm is None:
            normed, hidden = self.self_attn(normed, rope, cache_layer, view_pass, hidden, self.post_attention_layernorm)
            return self.mlp(normed, hidden, next_norm, **options)
        attended = self.self_attn(normed, rope, cache_layer, view_pass)
        normed, hidden = self.post_self_attn_layernorm.add_to(
            hidden, attended, self.post_attention_layernorm, impl=impl
        )  # fmt: skip
        normed, hidden = self.post_mlp_layernorm.add_to(hidden, self.mlp(normed, **options), next_norm, impl=impl)
        return hidden if next_norm is None else (normed, hidden)


def run_layers(
    layers: Sequence[OrthrusDecoderLayer],
    norm: RMSNorm,
    hidden: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    cache: SharedKVCache,
    view_pass: ViewPass,
) -> torch.Tensor:
    """hidden [B, T, hidden_size] through all layers and the final norm, every norm in the kernel of the product before
    it. A model must run its layers either so or one by one: a norm may round differently in the two.

    Raises:
        ValueError: the cache is of another number of layers.
    """
    if len(cache.layers) != len(layers):
        raise ValueError(f"cache must hold {len(layers)} layers, as the model does, but holds {len(cache.layers)}")

    def eagerly(
        hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], view_pass: ViewPass
    ) -> torch.Tensor:  # fmt: skip
        normed = None  # the first layer's own matter
        next_norms = [*(layer.input_layernorm for layer in layers[1:]), norm]
        for layer, cache_layer, next_norm in zip(layers, cache.layers, next_norms):
            result = layer(hidden, rope, cache_layer, view_pass, normed, next_norm)
            normed, hidden = (None, result) if next_norm is None else result
        return normed

    if cache.recorded is None or torch.compiler.is_compiling():
        return eagerly(hidden, rope, view_pass)
    return cache.recorded.run(eagerly, [*layers, norm], hidden, rope, cache, view_pass)
