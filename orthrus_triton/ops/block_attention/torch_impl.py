"""Training attention in plain torch, forward and hand-written backward, for any device.
Context scores exist for one tile of rows at a time, in one reused buffer; the small blocks are done all at once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from einops import rearrange

from orthrus_triton.ops._dispatch import accumulate_dtype, without_autocast

ROW_TILE = 32  # tokens whose context scores are in memory at a time: about what a CPU core's own cache holds
LOG2_E = math.log2(math.e)


@without_autocast
def attention_forward_torch(
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor,
    v_block: torch.Tensor,
    block_size: int,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same arguments as `block_attention`; returns out [B, T, HQ, D] and the base-2 log-sum-exp [B, T, HQ]."""
    compute, group = accumulate_dtype(q.dtype), q.shape[2] // k_block.shape[2]
    # exp2 instead of exp: twice as fast on CPUs, and never slow where a score is masked
    rows = _pack(q.to(compute) * (scale * LOG2_E), group)
    keys, values = _split_blocks(k_block, block_size, compute), _split_blocks(v_block, block_size, compute)
    block_scores = _by_block(rows, keys) @ keys.transpose(-1, -2)
    row_max = block_scores.amax(dim=-1).view(rows.shape[:3]).unsqueeze(-1)
    row_sum, accumulator = torch.zeros_like(row_max), torch.zeros_like(rows)
    for b, tile, bias, workspace in _tiles(rows, k_context, key_limit, block_size, window):
        length = bias.shape[-1]
        k, v = k_context[b, :, :length].to(compute), v_context[b, :, :length].to(compute)
        scores = torch.baddbmm(bias, rows[b, :, tile], k.transpose(-1, -2), out=workspace)
        tile_max = torch.maximum(row_max[b, :, tile], scores.amax(dim=-1, keepdim=True))
        weights = scores.sub_(tile_max).exp2_()
        row_max[b, :, tile] = tile_max
        row_sum[b, :, tile] = weights.sum(dim=-1, keepdim=True)
        accumulator[b, :, tile] = weights @ v
    weights = (block_scores - _by_block(row_max, keys)).exp2_()
    row_sum += weights.sum(dim=-1).view_as(row_sum)
    accumulator += (weights @ values).view_as(accumulator)
    lse = row_max + row_sum.log2()
    return _unpack(accumulator / row_sum, group).to(q.dtype), _unpack(lse, group).squeeze(-1)


@without_autocast
def attention_backward_torch(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    key_limit: torch.Tensor,
    k_block: torch.Tensor,
    v_block: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    block_size: int,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k_block and v_block; the weights are computed again from the log-sum-exp."""
    compute, group = accumulate_dtype(q.dtype), q.shape[2] // k_block.shape[2]
    rows, grad_rows = _pack(q.to(compute) * (scale * LOG2_E), group), _pack(grad_out.to(compute), group)
    lse = _pack(lse[..., None], group)
    delta = (grad_rows * _pack(out.to(compute), group)).sum(dim=-1, keepdim=True)
    keys, values = _split_blocks(k_block, block_size, compute), _split_blocks(v_block, block_size, compute)
    block_rows, block_grads = _by_block(rows, keys), _by_block(grad_rows, keys)
    weights = (block_rows @ keys.transpose(-1, -2) - _by_block(lse, keys)).exp2_()
    grad_scores = (block_grads @ values.transpose(-1, -2)).sub_(_by_block(delta, keys)).mul_(weights)
    grad_v = _join_blocks(weights.transpose(-1, -2) @ block_grads).to(v_block.dtype)
    grad_k = _join_blocks(grad_scores.transpose(-1, -2) @ block_rows).mul_(1 / LOG2_E).to(k_block.dtype)
    grad_q = (grad_scores @ keys).view_as(rows)
    product = rows.new_empty(_workspace_size(rows, k_context, group))
    for b, tile, bias, workspace in _tiles(rows, k_context, key_limit, block_size, window):
        length = bias.shape[-1]
        k, v = k_context[b, :, :length].to(compute), v_context[b, :, :length].to(compute)
        # bias - lse comes first, so that the product lands on a finished exponent
        exponent = torch.sub(bias, lse[b, :, tile], out=workspace)
        weights = exponent.baddbmm_(rows[b, :, tile], k.transpose(-1, -2)).exp2_()
        grad_scores = product[: weights.numel()].view_as(weights).copy_(delta[b, :, tile].expand_as(weights))
        grad_scores.baddbmm_(grad_rows[b, :, tile], v.transpose(-1, -2), beta=-1).mul_(weights)
        grad_q[b, :, tile] += grad_scores @ k
    return _unpack(grad_q.mul_(scale), group).to(q.dtype), grad_k, grad_v


def _tiles(
    rows: torch.Tensor, k_context: torch.Tensor, key_limit: torch.Tensor, block_size: int, window: int | None
) -> Iterator[tuple[int, slice, torch.Tensor, torch.Tensor]]:
    """(sequence, its packed rows, what to add to their scores, room for the scores) of each tile that sees context.
    The additive mask [1, rows, length] is as long as the tile's largest limit: nothing beyond it is ever read."""
    T, group, S = key_limit.shape[1], rows.shape[2] // key_limit.shape[1], k_context.shape[2]
    limit = key_limit.clamp(0, S)
    lowest = None
    if window is not None:
        lowest = limit + torch.arange(T, device=limit.device, dtype=limit.dtype) % block_size + 1 - window
    workspace = rows.new_empty(_workspace_size(rows, k_context, group))
    keys = torch.arange(S, device=limit.device)
    for b in range(len(limit)):
        for t in range(0, T, ROW_TILE):
            tile_limit = limit[b, t : t + ROW_TILE, None]
            length = int(tile_limit.max())
            if length == 0:
                continue
            hidden = keys[:length] >= tile_limit
            if lowest is not None:
                hidden |= keys[:length] < lowest[b, t : t + ROW_TILE, None]
            bias = rows.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf).repeat_interleave(group, dim=0)
            scores = workspace[: rows.shape[1] * bias.numel()].view(-1, *bias.shape)
            yield b, slice(t * group, (t + ROW_TILE) * group), bias[None], scores


def _workspace_size(rows: torch.Tensor, k_context: torch.Tensor, group: int) -> int:
    return rows.shape[1] * min(rows.shape[2], ROW_TILE * group) * k_context.shape[2]


def _pack(x: torch.Tensor, group: int) -> torch.Tensor:
    return rearrange(x, "b t (h g) d -> b h (t g) d", g=group).contiguous()


def _unpack(x: torch.Tensor, group: int) -> torch.Tensor:
    return rearrange(x, "b h (t g) d -> b t (h g) d", g=group).contiguous()


def _split_blocks(x: torch.Tensor, block_size: int, compute: torch.dtype) -> torch.Tensor:
    return rearrange(x, "b (a k) h d -> b h a k d", k=block_size).to(compute).contiguous()


def _join_blocks(x: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "b h a k d -> b (a k) h d").contiguous()


def _by_block(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[B, HKV, T * group, X] as [B, HKV, A, block_size * group, X], beside `keys` [B, HKV, A, block_size, D]."""
    return rows.view(*rows.shape[:2], keys.shape[2], -1, rows.shape[3])
