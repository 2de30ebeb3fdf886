"""Whether both modes say the same on real weights: 1,000 prompts of 128 tokens, and a control that shows a difference
would be found. `python -m benchmarks.exactness` takes half an hour on two CPU cores, a minute on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import Report
from orthrus_triton.cli.common import DtypeOption, one_line_errors, resolve_device, resolve_dtype, status_console
from orthrus_triton.cli.load import ModelOption, load_model
from orthrus_triton.modules import ConsensusDecoder, first_difference

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
CONSENSUS_BATCH, AR_BATCH = 40, 125


def thousand_prompts(tokenizer: Any) -> list[torch.Tensor]:
    """Every template about every subject, as one question of a chat each."""
    questions = [template.format(subject) for template, subject in product(TEMPLATES, SUBJECTS)]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"][0]
        for question in questions
    ]


def answers(
    decoder: ConsensusDecoder, prompts: Sequence[torch.Tensor], batch_size: int, tokens: int,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:  # fmt: skip
    """So many tokens for every prompt, stop tokens or not."""
    said = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        output = decoder.generate(batch, max_new_tokens=tokens, eos_token_id=[])
        said += [sequence[len(prompt) :].tolist() for sequence, prompt in zip(output.sequences, batch)]
        on_batch(len(batch))
    return said


def main(
    model: ModelOption = None,
    dtype: DtypeOption = "bf16",
    limit: Annotated[int, typer.Option(help="Take so many of the prompts, evenly spread.")] = 1000,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    control: Annotated[int, typer.Option(help="Prompts of the control, evenly spread; 0 leaves it out.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.")] = None,
) -> None:
    """Decode every prompt in both modes and count how many answers have the same token ids.

    The control is the library's products in place of ours: one row in AR decoding, a block in the cycle. Exits with
    code 1 if an answer of ours differs, or if the control finds no difference.
    """
    with one_line_errors():
        for option, value, least in (("--limit", limit, 1), ("--tokens", tokens, 1), ("--control", control, 0)):
            if value < least:
                raise ValueError(f"{option} must be >= {least}, but got {value}")
        device = resolve_device("auto")
        network, tokenizer, name = load_model(model, resolve_dtype(dtype, device), device)
    prompts = thousand_prompts(tokenizer)
    prompts = [prompts[n * len(prompts) // limit] for n in range(limit)]
    checked = [n * limit // control for n in range(control)]
    longest = max(map(len, prompts)) + tokens - 1

    def say(what: str, of: Sequence[torch.Tensor], batch_size: int, **options: Any) -> list[list[int]]:
        from rich.progress import Progress

        with Progress(console=status_console) as progress:
            bar = progress.add_task(what, total=len(of))
            decoder = ConsensusDecoder(network, max_cache_len=longest, **options)
            return answers(decoder, of, batch_size, tokens, lambda count: progress.advance(bar, count))

    report = Report(f"exactness_{dtype}", device, out)

    def compare(what: str, ours: list[list[int]], theirs: list[list[int]]) -> int:
        parts = [at for a, b in zip(ours, theirs) if (at := first_difference(a, b)) is not None]
        report.add(
            model=name, compared=what, prompts=len(ours), tokens_each=tokens, identical=len(ours) - len(parts),
            median_first_difference=median(parts) if parts else "",
        )  # fmt: skip
        return len(parts)

    consensus = say("dual-view cycles", prompts, CONSENSUS_BATCH)
    wrong = compare("cycles, AR", consensus, say("AR", prompts, AR_BATCH, mode="ar"))
    found = 1
    if control:
        some, library = [prompts[n] for n in checked], {"impl": "torch", "exact": False}
        # on a CPU the torch implementation of a cycle is ours
        cycles = (
            say("control, cycles", some, 1, **library) if device.type == "cuda" else [consensus[n] for n in checked]
        )
        found = compare("control", cycles, say("control, AR", some, 1, mode="ar", **library))
    typer.echo(report.markdown())
    report.write_csv()
    raise typer.Exit(int(wrong > 0 or found == 0))


if __name__ == "__main__":
    typer.run(main)
