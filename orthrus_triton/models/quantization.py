"""Weights in int8, one scale per row: all of the layers' matrices, or copies of them that only drafts read."""

from __future__ import annotations

import torch

from orthrus_triton.models.backbone import OrthrusModel
from orthrus_triton.models.config import OrthrusConfig
from orthrus_triton.modules.projection import Linear, LowRankDelta


class QuantizationMixin:
    """Of `OrthrusForCausalLM`, whose layers it changes."""

    model: OrthrusModel
    config: OrthrusConfig
    lm_head: Linear | None
    anchor_rows: int

    @property
    def has_int8_weights(self) -> bool:
        """Whether `quantize_weights` was called, here or before the model was saved."""
        return any(isinstance(module, Linear) and module.is_quantized for module in self.modules())

    @property
    def has_int8_head(self) -> bool:
        """Whether the LM head is in int8, too."""
        return self.lm_head is not None and self.lm_head.is_quantized

    @property
    def rounds_rows(self) -> bool:
        """Whether CPUs may round what they multiply with weights in int8; see `quantize_weights`."""
        return any(isinstance(module, Linear) and module.rounds_rows for module in self.modules())

    def quantize_weights(self, round_rows: bool | None = None, head: bool = False) -> None:
        """Keep the layers' matrices in int8 alone, one scale per row, in both views: about half the memory, and half
        the bytes of every pass.

        From here on this is the frozen model: `mode="consensus"` and `mode="ar"` agree with each other to the bit as
        before, but no longer with the model in its own dtype. Embedding, norms and biases, the chain and what is a
        low-rank view's own stay as they are. There is no way back: load a view and train before. What
        `save_pretrained` then writes takes half the room, too. Call it before a decoder's run is opened, not within.

        Args:
            round_rows: whether CPUs that multiply integers faster also round to int8 what they multiply these weights
                with, in groups of up to 64 numbers with one scale each: less time, and text of a model that is a little
                further from the one before. Other devices take no notice. None leaves it as it is, which is no at
                first.
            head: keep the LM head in int8, too, which small models spend much of their time with. One that was tied to
                the embedding is one of its own then.

        Raises:
            ValueError: a weight is not finite; then nothing is changed.
        """
        deltas = [module for module in self.model.layers.modules() if isinstance(module, LowRankDelta)]
        of_deltas = {part for delta in deltas for part in delta.modules()}
        matrices = {
            name: module for name, module in self.model.layers.named_modules()
            if isinstance(module, Linear) and module not in of_deltas
        }  # fmt: skip
        embedding = self.model.embed_tokens.weight
        of_head = {"the LM head": embedding if self.lm_head is None else self.lm_head.weight} if head else {}
        weights = {f"layers.{name}": module.weight for name, module in matrices.items()} | of_head
        for name, weight in weights.items():
            if not weight.is_meta and not weight.isfinite().all():
                raise ValueError(f"weights must be finite to be kept in int8, but those of {name} are not")
        if head and self.lm_head is None:
            with torch.device("meta"):
                self.lm_head = Linear(embedding.shape[1], embedding.shape[0])
            self.lm_head.weight = embedding
            self.lm_head.train(self.training)
        round_rows = self.rounds_rows if round_rows is None else round_rows
        for module in (*matrices.values(), *[self.lm_head] * (head or self.has_int8_head)):
            module.quantize(round_rows)

    def require_float_weights(self, action: str) -> None:
        """Raise a ValueError unless weights can still be read, changed and learn, as `action` needs them to."""
        if self.has_int8_weights:
            raise ValueError(f"{action} needs a model whose weights are not in int8: do it before quantize_weights()")

    def quantize_drafts(self) -> None:
        """Let drafts read int8 copies of the layers' weights, one scale per row: on a GPU, about half the bytes of a
        draft pass; on CPUs that multiply integers faster, about half the time of its products. Text is as exact as
        without them: the frozen model's own weights verify every draft.

        The copies lie beside the weights and take about a third as much memory; with `anchor_view="ar"`, where the MLP
        of a draft pass also makes tokens that are said, only the diffusion view's projections are copied, and those of
        a low-rank view never are. They are not saved. Call it before decoding, and again after loading other weights or
        another view or training, which drop them. Weights in int8 (`quantize_weights`) need no copies.

        Raises:
            ValueError: nothing can be copied (a low-rank view with `anchor_view="ar"`), or a weight is not finite.
        """
        if self.has_int8_weights:
            return
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
