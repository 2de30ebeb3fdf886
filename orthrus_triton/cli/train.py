"""`orthrus-triton train`: train a diffusion view from one YAML file; started again, it goes on where it stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from orthrus_triton.cli.common import busy, one_line_errors, status_console


def train(
    config: Annotated[Path, typer.Option(metavar="FILE", help="YAML with the options of the run.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Replaces an option of FILE; repeatable.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start at step 0, and remove the checkpoints that output_dir has.")
    ] = False,
) -> None:
    """Train the diffusion view of a model on answers of its own. The frozen model is never changed.

    The file holds options of transformers' TrainingArguments, and of the view:

    \b
    output_dir: run              checkpoints, and the trained model in run/model
    data: rows                   a .jsonl file of distill-data, or a folder of them
    max_steps: 3000
    model: ./orthrus             by default SmolLM2-135M-Instruct
    cache_dir: cache             keep the frozen model's K/V and probabilities on disk: no AR pass in the loop
    per_device_train_batch_size: 8, num_anchors: 8, position_decay: 4.0, learning_rate: 1.0e-3, ...
    eval_data: held-out, eval_strategy: steps, eval_steps: 200

    A run that was stopped, even by kill -9, goes on from its last checkpoint when the command is given again, and ends
    with the same bits as an uninterrupted one. (With `max_seconds` it goes on with the time that is left, and ends with
    other bits.) torchrun trains on several GPUs: with DDP, or with FSDP2 where the file has `fsdp: true`.

    \b
    orthrus-triton distill-data rows --builtin
    orthrus-triton train --config view.yaml
    orthrus-triton train --config view.yaml --set max_steps=100 --set output_dir=try
    torchrun --nproc-per-node 8 -m orthrus_triton.cli train --config view.yaml
    orthrus-triton export-view run/model view.safetensors
    """
    with one_line_errors():
        with busy("Loading"):
            from orthrus_triton.training.config import read_config
            from orthrus_triton.training.run import train_view

            args = read_config(config, **parse_changes(changes or []))
        try:
            trainer = train_view(args, resume=not fresh)
        except FloatingPointError as error:
            raise ValueError(str(error)) from error
        except KeyboardInterrupt:
            if args.should_save:
                status_console.print(_what_is_left(args.output_dir))
            raise
        if trainer.args.should_save:
            status_console.print(f"{Path(args.output_dir) / 'model'}: the trained model")


def _what_is_left(output_dir: str) -> str:
    """After Ctrl-C: where the next run begins."""
    from orthrus_triton.training.trainer import last_checkpoint

    found = last_checkpoint(output_dir)
    if found is None:
        return f"stopped before there was a checkpoint in {output_dir}"
    return f"stopped; {found} is the last checkpoint, from which a run without --fresh goes on"


def parse_changes(changes: list[str]) -> dict[str, Any]:
    """NAME=VALUE of --set, as YAML, and numbers in whatever way Python writes them, too (2e-3).

    Raises:
        ValueError: another form.
    """
    import yaml

    parsed = {}
    for change in changes:
        name, equals, value = change.partition("=")
        name = name.strip()
        if not equals:
            raise ValueError(f"--set must be NAME=VALUE, but got {change!r}")
        try:
            parsed[name] = _as_number(name, yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ValueError(f"--set {name} must be a YAML value, but got {value!r}: {error}") from error
    return parsed


def _as_number(name: str, value: Any) -> Any:
    """The text of a number for an option that is one; anything else as it is."""
    from orthrus_triton.training.config import number_type

    kind = number_type(name)
    if kind is None or not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if not math.isfinite(number) or (kind is int and not number.is_integer()):
        return value
    return kind(number)
