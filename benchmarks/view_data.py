"""What a view is trained on: answers to prompts, made in given seconds, and the rows of several folders as one."""

from __future__ import annotations

import random
import shutil
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT
from benchmarks.view_visit import Visit
from orthrus_triton.training.distill import distill
from orthrus_triton.training.invent import invent
from orthrus_triton.training.overlap import find_overlaps
from orthrus_triton.training.prompts import Prompt, read_prompts, write_prompts

HELD_OUT = ROOT / "examples" / "prompts"
BEGINNINGS = HELD_OUT / "beginnings.txt"


def make_data(
    visit: Visit, questions: Sequence[Prompt], invented: dict[str, int], reserved: Sequence[Prompt], seconds: float,
    batch_size: int,
) -> None:  # fmt: skip
    """Answers to `questions` and to prompts that the model invents, so many of each domain, but to none that repeats a
    reserved one: as many as there is time for, into work/rows."""
    network, tokenizer = visit.load()
    tokens: list[int] = []
    started = time.monotonic()
    questions = list(questions)
    for domain, count in invented.items():
        beginnings = [prompt.text for prompt in read_prompts(BEGINNINGS)] if domain == "code" else [""]
        questions += invent(
            network, tokenizer, count, beginnings=beginnings, domain=domain, batch_size=2 * batch_size
        )  # fmt: skip
        print(f"{count} prompts for {domain} invented after {time.monotonic() - started:.1f} s", flush=True)
    texts, held_out = ([prompt.text for prompt in prompts] for prompts in (questions, reserved))
    repeats = {overlap.training for overlap in find_overlaps(held_out, texts)}
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
    staged = visit.out / "rows.tgz.tmp"
    with tarfile.open(staged, "w:gz", compresslevel=4) as archive:
        archive.add(visit.work / "rows", "rows")
    staged.replace(visit.out / "rows.tgz")


def held_out_prompts(more: Sequence[Path] = ()) -> list[Prompt]:
    """What no view is trained on: the examples' prompts, and those of other files."""
    files = [file for file in sorted(HELD_OUT.glob("*.txt")) if file != BEGINNINGS]
    return [prompt for file in (*files, *more) for prompt in read_prompts(file)]


def link_rows(folders: Sequence[Path], target: Path) -> None:
    """Make `target` a folder of links to the shards of all folders, of which some may not exist; each shard once.

    Raises:
        FileNotFoundError: there is no shard.
    """
    names: dict[Path, str] = {}
    for n, folder in enumerate(folders):
        for shard in folder.glob("*.jsonl"):
            names.setdefault(shard.resolve(), f"{n}-{shard.name}")
    if not names:
        raise FileNotFoundError(f"rows must be in one of {[str(folder) for folder in folders]}, but there are none")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for shard, name in names.items():
        (target / name).symlink_to(shard)
