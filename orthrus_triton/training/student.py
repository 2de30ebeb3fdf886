"""The diffusion view over many blocks at once, differentiable: A anchors x K rows of each text row in one pass.
Only the view's own weights get gradients; the keys and values of the frozen model are constants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.modules import DualViewAttention, OrthrusDecoderLayer


def draft_hidden(
    model: OrthrusForCausalLM,
    anchor_ids: torch.Tensor,
    anchors: torch.Tensor,
    context: torch.Tensor,
    block_size: int,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """Final hidden states of the blocks [anchor, MASK x (K-1)].

    Args:
        model: its `_diff` parameters receive the gradients.
        anchor_ids: [B, A] token at each anchor.
        anchors: [B, A] its position a; the block stands at a .. a+K-1 and sees AR keys 0 .. a-1 and itself.
        context: [layers, 2, B, HKV, S, D], K/V the frozen model wrote for the text rows, S >= the largest anchor.
        block_size: K.
        recompute: keep no activations inside a layer: less memory, one more forward.

    Returns:
        [B, A, K, H], normed: row i proposes the token at a + i + 1.

    Raises:
        ValueError: a layer with a sliding window, which training does not support.
    """
    if any(layer.self_attn.window is not None for layer in model.model.layers):
        raise ValueError("model must have full attention in every layer to train its view, but one has a window")
    (B, A), K = anchors.shape, block_size
    ids = torch.full((B, A, K), model.mask_token_id, dtype=torch.int64, device=anchors.device)
    ids[..., 0] = anchor_ids
    positions = (anchors[..., None] + torch.arange(K, device=anchors.device)).view(B, A * K)
    rope = model.model.rotary_emb(positions.int(), positions.amax(dim=1).int() + 1)
    keys = torch.arange(context.shape[-2], device=anchors.device)
    # [B, 1, 1, A, 1, S]: added to the scores of all rows of a block
    hidden_keys = torch.where(keys >= anchors[..., None], -torch.inf, 0.0)[:, None, None, :, None].to(context.dtype)
    hidden = model.model.embed(ids.view(B, A * K), "diffusion")
    for layer, (k_context, v_context) in zip(model.model.layers, context):
        arguments = (layer, hidden, rope, k_context, v_context, hidden_keys, K)
        hidden = checkpoint(_layer, *arguments, use_reentrant=False) if recompute else _layer(*arguments)
    norm = model.model.norm
    return _rms_norm(hidden, norm).view(B, A, K, -1)


def _layer(layer: OrthrusDecoderLayer, hidden, rope, k_context, v_context, hidden_keys, block_size) -> torch.Tensor:
    normed = _rms_norm(hidden, layer.input_layernorm)
    hidden = hidden + _attention(layer.self_attn, normed, rope, k_context, v_context, hidden_keys, block_size)
    normed = _rms_norm(hidden, layer.post_attention_layernorm)
    gate, up = _project(normed, layer.mlp.gate_up_proj).chunk(2, dim=-1)
    return hidden + _project(F.silu(gate) * up, layer.mlp.down_proj)


def _attention(attention: DualViewAttention, x, rope, k_context, v_context, hidden_keys, block_size) -> torch.Tensor:
    (B, T, _), K, D = x.shape, block_size, attention.head_dim
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    q, k, v = _project_qkv(attention, x).split([heads * D, kv_heads * D, kv_heads * D], dim=-1)
    q, k = q.view(B, T, heads, D), k.view(B, T, kv_heads, D)
    if attention.qk_norm:
        q, k = _rms_norm(q, attention.q_norm_diff), _rms_norm(k, attention.k_norm_diff)
    q, k = _rotate(q, *rope), _rotate(k, *rope)
    group, scale = heads // kv_heads, D**-0.5
    # [B, HKV, G, A, K, D], and the block's own keys and values [B, HKV, 1, A, K, D]
    q = (q * scale).view(B, T // K, K, kv_heads, group, D).permute(0, 3, 4, 1, 2, 5)
    k, v = (part.reshape(B, T // K, K, kv_heads, D).permute(0, 3, 1, 2, 4)[:, :, None] for part in (k, v))
    # the context has no gradient, so autograd never forms one for it
    rows = q.reshape(B, kv_heads, -1, D)
    seen = (rows @ k_context.transpose(-1, -2)).view(*q.shape[:-1], -1) + hidden_keys
    weights = torch.softmax(torch.cat((seen, q @ k.transpose(-1, -2)), dim=-1), dim=-1)
    of_context, of_block = weights.split([k_context.shape[-2], K], dim=-1)
    out = (of_context.reshape(B, kv_heads, rows.shape[2], -1) @ v_context).view(q.shape) + of_block @ v
    return _project_out(attention, out.permute(0, 3, 4, 1, 2, 5).reshape(B, T, heads * D))


def _project_qkv(attention: DualViewAttention, x: torch.Tensor) -> torch.Tensor:
    if attention.view_rank is None:
        return _project(x, attention.qkv_proj_diff)
    deltas = (attention.q_proj_diff, attention.k_proj_diff, attention.v_proj_diff)
    return _project(x, attention.qkv_proj) + torch.cat([_project(_project(x, d.down), d.up) for d in deltas], dim=-1)


def _project_out(attention: DualViewAttention, x: torch.Tensor) -> torch.Tensor:
    if attention.view_rank is None:
        return _project(x, attention.o_proj_diff)
    delta = attention.o_proj_diff
    return _project(x, attention.o_proj) + _project(_project(x, delta.down), delta.up)


def _project(x: torch.Tensor, linear) -> torch.Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _rms_norm(x: torch.Tensor, norm) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
