"""One training run from its options: model, rows, trainer, and the trained model as a folder at the end."""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.demo import load_demo_model
from orthrus_triton.models.view import load_view, read_view_config
from orthrus_triton.models.view_checkpoint import adopt_form, load_checkpoint_view, read_checkpoint_metadata
from orthrus_triton.training.config import ViewTrainingArguments
from orthrus_triton.training.data import TextRow, pack_rows, read_rows
from orthrus_triton.training.trainer import ViewTrainer

logger = logging.getLogger(__name__)
# names beside the model's folder that a run which was killed may leave; the next one clears them away
STAGING, REPLACED = ".model-being-written", ".model-replaced"


def train_view(args: ViewTrainingArguments, resume: bool = True) -> ViewTrainer:
    """Train, and write the model with its view to `output_dir/model`.

    Args:
        args: the run; `data` must be set.
        resume: go on from the last checkpoint in `output_dir`, if there is one; else remove the checkpoints there.

    Raises:
        ValueError, OSError: an option, the data or the model is not what it must be.
    """
    if args.data is None:
        raise ValueError("data must name a .jsonl file of distilled rows, or a folder of them, but is not set")
    if (args.eval_strategy != "no") != (args.eval_data is not None):
        raise ValueError(
            f"eval_data and eval_strategy go together, but they are {args.eval_data!r} and "
            f"{str(args.eval_strategy.value)!r}"
        )
    model, tokenizer = load_model(args)
    rows, eval_rows = load_rows(args.data, args), []
    if args.eval_data is not None:
        eval_rows = load_rows(args.eval_data, args, pack=False)
    trainer = ViewTrainer(model, args, rows, eval_rows)
    if not resume:
        with args.main_process_first(local=False, desc="old checkpoints"):
            remove_checkpoints(args)
    trainer.train(resume_from_checkpoint=resume or None)
    save_model(trainer, Path(args.output_dir) / "model", tokenizer)
    return trainer


def remove_checkpoints(args: ViewTrainingArguments) -> None:
    """Make room for a run from step 0: an old checkpoint of more steps would count as its newest one.

    Raises:
        ValueError: `init_view` is one of them.
    """
    found = [path for path in Path(args.output_dir).glob("checkpoint-*") if path.name[len("checkpoint-") :].isdecimal()]
    if args.init_view is not None:
        start = Path(args.init_view).resolve()
        if any(start.is_relative_to(folder.resolve()) for folder in found):
            raise ValueError(f"init_view must not be among the checkpoints that a fresh run removes, but is {start}")
    if args.should_save:
        for folder in found:
            shutil.rmtree(folder)


def save_model(trainer: ViewTrainer, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write the trained model as `folder`, whole or not at all; every process must call this.

    A folder of that name is replaced as a whole, never file by file: whenever this is interrupted, there is the old
    model, the new one, or (between two renames) none.
    """
    staging, replaced = folder.with_name(STAGING), folder.with_name(REPLACED)
    if trainer.args.should_save:
        for left in (staging, replaced):
            shutil.rmtree(left, ignore_errors=True)
        staging.mkdir(parents=True)  # one that is there keeps what is being written inside it
    trainer.save_trained(staging, tokenizer)
    if trainer.args.should_save:
        if folder.exists():
            os.replace(folder, replaced)
        os.replace(staging, folder)
        shutil.rmtree(replaced, ignore_errors=True)


def load_model(args: ViewTrainingArguments) -> tuple[OrthrusForCausalLM, PreTrainedTokenizerBase]:
    """The model to train, with a mask embedding where `args` asks for one, and its tokenizer."""
    dtype = getattr(torch, args.frozen_dtype)
    if args.model is None:
        model, tokenizer = load_demo_model(dtype, args.block_size, view="copy", view_rank=args.view_rank)
    else:
        if args.view_rank is not None:
            raise ValueError("view_rank is the model's own: set it where the model is made (orthrus-triton convert)")
        model = OrthrusForCausalLM.from_pretrained(args.model, dtype=dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"model must have a tokenizer that transformers can read, but {args.model}: {error}"
            ) from error
    if args.mask_embedding:
        model.add_mask_embedding()
    if args.init_view is not None:
        start_from(model, Path(args.init_view))
    if args.anchor_view is not None:
        model.config.anchor_view = args.anchor_view
    if args.chain_width is not None:
        old = model.config.chain_width
        if old not in (None, args.chain_width):
            logger.warning("a new chain of width %d replaces the one of width %d", args.chain_width, old)
        model.add_chain(args.chain_width)
    return model, tokenizer


def start_from(model: OrthrusForCausalLM, view: Path) -> None:
    """Put the view of a view file, or of a training checkpoint's folder, into `model`, with its anchor_view. The blocks
    of `model` may be longer than the view's.

    Raises:
        ValueError, OSError: there is none, or it is of another model.
    """
    if view.is_dir():
        weights = view / SAFE_WEIGHTS_NAME
        about, load, source = read_checkpoint_metadata(weights), load_checkpoint_view, weights
    else:
        about, load, source = read_view_config(view), partial(load_view, longer_blocks=True), view
    adopt_form(model, about)
    load(model, source)


def load_rows(path: str, args: ViewTrainingArguments, pack: bool = True) -> list[TextRow]:
    """The rows of a file or folder, cut and packed as `args` say; rows nothing can be learnt from are counted. With
    `pack=False` they are only cut: of a packed row, an evaluation would see the last answer alone, and behind other
    texts, where decoding never finds it."""
    rows, skipped = read_rows(path, args.max_row_len)
    tokens = sum(len(row.ids) for row in rows)
    logger.warning(
        "%s: %d rows, %d tokens; %d rows skipped, without an answer of two tokens within max_row_len=%d",
        path, len(rows), tokens, skipped, args.max_row_len,
    )  # fmt: skip
    if not rows:
        raise ValueError(f"{path} must hold at least one row with an answer of two tokens within {args.max_row_len}")
    return pack_rows(rows, args.max_row_len) if args.pack and pack else rows
