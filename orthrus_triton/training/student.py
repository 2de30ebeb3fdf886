"""The diffusion view over many blocks at once, differentiable: A anchors x K rows of each text row in one pass.
Gradients reach the view's own weights alone; the keys and values of the frozen model are constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from orthrus_triton import ops
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import DualViewAttention, OrthrusDecoderLayer, SharedKVCache
from orthrus_triton.modules.kv_cache import ViewPass
from orthrus_triton.modules.projection import Linear
from orthrus_triton.modules.rms_norm import RMSNorm
from orthrus_triton.modules.rotary import angles_of

Rope = tuple[torch.Tensor, torch.Tensor]
LayerContext = Sequence[torch.Tensor]  # k, v [B, HKV, S, D], and whatever else an AR pass needs


class BlockPass(NamedTuple):
    """What one training pass sees: key_limit [B, T] int32, the AR keys of each row; block_size, rows of a block."""

    key_limit: torch.Tensor
    block_size: int


class BlockLayer(nn.Module):
    """One decoder layer over blocks. A module of its own so that FSDP gathers its weights around each call."""

    def __init__(self, layer: OrthrusDecoderLayer) -> None:
        super().__init__()
        self.layer = layer
        self.compiled: Callable | None = None

    def forward(
        self, hidden: torch.Tensor, rope: Rope, context: LayerContext, how: BlockPass | ViewPass
    ) -> torch.Tensor:
        """hidden [B, T, H] -> [B, T, H]: the layer's own inference pass with a ViewPass, else the training pass."""
        if isinstance(how, ViewPass):
            return self.layer(hidden, rope, context, how)
        # evaluation has other shapes and is not worth compiling for
        if self.compiled is None or not torch.is_grad_enabled():
            run = _train_layer
        else:
            run = self.compiled
            for tensor in context[:2]:  # a graph for each length would be more of them than torch.compile keeps
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
        own_rope = angles_of(rope, self.layer.rope_set)
        return run(self.layer, hidden, *own_rope, *context[:2], how.key_limit, how.block_size)


def _train_layer(
    layer: OrthrusDecoderLayer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_context: torch.Tensor,
    v_context: torch.Tensor, key_limit: torch.Tensor, block_size: int,
) -> torch.Tensor:  # fmt: skip
    attended = _attention(
        layer.self_attn, _norm(hidden, layer.input_layernorm), cos, sin, k_context, v_context, key_limit, block_size
    )
    hidden = hidden + _norm(attended, layer.post_self_attn_layernorm)
    normed = _norm(hidden, layer.post_attention_layernorm)
    gate, up = _project(normed, layer.mlp.gate_up_proj).chunk(2, dim=-1)
    gate = F.silu(gate) if layer.mlp.activation == "silu" else F.gelu(gate, approximate="tanh")
    return hidden + _norm(_project(gate * up, layer.mlp.down_proj), layer.post_mlp_layernorm)


class BlockStudent(nn.Module):
    """The parts of a dual-view model that training runs, sharing its parameters; layers as `BlockLayer`."""

    # the unit that FSDP wraps
    _no_split_modules = ["BlockLayer"]

    def __init__(self, model: OrthrusForCausalLM) -> None:
        super().__init__()
        model.require_float_weights("training")
        self.embed_tokens, self.norm, self.lm_head = model.model.embed_tokens, model.model.norm, model.lm_head
        self.layers = nn.ModuleList(BlockLayer(layer) for layer in model.model.layers)
        self.rotary_emb = model.model.rotary_emb
        self.mask_embedding_diff = model.model.mask_embedding_diff
        self.draft_chain_diff = model.model.draft_chain_diff
        self.mask_token_id, self.anchor_rows = model.mask_token_id, model.anchor_rows
        self.new_cache = model.new_cache

    def compile_layers(self) -> None:
        """Run the training pass of every layer through torch.compile: one graph for all layers of a kind, in which
        what stands between the products and the attention is a few kernels instead of a hundred."""
        compiled = torch.compile(_train_layer, dynamic=False)
        for layer in self.layers:
            layer.compiled = compiled

    @property
    def head_weight(self) -> torch.Tensor:
        """The LM head [V, H]."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def draft(
        self,
        anchor_ids: torch.Tensor,
        anchors: torch.Tensor,
        prompt_len: torch.Tensor,
        context: Sequence[LayerContext],
        block_size: int,
    ) -> torch.Tensor:
        """Final hidden states of the rows of the blocks [anchor, MASK x (K-1)] that propose a token.

        The block stands at a .. a+K-1 and row i proposes the token at a + i + 1. Where the trained view reads the
        anchor, it sees the AR keys 0 .. a-1 and the whole of itself, and its last row has nothing to propose. Where
        the frozen view does, the masks see the AR keys 0 .. a and each other, and all of them propose.

        Args:
            anchor_ids: [B, A] token at each anchor.
            anchors: [B, A] its position a, ascending.
            prompt_len: [B], for rotary rules that look at the length.
            context: for each layer k, v [B, HKV, S, D] that the frozen model wrote, as many as the blocks see.
            block_size: K.

        Returns:
            [B, A, K-1, H], normed.
        """
        (B, A), first = anchors.shape, self.anchor_rows
        rows = block_size - first
        ids = torch.full((B, A, rows), self.mask_token_id, dtype=torch.int64, device=anchors.device)
        if first == 0:
            ids[..., 0] = anchor_ids
        ids = ids.view(B, A * rows)
        steps = torch.arange(first, block_size, device=anchors.device)
        positions = (anchors[..., None] + steps).view(B, A * rows).int()
        rope = self.rotary_emb(positions, prompt_len.int())
        how = BlockPass((anchors + first).int().repeat_interleave(rows, dim=1), rows)
        hidden = self.embed_tokens(ids, ids == self.mask_token_id, self.mask_embedding_diff)
        for layer, layer_context in zip(self.layers, context):
            hidden = layer(hidden, rope, layer_context, how)
        return _norm(hidden, self.norm).view(B, A, rows, -1)[:, :, : block_size - 1]

    def chain(self, hidden: torch.Tensor, own_ids: torch.Tensor) -> torch.Tensor:
        """hidden [..., H] of masks, corrected, if the view has a chain, by the tokens [...] at their own positions; -1
        leaves a row as it is."""
        if self.draft_chain_diff is None:
            return hidden
        embedded = F.embedding(own_ids.clamp(min=0), self.embed_tokens.weight)
        correction = self.draft_chain_diff.correction(hidden, embedded)
        return hidden + correction * (own_ids >= 0)[..., None]

    @torch.no_grad()
    def read(self, input_ids: torch.Tensor, prompt_len: torch.Tensor, cache: SharedKVCache) -> torch.Tensor:
        """The frozen model over whole rows: its K/V go to `cache`, and its final hidden states [B, L, H] come back.

        Args:
            input_ids: [B, L]; a row's padding at its end is seen by nobody.
            prompt_len: [B].
            cache: of batch size B, for L tokens or more.
        """
        cache.context_len.zero_()
        cache.prompt_len.copy_(prompt_len)
        view_pass = cache.view_pass("ar", input_ids.shape[1], linear_impl="library")
        rope = self.rotary_emb(view_pass.positions, view_pass.prompt_len)
        hidden = self.embed_tokens(input_ids)
        for layer, buffers in zip(self.layers, cache.layers):
            hidden = layer(hidden, rope, buffers, view_pass)
        return self.norm(hidden)


def _attention(
    attention: DualViewAttention, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_context: torch.Tensor,
    v_context: torch.Tensor, key_limit: torch.Tensor, block_size: int,
) -> torch.Tensor:  # fmt: skip
    heads, kv_heads, D = attention.num_heads, attention.num_kv_heads, attention.head_dim
    q, k, v = _project_qkv(attention, x).split([heads * D, kv_heads * D, kv_heads * D], dim=-1)
    if attention.qk_norm == "whole":
        q, k = _norm(q, attention.q_norm_diff), _norm(k, attention.k_norm_diff)
    q, k, v = (rows.unflatten(-1, (-1, D)) for rows in (q, k, v))
    if attention.qk_norm and attention.qk_norm != "whole":
        q, k = _norm(q, attention.q_norm_diff), _norm(k, attention.k_norm_diff)
    if attention.use_rope:
        q, k = (_rotate(rows, cos, sin).to(v.dtype) for rows in (q, k))
    attended = ops.block_attention(
        q, k_context.to(v.dtype), v_context.to(v.dtype), key_limit, k, v, block_size=block_size,
        window=attention.window, scale=attention.scale,
    )  # fmt: skip
    return _project_out(attention, attended.flatten(2))


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


def _project(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    # trained weights are fp32 masters where the frozen ones are bf16
    if linear.is_quantized:  # since the student was made
        raise ValueError("weights must not be in int8 to be trained with")
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


def _norm(x: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
    if norm is None:  # there is none at this place
        return x
    if norm.offset == 0:
        return F.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = norm.weight.to(x.dtype).to(wide) + norm.offset
    return F.rms_norm(x.to(wide), (x.shape[-1],), weight, norm.eps).to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
