"""The end of a cycle, on the device: accept the longest prefix on which both views agree, add the bonus token,
stop at an EOS or a length limit, append to the output, advance the cache and lay out the next block."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, next_power_of_2, tl, triton
from orthrus_triton.ops._dispatch import on_its_device, require_same, resolve_impl, runs_directly
from orthrus_triton.ops.cpu.token_kernels import consensus_cpu


def consensus_(
    candidate: torch.Tensor,
    choice: torch.Tensor,
    eos_ids: torch.Tensor,
    limit: torch.Tensor,
    mask_token_id: int,
    *,
    context_len: torch.Tensor,
    output_ids: torch.Tensor,
    output_len: torch.Tensor,
    finished: torch.Tensor,
    block: torch.Tensor,
    accepted_histogram: torch.Tensor,
    impl: str = "auto",
) -> None:
    """Commit one cycle for every unfinished sequence. Everything after `mask_token_id` is updated in place.

    The AR view's choice in row i is the token at position `context_len + i + 1`; the drafted token there is
    `candidate[i + 1]`. With `a` the length of the longest prefix of agreement (0 <= a <= K - 1), the choices of rows
    0..a are committed: `a` accepted tokens and the bonus token. An EOS among them, or the limit, ends the sequence.

    Args:
        candidate: [B, K] int64, the verified block: anchor, then K - 1 drafted tokens.
        choice: [B, K] int64, the AR view's own choice in each row. What ends a sequence without being a token (VOID,
            negative) never stands in `block`, whose ids are looked up.
        eos_ids: [E] int64, may be empty. The EOS that stops a sequence is part of its output.
        limit: [B] int32, the most tokens each sequence may have in `output_ids`.
        mask_token_id: fills the next block after its anchor.
        context_len: [B] int32, tokens in the cache; advances by the number of committed tokens.
        output_ids: [B, L] int64, committed tokens.
        output_len: [B] int32, how many of them.
        finished: [B] bool. A finished sequence is left as it is.
        block: [B, W] int64 with W >= K, the next draft block: anchor, then MASK.
        accepted_histogram: [B, W] int32, cycles by accepted length.
        impl: "auto", "triton", "torch" or "reference".

    Raises:
        ValueError: shapes or dtypes that do not agree.
    """
    B, K = candidate.shape
    require_same("choice", tuple(choice.shape), (B, K), "shape")
    for name, tensor, dtype in (
        ("candidate", candidate, torch.int64), ("choice", choice, torch.int64), ("eos_ids", eos_ids, torch.int64),
        ("output_ids", output_ids, torch.int64), ("block", block, torch.int64), ("limit", limit, torch.int32),
        ("context_len", context_len, torch.int32), ("output_len", output_len, torch.int32),
        ("finished", finished, torch.bool), ("accepted_histogram", accepted_histogram, torch.int32),
    ):  # fmt: skip
        require_same(name, tensor.dtype, dtype, "dtype")
        if name != "eos_ids":
            require_same(name, tensor.shape[0], B, "batch size")
    if block.shape[1] < K or accepted_histogram.shape != block.shape:
        raise ValueError(
            f"block and accepted_histogram must have one shape [B, W >= {K}], "
            f"but got {tuple(block.shape)} and {tuple(accepted_histogram.shape)}"
        )
    arguments = (
        candidate, choice, eos_ids, limit, mask_token_id, context_len, output_ids, output_len, finished, block,
        accepted_histogram,
    )  # fmt: skip
    impl = resolve_impl(impl, candidate)
    if runs_directly(impl, candidate):
        consensus_torch(*arguments)
    else:
        torch.ops.orthrus_triton.consensus_(*arguments, impl)


# A prefill commits to one slot, whose tensors begin anywhere in those of all slots. Compiled for every alignment, the
# kernel would be made anew when the first sequence comes to a slot.
OF_A_SLOT = (
    "limit_ptr", "context_len_ptr", "output_ids_ptr", "output_len_ptr", "finished_ptr", "block_ptr", "histogram_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=["L", "E"], do_not_specialize_on_alignment=OF_A_SLOT)
def consensus_kernel(
    candidate_ptr, choice_ptr, eos_ptr, limit_ptr, context_len_ptr, output_ids_ptr, output_len_ptr, finished_ptr,
    block_ptr, histogram_ptr, mask_token_id, L, E, K: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    if tl.load(finished_ptr + b).to(tl.int32) == 0:
        rows = tl.arange(0, BLOCK_W)
        # [BLOCK_W] each
        choice = tl.load(choice_ptr + b * K + rows, mask=rows < K, other=-1)
        drafted = tl.load(candidate_ptr + b * K + rows + 1, mask=rows < K - 1, other=-1)
        # row K-1 has no drafted token to agree with: it never agrees, so accepted <= K-1
        agrees = (choice == drafted) & (rows < K - 1)
        accepted = tl.min(tl.where(agrees, BLOCK_W, rows), axis=0)
        is_eos = tl.zeros((BLOCK_W,), tl.int1)
        for e in range(E):
            is_eos = is_eos | (choice == tl.load(eos_ptr + e))
        first_eos = tl.min(tl.where(is_eos & (rows <= accepted), rows, BLOCK_W), axis=0)
        written = tl.load(output_len_ptr + b)
        limit = tl.load(limit_ptr + b)
        count = tl.minimum(tl.minimum(accepted, first_eos) + 1, tl.maximum(limit - written, 0))
        commit = rows < count
        tl.store(output_ids_ptr + b * L + written + rows, choice, mask=commit & (written + rows < L))
        tl.store(output_len_ptr + b, written + count)
        tl.store(context_len_ptr + b, tl.load(context_len_ptr + b) + count)
        tl.store(finished_ptr + b, (first_eos < count) | (written + count >= limit))
        anchor = tl.maximum(tl.sum(tl.where(rows == count - 1, choice, 0), axis=0), 0)
        next_block = tl.where(rows == 0, anchor, mask_token_id)
        tl.store(block_ptr + b * W + rows, next_block, mask=rows < tl.where(count > 0, W, 0))
        tally_ptr = histogram_ptr + b * W + accepted
        tl.store(tally_ptr, tl.load(tally_ptr) + 1)


NUM_WARPS = 1


@on_its_device
def launch_consensus(
    candidate, choice, eos_ids, limit, mask_token_id, context_len, output_ids, output_len, finished, block, histogram
) -> None:
    (B, K), W = candidate.shape, block.shape[1]
    for name, tensor in (
        ("context_len", context_len), ("output_ids", output_ids), ("output_len", output_len), ("finished", finished),
        ("block", block), ("accepted_histogram", histogram),
    ):  # fmt: skip
        if not tensor.is_contiguous():  # the kernel would write elsewhere
            raise ValueError(f"{name} must be contiguous, but has strides {tensor.stride()}")
    consensus_kernel[(B,)](
        candidate.contiguous(), choice.contiguous(), eos_ids.contiguous(), limit.contiguous(), context_len,
        output_ids, output_len, finished, block, histogram, mask_token_id, output_ids.shape[1], eos_ids.numel(),
        K=K, W=W, BLOCK_W=next_power_of_2(W), num_warps=NUM_WARPS, **EXACT_LAUNCH,
    )  # fmt: skip


def consensus_torch(
    candidate, choice, eos_ids, limit, mask_token_id, context_len, output_ids, output_len, finished, block, histogram
) -> None:
    """The same rules in batched torch, any device, no host synchronisation; or in C on a CPU."""
    changed = (context_len, output_ids, output_len, finished, block, histogram)
    if consensus_cpu(candidate, choice, eos_ids, limit, mask_token_id, *changed):
        return
    K, L = candidate.shape[1], output_ids.shape[1]
    rows = torch.arange(K, device=candidate.device)
    active = ~finished
    agrees = (choice[:, :-1] == candidate[:, 1:]).to(torch.int32)
    accepted = agrees.cumprod(dim=1).sum(dim=1)
    is_eos = torch.isin(choice, eos_ids) & (rows <= accepted[:, None])
    first_eos = torch.where(is_eos, rows, K).amin(dim=1)
    count = torch.minimum(torch.minimum(accepted, first_eos) + 1, (limit - output_len).clamp(min=0)) * active
    columns = output_len[:, None] + rows
    commit = (rows < count[:, None]) & (columns < L)
    # a row that commits nothing writes what the first row writes, committed or not: no place gets two values
    first_column = columns[:, :1].clamp(max=L - 1)
    first = torch.where(commit[:, :1], choice[:, :1], output_ids.gather(1, first_column))
    output_ids.scatter_(1, torch.where(commit, columns, first_column), torch.where(commit, choice, first))
    output_len += count.to(torch.int32)
    context_len += count.to(torch.int32)
    finished |= active & ((first_eos < count) | (output_len >= limit))
    moved = (count > 0)[:, None]
    anchor = choice.gather(1, (count - 1).clamp(min=0)[:, None].long()).clamp(min=0)
    block[:, :1] = torch.where(moved, anchor, block[:, :1])
    block[:, 1:] = torch.where(moved, mask_token_id, block[:, 1:])
    histogram.scatter_add_(1, accepted[:, None].long(), active[:, None].to(torch.int32))


def consensus_reference(
    candidate, choice, eos_ids, limit, mask_token_id, context_len, output_ids, output_len, finished, block, histogram
) -> None:
    """The definition, one token after the other."""
    stops = set(eos_ids.tolist())
    for b in range(candidate.shape[0]):
        if finished[b]:
            continue
        accepted = 0
        while accepted < candidate.shape[1] - 1 and candidate[b, accepted + 1] == choice[b, accepted]:
            accepted += 1
        histogram[b, accepted] += 1
        for token in choice[b, : accepted + 1].tolist():
            if output_len[b] >= limit[b]:
                finished[b] = True
            if finished[b]:
                break
            output_ids[b, output_len[b]] = token
            output_len[b] += 1
            context_len[b] += 1
            block[b] = torch.tensor([max(token, 0)] + [mask_token_id] * (block.shape[1] - 1))
            finished[b] = token in stops or bool(output_len[b] >= limit[b])


@torch.library.custom_op(
    "orthrus_triton::consensus_",
    mutates_args=("context_len", "output_ids", "output_len", "finished", "block", "accepted_histogram"),
    schema="(Tensor candidate, Tensor choice, Tensor eos_ids, Tensor limit, int mask_token_id, Tensor(a!) context_len, "
    "Tensor(b!) output_ids, Tensor(c!) output_len, Tensor(d!) finished, Tensor(e!) block, "
    "Tensor(f!) accepted_histogram, str impl) -> ()",
)
def _consensus_op(
    candidate, choice, eos_ids, limit, mask_token_id, context_len, output_ids, output_len, finished, block,
    accepted_histogram, impl,
):  # fmt: skip
    run = {"triton": launch_consensus, "torch": consensus_torch, "reference": consensus_reference}[impl]
    run(
        candidate, choice, eos_ids, limit, mask_token_id, context_len, output_ids, output_len, finished, block,
        accepted_histogram,
    )  # fmt: skip


@_consensus_op.register_fake
def _(*_args):
    return None
