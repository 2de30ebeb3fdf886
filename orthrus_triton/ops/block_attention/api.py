"""The public function: check the arguments, choose the implementation, call the registered op."""

from __future__ import annotations

import torch

from orthrus_triton.ops._attention_arguments import require_attention_arguments
from orthrus_triton.ops._dispatch import resolve_impl
from orthrus_triton.ops.block_attention import schema  # noqa: F401  (registers the ops)
from orthrus_triton.ops.dual_view_attention.api import HEAD_DIMS
from orthrus_triton.ops.dual_view_attention.reference import attention_reference


def block_attention(
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor,
    v_block: torch.Tensor,
    *,
    block_size: int,
    window: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """`dual_view_attention` of training rows, with gradients: A blocks of K rows over one row of frozen context.

    Row t sees context rows 0..key_limit[b, t] - 1 and, in both directions, every row of its own block t // block_size.
    The backward gives the gradients of `q`, `k_block` and `v_block`. The context gets none (None, even where it asks
    for one): the view that wrote it is frozen, and leaving its gradient out changes no bit of the others.

    Args:
        q: [B, T, HQ, D], T = A * block_size; fp32, fp16 or bf16, fp64 with "torch" and "reference".
            D in {64, 80, 96, 128, 256} for Triton, any D for the others.
        k_context, v_context: [B, HKV, S, D], HQ a multiple of HKV. Rows beyond the largest limit of a sequence are
            never read and may hold anything, NaN included.
        key_limit: [B, T] int32, the position of the row's anchor. Values are clamped to 0..S. Blocks in the order of
            their anchors are fastest: neighbours then stop at nearly the same key.
        k_block, v_block: [B, T, HKV, D], the keys and values of the block rows themselves.
        block_size: K, rows of one block; T must be a multiple of it.
        window: sliding window, or None. Row t stands at position p = key_limit + t % block_size and sees context rows
            > p - window; a block is always seen whole.
        scale: multiplies the scores, by default D ** -0.5.
        impl: "auto", "triton", "torch" or "reference" (fp64, differentiated by autograd).

    Returns:
        [B, T, HQ, D], the dtype of `q`. Two runs have the same bits, forward and backward.

    Raises:
        TypeError: a tensor's dtype is not the one expected.
        ValueError: shapes or options that do not agree.

    Source: Orthrus, arXiv 2605.12825 (training of the diffusion view).
    """
    require_attention_arguments(q, k_context, v_context, key_limit, k_block, v_block, block_size, window, "context")
    impl = resolve_impl(impl, q)
    if impl == "triton" and q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS} with impl='triton', but got {q.shape[-1]}")
    scale = float(scale) if scale is not None else q.shape[-1] ** -0.5
    k_context, v_context = k_context.detach(), v_context.detach()
    if impl == "reference":
        return attention_reference(q, k_context, v_context, key_limit, k_block, v_block, block_size, window, scale)
    out, _lse = torch.ops.orthrus_triton.block_attention(
        q, k_context, v_context, key_limit, k_block, v_block, block_size, window, scale, impl
    )
    return out
