"""ViewTrainingArguments: transformers' TrainingArguments with the recipe's defaults and what a diffusion view needs.
One flat YAML file holds all of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from orthrus_triton.training.objective import Loss


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ViewTrainingArguments(TrainingArguments):
    """Options of a training run; those not listed here are transformers' own, of which `max_steps` must be given.

    `per_device_train_batch_size` counts text rows, each with `num_anchors` blocks.

    Raises:
        ValueError: an option out of range; it names the field.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "domain_weights"]

    model: str | None = _option(None, "Folder or hub id of an Orthrus model; by default SmolLM2-135M-Instruct.")
    data: str | None = _option(None, "A .jsonl file of `orthrus-triton distill-data`, or a folder of them.")
    eval_data: str | None = _option(None, "Held-out rows, likewise.")
    cache_dir: str | None = _option(
        None, "Keep the frozen model's K/V and probabilities here instead of running it in every step."
    )
    max_row_len: int = _option(320, "Rows are cut to this many tokens.")
    pack: bool = _option(False, "Join short rows of one domain up to max_row_len: for GPUs.")
    num_anchors: int = _option(8, "Blocks per row and step.")
    block_size: int | None = _option(None, "K, anchor included; by default the model's.")
    view_rank: int | None = _option(None, "Demo model only: train rank-r deltas instead of full projections.")
    anchor_view: str | None = _option(
        None, "ar: the frozen view reads a block's anchor; diffusion: the trained one; by default as the model has it."
    )
    chain_width: int | None = _option(
        None,
        "Train a chain of this width, which lets each mask know what the row before it drafted; by default as "
        "the model or init_view has it.",
    )
    init_view: str | None = _option(
        None,
        "Start from this view file, or this training checkpoint, instead of a copy of the AR view; block_size may be "
        "larger than its.",
    )
    mask_embedding: bool = _option(True, "Train an embedding of the mask token that the frozen model does not see.")
    loss: Loss = _option("kl", "kl: the frozen model's probabilities; ce: its own tokens.")
    position_decay: float | None = _option(4.0, "Row i of a block weighs exp(-i / decay); null: all alike.")
    streak_focus: float = _option(
        0.0, "Share of its weight that a draft loses behind a wrong one, for it would not be accepted anyway."
    )
    anchor_focus: float = _option(
        0.0, "Share of the anchors drawn where the frozen model was unsure, as decoding does."
    )
    domain_weights: dict[str, float] | str | None = _option(None, "Share of the rows by domain; null: as in the data.")
    teacher_top_k: int = _option(32, "Teacher probabilities kept per position in the cache.")
    compile_layers: bool = _option(False, "Run the trained view's layers through torch.compile: for GPUs.")
    max_seconds: float | None = _option(
        None,
        "Stop after so many seconds, from the end of the first step on, evaluations and checkpoints included, with the "
        "schedule of the learning rate finished: it goes by the clock where that is ahead of the steps. On one process "
        "only. A run that is resumed has the time that is left, and ends with other bits than an unbroken one.",
    )
    eval_anchors: int = _option(8, "Blocks per held-out row.")
    frozen_dtype: str = _option(
        "auto",
        "Of the frozen weights and the arithmetic; the view's masters are float32. auto: bfloat16 on a GPU, else "
        "float32.",
    )

    learning_rate: float = 1e-3
    adam_beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(default_factory=lambda: {"min_lr_rate": 0.05})
    warmup_steps: float = 30
    logging_steps: float = 20
    save_steps: float = 200
    save_total_limit: int | None = 2
    report_to: str | list[str] = "none"
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_steps", "per_device_train_batch_size", "max_row_len", "num_anchors", "eval_anchors",
                     "teacher_top_k"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in ("output_dir", "cache_dir"):  # else it would be found out when the cache has been made
            folder = getattr(self, name)
            _require(folder is None or not Path(folder).is_file(), name, "a folder", f"the file {folder}")
        _require(self.anchor_view in (None, "ar", "diffusion"), "anchor_view", "'ar', 'diffusion' or null",
                 self.anchor_view)  # fmt: skip
        _require(self.block_size is None or self.block_size >= 2, "block_size", ">= 2 or null", self.block_size)
        _require(self.chain_width is None or self.chain_width >= 1, "chain_width", ">= 1 or null", self.chain_width)
        _require(self.loss in ("kl", "ce"), "loss", "'kl' or 'ce'", self.loss)
        _require(self.position_decay is None or self.position_decay > 0, "position_decay", "> 0 or null",
                 self.position_decay)  # fmt: skip
        _require(self.domain_weights is None or isinstance(self.domain_weights, dict), "domain_weights",
                 "a share for each domain or null", self.domain_weights)  # fmt: skip
        _require(0 <= self.streak_focus <= 1, "streak_focus", "in [0, 1]", self.streak_focus)
        _require(0 <= self.anchor_focus < 1, "anchor_focus", "in [0, 1)", self.anchor_focus)
        _require(self.max_seconds is None or self.max_seconds > 0, "max_seconds", "> 0 or null", self.max_seconds)
        _require(self.deepspeed_plugin is None or not self.deepspeed_plugin.hf_ds_config.is_zero3(), "deepspeed",
                 "of ZeRO stage 1 or 2, for stage 3 leaves no weight whole (use fsdp)", self.deepspeed)  # fmt: skip
        # Trainer would take all of them in one process, whose losses come back in pieces
        _require(self.n_gpu <= 1, "the number of GPUs that a process sees",
                 "1 (torchrun starts a process for each, CUDA_VISIBLE_DEVICES=0 shows one)", self.n_gpu)  # fmt: skip
        # every process would have a clock, and so a learning rate and a last step, of its own
        _require(self.max_seconds is None or self.world_size == 1, "max_seconds", "null on several processes",
                 self.max_seconds)  # fmt: skip
        if self.frozen_dtype == "auto":
            self.frozen_dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        _require(self.frozen_dtype in ("float32", "bfloat16", "float16"), "frozen_dtype",
                 "auto, float32, bfloat16 or float16", self.frozen_dtype)  # fmt: skip
        # Trainer asks a language model for them, and what it trains here is none; the first two are one, old name last
        for name in ("activation_checkpointing", "gradient_checkpointing", "neftune_noise_alpha",
                     "label_smoothing_factor"):  # fmt: skip
            value = getattr(self, name, None)
            _require(not value, name, "off where a view is trained", value)
        _require(not self.load_best_model_at_end, "load_best_model_at_end", "false", self.load_best_model_at_end)
        self.dataloader_pin_memory &= self.device.type != "cpu"  # there, torch would only warn of it
        self.remove_unused_columns = False  # a batch is what the collator makes, not columns of a table

    @property
    def device(self) -> torch.device:
        """Where this process trains. A CPU has no number: torch.load, and so resuming, knows no "cpu:0"."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found


def read_config(path: str | Path, **changes: Any) -> ViewTrainingArguments:
    """The options in a YAML file, with `changes` over them.

    Raises:
        FileNotFoundError: there is no such file. ImportError: PyYAML is not installed.
        ValueError: it is not a mapping, or a field is unknown or out of range; it names the field.
    """
    import yaml

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"config must be a YAML file, but {str(path)!r} is a folder")
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {str(path)!r}")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must hold YAML, but: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold a mapping of options, but got a {type(options).__name__}")
    options |= changes
    known = {one.name for one in fields(ViewTrainingArguments)}
    if unknown := sorted(map(str, set(options) - known)):
        raise ValueError(f"{path} has no such option: {', '.join(_with_likely(name, known) for name in unknown)}")
    for name, value in options.items():
        _check_number(name, value)
        if value is False and name.endswith("_strategy"):
            options[name] = "no"  # which YAML reads as false
    return ViewTrainingArguments(**options)


def _with_likely(name: str, known: set[str]) -> str:
    """A wrong name, and what may have been meant."""
    likely = get_close_matches(name, sorted(known), n=2)
    return f"{name} ({' or '.join(likely)}?)" if likely else name


def number_type(name: str) -> type | None:
    """int or float for an option that is a number, which may also be null; None for others and for unknown ones."""
    for option in fields(ViewTrainingArguments):
        if option.name == name:
            kind = option.type.__name__ if isinstance(option.type, type) else str(option.type)
            return {"int": int, "float": float}.get(kind.removesuffix(" | None"))
    return None


def _check_number(name: str, value: Any) -> None:
    option = next(one for one in fields(ViewTrainingArguments) if one.name == name)
    if isinstance(option.default, (int, float)) and not isinstance(option.default, bool) and value is None:
        raise ValueError(f"{name} must be a number, but is empty")
    kind = number_type(name)
    if kind is not None and isinstance(value, str):  # YAML reads 1e-3 as text, unlike 1.0e-3
        raise ValueError(f"{name} must be a number, but got the text {value!r} (in YAML write 1.0e-3, not 1e-3)")
    if kind is int and isinstance(value, (bool, float)):
        raise ValueError(f"{name} must be a whole number, but got {value!r}")


def _require(holds: bool, name: str, expected: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, but got {value!r}")
