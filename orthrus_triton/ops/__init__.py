"""Functional kernels: they know tensors, not models. Each runs as Triton, torch or fp64 reference (`impl=`)."""

from orthrus_triton.ops.consensus import consensus_
from orthrus_triton.ops.dual_view_attention import dual_view_attention
from orthrus_triton.ops.linear import linear
from orthrus_triton.ops.linear_swiglu import linear_swiglu
from orthrus_triton.ops.lm_head import lm_head_choice
from orthrus_triton.ops.rms_norm import rms_norm
from orthrus_triton.ops.rope_cache import rope_cache
from orthrus_triton.ops.rotary_angles import rotary_angles
from orthrus_triton.ops.sample import greedy_choice
from orthrus_triton.ops.swiglu import swiglu

__all__ = [
    "consensus_", "dual_view_attention", "greedy_choice", "linear", "linear_swiglu", "lm_head_choice", "rms_norm",
    "rope_cache", "rotary_angles", "swiglu",
]  # fmt: skip
