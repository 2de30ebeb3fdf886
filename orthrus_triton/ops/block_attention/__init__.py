"""Differentiable attention of training blocks over a frozen context: gradients reach the blocks and nothing else."""

from orthrus_triton.ops.block_attention.api import block_attention

__all__ = ["block_attention"]
