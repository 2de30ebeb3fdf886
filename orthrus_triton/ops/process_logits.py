"""Penalties, biases and the minimum length, applied to logits on the device, with each row's own history:
what is committed, and the tokens of its own block before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import on_its_device, require_same, resolve_impl

IN_PROMPT = 1 << 30  # in a history count: the token stands in the prompt; below it, how often it was generated


class ProcessorTensors(NamedTuple):
    """What each sequence does to its logits: tensors on the device.

    repetition_penalty [B] fp32, 1 is off: positive logits of tokens seen in prompt or output are divided by it,
    negative ones multiplied; presence_penalty, frequency_penalty [B] fp32, 0 is off: subtracted from tokens generated,
    once, and once per time; min_position [B] int32: before it no stop token is chosen; bias [B, V] fp32: added;
    history [B, V + 1] int32: see `IN_PROMPT`; the last column takes what nobody should count.
    """

    repetition_penalty: torch.Tensor
    presence_penalty: torch.Tensor
    frequency_penalty: torch.Tensor
    min_position: torch.Tensor
    bias: torch.Tensor
    history: torch.Tensor


def process_logits(
    logits: torch.Tensor,
    positions: torch.Tensor,
    candidate: torch.Tensor | None,
    eos_ids: torch.Tensor,
    processors: ProcessorTensors,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Logits after penalties, bias and minimum length, in this order.

    Args:
        logits: [B, T, V] fp32.
        positions: [B, T] int32, where the token chosen in the row will stand.
        candidate: [B, T] int64, the verified block: row t has read tokens 0..t of it; token 0 is in the history
            already. None where the block is not known yet, as in a draft.
        eos_ids: [E] int64.
        processors: see `ProcessorTensors`.
        impl: "auto", "triton" or "torch"; "reference" is torch.

    Returns:
        [B, T, V] fp32.

    Raises:
        ValueError: shapes or dtypes that do not agree.
    """
    require_same("logits", logits.dtype, torch.float32, "dtype")
    B, T, V = logits.shape
    require_same("positions", tuple(positions.shape), (B, T), "shape")
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_position"):
        require_same(name, tuple(getattr(processors, name).shape), (B,), "shape")
    require_same("bias", tuple(processors.bias.shape), (B, V), "shape")
    require_same("history", tuple(processors.history.shape), (B, V + 1), "shape")
    if candidate is not None:
        require_same("candidate", tuple(candidate.shape), (B, T), "shape")
    impl = resolve_impl(impl, logits)
    return torch.ops.orthrus_triton.process_logits(logits, positions, candidate, eos_ids, *processors, impl)


# a slot's own tensors begin anywhere in those of all slots: see `consensus`
OF_A_SLOT = (
    "repetition_ptr", "presence_ptr", "frequency_ptr", "min_position_ptr", "bias_ptr", "history_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=["T", "E"], do_not_specialize_on_alignment=OF_A_SLOT)
def process_logits_kernel(
    logits_ptr, positions_ptr, candidate_ptr, eos_ptr, repetition_ptr, presence_ptr, frequency_ptr, min_position_ptr,
    bias_ptr, history_ptr, out_ptr, T, E, V: tl.constexpr, HAS_CANDIDATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t = row // T, row % T
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = ids < V
    # [BLOCK] each
    logits = tl.load(logits_ptr + row * V + ids, mask=inside, other=0.0)
    count = tl.load(history_ptr + b * (V + 1) + ids, mask=inside, other=0)
    if HAS_CANDIDATE:
        for j in range(1, t + 1):
            count += (ids == tl.load(candidate_ptr + b * T + j)).to(tl.int32)
    penalty = tl.zeros_like(logits) + tl.load(repetition_ptr + b)
    punished = tl.where(logits < 0, logits * penalty, tl.div_rn(logits, penalty))
    logits = tl.where(count > 0, punished, logits)
    generated = count & 1073741823
    logits -= tl.load(frequency_ptr + b) * generated.to(tl.float32)
    logits -= tl.where(generated > 0, tl.load(presence_ptr + b), 0.0)
    logits += tl.load(bias_ptr + b * V + ids, mask=inside, other=0.0)
    if tl.load(positions_ptr + row) < tl.load(min_position_ptr + b):
        for e in range(E):
            logits = tl.where(ids == tl.load(eos_ptr + e), float("-inf"), logits)
    tl.store(out_ptr + row * V + ids, logits, mask=inside)


BLOCK, NUM_WARPS = 2048, 8


@on_its_device
def launch_process_logits(
    logits, positions, candidate, eos_ids, repetition, presence, frequency, min_position, bias, history
) -> torch.Tensor:
    logits, (B, T, V) = logits.contiguous(), logits.shape
    out, eos_ids = torch.empty_like(logits), eos_ids.contiguous()
    processors = (repetition, presence, frequency, min_position, bias, history)
    process_logits_kernel[(B * T, triton.cdiv(V, BLOCK))](
        logits, positions.contiguous(), eos_ids if candidate is None else candidate.contiguous(), eos_ids,
        *(tensor.contiguous() for tensor in processors), out, T, eos_ids.numel(), V=V,
        HAS_CANDIDATE=candidate is not None, BLOCK=BLOCK, num_warps=NUM_WARPS, **EXACT_LAUNCH,
    )  # fmt: skip
    return out


def process_logits_torch(
    logits, positions, candidate, eos_ids, repetition, presence, frequency, min_position, bias, history
) -> torch.Tensor:
    """Any device. Only tokens of the prompt, the output and the block are punished: the others get their bias."""
    B, T, V = logits.shape
    out = logits + bias[:, None, :]
    for b in range(B):
        ids = history[b, :-1].nonzero()[:, 0]
        if candidate is not None and T > 1:
            ids = torch.cat((ids, candidate[b, 1:])).unique()
        # [T, C]
        count = history[b, ids].expand(T, -1)
        if candidate is not None and T > 1:
            seen = (candidate[b, 1:, None] == ids).cumsum(0, dtype=torch.int32)
            count = count + F.pad(seen, (0, 0, 1, 0))
        some = logits[b][:, ids]
        punished = torch.where(some < 0, some * repetition[b], some / repetition[b])
        some = torch.where(count > 0, punished, some)
        generated = count & (IN_PROMPT - 1)
        some = some - frequency[b] * generated.to(torch.float32)
        some = some - torch.where(generated > 0, presence[b], 0.0)
        out[b, :, ids] = some + bias[b, ids]
    b, t = (positions < min_position[:, None]).nonzero(as_tuple=True)
    out[b[:, None], t[:, None], eos_ids[(eos_ids >= 0) & (eos_ids < V)]] = -torch.inf
    return out


@torch.library.custom_op(
    "orthrus_triton::process_logits",
    mutates_args=(),
    schema="(Tensor logits, Tensor positions, Tensor? candidate, Tensor eos_ids, Tensor repetition_penalty, "
    "Tensor presence_penalty, Tensor frequency_penalty, Tensor min_position, Tensor bias, Tensor history, str impl) "
    "-> Tensor",
)
def _process_logits_op(
    logits, positions, candidate, eos_ids, repetition_penalty, presence_penalty, frequency_penalty, min_position, bias,
    history, impl,
):  # fmt: skip
    run = launch_process_logits if impl == "triton" else process_logits_torch
    return run(
        logits, positions, candidate, eos_ids, repetition_penalty, presence_penalty, frequency_penalty, min_position,
        bias, history,
    )  # fmt: skip


@_process_logits_op.register_fake
def _(
    logits, positions, candidate, eos_ids, repetition_penalty, presence_penalty, frequency_penalty, min_position, bias,
    history, impl,
):  # fmt: skip
    return torch.empty_like(logits)
