"""Text repeats itself: what followed the newest tokens when they last stood together is likely to follow again.
One program per sequence searches its prompt and output; only drafts depend on what it finds."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from orthrus_triton._triton import EXACT_LAUNCH, next_power_of_2, tl, triton
from orthrus_triton.ops._dispatch import on_its_device, require_same, resolve_impl
from orthrus_triton.ops.cpu.token_kernels import recall_cpu

LONGEST = 8  # newest tokens that are compared, and the most that count for a bonus
BONUS = 0.5  # logits per token: a whole one gave the shipped view more drafts of quoted text, and fewer of code
BLOCK, NUM_WARPS = 512, 4


def recall(
    prompt_ids: torch.Tensor,
    output_ids: torch.Tensor,
    prompt_len: torch.Tensor,
    newest: torch.Tensor,
    last: torch.Tensor,
    count: int,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find where the newest tokens stood before: the longest match, of equally long ones the latest.

    Args:
        prompt_ids, output_ids: [B, L] int64; the token at position p is prompt_ids[p] if p < prompt_len, else
            output_ids[p - prompt_len].
        prompt_len: [B] int32.
        newest: [B] int64, the token at position `last` [B] int32, whatever the buffers hold there. Nothing behind it is
            read. Where `last` is beyond L - 1, nothing is drafted any more, and any tokens will do.
        count: T, tokens to recall.
        impl: "auto", "triton" or "torch"; "reference" is torch.

    Returns:
        tokens [B, T] int64 that followed the match, over and over if fewer did; bonus [B, T] fp32, what a draft may add
            to their logits: `BONUS` for every token that agrees beyond the first, counting the recalled ones before
            it, up to `LONGEST` of them. It is 0 where nothing matches.

    Raises:
        ValueError: shapes that do not agree, or a count below 1.

    Source: prompt lookup decoding (Saxena, 2023) drafts by such matches alone.
    """
    B = prompt_ids.shape[0]
    require_same("output_ids", tuple(output_ids.shape), tuple(prompt_ids.shape), "shape")
    for name, tensor in (("prompt_len", prompt_len), ("newest", newest), ("last", last)):
        require_same(name, tuple(tensor.shape), (B,), "shape")
    if count < 1:
        raise ValueError(f"count must be >= 1, but got {count}")
    impl = resolve_impl(impl, prompt_ids)
    return torch.ops.orthrus_triton.recall(prompt_ids, output_ids, prompt_len, newest, last, count, impl)


@triton.jit
def _tokens_at(prompt_ptr, output_ptr, at, prompt_len, newest, last, mask):
    """Tokens at positions up to `last`; -1 where they are masked."""
    of_prompt = at < prompt_len
    prompt = tl.load(prompt_ptr + at, mask=mask & of_prompt, other=-1)
    output = tl.load(output_ptr + at - prompt_len, mask=mask & (at >= prompt_len), other=-1)
    return tl.where(mask & (at == last), newest, tl.where(of_prompt, prompt, output))


@triton.jit(do_not_specialize=["L"])
def recall_kernel(
    prompt_ptr, output_ptr, prompt_len_ptr, newest_ptr, last_ptr, tokens_ptr, bonus_ptr, L,
    COUNT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, LONGEST: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    prompt_ptr += b * L
    output_ptr += b * L
    prompt_len = tl.load(prompt_len_ptr + b)
    newest = tl.load(newest_ptr + b)
    last = tl.minimum(tl.load(last_ptr + b), L - 1)
    best = tl.full((), 0, tl.int64)
    for start in range(0, last, BLOCK):
        # [BLOCK]: how many tokens that end at each position are the newest ones
        at = start + tl.arange(0, BLOCK)
        agrees = at < last
        length = tl.zeros((BLOCK,), dtype=tl.int64)
        for back in tl.static_range(LONGEST):
            mask = agrees & (at >= back)
            earlier = _tokens_at(prompt_ptr, output_ptr, at - back, prompt_len, newest, last, mask)
            compared = _tokens_at(prompt_ptr, output_ptr, last - back, prompt_len, newest, last, last >= back)
            agrees = mask & (earlier == compared) & (earlier >= 0)
            length += agrees.to(tl.int64)
        # the length of a match counts first, then its place
        best = tl.maximum(best, tl.max(tl.where(at < last, length * L + at, 0), axis=0))
    length, place = best // L, best % L
    ahead = tl.arange(0, BLOCK_T)
    mask = ahead < COUNT
    at = place + 1 + ahead % tl.maximum(last - place, 1)
    tokens = _tokens_at(prompt_ptr, output_ptr, at, prompt_len, newest, last, mask & (at < L))
    tl.store(tokens_ptr + b * COUNT + ahead, tl.maximum(tokens, 0), mask=mask)
    bonus = tl.where(length > 0, tl.minimum(length - 1 + ahead, LONGEST), 0).to(tl.float32) * BONUS
    tl.store(bonus_ptr + b * COUNT + ahead, bonus, mask=mask)


@on_its_device
def launch_recall(
    prompt_ids: torch.Tensor, output_ids: torch.Tensor, prompt_len: torch.Tensor, newest: torch.Tensor,
    last: torch.Tensor, count: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    B, L = prompt_ids.shape
    tokens = torch.empty(B, count, dtype=torch.int64, device=prompt_ids.device)
    bonus = torch.empty(B, count, dtype=torch.float32, device=prompt_ids.device)
    recall_kernel[(B,)](
        prompt_ids.contiguous(), output_ids.contiguous(), prompt_len.contiguous(), newest.contiguous(),
        last.contiguous(), tokens, bonus, L, COUNT=count, BLOCK_T=next_power_of_2(count), BLOCK=BLOCK, LONGEST=LONGEST,
        BONUS=BONUS, num_warps=NUM_WARPS, **EXACT_LAUNCH,
    )  # fmt: skip
    return tokens, bonus


def recall_torch(
    prompt_ids: torch.Tensor, output_ids: torch.Tensor, prompt_len: torch.Tensor, newest: torch.Tensor,
    last: torch.Tensor, count: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    given = (prompt_ids, output_ids, prompt_len, newest, last)
    if (of_c := recall_cpu(*given, count, LONGEST, BONUS)) is not None:
        return of_c
    L = prompt_ids.shape[1]
    at = torch.arange(L, device=prompt_ids.device)
    last, prompt_len = last.long().clamp(max=L - 1)[:, None], prompt_len[:, None]
    # [B, L]: tokens by position
    ids = torch.where(at < prompt_len, prompt_ids, output_ids.gather(1, (at - prompt_len).clamp(min=0)))
    ids = torch.where(at == last, newest[:, None], ids)
    # [B, L, LONGEST]: the tokens that end at each position; [B, 1, LONGEST]: the newest ones
    ending = F.pad(ids, (LONGEST - 1, 0), value=-1).unfold(1, LONGEST, 1)
    compared = ending.take_along_dim(last[..., None], dim=1)
    length = ((ending == compared) & (ending >= 0)).flip(-1).int().cumprod(-1).sum(-1)
    # the length of a match counts first, then its place
    best = torch.where(at < last, length * L + at, 0).amax(dim=1, keepdim=True)
    length, place = best // L, best % L
    ahead = torch.arange(count, device=ids.device)
    tokens = ids.gather(1, (place + 1 + ahead % (last - place).clamp(min=1)).clamp(max=L - 1))
    bonus = torch.where(length > 0, (length - 1 + ahead).clamp(max=LONGEST), 0) * BONUS
    return tokens.clamp(min=0), bonus


@torch.library.custom_op(
    "orthrus_triton::recall",
    mutates_args=(),
    schema="(Tensor prompt_ids, Tensor output_ids, Tensor prompt_len, Tensor newest, Tensor last, int count, str impl)"
    " -> (Tensor, Tensor)",
)
def _recall_op(prompt_ids, output_ids, prompt_len, newest, last, count, impl):
    compute = launch_recall if impl == "triton" else recall_torch
    return compute(prompt_ids, output_ids, prompt_len, newest, last, count)


@_recall_op.register_fake
def _(prompt_ids, output_ids, prompt_len, newest, last, count, impl):
    shape = (prompt_ids.shape[0], count)
    return prompt_ids.new_empty(shape), prompt_ids.new_empty(shape, dtype=torch.float32)
