"""`orthrus-triton distill-data`: the training data of a view, answers of the frozen model to prompts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from orthrus_triton.cli.common import (
    DeviceOption,
    DtypeOption,
    ImplOption,
    TemplateOption,
    busy,
    one_line_errors,
    parse_seconds,
    require_impl,
    resolve_device,
    resolve_dtype,
    status_console,
)
from orthrus_triton.cli.load import DEMO_NAME, load_demo, load_model


def distill_data(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for shards and manifest; an earlier run goes on.")
    ],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help='One prompt a line, or .jsonl with {"prompt", "domain", "chat"}; may be repeated.'
        ),
    ] = None,
    builtin: Annotated[
        bool, typer.Option("--builtin", help="Prompts from docstrings of installed packages, and from templates.")
    ] = False,
    corpus: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --builtin: WordNet's index.noun and text files to ask about, too."),
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="With --builtin: another package whose docstrings to read; may be repeated."),
    ] = None,
    phrasings: Annotated[int, typer.Option(help="With --builtin: phrasings of each task from a template.")] = 1,
    invent: Annotated[
        int | None,
        typer.Option(metavar="N", help="With --prompts-only: N messages of a user, which the model invents."),
    ] = None,
    beginnings: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --invent: how messages begin, one a line; else the model is free."),
    ] = None,
    domain: Annotated[str, typer.Option(help="With --invent: the domain of these prompts.")] = "chat",
    prompts_only: Annotated[
        bool, typer.Option("--prompts-only", help="Write the prompts to OUT, a .jsonl file for --prompts, and stop.")
    ] = False,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Prompts for evaluation, whose repeats are left out; may be repeated."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder of an Orthrus model, or its hub id; its AR view answers.",
            show_default=DEMO_NAME,
        ),
    ] = None,
    chat_template_kwargs: TemplateOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of an answer, or of what is invented.", show_default="192, with --invent 48"),
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer raw prompts are cut, longer chats left out.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Answers generated side by side.")] = 64,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard.")] = 256,
    budget: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Stop after 300s, 5m or 1h and keep the complete shards, or what is invented by then; none: no limit.",
        ),
    ] = "none",
    limit: Annotated[int | None, typer.Option(help="Take the first N prompts only.")] = None,
    seed: Annotated[int, typer.Option(help="Of --builtin's phrasings and order, or of what --invent gives.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    impl: ImplOption = "auto",
) -> None:
    """Let the frozen model answer prompts, as training data for its diffusion view.

    Rows are {"id", "domain", "prompt_ids", "answer_ids"}, in shards of jsonl. Stop it whenever you like: the same
    command goes on where it stopped. Where two tokens nearly tie, such a run may answer differently from an
    uninterrupted one.

    \b
    orthrus-triton distill-data ./data --prompts questions.txt
    orthrus-triton distill-data ./data --builtin --held-out examples/prompts/code.txt
    orthrus-triton distill-data ./data --model ./orthrus --prompts chats.jsonl --max-new-tokens 512
    orthrus-triton distill-data prompts.jsonl --builtin --package torch --phrasings 4 --prompts-only   # for elsewhere
    orthrus-triton distill-data prompts.jsonl --invent 10000 --prompts-only   # no corpus needed
    """  # fmt: skip
    with one_line_errors():
        from orthrus_triton.training.prompts import read_prompts, require_jsonl, write_prompts

        if prompts_only:
            require_jsonl(folder)
        elif folder.exists() and not folder.is_dir():
            raise ValueError(f"OUT must be a folder, but {folder} is a file (prompts go in by --prompts)")
        inventing = invent is not None
        if bool(prompts) + builtin + inventing != 1:
            raise ValueError("prompts must come from --prompts FILE, from --builtin or from --invent N, one of them")
        _require_companions("--builtin", builtin, corpus=corpus, package=package, phrasings=phrasings != 1)
        _require_companions("--invent", inventing, beginnings=beginnings, domain=domain != "chat")
        if inventing and not prompts_only:
            raise ValueError(
                "--invent must come with --prompts-only: a run that goes on needs the same prompts in a file"
            )
        for name, value in (
            ("--invent", invent), ("--limit", limit), ("--max-new-tokens", max_new_tokens),
            ("--max-prompt-tokens", max_prompt_tokens), ("--batch-size", batch_size), ("--shard-rows", shard_rows),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, but got {value}")
        if max_new_tokens is None:
            max_new_tokens = 48 if inventing else 192
        seconds = parse_seconds(budget)
        if prompts_only and chat_template_kwargs:
            raise ValueError("--chat-template-kwargs is for answers, but --prompts-only has none")
        if prompts_only and seconds is not None and not inventing:
            raise ValueError(f"--budget is for answers and for --invent, but --prompts-only has neither; got {budget}")
        # before anything that takes long
        reserved = [prompt for file in held_out or [] for prompt in read_prompts(file)]
        starts = [""] if beginnings is None else [prompt.text for prompt in read_prompts(beginnings)]
        network, tokenizer, stopped = None, None, False
        if inventing or not prompts_only:
            where = resolve_device(device)
            precision = resolve_dtype(dtype, where)
            require_impl(impl, where)
            # the demo model's own view is not used, so an untrained one does
            network, tokenizer, _ = (
                load_demo("copy", precision, where) if model is None else load_model(model, precision, where)
            )
            if chat_template_kwargs:
                from orthrus_triton.models.chat_template import set_template_options

                set_template_options(tokenizer, chat_template_kwargs)
        if inventing:
            questions, stopped = _invent(
                network, tokenizer, invent, beginnings=starts, domain=domain, max_new_tokens=max_new_tokens,
                batch_size=batch_size, seed=seed, impl=impl, seconds=seconds,
            )  # fmt: skip
            if stopped and folder.exists():  # it may be a whole run's
                status_console.print(f"{folder} was there before and stays as it is")
                raise typer.Exit(130)
        else:
            questions = _gather(prompts, builtin, corpus, package or [], phrasings, seed)
        questions = _without_repeats(questions, reserved)[:limit]
        if prompts_only:
            write_prompts(questions, folder)
            status_console.print(f"{folder}: {len(questions)} prompts")
            if stopped:
                raise typer.Exit(130)
            return
        from orthrus_triton.training.distill import distill

        columns = (
            TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=status_console) as progress:
            meter = _Meter(progress)
            try:
                manifest = distill(
                    network, tokenizer, questions, folder, max_new_tokens=max_new_tokens, impl=impl,
                    max_prompt_tokens=max_prompt_tokens, batch_size=batch_size, shard_rows=shard_rows, seconds=seconds,
                    on_row=meter.row, on_plan=meter.plan,
                )  # fmt: skip
            except KeyboardInterrupt:
                progress.stop()
                typer.echo(f"stopped; {meter.rows} new answers are kept in {folder}: run it again to go on", err=True)
                raise typer.Exit(130) from None
    status_console.print(
        f"{folder}: {manifest['finished_rows']} rows, {manifest['answer_tokens']} answer tokens, "
        f"{manifest['domains']}, {manifest['left_out']} prompts left out as too long"
        + ("" if manifest["complete"] else "; not all shards are complete: run it again to go on"),
    )


class _Meter:
    """Rows and tokens per second of this run on a progress bar."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.rows, self.tokens = progress, 0, 0
        self.task = progress.add_task("", total=None, rate="")
        self.started = time.perf_counter()

    def plan(self, done: int, total: int) -> None:
        self.started = time.perf_counter()
        self.progress.update(self.task, completed=done, total=total)

    def row(self, tokens: int) -> None:
        self.rows, self.tokens = self.rows + 1, self.tokens + tokens
        rate = self.tokens / (time.perf_counter() - self.started)
        self.progress.update(self.task, advance=1, rate=f"{rate:.0f} tokens/s")


def _require_companions(owner: str, given: bool, **others: object) -> None:
    """Raise a ValueError if an option was given that means nothing without `owner`."""
    if not given and any(others.values()):
        names = " and ".join(f"--{name}" for name in others)
        raise ValueError(f"{names} must come with {owner}, but it was not given")


def _invent(network: Any, tokenizer: Any, count: int, **options: Any) -> tuple[list[Any], bool]:
    """The messages found, fewer than `count` where Ctrl-C or the budget was first; and whether it was Ctrl-C."""
    from orthrus_triton.training.invent import invent

    found, stopped = [], False
    columns = (TextColumn("inventing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=status_console) as progress:
        task = progress.add_task("", total=count)

        def keep(prompt: Any) -> None:
            found.append(prompt)
            progress.advance(task)

        try:
            invent(network, tokenizer, count, on_prompt=keep, **options)
        except KeyboardInterrupt:
            stopped = True
    if not found and not stopped:
        raise ValueError("--budget must leave time to find a message, but none was found by then")
    if len(found) < count:
        why = "stopped" if stopped else "the budget is spent"
        status_console.print(f"{why}; {len(found)} of {count} messages were found")
    if not found:  # OUT stays as it is
        raise typer.Exit(130)
    return found, stopped


def _gather(
    files: list[Path] | None, builtin: bool, corpus: Path | None, packages: list[str], phrasings: int, seed: int
) -> list[Any]:
    from orthrus_triton.training.prompts import read_prompts

    if builtin:
        from orthrus_triton.training.prompts_builtin import builtin_prompts

        with busy("Reading docstrings of installed packages"):
            return builtin_prompts(seed, corpus, packages, phrasings)
    return [prompt for file in files or [] for prompt in read_prompts(file)]


def _without_repeats(questions: list[Any], reserved: list[Any]) -> list[Any]:
    from orthrus_triton.training.overlap import find_overlaps

    if not reserved:
        return questions
    texts, held_out = ([prompt.text for prompt in prompts] for prompts in (questions, reserved))
    repeats = {overlap.training for overlap in find_overlaps(held_out, texts)}
    status_console.print(f"{len(repeats)} prompts repeat held-out ones and are left out")
    questions = [prompt for n, prompt in enumerate(questions) if n not in repeats]
    if not questions:
        raise ValueError("--held-out must leave some prompts, but it covers all of them")
    return questions
