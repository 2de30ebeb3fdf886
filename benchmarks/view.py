"""A view for SmolLM2-135M from nothing, in one process: answers and training within given seconds, export, evaluation.
Or a rehearsal of all that on random weights of the same shape, which can also profile a training step."""

from __future__ import annotations

import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import environment, require_known, whole_numbers
from benchmarks.step_profile import profile_step
from benchmarks.view_data import HELD_OUT, held_out_prompts, link_rows, make_data
from benchmarks.view_visit import RANDOM, Visit, random_model, stage
from orthrus_triton.cli.common import one_line_errors, resolve_device
from orthrus_triton.cli.export_view import read_trained
from orthrus_triton.cli.train import parse_changes
from orthrus_triton.models.view import save_view
from orthrus_triton.training.config import read_config
from orthrus_triton.training.evaluate import evaluate
from orthrus_triton.training.prompts import encode, read_prompts
from orthrus_triton.training.run import train_view
from orthrus_triton.training.trainer import last_checkpoint

STAGES = ("data", "train", "export", "evaluate")
# options of the config that --set may not give, for these say them
OWN_OPTIONS = {"max_seconds": "--train-seconds", "output_dir": "--work", "data": "--rows"}


def train(visit: Visit, config: Path, rows: list[Path], held_out: Path, changes: dict[str, Any], profile: bool) -> None:
    """Train on the rows of all folders into work/run. A run that fails within 90 seconds is tried again without
    compiled layers, which may be what failed."""
    data = visit.work / "all_rows"
    link_rows(rows, data)
    changes = {"output_dir": str(visit.work / "run"), "data": str(data), "eval_data": str(held_out), **changes}
    if visit.device.type == "cpu":  # the trainer would take a GPU
        changes["use_cpu"] = True
    if visit.model is not None:
        changes |= {"model": str(visit.model), "eval_data": str(data)}
    started = time.monotonic()
    try:
        trainer = train_view(read_config(config, **changes), resume=False)
    except Exception as error:
        if time.monotonic() - started > 90 or isinstance(error, (ValueError, OSError)):
            raise
        traceback.print_exc()
        print("== again, with layers that are not compiled", flush=True)
        trainer = train_view(read_config(config, **changes | {"compile_layers": False}), resume=False)
    clock, steps = trainer.clock, trainer.state.global_step
    visit.checkpoint = Path(changes["output_dir"]) / f"checkpoint-{steps}"
    visit.figures["train"] = {
        "data": str(data), "rows": len(trainer.train_dataset.rows), "steps": steps,
        "ms_per_step": round(1000 * (clock.ended - clock.started) / max(steps - 1, 1), 2),
        "seconds_before_step_2": round(clock.started - started, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if visit.device.type == "cuda" else None,
    }  # fmt: skip
    print(visit.figures["train"], flush=True)
    visit.details["train_log"] = trainer.state.log_history
    if profile:
        visit.details["step"] = profile_step(trainer)
        print(visit.details["step"], flush=True)


def try_rates(visit: Visit, rates: list[float], *arguments: Any, changes: dict[str, Any]) -> None:
    """A short run at each learning rate, and the mean of its last two logs: its rows have hardly been seen before.
    They go to work/rates, for they leave no checkpoint, and those of an earlier training are wanted."""
    for rate in rates:
        part = {"learning_rate": rate, "save_strategy": "no", "logging_steps": 25, "eval_strategy": "steps"}
        part["output_dir"] = str(visit.work / "rates")
        train(visit, *arguments, changes=changes | part, profile=False)
        visit.checkpoint = None
        last = [entry for entry in visit.details["train_log"] if "loss" in entry][-2:]
        if not last:
            raise ValueError(f"--train-seconds must be time for 25 steps, after which a loss is logged, at rate {rate}")
        figures = {
            name: round(sum(entry[name] for entry in last) / len(last), 4) for name in ("loss", "tokens_per_cycle")
        }
        visit.figures.setdefault("rates", {})[rate] = figures
        print(f"learning rate {rate}: {figures}", flush=True)


def export(visit: Visit) -> None:
    """The view as work/view.safetensors, and in out in pieces of at most 15 MiB."""
    run = visit.work / "run"
    if visit.model is not None:
        source = run / "model"
    else:
        source = visit.checkpoint or last_checkpoint(run)
        if source is None or not source.is_dir():
            raise FileNotFoundError(
                f"a checkpoint must be in {run}, but there is none: train first, with save_strategy"
            )
    target = visit.work / "view.safetensors"
    size = save_view(read_trained(source), target, max_bytes=60_000_000)
    visit.figures["view_mb"] = round(size / 1e6, 2)
    data, piece = target.read_bytes(), 15 << 20
    for old in visit.out.glob("view.safetensors.?"):  # a larger view's last pieces would be joined to this one
        old.unlink()
    for n in range(0, len(data), piece):
        (visit.out / f"view.safetensors.{n // piece}").write_bytes(data[n : n + piece])
    print(f"{source} -> {size / 1e6:.2f} MB; cat view.safetensors.? > view.safetensors", flush=True)


def measure(visit: Visit, prompts: list[Path], limit: int | None, tokens: int, block_sizes: list[int]) -> None:
    """Real decoding of held-out prompts, at several block sizes; one report each."""
    network, tokenizer = visit.load(visit.work / "run" / "model", visit.work / "view.safetensors")
    questions = [prompt for file in prompts for prompt in read_prompts(file)[:limit]]
    encoded = [(prompt.domain, encode(tokenizer, prompt)) for prompt in questions]
    for block_size in block_sizes:
        report = evaluate(
            network, encoded, max_new_tokens=tokens, block_size=block_size, baseline=False,
            check_exact=block_size == block_sizes[0],
        )  # fmt: skip
        visit.details[f"evaluation_k{block_size}"] = report
        by_domain = {name: round(part["tokens_per_cycle"], 3) for name, part in report["domains"].items()}
        accepted = [round(share or 0, 3) for share in report["acceptance_by_position"]]
        exact = report["exactness"] and [report["exactness"]["equal"], report["exactness"]["checked"]]
        print(f"K={block_size}: tokens per cycle {by_domain}, accepted {accepted}, exact {exact}", flush=True)
        visit.figures[f"tokens_per_cycle_k{block_size}"] = by_domain


def _learning_rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--rates must be numbers separated by commas, but got {text!r}") from error


def _require_whole(fewest: int, **counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < fewest:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {fewest}, but got {value}")


def _require_there(files: list[Path], rows: dict[str, Path | None]) -> None:
    """Raise a FileNotFoundError where an input is missing: said now, not after what takes long."""
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
    for option, path in rows.items():
        if path is not None and not any(path.glob("*.jsonl")) and not (option == "--held-out" and path.is_file()):
            raise FileNotFoundError(f"{option} must be a folder with .jsonl files, but {str(path)!r} has none")


def main(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for results.")],
    prompts: Annotated[Path | None, typer.Option(help="Prompts of distill-data --prompts-only.")] = None,
    rows: Annotated[Path | None, typer.Option(help="More rows to train on, besides the new ones.")] = None,
    held_out: Annotated[Path, typer.Option(help="Held-out rows.")] = Path("held-out"),
    config: Annotated[Path, typer.Option()] = Path("examples/train_smollm2_gpu.yaml"),
    stages: Annotated[
        str, typer.Option(help=f"Some of {','.join(STAGES)}, or none; each takes up what is in --work.")
    ] = ",".join(STAGES),
    data_seconds: Annotated[float, typer.Option(help="For answers, at most.")] = 60,
    train_seconds: Annotated[float, typer.Option(help="For steps after the first.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Answers generated side by side.")] = 256,
    limit: Annotated[int | None, typer.Option(help="Take the first N prompts.")] = None,
    invent_code: Annotated[int, typer.Option(help="Prompts for code that the model invents, besides.")] = 0,
    invent_chat: Annotated[int, typer.Option(help="Other prompts that the model invents, besides.")] = 0,
    eval_prompts: Annotated[list[Path] | None, typer.Option(help="By default the code prompts.")] = None,
    eval_limit: Annotated[int | None, typer.Option(help="Of each file.")] = None,
    eval_tokens: Annotated[int, typer.Option(help="Of each answer.")] = 128,
    block_sizes: Annotated[str, typer.Option(help="To evaluate at; by default the trained one and 8.")] = "",
    rehearse: Annotated[
        str | None, typer.Option("--random", help=f"Rehearse on random weights: {', '.join(RANDOM)}.")
    ] = None,
    rates: Annotated[str, typer.Option(help="Instead of training, try learning rates: 1e-3,2e-3.")] = "",
    profile: Annotated[bool, typer.Option("--profile", help="Show what a training step consists of.")] = False,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Over the config.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for rows, checkpoints and models; by default OUT_work, beside OUT.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Make a view in one process, answers and training within their seconds. Ctrl-C ends the stage at hand, and the
    next begins. Exit code 1 if a stage failed or was ended; the others have run.

    \b
    python -m benchmarks.view OUT --prompts prompts.jsonl --held-out held-out              # on a GPU
    python -m benchmarks.view OUT --prompts prompts.jsonl --held-out held-out --random smollm2-135m --limit 512 \\
        --train-seconds 5 --eval-limit 2 --eval-tokens 32 --profile                         # a rehearsal there
    """
    started = time.monotonic()
    with one_line_errors():
        wanted = require_known("--stages", stages, (*STAGES, "none"))
        sizes = whole_numbers("--block-sizes", block_sizes) if block_sizes else None
        learning_rates = _learning_rates(rates) if rates else []
        if rehearse is not None:
            require_known("--random", rehearse, RANDOM)
            if invent_code or invent_chat:
                raise ValueError("--invent-code and --invent-chat are not for --random, whose model ends no message")
        _require_whole(1, limit=limit, eval_limit=eval_limit, eval_tokens=eval_tokens, batch_size=batch_size)
        _require_whole(0, invent_code=invent_code, invent_chat=invent_chat)
        overrides = parse_changes(changes or [])
        for name, option in OWN_OPTIONS.items():
            if name in overrides:
                raise ValueError(f"--set {name} is not for this command: use {option}")
        overrides["max_seconds"] = train_seconds
        trains = bool(learning_rates) or "train" in wanted
        eval_prompts = eval_prompts or [HELD_OUT / "code.txt"]
        if "data" not in wanted:
            prompts = None
        _require_there(
            [*([prompts] if prompts else []), *eval_prompts, config],
            {"--rows": rows, "--held-out": None if "eval_data" in overrides else held_out}
            if trains and rehearse is None
            else {},
        )
        questions = [] if prompts is None else read_prompts(prompts)[:limit]
        work = work or out.with_name(f"{out.name}_work")
        visit = Visit(out, work / (rehearse or "smollm2"), resolve_device(device), None, {}, {})
    out.mkdir(parents=True, exist_ok=True)
    visit.work.mkdir(parents=True, exist_ok=True)
    visit.figures |= environment(visit.device)
    if rehearse is not None:
        with stage(visit, "random model"):
            shutil.rmtree(visit.work)
            visit.model = random_model(visit.work / "base", rehearse, visit.device)
        if visit.model is None:  # the other stages would take the demo model
            sys.exit(1)
    invented = {domain: count for domain, count in (("code", invent_code), ("chat", invent_chat)) if count}
    if "data" in wanted and (questions or invented):
        with stage(visit, "data"):
            make_data(visit, questions, invented, held_out_prompts(eval_prompts), data_seconds, batch_size)
    found = [visit.work / "rows", *([rows] if rows and not rehearse else [])]
    if learning_rates:
        with stage(visit, "rates"):
            try_rates(visit, learning_rates, config, found, held_out, changes=overrides)
    elif "train" in wanted:
        with stage(visit, "train"):
            train(visit, config, found, held_out, overrides, profile)
    if "export" in wanted:
        with stage(visit, "export"):
            export(visit)
    if "evaluate" in wanted:
        with stage(visit, "evaluate"):
            if sizes is None:
                trained = overrides.get("block_size") or read_config(config, max_seconds=1).block_size
                sizes = sorted({trained, 8} - {None}, reverse=True)
            measure(visit, eval_prompts, eval_limit, eval_tokens, sizes)
    print(f"== all: {time.monotonic() - started:.1f} s, {json.dumps(visit.figures)}", flush=True)
    sys.exit(bool(visit.figures.get("failed")))


if __name__ == "__main__":
    typer.run(main)
