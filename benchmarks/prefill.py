"""Time to the first token of long prompts: the prefill as it is, with the cycle's own products, and transformers'.
python -m benchmarks.prefill --shape qwen3-8b --contexts 2048,8192,65536,131072"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import DTYPES, Report, require_green, require_known, whole_numbers
from benchmarks.shapes import SHAPES, build, transformers_model
from orthrus_triton.cli.common import one_line_errors, resolve_device
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder

SHOWN = "provider context ttft_s tokens_s peak_gib note".split()
WARM_UP_TOKENS = 8192  # two chunks: whatever a longer prompt launches has been compiled and loaded by then
PROVIDERS = ("ours", "ours-invariant", "hf")

Prefill = Callable[[torch.Tensor], int]


def decoder_of(model: OrthrusForCausalLM, **options: int) -> ConsensusDecoder:
    """For one token: nothing is decoded, so nothing is captured."""
    graphs = False if model.device.type == "cuda" else None
    return ConsensusDecoder(model, mode="ar", cuda_graph=graphs, **options)


def ours(model: OrthrusForCausalLM, length: int, invariant: bool) -> Prefill:
    """Our prefill up to the first token on the host, of prompts up to `length`."""
    decoder = decoder_of(model, batch_invariant_prefill=invariant, max_cache_len=length)

    def first_token(prompt: torch.Tensor) -> int:
        run = decoder.open(1, prompt.numel(), eos_token_id=[])
        run.admit(0, prompt, 1)
        run.poll(lag=0)
        return run.slots[0].tokens[0]

    return first_token


def hf(model: OrthrusForCausalLM) -> Prefill:
    """transformers' own forward with sdpa, the whole prompt at once, K/V kept, logits of the last token."""
    theirs = transformers_model(model)

    def first_token(prompt: torch.Tensor) -> int:
        ids = prompt[None].to(model.device)
        return int(theirs(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    return first_token


def problems(model: OrthrusForCausalLM, prompt: torch.Tensor) -> list[str]:
    """The gate: K/V near to those of our own products, and of these, in chunks of 8, the very bits of the whole."""
    caches = []
    for options in ({}, {"batch_invariant_prefill": True}, {"batch_invariant_prefill": True, "prefill_chunk": 8}):
        decoder = decoder_of(model, **options)
        decoder.generate([prompt], max_new_tokens=1, eos_token_id=[])
        length = len(prompt)
        layers = [(layer.k[:, :, :length].clone(), layer.v[:, :, :length].clone()) for layer in decoder.cache.layers]
        caches.append(layers)
    found = []
    for n, (default, invariant, in_eights) in enumerate(zip(*caches)):
        if not all(torch.equal(a, b) for a, b in zip(invariant, in_eights)):
            found.append(f"layer {n}: batch-invariant prefill depends on its chunks")
        for a, b in zip(default, invariant):
            alike = torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0).item()
            if not alike > 0.98:
                found.append(f"layer {n}: prefill with the library's products is another: cosine {alike:.4f}")
    return found


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen3-8b",
    contexts: Annotated[str, typer.Option(help="Tokens of the prompt, one or several.")] = "2048,8192,65536,131072",
    providers: Annotated[str, typer.Option(help=", ".join(PROVIDERS))] = ",".join(PROVIDERS),
    others_up_to: Annotated[int, typer.Option(help="Longest prompt of all but ours, which need longer.")] = 8192,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file.")] = None,
) -> None:
    """Seconds from a prompt on the host to its first token there, compiled and loaded before, timed once.

    "ours" takes the library's products, "ours-invariant" those of the cycle (`batch_invariant_prefill=True`), which
    leave the K/V that decoding would; the difference is their price. A row is written when it is measured.
    """
    with one_line_errors():
        require_known("--shape", shape, SHAPES)
        require_known("--dtype", dtype, DTYPES)
        names = require_known("--providers", providers, PROVIDERS)
        lengths = sorted(whole_numbers("--contexts", contexts))
        where = resolve_device(device)
    with torch.no_grad():
        model = build(SHAPES[shape], DTYPES[dtype], where)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, model.vocab_size - 1, (lengths[-1],), generator=generator)
        require_green(problems(model, prompt[:200]))
        report = Report(f"prefill_{shape}_{dtype}", where, out)
        try:
            for length in lengths:
                for name in names:
                    if name == "ours" or length <= others_up_to:
                        row = {"provider": name, "shape": shape, "dtype": dtype, "context": length}
                        report.add(**row, **_timed(_make(name, model, length), prompt[:length], name, where))
                        print(f"{name}, {length} tokens: {report.rows[-1]['ttft_s']} s", file=sys.stderr, flush=True)
        finally:
            if report.rows:
                print("\n".join([report.markdown(SHOWN), "", *_prices(report.rows)]), flush=True)


def _make(name: str, model: OrthrusForCausalLM, length: int) -> Prefill:
    return hf(model) if name == "hf" else ours(model, length, invariant=name == "ours-invariant")


def _timed(prefill: Prefill, prompt: torch.Tensor, name: str, device: torch.device) -> dict[str, object]:
    """The columns; of others' code, what it raises instead."""
    on_gpu, seconds, note = device.type == "cuda", None, ""
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        prefill(prompt[:WARM_UP_TOKENS])
        started = time.perf_counter()
        prefill(prompt)
        seconds = time.perf_counter() - started
    except Exception as error:
        if name.startswith("ours"):
            raise
        note = type(error).__name__
    peak = round(torch.cuda.max_memory_allocated(device) / 2**30, 1) if on_gpu else ""
    return {
        "ttft_s": round(seconds, 4) if seconds else "", "tokens_s": round(len(prompt) / seconds) if seconds else "",
        "peak_gib": peak, "note": note,
    }  # fmt: skip


def _prices(rows: list[dict]) -> list[str]:
    times = {(row["provider"], row["context"]): row["ttft_s"] for row in rows if row["ttft_s"] != ""}
    return [
        f"{context} tokens: batch-invariant prefill takes {seconds / times['ours', context]:.2f}x the library's"
        for (provider, context), seconds in times.items()
        if provider == "ours-invariant" and ("ours", context) in times
    ]


if __name__ == "__main__":
    typer.run(main)
