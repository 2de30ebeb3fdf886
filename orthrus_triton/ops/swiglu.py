"""SwiGLU and GeGLU over the fused gate/up product: silu(gate) * up or gelu(gate) * up, element by element."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, cdiv, tl, triton
from orthrus_triton.ops._dispatch import accumulate_dtype, on_its_device, resolve_impl, runs_directly
from orthrus_triton.ops.cpu.kernels import gated_cpu


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
    _check(gate_up)
    return torch.ops.orthrus_triton.swiglu(gate_up, resolve_impl(impl, gate_up))


def geglu(gate_up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """`gelu(gate) * up` with the gelu that goes by a tanh (transformers' gelu_pytorch_tanh); otherwise as `swiglu`."""
    _check(gate_up)
    impl = resolve_impl(impl, gate_up)
    if runs_directly(impl, gate_up):
        return geglu_formula(gate_up, accumulate_dtype(gate_up.dtype))
    return torch.ops.orthrus_triton.geglu(gate_up, impl)


def _check(gate_up: torch.Tensor) -> None:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must have an even last dimension, but got shape {tuple(gate_up.shape)}")


@triton.jit
def silu_times(gate, up):
    """`silu(gate) * up` in fp32. exp2 of a negated, scaled gate: overflow to +inf gives the right limit, 0."""
    return gate / (1.0 + tl.exp2(gate * -1.4426950408889634)) * up


@triton.jit
def gelu_times(gate, up):
    """`gelu(gate) * up` in fp32; 1 + tanh(x) is 2 * sigmoid(2 * x), which loses no digits to the 1."""
    x = gate * (1.5957691216057308 + 0.07135481627260025 * (gate * gate))
    return gate / (1.0 + tl.exp2(x * -1.4426950408889634)) * up


@triton.jit
def gated_kernel(gate_up_ptr, out_ptr, INTERMEDIATE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < INTERMEDIATE
    # [BLOCK], [BLOCK]
    gate = tl.load(gate_up_ptr + row * 2 * INTERMEDIATE + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * INTERMEDIATE + INTERMEDIATE + cols, mask=mask, other=0.0).to(tl.float32)
    out = gelu_times(gate, up) if GELU else silu_times(gate, up)
    tl.store(out_ptr + row * INTERMEDIATE + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


BLOCK = 1024
NUM_WARPS = 4


@on_its_device
def launch_gated(gate_up: torch.Tensor, gelu: bool) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    intermediate = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], intermediate)
    grid = (gate_up.numel() // gate_up.shape[-1], cdiv(intermediate, BLOCK))
    gated_kernel[grid](
        gate_up, out, INTERMEDIATE=intermediate, BLOCK=BLOCK, GELU=gelu, num_warps=NUM_WARPS, **EXACT_LAUNCH
    )
    return out


def swiglu_formula(gate_up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In torch, or in C on a CPU: computed in `dtype`, rounded once."""
    if dtype == torch.float32 and (out := gated_cpu(gate_up, gelu=False)) is not None:
        return out
    gate, up = gate_up.contiguous().to(dtype).chunk(2, dim=-1)
    return _sigmoid(gate).mul_(gate).mul_(up).to(gate_up.dtype)


def geglu_formula(gate_up: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `swiglu_formula`."""
    if dtype == torch.float32 and (out := gated_cpu(gate_up, gelu=True)) is not None:
        return out
    both = gate_up.contiguous().to(dtype)
    # of both halves, though only gate's counts: rows that lie apart, as those of silu do, each end where one alone does
    x, _ = (both * both).mul_(0.07135481627260025).add_(1.5957691216057308).mul_(both).chunk(2, dim=-1)
    gate, up = both.chunk(2, dim=-1)
    return _sigmoid(x).mul_(gate).mul_(up).to(gate_up.dtype)


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
        return launch_gated(gate_up, gelu=False)
    return swiglu_formula(gate_up, torch.float64 if impl == "reference" else accumulate_dtype(gate_up.dtype))


@_swiglu_op.register_fake
def _(gate_up, impl):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("orthrus_triton::geglu", mutates_args=(), schema="(Tensor gate_up, str impl) -> Tensor")
def _geglu_op(gate_up, impl):
    if impl == "triton":
        return launch_gated(gate_up, gelu=True)
    return geglu_formula(gate_up, torch.float64 if impl == "reference" else accumulate_dtype(gate_up.dtype))


@_geglu_op.register_fake
def _(gate_up, impl):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
