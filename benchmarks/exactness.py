"""Whether both modes say the same on real weights: 1,000 prompts of 128 tokens, and a control that shows a difference
would be found. `python -m benchmarks.exactness` takes half an hour on two CPU cores, a minute on a GPU."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
import traceback
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from transformers import DynamicCache, PreTrainedModel

from benchmarks.common import Report
from benchmarks.shapes import transformers_model
from orthrus_triton.autotune.config import DTYPE_NAMES
from orthrus_triton.cli.common import DtypeOption, one_line_errors, resolve_device, resolve_dtype
from orthrus_triton.cli.load import DEMO_NAME, ModelOption, load_model
from orthrus_triton.modules import ConsensusDecoder, first_difference

OURS, CONTROL = "cycles, AR", "control"
TEMPLATES = [
    "Explain {} to a child.", "Write a short story about {}.", "What are three facts about {}?",
    "Write a Python function that has to do with {}.", "Give me a recipe that involves {}.",
    "Why do people care about {}?", "Compare {} with something similar.", "Write a poem about {}.",
    "What is the history of {}?", "List ten words related to {}.", "How would you teach a class on {}?",
    "Summarise what is known about {} in one paragraph.", "Translate 'I like {}' into French and German.",
    "Write a dialogue between two experts on {}.", "What could go wrong with {}?",
    "Describe {} using only short sentences.", "Invent a riddle whose answer is {}.",
    "What would the world be without {}?", "Write a JSON object that describes {}.",
    "Draft an email to a colleague about {}.", "Name the parts of {}.", "Is {} good or bad? Argue both sides.",
    "Write a haiku about {}.", "What questions should one ask about {}?", "Plan a day around {}.",
]  # fmt: skip
SUBJECTS = [
    "the sea", "bread", "prime numbers", "volcanoes", "chess", "the moon", "trains", "honey", "glass", "recursion",
    "rain", "maps", "the violin", "salt", "bridges", "sleep", "magnets", "paper", "the human heart", "wolves",
    "clocks", "coffee", "democracy", "snow", "sorting algorithms", "gardens", "light", "money", "dinosaurs", "tea",
    "steel", "language", "bicycles", "the desert", "batteries", "cats", "probability", "rivers", "bees", "silence",
]  # fmt: skip
# the modes run at different batch sizes too: a sequence's tokens may not depend on its neighbours
AR_BATCH, CONSENSUS_BATCH = 125, 25
CONTROL_BLOCK = 16
GPU_PROCESSES = 8  # short prompts are prefilled at the speed of the host: each process takes a share of them


def thousand_prompts(tokenizer: Any) -> list[torch.Tensor]:
    """Every template about every subject, as one question of a chat each."""
    questions = [template.format(subject) for template, subject in product(TEMPLATES, SUBJECTS)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"][0]
        for question in questions
    ]


class Share(NamedTuple):
    """What one process compares: the model and dtype by name, the numbers of its prompts and of those of the control,
    tokens of an answer."""

    model: str | None
    dtype: str
    numbers: list[int]
    control: list[int]
    tokens: int


class Part(NamedTuple):
    """The first difference between two answers to each of some prompts, None where there is none."""

    compared: str
    differences: list[int | None]


def compare(share: Share) -> Iterator[Part]:
    """Both modes on a share of the prompts, then the control."""
    device = resolve_device("auto")
    network, tokenizer, _ = load_model(share.model, resolve_dtype(share.dtype, device), device)
    prompts = thousand_prompts(tokenizer)
    longest = max(map(len, prompts)) + share.tokens - 1
    consensus, ar = (ConsensusDecoder(network, mode=mode, max_cache_len=longest) for mode in ("consensus", "ar"))
    for group in _batches([prompts[n] for n in share.numbers], AR_BATCH):
        theirs = iter(_answers(ar, group, share.tokens))
        for some in _batches(group, CONSENSUS_BATCH):
            yield Part(OURS, [first_difference(ours, next(theirs)) for ours in _answers(consensus, some, share.tokens)])
    if share.control:
        library = transformers_model(network)
        for n in share.control:
            yield Part(CONTROL, [library_difference(library, prompts[n].to(device), share.tokens)])


@torch.no_grad()
def library_difference(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> int | None:
    """Where transformers' AR decoding first says something else than its own pass over blocks of that very answer: the
    verify pass of speculative decoding, with the library's kernels as they come."""
    decode = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    answer = model.generate(prompt[None], max_new_tokens=tokens, **decode)[0, len(prompt) :]
    past = DynamicCache(config=model.config)
    if len(prompt) > 1:
        model(prompt[None, :-1], past_key_values=past)
    rows = torch.cat((prompt[-1:], answer[:-1]))
    chosen = torch.cat([
        model(block[None], past_key_values=past).logits[0].argmax(dim=-1) for block in rows.split(CONTROL_BLOCK)
    ])  # fmt: skip
    return first_difference(chosen.tolist(), answer.tolist())


def _batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _answers(decoder: ConsensusDecoder, prompts: list[torch.Tensor], tokens: int) -> list[list[int]]:
    """So many tokens for every prompt, stop tokens or not."""
    sequences = decoder.generate(prompts, max_new_tokens=tokens, eos_token_id=[]).sequences
    return [sequence[len(prompt) :].tolist() for sequence, prompt in zip(sequences, prompts, strict=True)]


def compare_all(shares: list[Share]) -> Iterator[Part]:
    """`compare` of every share, each in a process of its own if there are several, as parts get ready.

    Raises:
        RuntimeError: a process failed, with what it said.
    """
    if len(shares) == 1:
        yield from compare(shares[0])
        return
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_work, args=(share, len(shares), results), daemon=True) for share in shares
    ]  # fmt: skip
    for worker in workers:
        worker.start()
    running = len(workers)
    try:
        while running:
            try:
                part = results.get(timeout=2)
            except queue.Empty:
                if any(worker.exitcode for worker in workers):
                    raise RuntimeError("a process ended without a word: out of memory?") from None
                continue
            if isinstance(part, str):
                raise RuntimeError(part)
            if part is None:
                running -= 1
            else:
                yield part
    finally:
        for worker in workers:
            worker.terminate()


def _work(share: Share, processes: int, results: multiprocessing.Queue) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends the others
    torch.set_num_threads(max((os.cpu_count() or 1) // processes, 1))
    try:
        for part in compare(share):
            results.put(part)
        results.put(None)
    except BaseException:
        results.put(traceback.format_exc())


class Count:
    """How many answers were the same, as parts come in."""

    def __init__(self, name: str, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        self.differences: dict[str, list[int | None]] = {}

    def add(self, part: Part) -> None:
        self.differences.setdefault(part.compared, []).extend(part.differences)

    def identical(self, compared: str) -> int:
        return self.differences.get(compared, []).count(None)

    def rows(self) -> list[dict[str, Any]]:
        """One for each comparison, for a report."""
        rows = []
        for compared, differences in self.differences.items():
            parts = [at for at in differences if at is not None]
            rows.append({
                "model": self.name, "compared": compared, "prompts": len(differences), "tokens_each": self.tokens,
                "identical": len(differences) - len(parts), "median_first_difference": median(parts) if parts else "",
            })  # fmt: skip
        return rows


def shares_of(model: str | None, dtype: str, limit: int, control: int, tokens: int, processes: int) -> list[Share]:
    """`limit` of the prompts and `control` of these, evenly spread, in as many shares as there are processes."""
    total = len(TEMPLATES) * len(SUBJECTS)
    numbers = [n * total // limit for n in range(limit)]
    checked = [numbers[n * limit // control] for n in range(control)]
    processes = min(processes, limit)
    return [Share(model, dtype, numbers[n::processes], checked[n::processes], tokens) for n in range(processes)]


def main(
    model: ModelOption = None,
    dtype: DtypeOption = "bf16",
    limit: Annotated[int, typer.Option(help="Take so many of the prompts, evenly spread.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    control: Annotated[int, typer.Option(help="Prompts of the control, evenly spread; 0 leaves it out.")] = 100,
    processes: Annotated[int, typer.Option(help="0: 8 on a GPU, 1 on a CPU.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.")] = None,
) -> None:
    """Decode every prompt in both modes and count how many answers have the same token ids.

    The control is transformers' own AR decoding against its own pass over blocks of that answer. Exits with code 1
    if an answer of ours differs, or if the control finds no difference. What is compared is written at once: Ctrl-C
    leaves the count so far.
    """
    with one_line_errors():
        least = (
            ("--limit", limit, 1),
            ("--tokens", tokens, 1),
            ("--control", control, 0),
            ("--processes", processes, 0),
        )
        for option, value, smallest in least:
            if value < smallest:
                raise ValueError(f"{option} must be >= {smallest}, but got {value}")
        if limit > len(TEMPLATES) * len(SUBJECTS):
            raise ValueError(f"--limit must be at most {len(TEMPLATES) * len(SUBJECTS)}, but got {limit}")
        device = resolve_device("auto")
        of = resolve_dtype(dtype, device)
    processes = processes or (GPU_PROCESSES if device.type == "cuda" else 1)
    report = Report(f"exactness_{DTYPE_NAMES[of]}", device, out)
    count = Count(model or f"{DEMO_NAME}, shipped view", tokens)
    started = time.monotonic()
    try:
        with one_line_errors():
            for part in compare_all(shares_of(model, dtype, limit, min(control, limit), tokens, processes)):
                count.add(part)
                report.rows = count.rows()
                report.write_csv()
                so_far = ", ".join(f"{row['compared']}: {row['identical']} of {row['prompts']}" for row in report.rows)
                typer.echo(f"{time.monotonic() - started:.0f} s, the same text in {so_far}", err=True)
    finally:
        if report.rows:
            typer.echo(report.markdown())
    same_control = count.identical(CONTROL) == min(control, limit) > 0
    raise typer.Exit(int(count.identical(OURS) < limit or same_control))


if __name__ == "__main__":
    typer.run(main)
