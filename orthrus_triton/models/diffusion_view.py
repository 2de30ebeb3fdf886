"""What can be done to a model's diffusion view: start it anew, give it parts of its own, draft from int8 copies."""

from __future__ import annotations

import torch
from torch import nn

from orthrus_triton.models.backbone import OrthrusModel
from orthrus_triton.models.config import OrthrusConfig
from orthrus_triton.modules.draft_chain import DraftChain
from orthrus_triton.modules.projection import Linear, LowRankDelta


class DiffusionViewMixin:
    """Of `OrthrusForCausalLM`, whose `model` and `config` it changes."""

    model: OrthrusModel
    config: OrthrusConfig

    @torch.no_grad()
    def reset_view(self) -> None:
        """Start the diffusion view anew, as a copy of the AR view (for a low-rank view: a zero delta). What has to be
        drawn is the same in every process and every run."""
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

    def quantize_drafts(self) -> None:
        """Let drafts read int8 copies of the layers' weights, one scale per row: on a GPU, about half the bytes of a
        draft pass. Text is as exact as without them: the frozen model's own weights verify every draft.

        The copies lie beside the weights and take about a third as much memory; with `anchor_view="ar"`, where the MLP
        of a draft pass also makes tokens that are said, only the diffusion view's projections are copied, and those of
        a low-rank view never are. They are not saved. Call it before decoding, and again after loading other weights or
        another view or training, which drop them. On a CPU it saves nothing.

        Raises:
            ValueError: nothing can be copied (a low-rank view with `anchor_view="ar"`), or a weight is not finite.
        """
        if self.anchor_rows and self.config.view_rank is not None:
            raise ValueError(
                "quantize_drafts needs a model with view_rank=None or anchor_view='diffusion', but got "
                f"view_rank={self.config.view_rank} and anchor_view='ar', where a draft has nothing to itself to copy"
            )
        self.unquantize_drafts()
        for layer in self.model.layers:
            layer.self_attn.quantize_for_drafts()
            if self.anchor_rows == 0:
                layer.mlp.quantize_for_drafts()

    def unquantize_drafts(self) -> None:
        """Let drafts read the weights themselves again, and free the int8 copies, if there are any."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.drop_draft_copy()

    @torch.no_grad()
    def add_chain(self, width: int) -> None:
        """Give the diffusion view a `DraftChain`, which for now changes nothing, unless it has one of that width."""
        if self.config.chain_width == width:
            return
        weight = self.model.embed_tokens.weight
        chain = DraftChain(self.config.hidden_size, width).to(weight.device, weight.dtype)
        chain.reset()
        self.model.draft_chain_diff, self.config.chain_width = chain, width
