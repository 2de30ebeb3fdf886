"""Where a cycle's time goes on a GPU: every kernel of a replayed cycle, its launches and microseconds, and the rest.
python -m benchmarks.kernel_list --shape qwen3-8b --context 2048 --mode consensus"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import Report, require_known
from benchmarks.cycle_providers import WARM_UP
from benchmarks.shapes import SHAPES, build
from orthrus_triton.cli.common import one_line_errors, resolve_device
from orthrus_triton.modules import ConsensusDecoder

REPLAYS = 5


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen3-8b",
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 2048,
    mode: Annotated[str, typer.Option(help="consensus or ar.")] = "consensus",
    out: Annotated[Path | None, typer.Option(help="Folder for the CSV file.")] = None,
) -> None:
    """Kernels of one replay (in AR mode eight passes), the most time first; "idle" is what no kernel accounts for."""
    with one_line_errors():
        require_known("--shape", shape, SHAPES)
        require_known("--mode", mode, ("consensus", "ar"))
        device = resolve_device("cuda")
    model = build(SHAPES[shape], torch.bfloat16, device)
    run = ConsensusDecoder(model, mode=mode).open(1, context + 4096, eos_token_id=[])
    run.admit(0, torch.randint(0, model.vocab_size - 1, (context,)), 4096)
    for _ in range(WARM_UP):
        run.advance()
    run.poll(lag=0)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(REPLAYS):
        run.step()
    torch.cuda.synchronize()
    wall_us = (time.perf_counter() - started) / REPLAYS * 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            run.step()
        torch.cuda.synchronize()
    report = Report(f"kernels_{shape}_{mode}_{context}", device, out)
    busy_us = 0.0
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    for event in sorted(events, key=lambda event: -event.self_device_time_total):
        us = event.self_device_time_total / REPLAYS
        busy_us += us
        launches = event.count / REPLAYS
        report.add(kernel=event.key[:70], launches=launches, us=round(us, 1), share=f"{us / wall_us:.1%}")
    idle = wall_us - busy_us
    report.add(kernel="idle", launches="", us=round(idle, 1), share=f"{idle / wall_us:.1%}")
    report.add(kernel="wall-clock, not profiled", launches="", us=round(wall_us, 1), share="100.0%")
    print(report.markdown())


if __name__ == "__main__":
    typer.run(main)
