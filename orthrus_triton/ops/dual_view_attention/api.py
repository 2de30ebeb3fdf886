"""The public function: check the arguments, choose the implementation, call the registered op."""

from __future__ import annotations

import torch

from orthrus_triton.autotune.store import KernelConfig
from orthrus_triton.ops._dispatch import require_same, resolve_impl, runs_directly
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
        impl: "auto", "triton", "torch" or "reference"; or "library", torch's attention without the promise that a
            row's bits do not depend on its neighbours and on the context's length.
        config: kernel configuration, by default the one looked up for this head shape. Only with impl="triton".

    Returns:
        [B, T, HQ, D], the dtype of `q`. A row that sees no key is 0.

    Raises:
        TypeError: a tensor's dtype is not the one expected.
        ValueError: shapes or options that do not agree.

    Source: Orthrus, arXiv 2605.12825 (dual-view attention over one KV cache).
    """
    _validate(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window)
    impl = impl if impl == "library" else resolve_impl(impl, q)
    if impl == "triton" and q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS} with impl='triton', but got {q.shape[-1]}")
    if impl != "triton" and config is not None:
        raise ValueError(f"config belongs to impl='triton', but impl is {impl!r}")
    scale = float(scale) if scale is not None else q.shape[-1] ** -0.5
    if config is not None:
        return launch(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, config)
    if runs_directly("torch" if impl == "library" else impl):
        return attention_torch(
            q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, impl == "torch", keep=True
        )
    return torch.ops.orthrus_triton.dual_view_attention(
        q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window, scale, impl
    )


def _validate(q, k_cache, v_cache, key_limit, k_block, v_block, block_size, window) -> None:
    if q.dim() != 4 or k_cache.dim() != 4:
        raise ValueError(
            f"q must be [B, T, HQ, D] and k_cache [B, HKV, S, D], "
            f"but got shapes {tuple(q.shape)} and {tuple(k_cache.shape)}"
        )
    B, T, HQ, D = q.shape
    HKV = k_cache.shape[1]
    if k_cache.shape[0] != B or k_cache.shape[3] != D:
        raise ValueError(f"k_cache must be [{B}, HKV, S, {D}] like q, but got {tuple(k_cache.shape)}")
    if HKV < 1 or HQ % HKV:
        raise ValueError(f"q must have a multiple of num_kv_heads={HKV} heads, but got {HQ}")
    require_same("v_cache", tuple(v_cache.shape), tuple(k_cache.shape), "shape")
    require_same("key_limit", tuple(key_limit.shape), (B, T), "shape")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k_block", k_block), ("v_block", v_block)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, but got {tensor.dtype}")
        if tensor is not None and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, but has strides {tensor.stride()}")
    if key_limit.dtype != torch.int32:
        raise TypeError(f"key_limit must be int32, but got {key_limit.dtype}")
    if (k_block is None) != (v_block is None) or (k_block is None) != (block_size is None):
        raise ValueError("k_block, v_block and block_size must be given together: got only some of them")
    if k_block is not None:
        require_same("k_block", tuple(k_block.shape), (B, T, HKV, D), "shape")
        require_same("v_block", tuple(v_block.shape), (B, T, HKV, D), "shape")
        if block_size < 1 or T % block_size:
            raise ValueError(f"block_size must be >= 1 and divide the {T} query rows, but got {block_size}")
    if window is not None and window < 1:
        raise ValueError(f"window must be >= 1 or None, but got {window}")
