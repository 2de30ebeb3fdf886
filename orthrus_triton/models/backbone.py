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


class TokenEmbedding(nn.Embedding):
    """Rows of a table, `scale` times; the scale itself is rounded to their dtype if `rounds_scale`."""

    def __init__(self, vocab_size: int, hidden_size: int, scale: float = 1.0, rounds_scale: bool = False) -> None:
        super().__init__(vocab_size, hidden_size)
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        # numbers, because a tensor would have to be moved, cast and read with the model
        self.scale = scale
        self.scales = {d: float(torch.tensor(scale, dtype=d, device="cpu")) if rounds_scale else scale for d in dtypes}

    def forward(
        self, ids: torch.Tensor, is_mask: torch.Tensor | None = None, mask_embedding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids [B, T] -> [B, T, H]; where `is_mask` [B, T], `mask_embedding` [H] takes the row's place, if given."""
        hidden = super().forward(ids)
        if mask_embedding is not None:
            hidden = torch.where(is_mask[..., None], mask_embedding.to(hidden.dtype), hidden)
        return hidden if self.scale == 1 else hidden * self.scales.get(hidden.dtype, self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"


class OrthrusModel(nn.Module):
    """Embedding, layers, final norm and rotary frequencies."""

    def __init__(self, config: OrthrusConfig) -> None:
        super().__init__()
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, **config.embedding_options())
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
        self.norm = RMSNorm(config.hidden_size, **config.norm_options())
        self.rotary_emb = rotary_from_config(config.base_config())

    def forward(self, input_ids: torch.Tensor, cache: SharedKVCache, view_pass: ViewPass) -> torch.Tensor:
        """input_ids [B, T] through one view -> hidden states [B, T, H], normed."""
        hidden = self.embed(input_ids, view_pass)
        rope = self.rotary_emb(view_pass.positions, view_pass.prompt_len)
        return run_layers(self.layers, self.norm, hidden, rope, cache, view_pass)

    def embed(self, input_ids: torch.Tensor, view_pass: ViewPass) -> torch.Tensor:
        """input_ids [B, T] -> [B, T, H]. The mask token has an embedding of its own in a diffusion view that was given
        one; everything else, and whatever the frozen view reads, has the frozen row."""
        if view_pass.view == "ar" or self.mask_embedding_diff is None:
            return self.embed_tokens(input_ids)
        is_mask = input_ids == self.mask_token_id
        if view_pass.anchor_rows:
            is_mask[:, : view_pass.anchor_rows] = False
        return self.embed_tokens(input_ids, is_mask, self.mask_embedding_diff)
