"""Time of a decode cycle at a model's true shape, ours and others', against the memory floor of the same device.
python -m benchmarks.cycle --shape qwen3-8b --context 2048 --batch 1 --providers ours,ours-ar,official,hf,hf-compiled"""

from __future__ import annotations

import gc
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import DTYPES, Report, Timing, copy_bandwidth, require_green, require_known, whole_numbers
from benchmarks.cycle_providers import PROVIDERS, CannotRun, Cycles, Workload, problems
from benchmarks.shapes import SHAPES, build, bytes_per_pass
from orthrus_triton.cli.common import one_line_errors, resolve_device

SHOWN = "provider context batch p20_ms p50_ms p80_ms floor_ms of_floor gb_s ttft_s tokens_s note".split()
MEASURED = "samples p20_ms p50_ms p80_ms floor_ms of_floor gb_s ttft_s assumed_tokens_per_cycle tokens_s".split()


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen3-8b",
    context: Annotated[str, typer.Option(help="Tokens in the cache, one or several: 2048,32768.")] = "2048",
    batch: Annotated[str, typer.Option(help="Sequences, one or several: 1,2,4.")] = "1",
    providers: Annotated[str, typer.Option(help=", ".join(PROVIDERS))] = "ours,ours-ar,official,hf,hf-compiled",
    tokens_per_cycle: Annotated[
        float, typer.Option(help="ASSUMED acceptance, bonus token included, for tokens/s of drafted cycles.")
    ] = 1.0,
    cycles: Annotated[int, typer.Option(min=1, help="Cycles to time in each cell.")] = 40,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    official: Annotated[Path | None, typer.Option(help="Checkout of the official repository; its code is run.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for CSV, table and chart.")] = None,
) -> None:
    """Time a cycle of each provider. Weights are random, so acceptance is not measured, and tokens/s is what
    --tokens-per-cycle assumes."""
    with one_line_errors():
        require_known("--shape", shape, SHAPES)
        require_known("--dtype", dtype, DTYPES)
        names = require_known("--providers", providers, PROVIDERS)
        contexts, batches = whole_numbers("--context", context), whole_numbers("--batch", batch)
        where = resolve_device(device)
    model = build(SHAPES[shape], DTYPES[dtype], where)
    bandwidth = copy_bandwidth(where)
    report = Report(f"cycle_{shape}_{dtype}", where, out)
    cells = [(tokens, sequences) for tokens in contexts for sequences in batches]
    require_green(problems(_workload(model, min(c for c, _ in cells), 2, cycles, official), names))
    for tokens, sequences in cells:
        load = _workload(model, tokens, sequences, cycles, official)
        for name in names:
            row = {"provider": name, "shape": shape, "dtype": dtype, "context": tokens, "batch": sequences}
            row |= {"block_size": model.block_size, "copy_gb_s": round(bandwidth / 1e9, 1)}
            try:
                measured, note = PROVIDERS[name](load), ""
            except CannotRun as reason:
                measured, note = None, str(reason)
            except torch.OutOfMemoryError:
                measured, note = None, "out of memory"
            except Exception as error:  # what others' code does must not cost the rows that are there
                if name.startswith("ours"):
                    raise
                measured, note = None, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            report.add(**row, **_columns(measured, load, bandwidth, tokens_per_cycle), note=note)
            row = report.rows[-1]
            print(f"{name}, context {tokens}, batch {sequences}: {row['p50_ms'] or note}", file=sys.stderr, flush=True)
            gc.collect()
            if where.type == "cuda":
                torch.cuda.empty_cache()
    _publish(report, tokens_per_cycle)


def _workload(model, context: int, batch: int, cycles: int, official: Path | None) -> Workload:
    generator = torch.Generator().manual_seed(context)
    prompts = torch.randint(0, model.vocab_size - 1, (batch, context), generator=generator).to(model.device)
    return Workload(model, prompts, cycles, official)


def _columns(measured: Cycles | None, load: Workload, bandwidth: float, tokens_per_cycle: float) -> dict[str, object]:
    """Times in ms, the floor (bytes of weights and K/V the views read, over copy bandwidth), and assumed tokens/s."""
    if measured is None:
        return dict.fromkeys(MEASURED, "")
    timing = Timing.of(measured.seconds)
    batch, context = load.prompts.shape
    nbytes = sum(bytes_per_pass(load.model, view, context, batch) for view in measured.views)
    tokens = 1.0 if len(measured.views) == 1 else tokens_per_cycle
    values = (
        timing.samples, *(round(1e3 * t, 3) for t in (timing.p20, timing.p50, timing.p80)),
        round(1e3 * nbytes / bandwidth, 3), round(timing.p50 * bandwidth / nbytes, 3),
        round(nbytes / timing.p50 / 1e9, 1), round(measured.ttft, 3), tokens,
        round(batch * tokens / timing.p50, 1),
    )  # fmt: skip
    return dict(zip(MEASURED, values))


def _publish(report: Report, tokens_per_cycle: float) -> None:
    table = report.markdown(SHOWN)
    assumed = (
        f"Random weights: acceptance is not measured. tokens_s assumes {tokens_per_cycle:g} tokens per drafted cycle. "
        "of_floor: p50 over the time to read weights and K/V once per pass at the measured copy bandwidth."
    )
    lines = [table, "", assumed, *_comparisons(report.rows), "", f"    {_command()}"]
    report.publish("\n".join(lines))
    report.write_chart(
        "context", "p50_ms", lambda row: f"{row['provider']}, batch {row['batch']}", x_label="tokens of context",
        y_label="ms per cycle (per token: -ar, hf)", rows=[row for row in report.rows if row["p50_ms"] != ""],
    )  # fmt: skip


def _command() -> str:
    """What was run, without the folders of this machine."""
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for option in ("--official", "--out"):
        if option in words:
            words[words.index(option) + 1] = "PATH"
    return shlex.join(["python", "-m", "benchmarks.cycle", *words])


def _comparisons(rows: list[dict]) -> list[str]:
    """Our cycle beside the official one and beside the library's products, wherever both were timed."""
    times = {(row["provider"], row["context"], row["batch"]): row["p50_ms"] for row in rows if row["p50_ms"] != ""}
    lines = []
    for (provider, context, batch), theirs in times.items():
        cell, mine = f"context {context}, batch {batch}", times.get(("ours", context, batch))
        if provider == "official" and mine:
            lines.append(f"{cell}: the official cycle takes {theirs / mine:.2f}x ours")
        elif provider == "ours-inexact" and mine:
            lines.append(f"{cell}: exactness costs {100 * (mine / theirs - 1):+.1f} % of a cycle with library products")
    return lines


if __name__ == "__main__":
    typer.run(main)
