"""OrthrusModel: embedding, dual-view layers and final norm of a model with two views over one KV cache."""

from __future__ import annotations

import torch
from torch import nn

from orthrus_triton.models.config import OrthrusConfig
from orthrus_triton.models.rope import rotary_from_config
from orthrus_triton.modules.decoder_layer import OrthrusDecoderLayer, run_layers
from orthrus_triton.modules.draft_chain import DraftChain
from orthrus_triton.modules.kv_cache import SharedKVCache, ViewPass
from orthrus_triton.modules.rms_norm import RMSNorm


class OrthrusModel(nn.Module):
    """Embedding, layers, final norm and rotary frequencies."""

    def __init__(self, config: OrthrusConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mask_token_id = config.mask_token_id
        has_mask = config.mask_embedding
        self.mask_embedding_diff = nn.Parameter(torch.empty(config.hidden_size)) if has_mask else None
        width = config.chain_width
        self.draft_chain_diff = DraftChain(config.hidden_size, width) if width is not None else None
        self.layers = nn.ModuleList(
            OrthrusDecoderLayer(
                config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim,
                config.intermediate_size, **options,
            )
            for options in config.layer_options()
        )  # fmt: skip
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = rotary_from_config(config.base_config())

    def forward(self, input_ids: torch.Tensor, cache: SharedKVCache, view_pass: ViewPass) -> torch.Tensor:
        """input_ids [B, T] through one view -> hidden states [B, T, H], normed."""
        hidden = self.embed(input_ids, view_pass)
        rope = self.rotary_emb(view_pass.positions, view_pass.prompt_len)
        return run_layers(self.layers, self.norm, hidden, rope, cache, view_pass)

    def embed(self, input_ids: torch.Tensor, view_pass: ViewPass) -> torch.Tensor:
        """input_ids [B, T] -> [B, T, H]. The mask token has an embedding of its own in a diffusion view that was given
        one; everything else, and whatever the frozen view reads, has the frozen row."""
        hidden = self.embed_tokens(input_ids)
        if view_pass.view == "ar" or self.mask_embedding_diff is None:
            return hidden
        is_mask = (input_ids == self.mask_token_id).unsqueeze(-1)
        if view_pass.anchor_rows:
            is_mask[:, : view_pass.anchor_rows] = False
        return torch.where(is_mask, self.mask_embedding_diff.to(hidden.dtype), hidden)
