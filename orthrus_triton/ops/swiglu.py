"""SwiGLU over the fused gate/up product: silu(gate) * up, element by element."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, tl, triton
from orthrus_triton.ops._dispatch import accumulate_dtype, on_its_device, resolve_impl
from orthrus_triton.ops.cpu.kernels import swiglu_cpu


def swiglu(gate_up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """`silu(gate) * up`, computed in fp32 and rounded once.

    Args:
        gate_up: [..., 2 * I], gate in the first half of the last dimension, up in the second; fp32, fp16 or bf16.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        [..., I], the dtype of `gate_up`.

    Raises:
        ValueError: the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even last dimension, but got shape {tuple(gate_up.shape)}")
    return torch.ops.orthrus_triton.swiglu(gate_up, resolve_impl(impl, gate_up))


@triton.jit
def silu_times(gate, up):
    """`silu(gate) * up` in fp32. exp2 of a negated, scaled gate: overflow to +inf gives the right limit, 0."""
    return gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, INTERMEDIATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < INTERMEDIATE
    # [BLOCK], [BLOCK]
    gate = tl.load(gate_up_ptr + row * 2 * INTERMEDIATE + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * INTERMEDIATE + INTERMEDIATE + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * INTERMEDIATE + cols, silu_times(gate, up).to(out_ptr.dtype.element_ty), mask=mask)


BLOCK = 1024
NUM_WARPS = 4


@on_its_device
def launch_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    intermediate = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], intermediate)
    grid = (gate_up.numel() // gate_up.shape[-1], cdiv(intermediate, BLOCK))
    swiglu_kernel[grid](gate_up, out, INTERMEDIATE=intermediate, BLOCK=BLOCK, num_warps=NUM_WARPS, **EXACT_LAUNCH)
    return out


def swiglu_formula(gate_up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In torch, or in C on a CPU: computed in `dtype`, rounded once."""
    if dtype == torch.float32 and (out := swiglu_cpu(gate_up)) is not None:
        return out
    gate, up = gate_up.contiguous().to(dtype).chunk(2, dim=-1)
    return _sigmoid(gate).mul_(gate).mul_(up).to(gate_up.dtype)


SHARED_FROM = 32768  # numbers: at::internal::GRAIN_SIZE, from which torch's CPU kernels share a step among threads


def _sigmoid(gate: torch.Tensor) -> torch.Tensor:
    """Of [..., I], so that a row has the bits it has alone.

    A thread's share may begin and end within a row, and the last numbers of a share, which fill no vector, are rounded
    otherwise. So a step has no more rows than one thread takes.
    """
    if gate.device.type != "cpu" or gate.numel() < SHARED_FROM:
        return torch.sigmoid(gate)
    intermediate = gate.shape[-1]
    steps = gate.reshape(-1, intermediate).split(max(SHARED_FROM // intermediate, 1))
    return torch.cat([torch.sigmoid(rows) for rows in steps]).view(gate.shape)


@torch.library.custom_op("orthrus_triton::swiglu", mutates_args=(), schema="(Tensor gate_up, str impl) -> Tensor")
def _swiglu_op(gate_up, impl):
    if impl == "triton":
        return launch_swiglu(gate_up)
    return swiglu_formula(gate_up, torch.float64 if impl == "reference" else accumulate_dtype(gate_up.dtype))


@_swiglu_op.register_fake
def _(gate_up, impl):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
