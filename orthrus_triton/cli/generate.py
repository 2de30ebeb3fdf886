"""`orthrus-triton generate`: text from an Orthrus model, streamed to stdout; what it cost, to stderr or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orthrus_triton.cli.common import (
    DeviceOption,
    DtypeOption,
    FastBlockOption,
    ImplOption,
    Int8DraftsOption,
    Int8HeadOption,
    Int8RowsOption,
    Int8WeightsOption,
    MinPOption,
    SeedOption,
    TemperatureOption,
    TemplateOption,
    TopKOption,
    TopPOption,
    encode_prompt,
    fast_block,
    one_line_errors,
    require_impl,
    require_text,
    resolve_device,
    resolve_dtype,
    text_streamer,
)
from orthrus_triton.cli.load import load_model

if TYPE_CHECKING:
    from orthrus_triton.modules import DecodeStats


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of an Orthrus model (see convert), or its hub id.")
    ],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; without it, stdin is read.")
    ] = None,
    mode: Annotated[
        Literal["consensus", "ar"], typer.Option(help="Draft and verify, or plain autoregressive decoding.")
    ] = "consensus",
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = 0,
    block_size: FastBlockOption = None,
    int8_weights: Int8WeightsOption = False,
    int8_rows: Int8RowsOption = False,
    int8_head: Int8HeadOption = False,
    int8_drafts: Int8DraftsOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    impl: ImplOption = "auto",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Apply the tokenizer's chat template or not; by default, if it has one."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of a chat.")] = None,
    chat_template_kwargs: TemplateOption = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A JSON schema; the text will be JSON of it. Say so in PROMPT, too."),
    ] = None,
    stats: Annotated[
        Literal["text", "json", "none"],
        typer.Option(help="text: one line on stderr. json: one object as the last line of stdout."),
    ] = "text",
) -> None:
    """Generate from an Orthrus model, greedily unless a temperature is given; the text streams to stdout.

    \b
    orthrus-triton generate ./orthrus "Write a haiku about rain."
    orthrus-triton generate ./orthrus --raw "def fibonacci(n):"
    orthrus-triton generate ./orthrus < question.txt > answer.txt
    orthrus-triton generate ./orthrus "Hello" --stats json | tail -n 1
    orthrus-triton generate ./orthrus "Hello" --mode ar    # the same text, sampled or not
    orthrus-triton generate ./orthrus "Hello" --temperature 0.7 --top-p 0.9 --seed 1
    orthrus-triton generate ./orthrus "Invent a person, in JSON." --json-schema person.json
    """
    with one_line_errors():
        prompt = _read_prompt(prompt)
        where = resolve_device(device)
        precision = resolve_dtype(dtype, where)
        runs = require_impl(impl, where)
        block_size = fast_block(block_size, where)
        from orthrus_triton.modules import ConsensusDecoder, NonFiniteLogitsError, SamplingParams

        # out-of-range options are named before a model is loaded
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        schema = None if json_schema is None else _read_schema(json_schema)
        network, tokenizer, _ = load_model(
            model, precision, where, int8_weights=int8_weights, int8_rows=int8_rows, int8_head=int8_head,
            int8_drafts=int8_drafts and mode == "consensus",
        )  # fmt: skip
        input_ids = encode_prompt(tokenizer, prompt, chat, system, chat_template_kwargs)
        if schema is not None:
            from orthrus_triton.models.grammar import Grammars

            grammars = Grammars(tokenizer, network.vocab_size, network.eos_token_ids)
            params = replace(params, logits_processor=grammars.of_schema(schema, input_ids.shape[1]))
        decoder = ConsensusDecoder(network, mode=mode, block_size=block_size, impl=impl)
        try:
            output = decoder.generate(
                input_ids, max_new_tokens=max_new_tokens, streamer=text_streamer(tokenizer), params=[params]
            )
        except NonFiniteLogitsError as error:
            why = getattr(params.logits_processor, "error", "")
            raise ValueError(
                f"--json-schema {json_schema} is too much for the parser: {why}" if why else error
            ) from error
        report = {
            "mode": mode,
            "prompt_tokens": input_ids.shape[1],
            **asdict(output.stats),
            "tokens_per_second": output.stats.tokens_per_second,
            "stopped_by": "eos" if int(output.sequences[0][-1]) in network.eos_token_ids else "length",
            "block_size": (block_size or decoder.block_size) if mode == "consensus" else 1,
            "dtype": str(precision).removeprefix("torch."),
            "int8_weights": network.has_int8_weights,
            "int8_rows": network.rounds_rows,
            "int8_head": network.has_int8_head,
            "device": str(where),
            "impl": runs,
        }
        if stats == "json":
            print(json.dumps(report))
        elif stats == "text":
            typer.echo(_stats_line(output.stats, report), err=True)


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if sys.stdin.isatty():
        raise ValueError("PROMPT must be given after MODEL, or piped to stdin")
    return require_text("stdin", sys.stdin.read().removesuffix("\n"))


def _read_schema(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"--json-schema {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one of the first
        raise ValueError(f"--json-schema {path} must be a JSON file, but {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"--json-schema {path} must hold a JSON object, but holds a {type(schema).__name__}")
    return schema


def _stats_line(stats: DecodeStats, report: dict[str, Any]) -> str:
    return (
        f"{stats.tokens} tokens in {stats.prefill_seconds + stats.decode_seconds:.2f} s "
        f"({stats.tokens_per_second:.1f} tokens/s, prefill included); {stats.cycles} cycles of "
        f"{stats.tokens_per_cycle:.2f} tokens, TPF {stats.tpf:.2f}; {report['mode']}, block {report['block_size']}, "
        f"{report['dtype']} on {report['device']} ({report['impl']}), stopped by {report['stopped_by']}"
    )
