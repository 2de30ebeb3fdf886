"""Attention of both views over one KV cache: prefill, decode, verify and draft are one op.
Training, where each anchor sees keys of its own, is `block_attention`."""

from orthrus_triton.ops.dual_view_attention.api import dual_view_attention

__all__ = ["dual_view_attention"]
