"""What both attention ops require of their arguments: shapes, dtypes and layouts that agree."""

from __future__ import annotations

import torch

from orthrus_triton.ops._dispatch import require_same


def require_attention_arguments(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor | None,
    v_block: torch.Tensor | None,
    block_size: int | None,
    window: int | None,
    of: str,
) -> None:
    """Raise for the first argument that does not fit; `keys` and `values` are called k_<of> and v_<of>.

    Raises:
        TypeError: a dtype. ValueError: a shape, a layout or an option.
    """
    if q.dim() != 4 or keys.dim() != 4:
        raise ValueError(
            f"q must be [B, T, HQ, D] and k_{of} [B, HKV, S, D], "
            f"but got shapes {tuple(q.shape)} and {tuple(keys.shape)}"
        )
    B, T, HQ, D = q.shape
    HKV = keys.shape[1]
    if keys.shape[0] != B or keys.shape[3] != D:
        raise ValueError(f"k_{of} must be [{B}, HKV, S, {D}] like q, but got {tuple(keys.shape)}")
    if HKV < 1 or HQ % HKV:
        raise ValueError(f"q must have a multiple of num_kv_heads={HKV} heads, but got {HQ}")
    require_same(f"v_{of}", tuple(values.shape), tuple(keys.shape), "shape")
    require_same("key_limit", tuple(key_limit.shape), (B, T), "shape")
    for name, tensor in ((f"k_{of}", keys), (f"v_{of}", values), ("k_block", k_block), ("v_block", v_block)):
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
