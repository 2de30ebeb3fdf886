"""ViewTrainer: a transformers Trainer that trains a diffusion view and nothing else.
Distribution, precision, accumulation, checkpoints, resuming, progress and loggers are the Trainer's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.training.data import AnchorExamples, TextRow
from orthrus_triton.training.frozen_cache import FrozenCache
from orthrus_triton.training.objective import linear_kl
from orthrus_triton.training.student import draft_hidden


class BlockCollator:
    """Examples of `AnchorExamples` -> the tensors of one step.

    Args:
        rows, cache: the same rows the cache was built from.
        block_size: K.
        decay: row i of a block weighs exp(-i / decay); None weighs all alike, as the paper does.
        dtype: of the frozen K/V handed to the view.
    """

    def __init__(
        self,
        rows: Sequence[TextRow],
        cache: FrozenCache,
        block_size: int,
        decay: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows, self.cache, self.block_size, self.dtype = rows, cache, block_size, dtype
        steps = torch.arange(block_size - 1, dtype=torch.float32)
        self.row_weight = torch.exp(-steps / decay) if decay else torch.ones(block_size - 1)

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        K = self.block_size
        row_ids = [example["row_id"] for example in examples]
        anchors = torch.stack([torch.as_tensor(example["anchors"]) for example in examples])
        lengths = [int(anchors[b].max()) for b in range(len(examples))]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(self.rows[row].ids) for row in row_ids], batch_first=True, padding_value=0
        )
        ends = torch.tensor([len(self.rows[row].ids) for row in row_ids])
        # row i of a block is taught the token at a + i + 1, so the last row has nothing to learn
        taught = anchors[..., None] + torch.arange(K - 1)
        inside = taught + 1 < ends[:, None, None]
        starts = torch.tensor([self.cache.starts[row] for row in row_ids])[:, None, None]
        tokens = torch.where(inside, starts + taught, starts + ends[:, None, None] - 1)
        batch = torch.arange(len(examples))[:, None, None]
        targets = ids[batch, torch.where(inside, taught + 1, 0)]
        return {
            "anchor_ids": ids.gather(1, anchors),
            "anchors": anchors,
            "context": self.cache.context(row_ids, lengths, self.dtype),
            "teacher_ids": self.cache.teacher_ids[tokens],
            "teacher_probs": self.cache.teacher_probs[tokens],
            "row_weight": inside * self.row_weight,
            "targets": torch.where(inside, targets, -1),
        }


class ViewDistillation(nn.Module):
    """The loss of one batch as a module, so that DDP and FSDP see one forward call.

    Returns a dict: `loss`, and `matches` [B, A, K-1] bool, where the draft is the token of the text (False where
    there is none).
    """

    def __init__(self, model: OrthrusForCausalLM, block_size: int) -> None:
        super().__init__()
        self.orthrus, self.block_size = model, block_size

    def forward(
        self, anchor_ids, anchors, context, teacher_ids, teacher_probs, row_weight, targets
    ) -> dict[str, torch.Tensor]:
        hidden = draft_hidden(self.orthrus, anchor_ids, anchors, context, self.block_size)[:, :, :-1]
        head = self.orthrus.lm_head or self.orthrus.model.embed_tokens
        loss, choice = linear_kl(
            hidden.reshape(-1, hidden.shape[-1]), head.weight, teacher_ids.flatten(0, 2), teacher_probs.flatten(0, 2),
            row_weight.flatten(),
        )  # fmt: skip
        return {"loss": loss, "matches": choice.view(targets.shape) == targets}


class ViewTrainer(Trainer):
    """Trains the `_diff` parameters of `model` to propose what its AR view says.

    Args:
        model: a dual-view model; its AR weights stay as they are.
        args: transformers' TrainingArguments; `per_device_train_batch_size` counts text rows.
        rows, eval_rows: text with the frozen model's answers.
        cache_dir: where the frozen K/V and probabilities are kept.
        num_anchors: blocks per row and step.
        block_size: K, at most model.block_size; by default that.
        decay: see `BlockCollator`.
        domain_weights: see `AnchorExamples`.

    Source: Orthrus, arXiv 2605.12825, section 3 (training).
    """

    def __init__(
        self,
        model: OrthrusForCausalLM,
        args: TrainingArguments,
        rows: Sequence[TextRow],
        eval_rows: Sequence[TextRow] | None = None,
        *,
        cache_dir: str | Path,
        num_anchors: int = 8,
        block_size: int | None = None,
        decay: float | None = None,
        domain_weights: dict[str, float] | None = None,
    ) -> None:
        if args.max_steps < 1:
            raise ValueError(f"args.max_steps must be >= 1, the length of the run, but got {args.max_steps}")
        block_size = block_size or model.block_size
        if not 2 <= block_size <= model.block_size:
            raise ValueError(f"block_size must be in 2..{model.block_size}, but got {block_size}")
        args.remove_unused_columns = False  # the batch is ours, not the model's signature
        everything = [*rows, *(eval_rows or [])]
        cache = FrozenCache.open_or_build(cache_dir, model, everything)
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1)
        examples = AnchorExamples(rows, args.max_steps * per_step, num_anchors, domain_weights, args.seed)
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("_diff" in name)
        super().__init__(
            ViewDistillation(model, block_size),
            args,
            data_collator=BlockCollator(everything, cache, block_size, decay, model.dtype),
            train_dataset=examples,
        )

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        """Examples are drawn by their index already; in order, a resumed run goes on where the other stopped."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        if not torch.isfinite(outputs["loss"].detach()):
            raise FloatingPointError(
                f"the loss is {outputs['loss'].item()} in step {self.state.global_step}: lower the learning rate, or "
                f"resume from the last checkpoint in {self.args.output_dir}"
            )
        self._count_matches(inputs["targets"], outputs["matches"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _count_matches(self, targets: torch.Tensor, matches: torch.Tensor) -> None:
        """Tokens per cycle on the training anchors, for the log: leading matches, and the bonus token."""
        leading = matches.cumprod(dim=-1).sum(dim=-1).float()
        whole = (targets >= 0).all(dim=-1)
        totals = getattr(self, "_leading", torch.zeros(2))
        self._leading = totals + torch.stack((leading[whole].sum(), whole.sum().float())).cpu()

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """The Trainer's logs, with the tokens per cycle since the last one."""
        matched, blocks = getattr(self, "_leading", torch.zeros(2)).tolist()
        if "loss" in logs and blocks:
            logs["tokens_per_cycle"] = round(1 + matched / blocks, 4)
            self._leading = torch.zeros(2)
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The view alone, complete or not at all; the frozen weights are the base's and stay with it."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        view = {name: tensor.detach().contiguous().clone() for name, tensor in state.items() if "_diff" in name}
        staged = folder / f"{SAFE_WEIGHTS_NAME}.tmp"
        try:
            save_file(view, staged)
            os.replace(staged, folder / SAFE_WEIGHTS_NAME)
        finally:
            staged.unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        view = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        result = (model or self.model).load_state_dict(view, strict=False)
        lost = [name for name in result.missing_keys if "_diff" in name]
        if lost or result.unexpected_keys:
            raise ValueError(
                f"resume_from_checkpoint {resume_from_checkpoint} is not of this view: missing {lost[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}"
            )
