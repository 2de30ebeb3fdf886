"""Functional kernels: they know tensors, not models. Each runs as Triton, torch or fp64 reference (`impl=`)."""

from orthrus_triton.ops.add_normed import add_normed
from orthrus_triton.ops.block_attention import block_attention
from orthrus_triton.ops.consensus import consensus_
from orthrus_triton.ops.dual_view_attention import dual_view_attention
from orthrus_triton.ops.int8_product import quantize_rows
from orthrus_triton.ops.linear import linear
from orthrus_triton.ops.linear_kl import HiddenTeacher, LabelTeacher, LinearKL, TopKTeacher, linear_kl
from orthrus_triton.ops.linear_norm import linear_norm
from orthrus_triton.ops.linear_swiglu import linear_swiglu
from orthrus_triton.ops.lm_head import lm_head_choice
from orthrus_triton.ops.logits_filter import SamplingTensors
from orthrus_triton.ops.norm_spans import norm_spans
from orthrus_triton.ops.process_logits import ProcessorTensors, process_logits
from orthrus_triton.ops.qkv_rope_cache import qkv_rope_cache
from orthrus_triton.ops.recall import recall
from orthrus_triton.ops.rejection import filtered_probs, rejection_choice
from orthrus_triton.ops.rms_norm import rms_norm
from orthrus_triton.ops.rope_cache import rope_cache
from orthrus_triton.ops.rotary_angles import rotary_angles
from orthrus_triton.ops.sample import greedy_choice
from orthrus_triton.ops.sampling import sample_choice
from orthrus_triton.ops.swiglu import geglu, swiglu
from orthrus_triton.ops.void_rows import VOID, void_rows

__all__ = [
    "HiddenTeacher",
    "LabelTeacher",
    "LinearKL",
    "ProcessorTensors",
    "SamplingTensors",
    "TopKTeacher",
    "VOID",
    "add_normed",
    "block_attention",
    "consensus_",
    "dual_view_attention",
    "filtered_probs",
    "geglu",
    "greedy_choice",
    "linear",
    "linear_kl",
    "linear_norm",
    "linear_swiglu",
    "lm_head_choice",
    "norm_spans",
    "process_logits",
    "quantize_rows",
    "qkv_rope_cache",
    "recall",
    "rejection_choice",
    "rms_norm",
    "rope_cache",
    "rotary_angles",
    "sample_choice",
    "swiglu",
    "void_rows",
]  # fmt: skip
