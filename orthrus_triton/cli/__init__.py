"""The `orthrus-triton` command. torch and transformers are imported inside the commands, so that --help is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from orthrus_triton import __version__
from orthrus_triton.cli import (
    autotune,
    chat,
    convert,
    demo,
    distill_data,
    doctor,
    evaluate,
    export_view,
    generate,
    serve,
    train,
    verify,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="orthrus-triton",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(convert.convert)
app.command()(distill_data.distill_data)
app.command()(evaluate.evaluate)
app.command()(train.train)
app.command()(export_view.export_view)
app.command()(verify.verify)
app.command()(autotune.autotune)
app.command()(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Lossless parallel decoding: a diffusion view drafts a block, the frozen model verifies it.

    The text is the frozen model's own, token for token; only the number of passes changes.

    \b
    orthrus-triton demo                           see it work, no GPU needed
    orthrus-triton convert ./base ./orthrus       give a base model a second view
    orthrus-triton generate ./orthrus "Once upon" decode with it
    orthrus-triton chat ./orthrus                 talk with it
    orthrus-triton serve ./orthrus                answer HTTP requests, as OpenAI's API does
    orthrus-triton distill-data OUT --builtin     write training data with the frozen model
    orthrus-triton evaluate --prompts FILE        measure acceptance, speed and exactness
    orthrus-triton verify --prompts FILE          check that both modes give the same tokens
    orthrus-triton autotune --model ./orthrus     tune the kernels to this GPU
    orthrus-triton doctor                         what runs where, and why
    """


def main() -> None:
    """Console script. Bad input ends with code 2 and one line, Ctrl-C with 130."""
    app()
