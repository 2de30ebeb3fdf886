"""What can be done to a model's diffusion view: start it anew, give it parts of its own."""

from __future__ import annotations

import torch
from torch import nn

from orthrus_triton.models.backbone import OrthrusModel
from orthrus_triton.models.config import OrthrusConfig
from orthrus_triton.modules.draft_chain import DraftChain
from orthrus_triton.modules.projection import LowRankDelta


class DiffusionViewMixin:
    """Of `OrthrusForCausalLM`, whose `model` and `config` it changes."""

    model: OrthrusModel
    config: OrthrusConfig

    @torch.no_grad()
    def reset_view(self) -> None:
        """Start the diffusion view anew, as a copy of the AR view (for a low-rank view: a zero delta). What has to be
        drawn is the same in every process and every run.

        Raises:
            ValueError: the weights are in int8.
        """
        self.require_float_weights("reset_view")
        self.unquantize_drafts()
        if self.model.mask_embedding_diff is not None:
            self.model.mask_embedding_diff.copy_(self.model.embed_tokens.weight[self.mask_token_id])
        if self.model.draft_chain_diff is not None:
            self.model.draft_chain_diff.reset()
        generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, LowRankDelta):
                module.reset(generator)
        for layer in self.model.layers:
            layer.self_attn.copy_ar_to_diffusion()

    @torch.no_grad()
    def add_mask_embedding(self) -> None:
        """Give the diffusion view a vector of its own for the mask token, for now a copy of the frozen row."""
        if self.model.mask_embedding_diff is None:
            row = self.model.embed_tokens.weight[self.mask_token_id]
            self.model.mask_embedding_diff = nn.Parameter(row.detach().clone())
            self.config.mask_embedding = True

    @torch.no_grad()
    def add_chain(self, width: int) -> None:
        """Give the diffusion view a `DraftChain`, which for now changes nothing, unless it has one of that width."""
        if self.config.chain_width == width:
            return
        weight = self.model.embed_tokens.weight
        chain = DraftChain(self.config.hidden_size, width).to(weight.device, weight.dtype)
        chain.reset()
        self.model.draft_chain_diff, self.config.chain_width = chain, width
