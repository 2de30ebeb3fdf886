"""From tensors to the arguments of the C kernels. Each function has the arguments of its op, and gives None where its
kernel does not serve them: another device or dtype, heads that are too large, or no C compiler. So the torch
implementation, which is next, says what it always said of tensors that do not go together."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from functools import cache

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from orthrus_triton.ops._dispatch import PLAIN
from orthrus_triton.ops.cpu.library import c_library
from orthrus_triton.ops.cpu.recording import active_recorder

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # numbered as in vectors.h
MAX_HEAD_DIM, MAX_ROWS = 256, 128  # what the kernels' workspaces hold: MAX_HEAD in vectors.h, MAX_ROWS in attention.c
FEW_ROWS = 16  # no task of attention is split to fewer
FP32_ROWS = 8  # of a product of fp32, up to which no library is faster
COLUMNS = 1024  # of a product, that a task takes at most
LOG2_E = 1.4426950408889634


def attention_cpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor | None,
    v_block: torch.Tensor | None,
    block_size: int | None,
    window: int | None,
    scale: float,
) -> torch.Tensor | None:
    """`dual_view_attention`. A row has the same bits whatever other rows there are, the context's length, what lies
    beyond its limit, and the number of threads."""
    (B, T, HQ, D), (HKV, S) = q.shape, k_cache.shape[1:3]
    group = HQ // HKV
    library = library_for(q, k_cache, v_cache, key_limit, k_block, v_block)
    if library is None or D > MAX_HEAD_DIM or group > MAX_ROWS or k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return None
    q, key_limit, out = q.contiguous(), key_limit.contiguous(), empty(q, q.shape)
    blocks = [block if block is None else block.contiguous() for block in (k_block, v_block)]
    threads, heads = torch.get_num_threads(), B * HKV
    chunks = -(-T // (MAX_ROWS // group))
    # split further until all threads have as many tasks, or so many that it does not matter
    while heads * chunks % threads and heads * chunks < 4 * threads and T * group >= FEW_ROWS * (chunks + 1):
        chunks += 1
    tokens = -(-T // chunks)
    call(
        library.orthrus_attention, (q, k_cache, v_cache, key_limit, *blocks, out), B, T, HQ, HKV, D, S,
        *k_cache.stride()[:3], *v_cache.stride()[:3], block_size or 0, window or 0, tokens, scale * LOG2_E,
        DTYPES[q.dtype], threads,
    )  # fmt: skip
    return out


def has_product(like: torch.Tensor, rows: int = 1) -> bool:
    """Whether `linear_cpu` serves numbers such as these, and no library multiplies so many rows faster: oneDNN does in
    fp32. Nothing of ours is for bf16 on CPUs that multiply it in tiles (amx_bf16)."""
    if not like.is_cpu or like.dtype == torch.float32 and rows > FP32_ROWS:
        return False
    return _product(c_library(), like.dtype)[0] is not None


def has_integer_product() -> bool:
    """Whether `linear_cpu` can multiply in integers: this CPU has instructions for it."""
    return _product(c_library(), torch.float32, True, True) != _product(c_library(), torch.float32, True)


def linear_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, weight_scale: torch.Tensor | None = None,
    round_rows: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """`linear`. A row has the same bits whatever other rows there are, and whatever the number of threads."""
    of_int8 = weight_scale is not None
    kernel, has_room = _product(library_for(x, weight, bias, weight_scale), x.dtype, of_int8, round_rows)
    if kernel is None or weight.dtype != (torch.int8 if of_int8 else x.dtype) or not weight.is_contiguous():
        return None
    N, K = weight.shape
    x, out = x.contiguous(), empty(x, (*x.shape[:-1], N))
    bias = bias if bias is None else bias.contiguous()
    M, threads = x.shape[:-1].numel(), torch.get_num_threads()
    # tasks of about equal size, as many for every thread; of many rows smaller ones, whose weights a cache holds
    tasks = threads * max(-(-N // (threads * (COLUMNS if M <= MAX_ROWS else COLUMNS // 4))), 1)
    columns = -(-N // (tasks * 16)) * 16
    scale = [weight_scale.float().contiguous()] if of_int8 else []
    room = [empty(x, (M, -(-K // 64) * 64), torch.float32)] if has_room else []  # for x in fp32 or int8
    call(kernel, (x, weight, *scale, bias, out, *room), M, N, K, columns, threads)
    return out


@cache
def _product(
    library: ctypes.CDLL | None, dtype: torch.dtype, of_int8: bool = False, round_rows: bool = False
) -> tuple[Callable | None, bool]:  # fmt: skip
    """The product of rows of this dtype, if there is one, and whether it needs room for them in another
    one."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    kinds = (*["_int8_integers"] * round_rows, "_int8_wide") if of_int8 else ("", "_wide")
    for kind in kinds:
        if hasattr(library, f"orthrus_linear_{name}{kind}"):
            return getattr(library, f"orthrus_linear_{name}{kind}"), bool(kind)
    return None, False


def rope_cache_cpu(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    norm_offset: float,
) -> torch.Tensor | None:
    """`rope_cache`."""
    (B, T), (HKV, S, D) = slots.shape, k_out.shape[1:]
    library = library_for(qkv, cos, sin, k_out, v_out, slots, q_norm, k_norm)
    if library is None or D > MAX_HEAD_DIM or 0 in (*k_out.stride(), *v_out.stride()):  # torch refuses expanded ones
        return None
    HQ = qkv.shape[-1] // D - 2 * HKV
    if cos is not None and (cos.stride()[1:] != (D // 2, 1) or sin.stride() != cos.stride()):
        cos, sin = cos.contiguous(), sin.contiguous()
    qkv, slots, q = qkv.contiguous(), slots.contiguous(), empty(qkv, (B, T, HQ, D))
    norms = [norm if norm is None else norm.to(qkv.dtype).contiguous() for norm in (q_norm, k_norm)]
    call(
        library.orthrus_rope_cache, (qkv, cos, sin, slots, *norms, q, k_out, v_out), B, T, HQ, HKV, D, S,
        0 if cos is None else cos.stride(0), *k_out.stride()[:3], *v_out.stride()[:3], eps, norm_offset,
        DTYPES[qkv.dtype], torch.get_num_threads(),
    )  # fmt: skip
    increment_version((k_out, v_out))  # autograd shall know that what it may have saved is gone
    return q


def rms_norm_cpu(
    x: torch.Tensor, weight: torch.Tensor, eps: float, norm_offset: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`rms_norm` and what it is the norm of: x + residual, or x without one."""
    library = library_for(x, weight, residual)
    if library is None:
        return None
    x, weight, out = x.contiguous(), weight.contiguous(), empty(x, x.shape)
    hidden = x
    if residual is not None:
        residual, hidden = residual.contiguous(), empty(x, x.shape)
    H = weight.numel()
    call(
        library.orthrus_rms_norm, (x, residual, weight, out, hidden), x.numel() // max(H, 1), H, eps, norm_offset,
        DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, hidden


def add_normed_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, next_weight: torch.Tensor | None,
    next_eps: float, norm_offset: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """`add_normed`: the norm of the sum, and the sum; the sum twice without `next_weight`."""
    library = library_for(x, residual, weight, next_weight)
    if library is None:
        return None
    x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
    hidden = out = empty(x, x.shape)
    if next_weight is not None:
        next_weight, out = next_weight.contiguous(), empty(x, x.shape)
    H = weight.numel()
    call(
        library.orthrus_add_normed, (x, residual, weight, next_weight, out, hidden), x.numel() // max(H, 1), H, eps,
        next_eps, norm_offset, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out, hidden


def norm_spans_cpu(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, norm_offset: float
) -> torch.Tensor | None:
    """`norm_spans`."""
    library = library_for(qkv, q_weight, k_weight)
    if library is None:
        return None
    qkv, q_weight, k_weight, out = qkv.contiguous(), q_weight.contiguous(), k_weight.contiguous(), empty(qkv, qkv.shape)
    width = qkv.shape[-1]
    call(
        library.orthrus_norm_spans, (qkv, q_weight, k_weight, out), qkv.numel() // max(width, 1), width,
        q_weight.numel(), k_weight.numel(), eps, norm_offset, DTYPES[qkv.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_cpu(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor | None:
    """`swiglu`; with `gelu`, `geglu`."""
    library = library_for(gate_up)
    if library is None:
        return None
    gate_up, I = gate_up.contiguous(), gate_up.shape[-1] // 2
    out = empty(gate_up, (*gate_up.shape[:-1], I))
    call(
        library.orthrus_gated, (gate_up, out), out.numel() // max(I, 1), I, int(gelu), DTYPES[out.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def call(kernel: Callable, tensors: Sequence[torch.Tensor | None], *numbers: int | float) -> None:
    """Run a kernel, and have it taken down where a pass is recorded."""
    recorder = active_recorder()
    if recorder is not None:
        recorder.kernel(kernel, tensors, numbers)
    kernel(*(None if tensor is None else tensor.data_ptr() for tensor in tensors), *numbers)


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """What a kernel writes to; a recorder that had to be told of it by torch would take ten times as long."""
    recorder = active_recorder()
    return like.new_empty(shape, dtype=dtype) if recorder is None else recorder.empty(shape, dtype or like.dtype)


def library_for(
    tensor: torch.Tensor, *others: torch.Tensor | None, dtypes: Collection[torch.dtype] = DTYPES
) -> ctypes.CDLL | None:  # fmt: skip
    """None unless all are numbers in this machine's memory, which an address is enough to find, and only asked for
    their values; the first one of `dtypes`."""
    if tensor.dtype not in dtypes or is_watched():
        return None
    for argument in (tensor, *others):
        if argument is not None and not (argument.is_cpu and type(argument) in PLAIN):
            return None
    return c_library()


def is_watched() -> bool:
    """Whether torch records or transforms what is done to tensors, and so would have to see it: in a trace, vmap or a
    forward-mode derivative."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > (active_recorder() is not None)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
