"""`orthrus-triton verify`: every prompt through the dual-view cycle and through AR decoding; the tokens must be equal.
Where they are not: the first divergent position, both tokens, and how close the call was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from orthrus_triton.cli.common import (
    BlockSizeOption,
    DeviceOption,
    DtypeOption,
    ImplOption,
    Int8HeadOption,
    Int8RowsOption,
    Int8WeightsOption,
    TemplateOption,
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

    from orthrus_triton.modules.decode_options import BlockSize
    from orthrus_triton.modules.dual_view_model import DualViewModel


@dataclass(frozen=True)
class Divergence:
    """Where the two modes part: a line of the prompt file (from 1), a generated token (from 0), what each mode said
    there (None: it had ended), and the AR view's highest logit minus its second highest."""

    line: int
    position: int
    consensus_token: int | None
    ar_token: int | None
    margin: float


def verify(
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help='One prompt a line, or .jsonl with {"prompt", "domain", "chat"}.')
    ],
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate per prompt.")] = 128,
    block_size: BlockSizeOption = None,
    int8_weights: Int8WeightsOption = False,
    int8_rows: Int8RowsOption = False,
    int8_head: Int8HeadOption = False,
    chat_template_kwargs: TemplateOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    impl: ImplOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Prompts that decode side by side.")] = 8,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="Apply the chat template or not; by default as the file says, else if there is one."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Check on this machine that the dual-view cycle gives the tokens of plain AR decoding, prompt by prompt.

    Ends with code 0 if all prompts agree, with 1 if one does not.

    \b
    orthrus-triton verify --prompts prompts.txt
    orthrus-triton verify --model ./orthrus --prompts prompts.txt --dtype bf16 --max-new-tokens 256
    orthrus-triton verify --model ./orthrus --prompts prompts.txt --json > result.json
    """
    with one_line_errors():
        import torch

        from orthrus_triton.training.prompts import encode, read_prompts

        questions = read_prompts(prompts)
        if chat is not None:
            questions = [replace(question, chat=chat) for question in questions]
        for option, value in (("--batch-size", batch_size), ("--max-new-tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"{option} must be >= 1, but got {value}")
        where = resolve_device(device)
        precision = resolve_dtype(dtype, where)
        runs = require_impl(impl, where)
        network, tokenizer, name = load_model(
            model, precision, where, int8_weights=int8_weights, int8_rows=int8_rows, int8_head=int8_head,
            template=chat_template_kwargs,
        )  # fmt: skip
        ids = {question.line: torch.tensor(encode(tokenizer, question)) for question in questions}
        found, tokens = _compare(network, ids, max_new_tokens, block_size, impl, batch_size)
    result = {
        "model": name, "prompts": len(ids), "identical": len(ids) - len(found), "tokens": tokens,
        "max_new_tokens": max_new_tokens, "block_size": block_size or network.block_size,
        "dtype": str(precision).removeprefix("torch."), "device": str(where), "impl": runs,
    }  # fmt: skip
    if as_json:
        print(json.dumps(result | {"divergences": [asdict(divergence) for divergence in found]}))
    else:
        _print(result, found, tokenizer)
    if found:
        raise typer.Exit(1)


def _compare(
    network: DualViewModel, ids: dict[int, torch.Tensor], max_new_tokens: int, block_size: BlockSize | None, impl: str,
    batch_size: int,
) -> tuple[list[Divergence], int]:  # fmt: skip
    """Divergences, and how many tokens AR decoding generated in all."""
    from orthrus_triton.modules import ConsensusDecoder, first_difference
    from orthrus_triton.modules.prompts import tokens_to_cache

    # one cache for all batches: graphs captured over it serve to the end
    longest = max(prompt.numel() for prompt in ids.values())
    options = {"block_size": block_size, "impl": impl, "max_cache_len": tokens_to_cache(longest, max_new_tokens)}
    consensus, ar = (ConsensusDecoder(network, mode=mode, **options) for mode in ("consensus", "ar"))
    found, tokens, lines = [], 0, list(ids)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=status_console, transient=True) as progress:
        bar = progress.add_task("prompts, both modes", total=len(lines))
        for start in range(0, len(lines), batch_size):
            batch = lines[start : start + batch_size]
            prompts = [ids[line] for line in batch]
            answers, expected = (
                [sequence[len(prompt) :].tolist() for sequence, prompt in zip(output.sequences, prompts)]
                for output in (decoder.generate(prompts, max_new_tokens=max_new_tokens) for decoder in (consensus, ar))
            )
            for line, prompt, ours, theirs in zip(batch, prompts, answers, expected):
                tokens += len(theirs)
                if (position := first_difference(ours, theirs)) is not None:
                    margin = _top2_margin(network, prompt, prompt.new_tensor(theirs[:position]), impl)
                    parted = (said[position] if position < len(said) else None for said in (ours, theirs))
                    found.append(Divergence(line, position, *parted, margin))
            progress.advance(bar, len(batch))
    return found, tokens


def _top2_margin(network: DualViewModel, prompt: torch.Tensor, agreed: torch.Tensor, impl: str) -> float:
    """Highest minus second highest AR logit after the prompt and the tokens both modes agree on."""
    import torch

    sequence = torch.cat((prompt, agreed))[None]
    with torch.no_grad():
        cache = network.new_cache(1, sequence.shape[1], network.block_size)
        cache.prompt_len.fill_(prompt.numel())
        view_pass = cache.view_pass("ar", sequence.shape[1], impl=impl)
        hidden = network.forward_view(sequence.to(cache.context_len.device), cache, view_pass)
        first, second = network.compute_logits(hidden[:, -1:], impl).flatten().topk(2).values.tolist()
    return first - second


def _print(result: dict[str, Any], found: list[Divergence], tokenizer: Any) -> None:
    def name(token: int | None) -> str:
        return "its end" if token is None else f"{token} {tokenizer.decode([token])!r}"

    console = result_console(soft_wrap=True)
    for divergence in found:
        console.print(
            f"line {divergence.line}: DIFFERS from generated token {divergence.position} on: "
            f"dual-view {name(divergence.consensus_token)}, AR {name(divergence.ar_token)}; "
            f"top-2 margin of the AR logits there {divergence.margin:.3g}",
            style="red",
        )
    console.print(
        f"{result['identical']} of {result['prompts']} prompts identical ({result['tokens']} tokens); "
        f"{result['model']}, {result['dtype']} on {result['device']} ({result['impl']}), "
        f"block {result['block_size']}",
        style="bold red" if found else "bold green",
    )
