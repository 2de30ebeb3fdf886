"""A complete dual-view language model of modules: for tests, and as the pattern for models of your own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from orthrus_triton import ops
from orthrus_triton.modules.decoder_layer import OrthrusDecoderLayer, run_layers
from orthrus_triton.modules.kv_cache import SharedKVCache, ViewPass
from orthrus_triton.modules.projection import Linear
from orthrus_triton.modules.rms_norm import RMSNorm
from orthrus_triton.modules.rotary import RotaryEmbedding


class TinyDualViewModel(nn.Module):
    """A random dual-view Transformer that `ConsensusDecoder` can run.

    Args:
        vocab_size, hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size: its shape.
        block_size: rows of a draft block.
        anchor_rows: 1 to let the frozen view read a block's anchor, as `OrthrusConfig.anchor_view="ar"` does.
        **layer: further options of `OrthrusDecoderLayer` (qk_norm, window, view_rank, ...).
    """

    def __init__(
        self,
        vocab_size: int = 61,
        hidden_size: int = 48,
        num_layers: int = 2,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_dim: int = 64,
        intermediate_size: int = 96,
        block_size: int = 8,
        anchor_rows: int = 0,
        **layer: Any,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size, self.mask_token_id = vocab_size, block_size, vocab_size - 1
        self.anchor_rows = anchor_rows
        self.eos_token_ids: list[int] = []
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            OrthrusDecoderLayer(hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, **layer)
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, offset=layer.get("norm_offset", 0.0))
        self.lm_head = Linear(hidden_size, vocab_size)
        self.rotary = RotaryEmbedding.from_theta(head_dim)

    def new_cache(self, batch_size: int, max_len: int, block_size: int) -> SharedKVCache:
        """Buffers on this model's device and in its dtype."""
        attention, weight = self.layers[0].self_attn, self.lm_head.weight
        return SharedKVCache(
            len(self.layers), attention.num_kv_heads, attention.head_dim, batch_size=batch_size, max_len=max_len,
            block_size=block_size, dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    def forward_view(self, input_ids: torch.Tensor, cache: SharedKVCache, view_pass: ViewPass) -> torch.Tensor:
        """input_ids [B, T] -> hidden [B, T, H], normed."""
        hidden = self.embed_tokens(input_ids)
        rope = self.rotary(view_pass.positions, view_pass.prompt_len)
        return run_layers(self.layers, self.norm, hidden, rope, cache, view_pass)

    def compute_logits(self, hidden: torch.Tensor, linear_impl: str = "auto") -> torch.Tensor:
        """hidden [B, T, H] -> logits [B, T, V], fp32."""
        return self.lm_head(hidden, out_dtype=torch.float32, impl=linear_impl)

    def choose(self, hidden: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        """hidden [B, T, H] -> greedy tokens [B, T], the logits' own without writing them to memory."""
        return ops.lm_head_choice(hidden, self.lm_head.weight, impl=impl)
