"""A view for SmolLM2-135M from nothing, in one process and within given seconds: answers, training, export, evaluation.
Or a rehearsal of all that on random weights of the same shape, which can also profile a training step."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import environment, require_known, whole_numbers
from benchmarks.step_profile import profile_step
from orthrus_triton.cli.common import one_line_errors, resolve_device
from orthrus_triton.cli.export_view import read_trained
from orthrus_triton.cli.train import parse_changes
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.demo import load_demo_model
from orthrus_triton.models.view import save_view
from orthrus_triton.training.config import read_config
from orthrus_triton.training.distill import distill
from orthrus_triton.training.evaluate import evaluate
from orthrus_triton.training.invent import invent
from orthrus_triton.training.overlap import find_overlaps
from orthrus_triton.training.prompts import encode, read_prompts, write_prompts
from orthrus_triton.training.run import train_view
from orthrus_triton.training.trainer import last_checkpoint

HELD_OUT = Path("examples/prompts")
BEGINNINGS = HELD_OUT / "beginnings.txt"
STAGES = ("data", "train", "export", "evaluate")
# hidden, layers, heads, key heads, intermediate, vocabulary
RANDOM = {"smollm2-135m": (576, 30, 9, 3, 1536, 49_152), "tiny": (128, 2, 2, 1, 96, 300)}


@dataclass
class Visit:
    """What the stages share. model: a folder with random weights, or None for the demo model. figures are printed,
    details are not; both go to out/figures.json. checkpoint: the last one of the training just done."""

    out: Path
    work: Path
    device: torch.device
    model: Path | None
    figures: dict[str, Any]
    details: dict[str, Any]
    checkpoint: Path | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def load(self, folder: Path | None = None, view: Path | None = None) -> tuple[OrthrusForCausalLM, Any]:
        """Model and tokenizer for decoding."""
        if self.model is None:
            return load_demo_model(self.dtype, device=self.device, view=view or "copy")
        from transformers import AutoTokenizer

        network = OrthrusForCausalLM.from_pretrained(folder or self.model, dtype=self.dtype, device=self.device)
        return network, AutoTokenizer.from_pretrained(self.model)


@contextmanager
def stage(visit: Visit, name: str) -> Iterator[None]:
    """Time a stage. One that fails shows its traceback, and the next ones have their turn."""
    print(f"== {name}", flush=True)
    started = time.monotonic()
    try:
        yield
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        visit.figures.setdefault("failed", []).append(name)
    seconds = round(time.monotonic() - started, 1)
    visit.figures[f"{name}_seconds"] = seconds
    print(f"== {name}: {seconds} s", flush=True)
    (visit.out / "figures.json").write_text(json.dumps(visit.figures | {"details": visit.details}, indent=1))


def random_model(folder: Path, shape: str, device: torch.device) -> Path:
    """A Llama with random weights, in bf16, and a tokenizer that knows no word; no token ends its answers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    hidden, layers, heads, kv_heads, intermediate, vocab = RANDOM[shape]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, rms_norm_eps=1e-5, initializer_range=0.04,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocab)}, unk_token="w20"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.chat_template = "{% for m in messages %}w17 {{ m.content }} w18{% endfor %}"
    model = OrthrusForCausalLM.from_base(base, block_size=16, mask_token_id=16)
    model.save_pretrained(folder, tokenizer=tokenizer)
    return folder


def make_data(
    visit: Visit, prompts: Path, limit: int | None, invented: dict[str, int], seconds: float, batch_size: int
) -> None:
    """Answers to prompts, some of which the model invents, as many as there is time for, into work/rows."""
    network, tokenizer = visit.load()
    tokens: list[int] = []
    started = time.monotonic()
    questions = read_prompts(prompts)[:limit]
    for domain, count in invented.items():
        beginnings = [prompt.text for prompt in read_prompts(BEGINNINGS)] if domain == "code" else [""]
        questions += invent(
            network, tokenizer, count, beginnings=beginnings, domain=domain, batch_size=2 * batch_size
        )  # fmt: skip
        print(f"{count} prompts for {domain} invented after {time.monotonic() - started:.1f} s", flush=True)
    reserved = [prompt.text for file in HELD_OUT.glob("*.txt") if file != BEGINNINGS for prompt in read_prompts(file)]
    repeats = {overlap.training for overlap in find_overlaps(reserved, [prompt.text for prompt in questions])}
    print(f"{len(repeats)} of {len(questions)} prompts repeat held-out ones and are left out", flush=True)
    questions = [prompt for n, prompt in enumerate(questions) if n not in repeats]
    random.Random(0).shuffle(questions)  # what there is no time for is of no particular kind
    write_prompts(questions, visit.out / "prompts.jsonl")
    started = time.monotonic()

    def plan(done: int, total: int) -> None:
        print(f"{total - done} prompts after {time.monotonic() - started:.1f} s", flush=True)

    manifest = distill(
        network, tokenizer, questions, visit.work / "rows", batch_size=batch_size,
        max_new_tokens=192 if network.vocab_size > 1000 else 24, seconds=seconds, on_row=tokens.append, on_plan=plan,
    )  # fmt: skip
    taken = time.monotonic() - started
    kept = {name: manifest[name] for name in ("rows", "finished_rows", "answer_tokens", "domains", "left_out")}
    visit.figures["data"] = kept | {"tokens_per_second": round(sum(tokens) / taken), "seconds": round(taken, 1)}
    print(visit.figures["data"])
    with tarfile.open(visit.out / "rows.tgz", "w:gz", compresslevel=4) as archive:
        archive.add(visit.work / "rows", "rows")


def train(visit: Visit, config: Path, rows: list[Path], held_out: Path, changes: dict[str, Any], profile: bool) -> None:
    """Train on the rows of all folders into work/run. A run that fails within 90 seconds is tried again without
    compiled layers, which may be what failed."""
    data = visit.work / "all_rows"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    for n, folder in enumerate(rows):
        for shard in folder.glob("*.jsonl"):
            (data / f"{n}-{shard.name}").symlink_to(shard.resolve())
    if not any(data.iterdir()):
        raise FileNotFoundError(f"rows must be in one of {[str(folder) for folder in rows]}, but there are none")
    changes = {"output_dir": str(visit.work / "run"), "data": str(data), "eval_data": str(held_out), **changes}
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
    visit.checkpoint = visit.work / "run" / f"checkpoint-{steps}"
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
    """A short run at each learning rate, and the mean of its last two logs: its rows have hardly been seen before."""
    for rate in rates:
        part = {"learning_rate": rate, "save_strategy": "no", "logging_steps": 25, "eval_strategy": "steps"}
        train(visit, *arguments, changes=changes | part, profile=False)
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
    """Make a view in one process, each stage within its seconds. Ctrl-C ends the stage at hand, and the next begins.
    Exit code 1 if a stage failed or was ended; the others have run.

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
        overrides = parse_changes(changes or []) | {"max_seconds": train_seconds}
        work = work or out.with_name(f"{out.name}_work")
        visit = Visit(out, work / (rehearse or "smollm2"), resolve_device(device), None, {}, {})
    out.mkdir(parents=True, exist_ok=True)
    visit.work.mkdir(parents=True, exist_ok=True)
    visit.figures |= environment(visit.device)
    if rehearse is not None:
        with stage(visit, "random model"):
            shutil.rmtree(visit.work)
            visit.model = random_model(visit.work / "base", rehearse, visit.device)
    if "data" in wanted and prompts is not None:
        with stage(visit, "data"):
            invented = {"code": invent_code, "chat": invent_chat}
            invented = {domain: count for domain, count in invented.items() if count}
            make_data(visit, prompts, limit, invented, data_seconds, batch_size)
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
            measure(visit, eval_prompts or [Path("examples/prompts/code.txt")], eval_limit, eval_tokens, sizes)
    print(f"== all: {time.monotonic() - started:.1f} s, {json.dumps(visit.figures)}", flush=True)
    sys.exit(bool(visit.figures.get("failed")))


if __name__ == "__main__":
    typer.run(main)
