"""The public function: check the arguments, choose the implementation, call the registered op."""

from __future__ import annotations

import torch

from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.ops._attention_arguments import require_attention_arguments
from orthrus_triton.ops._dispatch import require_kernel, resolve_impl, runs_directly
from orthrus_triton.ops.dual_view_attention import schema  # noqa: F401  (registers the op)
from orthrus_triton.ops.dual_view_attention.launch import launch
from orthrus_triton.ops.dual_view_attention.torch_impl import attention_torch

HEAD_DIMS = (64, 80, 96, 128, 256)


def dual_view_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor | None = None,
    v_block: torch.Tensor | None = None,
    block_size: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    *,
    impl: str = "auto",
    config: KernelConfig | None = None,
) -> torch.Tensor:
    """Softmax attention of query rows over a prefix of the cache and, in the diffusion view, over their own block.

    Which rows see what is data, so one kernel serves every use:

    ==============================  ==========  ==================================  ===============
    use                             T           key_limit                           block keys
    ==============================  ==========  ==================================  ===============
    prefill, AR decode, verify      any, 1, K   position + 1                        none
    draft, K/V behind the context   K           context_len + K in every row        none
    draft with a sliding window     K           context_len in every row            the block itself
    ==============================  ==========  ==================================  ===============

    Args:
        q: [B, T, HQ, D], fp32, fp16 or bf16; D in {64, 80, 96, 128, 256} for Triton, any D for the others.
        k_cache, v_cache: [B, HKV, S, D], HQ a multiple of HKV. Row t reads only rows 0..key_limit-1; rows beyond the
            largest limit of a sequence may hold anything, NaN included.
        key_limit: [B, T] int32: row t sees cache rows 0..key_limit[b, t] - 1. Values are clamped to 0..S.
        k_block, v_block: [B, T, HKV, D] or None: scratch keys, row t also sees every row of block t // block_size.
        block_size: rows of one block; T must be a multiple of it. Needed with block keys.
        window: sliding window, or None. A query at position p sees cache rows > p - window, where p is
            key_limit - 1 without block keys and key_limit + t % block_size with them; a block is always seen whole.
        scale: multiplies the scores, by default D ** -0.5.
        impl: "auto", "triton", "torch" or "reference"; or "library": where "torch" takes torch's own attention, this
            takes it without the promise that a row's bits do not depend on its neighbours and the context's length.
        config: kernel configuration, by default the one looked up for this head shape. Only with impl="triton".

    Returns:
        [B, T, HQ, D], the dtype of `q`. A row that sees no key is 0.

    Raises:
        TypeError: a tensor's dtype is not the one expected.
        ValueError: shapes or options that do not agree.

    Source: Orthrus, arXiv 2605.12825 (dual-view attention over one KV cache).
    """
    require_attention_arguments(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, "cache")
    impl = impl if impl == "library" else resolve_impl(impl, q)
    if impl == "triton" and q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS} with impl='triton', but got {q.shape[-1]}")
    require_kernel(config, impl, q, k_cache, v_cache, k_block, v_block)
    scale = float(scale) if scale is not None else q.shape[-1] ** -0.5
    if config is not None:
        return launch(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, config)
    if runs_directly("torch" if impl == "library" else impl, q):
        return attention_torch(
            q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, impl == "torch", keep=True
        )
    return torch.ops.orthrus_triton.dual_view_attention(
        q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, impl
    )
