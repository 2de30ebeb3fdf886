"""ViewTrainer: a transformers Trainer that trains a diffusion view and nothing else.
Distribution, precision, accumulation, resuming, progress and loggers are the Trainer's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerState
from transformers.trainer_utils import EvalPrediction, TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.view_checkpoint import checkpoint_metadata, load_checkpoint_view
from orthrus_triton.training.acceptance import acceptance
from orthrus_triton.training.anchors import AnchorExamples, EvenAnchors, row_shares
from orthrus_triton.training.batches import BlockCollator, ViewDistillation
from orthrus_triton.training.clock import TrainingClock
from orthrus_triton.training.config import ViewTrainingArguments
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.finite import FiniteWatch, whole
from orthrus_triton.training.frozen_cache import FrozenCache
from orthrus_triton.training.surprise import read_surprise, surprise

STATE, STAGING = "trainer_state.json", ".checkpoint-being-written"


class ViewTrainer(Trainer):
    """Trains the `_diff` parameters of `model` to propose what its AR view says.

    A checkpoint holds the view, the optimizer and where the run stands; it appears under its name when it is complete.

    Args:
        model: a dual-view model; its AR weights stay as they are. The view becomes fp32, whatever it was, and
            `block_size` what it is trained for. To decode with a model in half precision afterwards, call
            `model.to(model.dtype)`, or load what `save_trained` wrote.
        args: the run.
        rows: text with the frozen model's answers.
        eval_rows: held-out text; needed where `args.eval_strategy` asks for evaluation.
        **options: of transformers' Trainer, such as `callbacks`.

    Raises:
        TypeError: another kind of model.
        ValueError: an option that does not fit the model or the data.

    Source: Orthrus, arXiv 2605.12825, section 3 (training).
    """

    def __init__(
        self,
        model: OrthrusForCausalLM,
        args: ViewTrainingArguments,
        rows: Sequence[TextRow],
        eval_rows: Sequence[TextRow] = (),
        **options: Any,
    ) -> None:
        if not isinstance(model, OrthrusForCausalLM):
            raise TypeError(
                f"model must be an OrthrusForCausalLM, but got a {type(model).__name__}; for models of your own see "
                "docs/training.md"
            )
        model.require_float_weights("training")
        block_size = model.block_size if args.block_size is None else args.block_size
        if not 2 <= block_size <= model.block_size:
            raise ValueError(f"block_size must be in 2..{model.block_size}, the model's, but got {block_size}")
        model.config.block_size = block_size  # what it is trained for, decoding drafts
        everything, cache = [*rows, *eval_rows], None
        _require_rows(rows, everything, model.vocab_size)
        row_shares(rows, args.domain_weights)  # what is wrong with them is said before the cache is made
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if args.cache_dir is not None:
            model.to(args.device)  # as the Trainer will; filling the cache takes many passes of the frozen view
            with args.main_process_first(desc="the frozen cache"):
                cache = FrozenCache.open_or_build(args.cache_dir, model, everything, args.teacher_top_k)
        examples = AnchorExamples(
            rows, args.max_steps * per_step, args.num_anchors, args.domain_weights, args.seed,
            _surprise(model, args, rows, cache), args.anchor_focus, model.anchor_rows,
        )  # fmt: skip
        model.unquantize_drafts()  # copies do not learn
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("_diff" in name)
            if "_diff" in name:
                parameter.data = parameter.data.float()
        held_out = EvenAnchors(eval_rows, args.eval_anchors, block_size, len(rows), model.anchor_rows)
        self.orthrus = model
        self._about = checkpoint_metadata(model, block_size)  # now, while no FSDP has cut the weights up
        self.domains = list(dict.fromkeys(row.domain for row in everything))
        self._domain_ids = torch.tensor([self.domains.index(row.domain) for row in everything])
        self._matched, self._blocks = torch.zeros(()), 0
        self.watch = FiniteWatch(args.output_dir, deferred=args.device.type != "cpu")
        self._staging: Path | None = None
        distillation = ViewDistillation(model, block_size, args.loss, args.position_decay, args.streak_focus)
        if args.compile_layers:
            distillation.student.compile_layers()
        self.clock = None if args.max_seconds is None else TrainingClock(args.max_seconds)
        if self.clock is not None:
            options["callbacks"] = [*(options.get("callbacks") or []), self.clock]
        super().__init__(
            distillation,
            args,
            data_collator=BlockCollator(everything, cache, block_size, args.loss, model.anchor_rows),
            train_dataset=examples,
            eval_dataset=held_out if eval_rows else None,
            compute_metrics=self._metrics,
            **options,
        )

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any):
        """As transformers' Trainer. `True` resumes from the last checkpoint in `output_dir`, if there is one.

        Raises:
            FileNotFoundError: the named checkpoint is none. ValueError: it is of another view.
            FloatingPointError: loss or gradient is not finite. OSError: a checkpoint could not be written.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        folder = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if folder is not None:
            if not (folder / STATE).is_file():
                raise FileNotFoundError(f"resume_from_checkpoint must be a training checkpoint, but {folder} is none")
            # here rather than where Trainer does it, so that it comes before FSDP has cut the weights up
            load_checkpoint_view(self.orthrus, folder / SAFE_WEIGHTS_NAME)
        if self.args.should_save:  # files of a run that was killed while it wrote must not join the next checkpoint
            shutil.rmtree(Path(self._get_output_dir(None)) / STAGING, ignore_errors=True)
        if self.clock is not None:
            self.clock.resume(folder)
            if self.clock.share >= 1.0:  # Trainer would take a step before it asks
                self.state = TrainerState.load_from_json(str(folder / STATE))
                return TrainOutput(self.state.global_step, 0.0, {})
        result = super().train(None if folder is None else str(folder), **options)
        self.watch.require()  # of steps after the last log and checkpoint
        return result

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Done by `train`."""

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        """Examples are drawn by their number already; in order, a resumed run goes on where the other stopped."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self.watch.see("loss", outputs["loss"].detach(), self.state.global_step + 1)
        if model.training:
            leading = 1.0 + self.orthrus.anchor_rows + outputs["matches"].cumprod(dim=-1).sum(dim=-1)
            # on a GPU nothing waits for these numbers before they are logged
            self._matched = self._matched.to(leading.device) + leading.sum()
            self._blocks += leading.numel()
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.watch.see("gradient's norm", norm, self.state.global_step + 1)
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self.clock is not None:
            self.clock.drive(scheduler, num_training_steps)
        return scheduler

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        matches = torch.where(inputs["targets"] >= 0, outputs["matches"].int(), -1)
        return loss, matches, self._domain_ids.to(loss.device)[inputs["row_ids"]]

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        return acceptance(prediction.predictions, prediction.label_ids, self.domains, self.orthrus.anchor_rows)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """The Trainer's logs, with this process's tokens per cycle on training blocks since the last one."""
        if "loss" in logs and self._blocks:
            self.watch.require()
            logs["tokens_per_cycle"] = round(self._matched.item() / self._blocks, 4)
            self._matched.zero_()
            self._blocks = 0
        super().log(logs, *args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the view alone, whole or not at all; the frozen weights are the base's and stay with it."""
        view = {name: whole(tensor) for name, tensor in self._state().items() if "_diff" in name}
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f"{SAFE_WEIGHTS_NAME}.tmp"
        try:
            tensors = {name: tensor.detach().cpu().clone() for name, tensor in view.items()}
            save_file(tensors, staged, metadata=self._about)
            os.replace(staged, folder / SAFE_WEIGHTS_NAME)
        finally:
            staged.unlink(missing_ok=True)

    def _state(self) -> dict[str, torch.Tensor]:
        state, mask = self.orthrus.state_dict(), self.model.student.mask_embedding_diff
        if mask is not None:
            # FSDP puts its own parameter where it wraps, in the student, and the model still has the one before
            state["model.mask_embedding_diff"] = mask
        return state

    def save_trained(self, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the whole dual-view model with `OrthrusForCausalLM.save_pretrained`; every process must call this."""
        state = {name: whole(tensor) for name, tensor in self._state().items()}
        if self.args.should_save:
            self.orthrus.save_pretrained(folder, tokenizer, state_dict=state)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial) -> None:
        """Into a staging folder; a rename makes it a checkpoint."""
        self.watch.require()
        run = Path(self._get_output_dir(trial))
        self._staging = run / STAGING
        name = f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.clock is not None and self.args.should_save:
                self.clock.save(self._staging / name)
        # torch and safetensors have errors of their own for a full disk
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._staging, ignore_errors=True)
            raise OSError(
                f"{name} could not be written to {run}: {error}. Earlier checkpoints there are whole; make room and "
                "resume"
            ) from error
        finally:
            staging, self._staging = self._staging, None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(staging / name, run / name)
            shutil.rmtree(staging)
            kept = self.args.save_total_limit or 0
            for old in _checkpoints(run)[:-kept] if kept else []:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def _require_rows(rows: Sequence[TextRow], everything: Sequence[TextRow], vocab_size: int) -> None:
    """Here, for an embedding's index error on a GPU names neither the token nor the row."""
    if not rows:
        raise ValueError("rows must not be empty: no row of the data has an answer to learn from")
    largest = max(max(row.ids) for row in everything)
    if largest >= vocab_size:
        raise ValueError(
            f"rows must hold tokens of the model's vocabulary, 0..{vocab_size - 1}, but one holds {largest}: they may "
            "be of another model"
        )


def _surprise(
    model: OrthrusForCausalLM, args: ViewTrainingArguments, rows: Sequence[TextRow], cache: FrozenCache | None
) -> list[np.ndarray] | None:
    if not args.anchor_focus:
        return None
    if cache is not None:
        return surprise(cache, rows)
    model.to(args.device)
    return read_surprise(model, rows)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the most steps in a run's folder, None if it has none."""
    found = _checkpoints(Path(output_dir))
    return found[-1] if found else None


def _checkpoints(run: Path) -> list[Path]:
    steps = {path: path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*")}
    # a folder of another name, such as a copy somebody made, is none of the run's
    found = [path for path, step in steps.items() if step.isdecimal() and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(steps[path]))
