"""From chosen rows and anchors to the tensors of one step, and from them to the loss: the module that Trainer runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from orthrus_triton import ops
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.training.anchors import AnchorExample
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.frozen_cache import FrozenCache
from orthrus_triton.training.frozen_reader import FrozenReader
from orthrus_triton.training.objective import Loss, block_loss, position_weights
from orthrus_triton.training.student import BlockStudent


class BlockCollator:
    """Examples -> one batch.

    anchors, anchor_ids [B, A]; prompt_len, row_ids [B]; targets [B, A, K-1], -1 beyond the end of an answer; own_ids
    [B, A, K-1], the tokens before them, -1 in blocks that learn without a chain.
    With a cache: context [B, layers, 2, HKV, S, D], and for "kl" teacher_ids, teacher_probs [B, A, K-1, k].
    Without: input_ids [B, L], whole rows for the frozen model to read.

    Args:
        rows: all rows, by row id.
        cache: of the same rows, or None.
        block_size: K.
        loss: "kl" or "ce".
        anchor_rows: 1 where the frozen view reads the anchor; its own prediction has nothing to learn.
    """

    def __init__(
        self, rows: Sequence[TextRow], cache: FrozenCache | None, block_size: int, loss: Loss, anchor_rows: int = 0
    ) -> None:
        self.rows, self.cache, self.block_size, self.loss = rows, cache, block_size, loss
        self.anchor_rows = anchor_rows

    def __call__(self, examples: Sequence[AnchorExample]) -> dict[str, torch.Tensor]:
        row_ids = [example["row_id"] for example in examples]
        rows = [self.rows[row] for row in row_ids]
        anchors, chained = (
            torch.stack([torch.as_tensor(example[name]) for example in examples]) for name in ("anchors", "chained")
        )
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
        ends = torch.stack([_ends(row, of_row) for row, of_row in zip(rows, anchors)])
        # row i of a block predicts the token at a + i + 1
        predicted = anchors[..., None] + self.anchor_rows + torch.arange(1, self.block_size)
        inside = predicted < ends[..., None]
        taken, own = (
            ids.gather(1, places.clamp(max=ids.shape[1] - 1).flatten(1)).view_as(places)
            for places in (predicted, predicted - 1)
        )
        batch = {
            "anchors": anchors,
            "anchor_ids": ids.gather(1, anchors),
            "prompt_len": torch.tensor([row.prompt_len for row in rows]),
            "targets": torch.where(inside, taken, -1),
            "own_ids": torch.where(chained[..., None], own, -1),
            "row_ids": torch.tensor(row_ids),
        }
        if self.cache is None:
            return batch | {"input_ids": ids}
        batch["context"] = self.cache.context(row_ids, (anchors.amax(dim=1) + self.anchor_rows).tolist())
        if self.loss == "kl":
            starts = torch.tensor([self.cache.starts[row] for row in row_ids])[:, None, None]
            # beyond an answer's end any probabilities do, for they weigh nothing
            lines = starts + torch.where(inside, predicted - 1, anchors[..., None])
            batch["teacher_ids"] = self.cache.teacher_ids[lines].long()
            batch["teacher_probs"] = self.cache.teacher_probs[lines]
        return batch


def _ends(row: TextRow, anchors: torch.Tensor) -> torch.Tensor:
    """Where the answer ends that each anchor [A] drafts."""
    ends = torch.tensor([end for _, end in row.answers])
    # an anchor is at most the last token but one
    return ends[torch.searchsorted(ends, anchors + 1, right=True)]


class ViewDistillation(nn.Module):
    """The loss of one batch as one forward call, for DDP and FSDP.

    Args:
        model: its `_diff` parameters are the only ones that require gradients.
        block_size: K.
        loss: "kl" or "ce".
        position_decay: see `position_weights`.
        streak_focus: see `block_loss`. Where the view has a chain, it is for the blocks that the chain corrects: the
            others must have good candidates behind wrong drafts, too, which the chain may mend.
    """

    _no_split_modules = BlockStudent._no_split_modules

    def __init__(
        self, model: OrthrusForCausalLM, block_size: int, loss: Loss = "kl", position_decay: float | None = None,
        streak_focus: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student = BlockStudent(model)
        self.block_size, self.loss, self.streak_focus = block_size, loss, streak_focus
        self.register_buffer("weights", position_weights(block_size, position_decay), persistent=False)
        self._reader = FrozenReader(self.student)

    def forward(
        self,
        anchors: torch.Tensor,
        anchor_ids: torch.Tensor,
        prompt_len: torch.Tensor,
        targets: torch.Tensor,
        own_ids: torch.Tensor,
        row_ids: torch.Tensor,
        context: torch.Tensor | None = None,
        teacher_ids: torch.Tensor | None = None,
        teacher_probs: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """A batch of `BlockCollator` -> `loss`, and `matches` [B, A, K-1]: the draft is the text's token."""
        of_targets = torch.arange(targets.numel(), device=targets.device).view(targets.shape)
        index = of_targets  # the teacher's position for each target
        if input_ids is not None:
            layers, states = self._reader(input_ids, prompt_len)
            teacher = ops.HiddenTeacher(states.flatten(0, 1))
            starts = torch.arange(len(anchors), device=anchors.device)[:, None, None] * states.shape[1]
            steps = self.student.anchor_rows + torch.arange(self.block_size - 1, device=anchors.device)
            index = starts + torch.where(targets >= 0, anchors[..., None] + steps, anchors[..., None])
        else:
            layers = [context[:, n].unbind(1) for n in range(context.shape[1])]
            teacher = None if teacher_ids is None else ops.TopKTeacher(teacher_ids.flatten(0, 2),
                                                                       teacher_probs.flatten(0, 2))  # fmt: skip
        if self.loss == "ce":
            teacher, index = ops.LabelTeacher(targets.flatten().clamp(min=0)), of_targets
        hidden = self.student.draft(anchor_ids, anchors, prompt_len, layers, self.block_size)
        hidden = self.student.chain(hidden, own_ids)
        chained = None if self.student.draft_chain_diff is None else own_ids[..., 0] >= 0
        loss, matches = block_loss(
            hidden, self.student.head_weight, teacher, index, targets, self.weights, self.streak_focus, chained
        )
        return {"loss": loss, "matches": matches}

    def state_dict(self, *args: Any, **options: Any) -> dict[str, torch.Tensor]:
        """What is trained, under the parameters' own names: FSDP's checkpoints look every name up, and the frozen
        weights appear in the model's state dict under names that its fused parameters do not have."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Takes what `state_dict` gives: DeepSpeed, strict, would miss the frozen weights, which come with the model.

        Raises:
            ValueError: with `strict`, other names than those of what is trained.
        """
        if strict and state_dict.keys() != (expected := self.state_dict().keys()):
            raise ValueError(
                f"state_dict must name what is trained, but differs in {sorted(state_dict.keys() ^ expected)[:4]}"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)
