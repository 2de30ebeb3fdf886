"""`orthrus-triton autotune`: find the fastest kernel configurations on this GPU, once; or only compile them."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from orthrus_triton.cli.common import (
    DeviceOption,
    one_line_errors,
    parse_seconds,
    resolve_device,
    result_console,
    status_console,
)

if TYPE_CHECKING:
    from orthrus_triton.autotune.config import Problem
    from orthrus_triton.autotune.run import Outcome, Result
    from orthrus_triton.autotune.tuner import DryOutcome


def autotune(
    model: Annotated[Path | None, typer.Option(metavar="PATH", help="Folder of a model: its config.json.")] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Models by name, qwen3-8b and others, instead of a folder.")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(metavar="OP:NAME=N,...", help="One weight or head shape; repeatable.")
    ] = None,
    ops: Annotated[str | None, typer.Option(metavar="OP,...", help="Only these: linear, dual_view_attention.")] = None,
    module: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Python file with ops under @tunable; repeatable.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="auto: each model's own, else bf16.")
    ] = "auto",
    device: DeviceOption = "auto",
    budget: Annotated[str, typer.Option(metavar="TIME", help="Time for a run on a GPU: 300s, 5m, 1h, or none.")] = "5m",
    jobs: Annotated[int | None, typer.Option(help="Compiling processes; by default one per core.")] = None,
    candidates: Annotated[int, typer.Option(help="Most configurations to try per key.")] = 32,
    repeat: Annotated[int, typer.Option(help="Time and choose this many times; report differing winners.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, do not resume an interrupted run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only compile, to see what fits a GPU; needs no GPU, stores nothing.")
    ] = False,
    target: Annotated[
        str | None, typer.Option(help="With --dry-run: sm_80, sm_90, sm_100 or gfx942, by default this GPU's.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the configurations to this file, to pass them on.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Only show which configuration is used, and why.")] = False,
) -> None:
    """Tune the kernels to this GPU: compile, check, time, and write the winners to the user's file.

    Every candidate is compiled, compared with fp64, checked for row bits that do not depend on the row count, and only
    then timed. Kernels look the result up when they are launched; nothing is ever tuned during a call. A run that was
    stopped goes on when the same command is given again.

    \b
    orthrus-triton autotune --model ./orthrus
    orthrus-triton autotune --shape qwen3-8b --budget 5m --export NVIDIA_H200.json
    orthrus-triton autotune --key linear:K=4096,N=6144 --dtype fp16
    orthrus-triton autotune --shape qwen3-8b --dry-run --target sm_90    no GPU needed
    orthrus-triton autotune --show
    """
    with one_line_errors():
        for option, value in (("--jobs", jobs), ("--candidates", candidates), ("--repeat", repeat)):
            if value is not None and value < 1:
                raise ValueError(f"{option} must be >= 1, but got {value}")
        if export is not None and (export.suffix != ".json" or export.is_dir()):
            raise ValueError(f"--export must be a .json file, but got {str(export)!r}")
        if show and (dry_run or export is not None):
            raise ValueError("--show writes and compiles nothing: leave out --export and --dry-run")
        seconds = parse_seconds(budget)
        if target is not None and not dry_run:
            raise ValueError("--target goes with --dry-run: only the GPU that is here can be timed")
        from orthrus_triton.autotune import tuner

        precision = None if dtype == "auto" else dtype
        problems = _problems(model, shape, key or [], module or [], ops, precision)
        if show:
            _show(problems or None, device)
            return
        if not problems:
            raise ValueError("nothing to tune: give --model PATH, --shape NAME or --key OP:NAME=N,...")
        if dry_run:
            goal = target or _target_here(device)
            with _progress() as advance:
                dry = tuner.tune_dry(problems, goal, jobs=jobs, candidates=candidates, advance=advance)
            _print_dry(dry, goal)
            if export is not None:
                _export(export, None, goal.replace("_", ""), goal, tuner.entries_of(dry))
            if not all(outcome.fitting for outcome in dry):
                raise typer.Exit(1)
            return
        with _progress() as advance:
            result = tuner.tune(
                problems, device=resolve_device(device), budget=seconds, jobs=jobs, candidates=candidates,
                repeats=repeat, fresh=fresh, advance=advance,
            )  # fmt: skip
        _print(result)
        if export is not None:
            from orthrus_triton.autotune.store import gpu_of

            gpu = gpu_of(resolve_device(device))
            entries = [outcome.entry for outcome in result.outcomes if outcome.entry is not None]
            _export(export, gpu.name, gpu.family, gpu.capability, entries)
    if not all(outcome.entry for outcome in result.outcomes):
        raise typer.Exit(1)


def _problems(
    model: Path | None, shape: str | None, keys: Sequence[str], modules: Sequence[Path], ops: str | None,
    dtype: str | None,
) -> list[Problem]:  # fmt: skip
    from orthrus_triton.autotune.config import Problem
    from orthrus_triton.autotune.jobs import load_file
    from orthrus_triton.autotune.shapes import SHAPES, problems_of, select

    for file in modules:
        if not file.is_file() or file.suffix != ".py":
            raise ValueError(f"--module must be a Python file, but {file} is none")
        try:
            load_file(file.resolve())
        except Exception as error:  # it is the user's code
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = "" if isinstance(error, SyntaxError) else f" (line {last.lineno} of {last.filename})"
            raise ValueError(f"--module {file} fails: {type(error).__name__}: {error}{where}") from error
    found = []
    if model is not None:
        if not model.exists():
            raise ValueError(f"--model must be a folder with a config.json, but there is no {model}")
        found += problems_of(model, dtype)
    for name in shape.split(",") if shape else []:
        if name not in SHAPES:
            raise ValueError(f"--shape must name some of {', '.join(SHAPES)}, but got {name!r}")
        found += problems_of(name, dtype)
    found += [Problem.parse(text, dtype or "bf16") for text in keys]
    return select(found, ops.split(",") if ops else None)


def _target_here(device: str) -> str:
    from orthrus_triton.autotune.store import device_family

    where = resolve_device(device)
    if where.type != "cuda":
        raise ValueError("--dry-run needs --target sm_80, sm_90, sm_100 or gfx942 where there is no GPU")
    return device_family(where)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=status_console, transient=True) as progress:
        bar = progress.add_task("starting", total=None)
        yield lambda done, total, text: progress.update(bar, completed=done, total=total, description=text)


def _print(result: Result) -> None:
    console = result_console(soft_wrap=True)
    for outcome in result.outcomes:
        console.print(_line(outcome), style=None if outcome.entry else "bold red")
        _print_rejected(console, outcome.rejected)
    if result.unfinished:
        names = ", ".join(str(problem) for problem in result.unfinished)
        console.print(f"out of time, not done: {names}. The same command goes on with them.", style="yellow")
    console.print(f"written to {result.path}")


def _line(outcome: Outcome) -> str:
    entry = outcome.entry
    if entry is None:
        return f"{outcome.problem}: none of {outcome.tried} candidates may be used, the default stays"
    times = ", ".join(f"{load} {us:.1f} us, {entry.of_floor[load]:.0%} of floor" for load, us in entry.us.items())
    text = f"{outcome.problem} {entry.dtype}: {entry.config} ({times}"
    if outcome.tried:
        text += f"; {outcome.timed} timed of {outcome.tried}"
    if outcome.previous is not None and outcome.tried:
        text += "; another winner than last time" if outcome.changed else "; the winner of last time"
    if len(outcome.choices) > 1:
        winners = {config.identity() for config, _ in outcome.choices}
        worst = max(behind for _, behind in outcome.choices)
        text += f"; {len(winners)} winner(s) in {len(outcome.choices)} repetitions, at most {worst:.1%} behind"
    return text + ")"


def _print_dry(outcomes: Sequence[DryOutcome], target: str) -> None:
    console = result_console(soft_wrap=True)
    for outcome in outcomes:
        total = len(outcome.fitting) + len(outcome.rejected)
        text = f"{outcome.problem} {outcome.problem.dtype}: {len(outcome.fitting)} of {total} candidates fit {target}"
        console.print(f"{text}; by the compile-time model: {outcome.pick or 'none'}")
        _print_rejected(console, outcome.rejected)
    console.print(
        "compiled only; which one is fastest takes a GPU of this kind: the same command without --dry-run and --target"
    )


def _print_rejected(console: Console, rejected: dict[str, str]) -> None:
    for config, why in rejected.items():
        console.print(f"  no: {config}: {why}", style="dim")


def _export(path: Path, gpu: str | None, family: str, capability: str, entries: list) -> None:
    from orthrus_triton.autotune.files import merge_entries

    merge_entries(path, gpu, family, capability, entries)
    status_console.print(f"{path}: {len(entries)} configurations")


def _show(problems: Sequence[Problem] | None, device: str) -> None:
    from orthrus_triton.autotune.report import describe

    console = result_console(soft_wrap=True)  # a key's line stays whole for grep
    for row in describe(problems, resolve_device(device)):
        console.print(str(row))
