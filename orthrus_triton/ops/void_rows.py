"""A model that gives NaN or infinity has nothing to choose from: such rows are marked instead of committed as a token.
Decided on the device, so that no cycle waits for the host to look."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import on_its_device, require_same, resolve_impl, runs_directly
from orthrus_triton.ops.cpu.token_kernels import void_rows_cpu

VOID = -2  # no token: ends a sequence as a stop token does, and is not part of it
BLOCK, NUM_WARPS = 1024, 4


def void_rows(choice: torch.Tensor, hidden: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """`choice` with VOID in rows whose hidden state is not finite.

    Args:
        choice: [B, T] int64.
        hidden: [B, T, H] floating point, what the logits were computed from.
        impl: "auto", "triton" or "torch"; "reference" is torch.

    Returns:
        [B, T] int64.

    Raises:
        ValueError: shapes that do not agree.
    """
    require_same("choice", tuple(choice.shape), tuple(hidden.shape[:-1]), "shape")
    impl = resolve_impl(impl, hidden)
    if runs_directly(impl, hidden):
        return void_rows_torch(choice, hidden)
    return torch.ops.orthrus_triton.void_rows(choice, hidden, impl)


@triton.jit
def void_rows_kernel(choice_ptr, hidden_ptr, out_ptr, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    void = tl.full((), 0, tl.int32)
    for start in range(0, H, BLOCK):
        dims = start + tl.arange(0, BLOCK)
        hidden = tl.load(hidden_ptr + row * H + dims, mask=dims < H, other=0.0).to(tl.float32)
        # NaN fails every comparison
        void = tl.maximum(void, tl.max(tl.where(tl.abs(hidden) < float("inf"), 0, 1), axis=0))
    tl.store(out_ptr + row, tl.where(void > 0, -2, tl.load(choice_ptr + row)))


@on_its_device
def launch_void_rows(choice: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(choice, memory_format=torch.contiguous_format)
    void_rows_kernel[(choice.numel(),)](
        choice.contiguous(), hidden.contiguous(), out, H=hidden.shape[-1], BLOCK=BLOCK, num_warps=NUM_WARPS,
        **EXACT_LAUNCH,
    )  # fmt: skip
    return out


def void_rows_torch(choice: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Any device."""
    if (of_c := void_rows_cpu(choice, hidden, VOID)) is not None:
        return of_c
    return torch.where(hidden.isfinite().all(dim=-1), choice, VOID)


@torch.library.custom_op(
    "orthrus_triton::void_rows", mutates_args=(), schema="(Tensor choice, Tensor hidden, str impl) -> Tensor"
)
def _void_rows_op(choice, hidden, impl):
    if impl == "triton":
        return launch_void_rows(choice, hidden)
    return void_rows_torch(choice, hidden)


@_void_rows_op.register_fake
def _(choice, hidden, impl):
    return torch.empty_like(choice)
