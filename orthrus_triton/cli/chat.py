"""`orthrus-triton chat`: a conversation in the terminal. Turns go on from the cache of those before them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from orthrus_triton.cli.chat_view import BONUS, DRAFTED, ColourView, PlainView
from orthrus_triton.cli.common import (
    DeviceOption,
    DtypeOption,
    Int8HeadOption,
    Int8RowsOption,
    Int8WeightsOption,
    MinPOption,
    SeedOption,
    TemperatureOption,
    TemplateOption,
    TopKOption,
    TopPOption,
    fast_block,
    one_line_errors,
    require_impl,
    require_text,
    resolve_device,
    resolve_dtype,
    status_console,
)
from orthrus_triton.cli.load import load_model

if TYPE_CHECKING:
    from orthrus_triton.modules import ConsensusDecoder

HELP = "/clear begins anew, /exit or Ctrl-D ends."


def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder of an Orthrus model, or its hub id; without it, the demo model."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    chat_template_kwargs: TemplateOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a reply.")] = 512,
    max_len: Annotated[int, typer.Option(min=2, help="Most tokens of the whole conversation.")] = 4096,
    mode: Annotated[
        Literal["consensus", "ar"], typer.Option(help="Draft and verify, or plain autoregressive decoding.")
    ] = "consensus",
    int8_weights: Int8WeightsOption = False,
    int8_rows: Int8RowsOption = False,
    int8_head: Int8HeadOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="Text only; the default when stdout is no terminal.")] = False,
) -> None:
    """Talk with a model. Drafted tokens are cyan, bonus tokens yellow; figures show tokens per cycle and per second.

    \b
    orthrus-triton chat
    orthrus-triton chat ./orthrus --temperature 0.7 --top-p 0.9
    printf 'Hello!\\nAnd in French?\\n' | orthrus-triton chat --plain
    """
    with one_line_errors():
        from orthrus_triton.modules import ConsensusDecoder, SamplingParams

        if system is not None:
            require_text("--system", system)
        where = resolve_device(device)
        require_impl("auto", where)
        # out-of-range options are named before a model is loaded
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        network, tokenizer, name = load_model(
            model, resolve_dtype(dtype, where), where, int8_weights=int8_weights, int8_rows=int8_rows,
            int8_head=int8_head, template=chat_template_kwargs,
        )  # fmt: skip
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("MODEL must have a chat template: use orthrus-triton generate --raw")
        decoder = ConsensusDecoder(network, mode=mode, block_size=fast_block(None, where), max_cache_len=max_len)
        console = Console()
        plain = plain or not console.is_terminal
        if not plain:
            colours = f"[{DRAFTED}]drafted[/] and [{BONUS}]bonus[/] tokens"
            console.print(f"{escape(name)}, {mode}, {colours}. {HELP}", highlight=False)
        first = [] if system is None else [{"role": "system", "content": system}]
        messages = list(first)
        while (said := _read(console, plain)) is not None:
            if said == "/clear":
                messages = list(first)
            elif said:
                messages.append({"role": "user", "content": said})
                try:
                    reply = _reply(decoder, tokenizer, messages, max_new_tokens, params, console, plain)
                    messages.append({"role": "assistant", "content": reply})
                except KeyboardInterrupt:
                    messages.pop()
                    status_console.print("(interrupted: that turn is forgotten)", style="yellow")


def _read(console: Console, plain: bool) -> str | None:
    """The next thing said, stripped; None at the end."""
    try:
        line = sys.stdin.readline() if plain else console.input("[bold]> [/bold]") + "\n"
    except EOFError:
        return None
    return None if not line or line.strip() == "/exit" else require_text("what you say", line.strip())


def _reply(
    decoder: ConsensusDecoder, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int, params: Any,
    console: Console, plain: bool,
) -> str:  # fmt: skip
    """One turn, shown while it comes; what was said of it."""
    from orthrus_triton.training.prompts import chat_text

    text = chat_text(tokenizer, messages)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    room = decoder.max_cache_len - ids.shape[1] + 1
    if room < 1:
        raise ValueError(f"--max-len must exceed the conversation, which has {ids.shape[1]} tokens now")
    how = {"drafts": decoder.mode == "consensus", "stop_ids": decoder.model.eos_token_ids}
    view = PlainView(tokenizer, **how) if plain else ColourView(tokenizer, console, **how)
    try:
        decoder.generate(
            ids, max_new_tokens=min(max_new_tokens, room), streamer=view, params=[params], reuse_cache=True
        )
    finally:
        if isinstance(view, ColourView):
            view.close()
    return view.text
