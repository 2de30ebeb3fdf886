"""Coupled sampling: the token with the largest logit / temperature + Gumbel noise among those the filters keep.
The noise belongs to the position, not to the pass, so drafts, the AR view and any batch see the same one."""

from __future__ import annotations

import torch

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import require_same, resolve_impl
from orthrus_triton.ops.gumbel import CHOICE, gumbel, gumbel_torch, row_key, row_key_torch
from orthrus_triton.ops.logits_filter import (
    SamplingTensors,
    kept_reference,
    load_scaled,
    mass,
    mass_torch,
    order_key,
    row_max,
    row_max_torch,
    scaled_torch,
    top_k_key,
    top_k_torch,
)
from orthrus_triton.ops.portable_math import portable_exp, portable_exp_torch
from orthrus_triton.ops.void_rows import VOID

BLOCK, NUM_WARPS = 2048, 8


def sample_choice(
    logits: torch.Tensor,
    positions: torch.Tensor,
    sampling: SamplingTensors,
    *,
    stream: int = CHOICE,
    impl: str = "auto",
) -> torch.Tensor:
    """One token per row, a function of that row, its position and its sequence's parameters alone.

    Filters as transformers orders them: temperature, top-k, top-p (of what top-k kept), min-p. A token is kept by
    top-k if it is as large as the k-th largest, by top-p if those strictly likelier have less than `top_p` of the
    mass, by min-p if it is at least `min_p` times as likely as the likeliest.

    Args:
        logits: [B, T, V] floating point. NaN is never chosen; a row of NaN and -inf alone gives VOID, no token.
        positions: [B, T] int32, where the chosen token will stand.
        sampling: see `SamplingTensors`, tensors [B].
        stream: which of the independent draws at a position.
        impl: "auto", "triton", "torch" or "reference". All but the last give the same ids on any device.

    Returns:
        [B, T] int64.
    """
    check_sampling(logits, positions, sampling)
    return torch.ops.orthrus_triton.sample_choice(logits, positions, *sampling, stream, resolve_impl(impl, logits))


def check_sampling(logits: torch.Tensor, positions: torch.Tensor, sampling: SamplingTensors) -> None:
    """Raise what is wrong with the arguments of a sampling op, by name."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, but got {logits.dtype}")
    if logits.dim() != 3:
        raise ValueError(f"logits must be [B, T, V], but got {tuple(logits.shape)}")
    require_same("positions", tuple(positions.shape), tuple(logits.shape[:2]), "shape")
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int32)
    for (name, tensor), dtype in zip(sampling._asdict().items(), dtypes):
        require_same(name, tuple(tensor.shape), (logits.shape[0],), "shape")
        require_same(name, tensor.dtype, dtype, "dtype")
        require_same(name, tensor.device, logits.device, "device")


@triton.jit
def best_above(
    row_ptr, temperature, z_max, key_min, min_p, bound, key0, key1, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Among tokens whose scaled logit exceeds `bound`: the mass kept by top-k, and the kept one with the best score.

    Returns (mass int64, id int32, its scaled logit); the id is -1 if there is none.
    """
    total = tl.full((), 0, tl.int64)
    best = tl.full((), float("-inf"), tl.float32)
    best_id, best_z = tl.full((), -1, tl.int32), tl.full((), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        z = load_scaled(row_ptr, ids, temperature, V)
        above = (z > bound) & (order_key(z) >= key_min)
        total += tl.sum(tl.where(above, mass(z, z_max), 0), axis=0)
        above = above & (portable_exp(z - z_max) >= min_p)
        score = tl.where(above, z + gumbel(ids, key0, key1), float("-inf"))
        tile_best = tl.max(score, axis=0)
        tile_id = tl.min(tl.where(score == tile_best, ids, V), axis=0)
        better = tile_best > best
        best_id = tl.where(better, tile_id, best_id)
        best_z = tl.where(better, tl.sum(tl.where(ids == tile_id, z, 0.0), axis=0), best_z)
        best = tl.where(better, tile_best, best)
    return total, best_id, best_z


# a slot's own tensors begin anywhere in those of all slots: see `consensus`
OF_A_SLOT = ("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "sequence_ptr")


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=OF_A_SLOT)
def sample_choice_kernel(
    logits_ptr, positions_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, sequence_ptr, out_ptr, T,
    STREAM: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    row_ptr = logits_ptr + row * V
    temperature = tl.load(temperature_ptr + b)
    z_max, choice = row_max(row_ptr, temperature, V, BLOCK)
    if (temperature > 0) & (z_max > float("-inf")):
        top_p, min_p = tl.load(top_p_ptr + b), tl.load(min_p_ptr + b)
        position = tl.load(positions_ptr + row)
        key0, key1 = row_key(tl.load(seed_ptr + b), tl.load(sequence_ptr + b), position, STREAM)
        key_min = top_k_key(row_ptr, temperature, tl.load(top_k_ptr + b), V, BLOCK)
        total, found, found_z = best_above(
            row_ptr, temperature, z_max, key_min, min_p, float("-inf"), key0, key1, V, BLOCK
        )
        choice = found
        # The best score among all tokens may be outside top-p. Then so is everything not likelier than it, and the
        # search goes on above it: one or two rounds, instead of a sort.
        looking = top_p < 1.0
        while looking:
            likelier, found, found_z_above = best_above(
                row_ptr, temperature, z_max, key_min, min_p, found_z, key0, key1, V, BLOCK
            )
            looking = (found >= 0) & (likelier.to(tl.float32) >= top_p * total.to(tl.float32))
            choice = tl.where(looking, found, choice)
            found_z = found_z_above
    tl.store(out_ptr + row, choice.to(tl.int64))


def launch_sample_choice(
    logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream
) -> torch.Tensor:  # fmt: skip
    logits = logits.contiguous()
    out = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    sample_choice_kernel[(out.numel(),)](
        logits, positions.contiguous(), temperature, top_k, top_p, min_p, seed, sequence, out, logits.shape[1],
        STREAM=stream, V=logits.shape[-1], BLOCK=BLOCK, num_warps=NUM_WARPS, **EXACT_LAUNCH,
    )  # fmt: skip
    return out


def sample_choice_torch(
    logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream
) -> torch.Tensor:  # fmt: skip
    """The same algorithm on all rows at once; integer sums and elementwise arithmetic, so the same ids."""
    z = scaled_torch(logits, temperature)
    best, greedy = row_max_torch(z)
    if not bool((temperature > 0).any()):
        return greedy
    z_max = best[..., None]
    key0, key1 = row_key_torch(seed[:, None], sequence[:, None], positions, stream)
    score = z + gumbel_torch(z.shape[-1], key0, key1)
    kept = z >= top_k_torch(z, top_k)
    if bool((min_p > 0).any()):
        score = torch.where(portable_exp_torch(z - z_max) >= min_p[:, None, None], score, -torch.inf)
    score = torch.where(kept, score, -torch.inf)
    choice = score.argmax(dim=-1)
    looking = (top_p < 1.0)[:, None].expand_as(choice)
    if bool(looking.any()):
        masses = torch.where(kept, mass_torch(z, z_max), 0)
        bound = top_p[:, None] * masses.sum(-1).to(torch.float32)
    while bool(looking.any()):
        above = z > z.gather(-1, choice[..., None])
        likelier = torch.where(above, masses, 0).sum(-1).to(torch.float32)
        best, found = torch.where(above, score, -torch.inf).max(dim=-1)
        looking = looking & (best > -torch.inf) & (likelier >= bound)
        choice = torch.where(looking, found, choice)
    return torch.where((temperature > 0)[:, None] & (greedy != VOID), choice, greedy)


def sample_choice_reference(
    logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream
) -> torch.Tensor:  # fmt: skip
    """The definition: filter in fp64, then the best score."""
    sampling = SamplingTensors(temperature, top_k, top_p, min_p, seed, sequence)
    z = scaled_torch(logits, temperature)
    noise = gumbel_torch(z.shape[-1], *row_key_torch(seed[:, None], sequence[:, None], positions, stream))
    score = torch.where(kept_reference(logits, sampling), z.double() + noise.double(), -torch.inf)
    greedy = row_max_torch(z)[1]
    return torch.where((temperature > 0)[:, None] & (greedy != VOID), score.argmax(-1), greedy)


@torch.library.custom_op(
    "orthrus_triton::sample_choice",
    mutates_args=(),
    schema="(Tensor logits, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor seed, Tensor sequence, int stream, str impl) -> Tensor",
)
def _sample_choice_op(logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream, impl):
    run = {"triton": launch_sample_choice, "torch": sample_choice_torch, "reference": sample_choice_reference}[impl]
    return run(logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream)


@_sample_choice_op.register_fake
def _(logits, positions, temperature, top_k, top_p, min_p, seed, sequence, stream, impl):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)
