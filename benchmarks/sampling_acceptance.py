"""How many drafts the two sampling rules accept, on real prompts at several temperatures. Counts, no times: they hold
for any machine.

python -m benchmarks.sampling_acceptance                     the demo model
python -m benchmarks.sampling_acceptance MODEL --tokens 256
"""

from __future__ import annotations

import argparse

import torch

from orthrus_triton.cli.load import load_model
from orthrus_triton.modules import ConsensusDecoder

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "A train travels 180 km in 2.5 hours. What is its average speed? Think step by step.",
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
)
TEMPERATURES = (0.0, 0.5, 0.8, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub id of an Orthrus model; by default the demo model")
    parser.add_argument("--tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, name = load_model(
        arguments.model, torch.bfloat16 if device.type == "cuda" else torch.float32, device
    )
    prompts = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
    decoder = ConsensusDecoder(model, block_size=arguments.block_size)
    print(f"{name}, block {arguments.block_size}, {len(prompts)} prompts of {arguments.tokens} tokens, {device}")
    print("| T | rule | tokens per cycle | first draft accepted | cycles |\n|---|---|---|---|---|")
    for temperature in TEMPERATURES:
        for rule in ("coupled", "rejection") if temperature else ("greedy",):
            stats = decoder.generate(
                prompts, max_new_tokens=arguments.tokens, temperature=temperature, seed=arguments.seed,
                sampling="coupled" if rule == "greedy" else rule,
            ).stats  # fmt: skip
            cycles = sum(stats.accepted_histogram)
            first = 1 - stats.accepted_histogram[0] / cycles
            print(f"| {temperature} | {rule} | {stats.tokens_per_cycle:.2f} | {first:.0%} | {cycles} |", flush=True)


if __name__ == "__main__":
    main()
