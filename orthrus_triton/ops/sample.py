"""From logits to token ids. Greedy: the highest logit, ties to the lowest id; where there is none, no token at all."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops._dispatch import on_its_device, resolve_impl
from orthrus_triton.ops.cpu.token_kernels import greedy_choice_cpu
from orthrus_triton.ops.void_rows import VOID

TILE = 128  # logits, on a CPU


def greedy_choice(logits: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Index of the largest logit of each row; the lowest index among equals.

    Args:
        logits: [..., V] floating point. A NaN never wins; a row of NaN and -inf alone gives VOID, no token.
        impl: "auto", "triton", "torch" or "reference".

    Returns:
        [...] int64.

    Raises:
        TypeError: logits are not floating point.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, but got {logits.dtype}")
    return torch.ops.orthrus_triton.greedy_choice(logits, resolve_impl(impl, logits))


@triton.jit
def greedy_choice_kernel(logits_ptr, out_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), -2, tl.int32)  # VOID, until a logit is larger than -inf
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        # [BLOCK]
        logits = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        logits = tl.where(logits == logits, logits, float("-inf"))
        tile_best = tl.max(logits, axis=0)
        tile_id = tl.min(tl.where(logits == tile_best, ids, V), axis=0)
        # strictly greater: an equal logit in a later tile has a higher id
        better = tile_best > best
        best_id = tl.where(better, tile_id, best_id)
        best = tl.where(better, tile_best, best)
    tl.store(out_ptr + row, best_id.to(tl.int64))


BLOCK = 4096
NUM_WARPS = 8


@on_its_device
def launch_greedy_choice(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.contiguous()
    out = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    greedy_choice_kernel[(out.numel(),)](
        logits, out, V=logits.shape[-1], BLOCK=BLOCK, num_warps=NUM_WARPS, **EXACT_LAUNCH
    )
    return out


def greedy_choice_torch(logits: torch.Tensor) -> torch.Tensor:
    """By tiles: on a CPU amax is sixteen times as fast as a max that says where. torch.max gives the first maximum."""
    if (choice := greedy_choice_cpu(logits, VOID)) is not None:
        return choice
    missing = -logits.shape[-1] % TILE
    # [..., tiles, TILE]
    tiles = (F.pad(logits, (0, missing), value=-torch.inf) if missing else logits).unflatten(-1, (-1, TILE))
    tile_best = tiles.amax(dim=-1)
    if tile_best.isnan().any():  # max would choose it
        tiles = tiles.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        tile_best = tiles.amax(dim=-1)
    best, tile = tile_best.max(dim=-1)
    of_best = tiles.take_along_dim(tile[..., None, None], dim=-2).squeeze(-2)
    return torch.where(best > -torch.inf, tile * TILE + of_best.max(dim=-1).indices, VOID)


def greedy_choice_reference(logits: torch.Tensor) -> torch.Tensor:
    """The first index that reaches the row's maximum, by comparison."""
    logits = logits.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    best = logits.amax(-1, keepdim=True)
    first = torch.where(logits == best, ids, logits.shape[-1]).amin(-1)
    return torch.where(best[..., 0] > -torch.inf, first, VOID)


@torch.library.custom_op("orthrus_triton::greedy_choice", mutates_args=(), schema="(Tensor logits, str impl) -> Tensor")
def _greedy_choice_op(logits, impl):
    if impl == "triton":
        return launch_greedy_choice(logits)
    return greedy_choice_torch(logits) if impl == "torch" else greedy_choice_reference(logits)


@_greedy_choice_op.register_fake
def _(logits, impl):
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)
