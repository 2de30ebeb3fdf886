"""`orthrus-triton evaluate`: what a view is worth on a file of prompts, as a table, as JSON and as a chart."""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from orthrus_triton.cli.common import (
    BlockSizeOption,
    DeviceOption,
    DtypeOption,
    ImplOption,
    Int8DraftsOption,
    Int8HeadOption,
    Int8RowsOption,
    Int8WeightsOption,
    TemplateOption,
    busy,
    one_line_errors,
    require_impl,
    resolve_device,
    resolve_dtype,
    result_console,
    status_console,
)
from orthrus_triton.cli.load import ModelOption, load_model

if TYPE_CHECKING:
    import torch

BASELINES = {"ar": "exact AR", "ar_one_row": "one-row AR (exact=False)"}


def evaluate(
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help='One prompt a line, or .jsonl with {"prompt", "domain", "chat"}; may be repeated.',
        ),
    ] = None,
    builtin: Annotated[
        int | None, typer.Option(metavar="N", help="Add N code tasks each from the docstrings of NumPy and pip.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --builtin: text files; N of their openings to continue.")
    ] = None,
    model: ModelOption = None,
    view: Annotated[
        str, typer.Option(help="Of the demo model: shipped, copy for an untrained one, or a view file.")
    ] = "shipped",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens per prompt, 2 at least.")] = 128,
    limit: Annotated[int | None, typer.Option(help="Take the first N prompts of each file only.")] = None,
    block_size: BlockSizeOption = None,
    int8_weights: Int8WeightsOption = False,
    int8_rows: Int8RowsOption = False,
    int8_head: Int8HeadOption = False,
    chat_template_kwargs: TemplateOption = None,
    int8_drafts: Int8DraftsOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    impl: ImplOption = "auto",
    check_exact: Annotated[
        bool, typer.Option("--check-exact/--no-check-exact", help="Decode in AR mode too and compare the token ids.")
    ] = True,
    baseline: Annotated[
        bool, typer.Option("--baseline/--no-baseline", help="Time the cheapest one-row AR decoding too.")
    ] = True,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the tokenizer's chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.json and chart.png (matplotlib) there.")
    ] = None,
) -> None:
    """Measure a view: tokens per cycle, TPF, acceptance, repetition, exactness and time against AR decoding.

    A text file called code, chat, prose or docs gives its prompts that domain. Ends with code 1 if an answer differs
    from the AR view's own; then no speed-up is given. The built-in prompts come from packages that the shipped
    view was not trained on.

    \b
    orthrus-triton evaluate --prompts questions.txt
    orthrus-triton evaluate --prompts examples/prompts/code.txt --prompts examples/prompts/prose.txt --output report
    orthrus-triton evaluate --builtin 20
    orthrus-triton evaluate --model ./orthrus --prompts questions.jsonl --json | tail -n 1
    """
    with one_line_errors():
        questions = _read(prompts or [], limit, raw, builtin, corpus)
        if output is not None:
            _prepare(output)
        where = resolve_device(device)
        precision = resolve_dtype(dtype, where)
        runs = require_impl(impl, where)
        if model is not None and view != "shipped":
            raise ValueError("--view is of the demo model, but --model was given: it has its own")
        network, tokenizer, name = load_model(
            model, precision, where, view=view, int8_weights=int8_weights, int8_rows=int8_rows, int8_head=int8_head,
            int8_drafts=int8_drafts, template=chat_template_kwargs,
        )  # fmt: skip
        from orthrus_triton.training.evaluate import evaluate as measure
        from orthrus_triton.training.prompts import encode

        encoded = [(prompt.domain, encode(tokenizer, prompt)) for prompt in questions]
        columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=status_console, transient=True) as progress:
            task = progress.add_task("", total=len(encoded))
            report = measure(
                network, encoded, max_new_tokens=max_new_tokens, block_size=block_size, impl=impl,
                check_exact=check_exact, baseline=baseline, on_answer=lambda: progress.advance(task),
            )  # fmt: skip
        report = {
            "model": name,
            "int8_weights": network.has_int8_weights,
            "int8_rows": network.rounds_rows,
            "int8_head": network.has_int8_head,
            "int8_drafts": int8_drafts,
            **_setting(where, precision, runs, prompts or []),
            **report,
        }
        if output is not None:
            _write(report, output)
    _print(report, status_console if as_json else result_console())
    if as_json:
        print(json.dumps(report))
    if report["exactness"] and report["exactness"]["different"]:
        raise typer.Exit(1)


def _read(files: list[Path], limit: int | None, raw: bool, builtin: int | None, corpus: Path | None) -> list[Any]:
    from dataclasses import replace

    from orthrus_triton.training.prompts import read_prompts

    for option, value in (("--limit", limit), ("--builtin", builtin)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be >= 1, but got {value}")
    if not files and builtin is None:
        raise ValueError("prompts must come from --prompts FILE or --builtin N, but neither was given")
    if corpus is not None and builtin is None:
        raise ValueError("--corpus goes with --builtin N, which was not given")
    questions = [prompt for file in files for prompt in read_prompts(file)[:limit]]
    if builtin is not None:
        from orthrus_triton.training.prompts_builtin import held_out_prompts

        with busy("Reading docstrings of installed packages"):
            questions += held_out_prompts(builtin, corpus=corpus)
    return [replace(prompt, chat=False) for prompt in questions] if raw else questions


def _prepare(folder: Path) -> None:
    """Fail before the measurement, not after it."""
    if find_spec("matplotlib") is None:
        raise ImportError("--output draws a chart and needs matplotlib, which is not installed: pip install matplotlib")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output must name a folder, but {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)


def _write(report: dict[str, Any], folder: Path) -> None:
    from orthrus_triton.training.chart import save_chart

    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    title = f"{report['model']}, {report['dtype']} on {report['hardware']}, block {report['block_size']}"
    save_chart(report, folder / "chart.png", title)
    status_console.print(f"wrote {folder / 'report.json'} and {folder / 'chart.png'}")


def _setting(where: torch.device, precision: torch.dtype, runs: str, files: list[Path]) -> dict[str, Any]:
    import torch

    hardware = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "prompt_files": [str(file) for file in files],
        "dtype": str(precision).removeprefix("torch."),
        "device": str(where),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "impl": runs,
        "torch": torch.__version__,
    }


def _print(report: dict[str, Any], console: Console) -> None:
    title = (
        f"{report['model']}, {report['dtype']} on {report['device']} ({report['impl']}), block {report['block_size']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("domain")
    for column in (
        "prompts", "tokens\n/cycle", "mean per\nquestion", "TPF", "mean per\nquestion", "repeated\n4-grams", "tokens/s"
    ):  # fmt: skip
        table.add_column(column, justify="right")
    rows = report["domains"] if len(report["domains"]) == 1 else {**report["domains"], "together": report}
    for name, row in rows.items():
        table.add_row(
            name, str(row["prompts"]), f"{row['tokens_per_cycle']:.2f}", f"{row['tokens_per_cycle_per_question']:.2f}",
            f"{row['tpf']:.2f}", f"{row['tpf_per_question']:.2f}", f"{row['repetition_share']:.0%}",
            f"{row['tokens_per_second']['consensus']:.1f}",
        )  # fmt: skip
    console.print(table)
    rates = " ".join(f"{rate:.2f}" for rate in report["acceptance_by_position"] if rate is not None)
    console.print(f"drafts accepted up to position 1, 2, ...: {rates}")
    for key, factor in report["speedup"].items():
        if factor is not None:
            console.print(
                f"{factor:.2f}x the tokens/s of {BASELINES[key]} ({report['tokens_per_second'][key]:.1f})",
            )
    exactness = report["exactness"]
    if exactness is None:
        console.print("exactness against AR decoding: not checked", style="dim")
    elif exactness["different"]:
        first = exactness["different"][0]
        console.print(
            f"AR decoding DIFFERS on {len(exactness['different'])} of {exactness['checked']} prompts, first on prompt "
            f"{first['prompt']} from generated token {first['token']} on: no speed-up is claimed",
            style="bold red",
        )
    else:
        console.print(f"AR decoding gave the same token ids on all {exactness['checked']} prompts.", style="bold green")
