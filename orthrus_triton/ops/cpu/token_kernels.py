"""From tensors to the arguments of the C kernels that make tokens, as `kernels.py` does it for those of the layers."""

from __future__ import annotations

import torch
from torch.autograd.graph import increment_version

from orthrus_triton.ops.cpu.kernels import DTYPES, call, library_for

INT64 = (torch.int64,)


def greedy_choice_cpu(logits: torch.Tensor, none: int) -> torch.Tensor | None:
    """`greedy_choice`; `none` where a row has no logit."""
    library = library_for(logits)
    if library is None:
        return None
    logits, out = logits.contiguous(), logits.new_empty(logits.shape[:-1], dtype=torch.int64)
    call(
        library.orthrus_greedy_choice,
        (logits, out),
        out.numel(),
        logits.shape[-1],
        none,
        DTYPES[logits.dtype],
        torch.get_num_threads(),
    )
    return out


def sample_choice_cpu(
    logits: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    sequence: torch.Tensor,
    stream: int,
    none: int,
) -> torch.Tensor | None:
    """`sample_choice`; `none` where a row has no logit."""
    of_slot = (temperature, top_k, top_p, min_p, seed, sequence)
    library = library_for(logits, positions, *of_slot)
    if library is None:
        return None
    (B, T, V), logits, positions = logits.shape, logits.contiguous(), positions.contiguous()
    of_slot, out = [tensor.contiguous() for tensor in of_slot], logits.new_empty(B, T, dtype=torch.int64)
    call(
        library.orthrus_sample_choice, (logits, positions, *of_slot, out), B, T, V, stream, none, DTYPES[logits.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def void_rows_cpu(choice: torch.Tensor, hidden: torch.Tensor, none: int) -> torch.Tensor | None:
    """`void_rows`; `none` in rows that are not finite."""
    library = library_for(hidden, choice)
    if library is None or choice.dtype != torch.int64:
        return None
    choice, hidden = choice.contiguous(), hidden.contiguous()
    out = choice.new_empty(choice.shape)
    call(
        library.orthrus_void_rows, (choice, hidden, out), out.numel(), hidden.shape[-1], none, DTYPES[hidden.dtype]
    )  # fmt: skip
    return out


def recall_cpu(
    prompt_ids: torch.Tensor, output_ids: torch.Tensor, prompt_len: torch.Tensor, newest: torch.Tensor,
    last: torch.Tensor, count: int, longest: int, bonus_of_one: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:  # fmt: skip
    """`recall`."""
    given = (prompt_ids, output_ids, prompt_len, newest, last)
    library = library_for(*given, dtypes=INT64)
    dtypes = (torch.int64, torch.int64, torch.int32, torch.int64, torch.int32)
    if library is None or tuple(tensor.dtype for tensor in given) != dtypes:
        return None
    (B, L), given = prompt_ids.shape, [tensor.contiguous() for tensor in given]
    tokens, bonus = newest.new_empty(B, count), newest.new_empty(B, count, dtype=torch.float32)
    call(library.orthrus_recall, (*given, tokens, bonus), B, L, count, longest, bonus_of_one)
    return tokens, bonus


def consensus_cpu(
    candidate: torch.Tensor, choice: torch.Tensor, eos_ids: torch.Tensor, limit: torch.Tensor, mask_token_id: int,
    *changed: torch.Tensor,
) -> bool:  # fmt: skip
    """`consensus_`; False where the kernel does not serve it, and nothing has changed."""
    given = (candidate, choice, eos_ids, limit)
    library = library_for(*given, *changed, dtypes=INT64)
    if library is None or not all(tensor.is_contiguous() for tensor in changed):
        return False
    _, output_ids, _, _, block, _ = changed
    (B, K), L, W = candidate.shape, output_ids.shape[1], block.shape[1]
    given = [tensor.contiguous() for tensor in given]
    call(library.orthrus_consensus, (*given, *changed), B, K, eos_ids.numel(), L, W, mask_token_id)
    increment_version(changed)
    return True
