"""Attention of both views over one KV cache: prefill, decode, verify, draft and training blocks are one op."""

from orthrus_triton.ops.dual_view_attention.api import dual_view_attention

__all__ = ["dual_view_attention"]
