"""How many drafts the two sampling rules accept, on real prompts at several temperatures: counts, so for any machine.
python -m benchmarks.sampling_acceptance [MODEL] --tokens 256"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from orthrus_triton.cli.common import MinPOption, TopKOption, TopPOption, one_line_errors, resolve_device
from orthrus_triton.cli.load import load_model
from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.training.prompts import Prompt, encode

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 180 km in 2.5 hours. What is its average speed? Think step by step.",
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
)
TEMPERATURES = (0.0, 0.5, 0.8, 1.0)


def main(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id of an Orthrus model; by default the demo model.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each prompt; the first is the prefill's.")] = 64,
    block_size: Annotated[
        int | None, typer.Option(help="Rows of a draft block, anchor included; by default the model's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampled tokens.")] = 1,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
) -> None:
    """Tokens per cycle, and the share of cycles that accept their first draft, by sampling rule and temperature."""
    filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    with one_line_errors():
        SamplingParams(**filters)  # raises before the model is loaded
        device = resolve_device("auto")
        network, tokenizer, name = load_model(model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
        prompts = [torch.tensor(encode(tokenizer, Prompt(text))) for text in PROMPTS]
        decoder = ConsensusDecoder(network, block_size=block_size)
    print(f"{name}, block {decoder.block_size}, {len(prompts)} prompts of {tokens} tokens, {device}")
    print("| T | rule | tokens per cycle | first draft accepted | cycles |\n|---|---|---|---|---|")
    for temperature in TEMPERATURES:
        for rule in ("coupled", "rejection") if temperature else ("greedy",):
            stats = decoder.generate(
                prompts, max_new_tokens=tokens, temperature=temperature, seed=seed, **(filters if temperature else {}),
                sampling="coupled" if rule == "greedy" else rule,
            ).stats  # fmt: skip
            cycles = sum(stats.accepted_histogram)
            first = 1 - stats.accepted_histogram[0] / cycles
            print(f"| {temperature} | {rule} | {stats.tokens_per_cycle:.2f} | {first:.0%} | {cycles} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
