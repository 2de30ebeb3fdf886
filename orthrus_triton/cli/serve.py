"""`orthrus-triton serve`: an OpenAI-compatible endpoint on this machine."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from typing import Annotated, Literal

import typer

from orthrus_triton.cli.common import (
    DeviceOption,
    DtypeOption,
    FastBlockOption,
    Int8DraftsOption,
    Int8HeadOption,
    Int8RowsOption,
    Int8WeightsOption,
    TemplateOption,
    fast_block,
    one_line_errors,
    require_impl,
    resolve_device,
    resolve_dtype,
    status_console,
)
from orthrus_triton.cli.load import DEMO_NAME, load_apart

CPU_CHUNK = 256  # prompt tokens that the others wait for between two cycles; larger chunks are hardly faster per token


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder of an Orthrus model, or its hub id; without it, the demo model."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Anything but loopback needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="ORTHRUS_API_KEY", help="Clients must send it as a bearer token.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in the API.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Sequences that decode at once.")] = 8,
    max_len: Annotated[int, typer.Option(min=2, help="Most tokens of prompt and output of one request.")] = 4096,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get status 429.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Larger requests get status 413.")] = 1 << 20,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Web page that may use it, such as http://localhost:3000; more than once for several, '*' for any."
        ),
    ] = None,
    sampling: Annotated[
        Literal["coupled", "rejection"], typer.Option(help="coupled: the tokens AR decoding of the same seed gives.")
    ] = "coupled",
    exact_prefill: Annotated[
        bool,
        typer.Option(
            "--exact-prefill/--fast-prefill",
            help="Read prompts with the decoder's own matrix products, so that a text never depends on what a cache "
            "already held of its prompt; or with the library's, which on a GPU take a sixth less time.",
        ),
    ] = True,
    block_size: FastBlockOption = None,
    int8_weights: Int8WeightsOption = False,
    int8_rows: Int8RowsOption = False,
    int8_head: Int8HeadOption = False,
    chat_template_kwargs: TemplateOption = None,
    int8_drafts: Int8DraftsOption = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    \b
    orthrus-triton serve ./orthrus
    ORTHRUS_API_KEY=... orthrus-triton serve ./orthrus --host 0.0.0.0 --slots 16
    """
    with one_line_errors():
        if api_key is not None and not api_key.strip():
            raise ValueError("--api-key must not be empty")
        if api_key is None and not _is_loopback(host):
            raise ValueError(f"--host {host} can be reached from other machines: set --api-key or ORTHRUS_API_KEY")
        try:
            import fastapi  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise ImportError(f"serve needs more: pip install 'orthrus-triton[serve]' ({error})") from error
        _require_free(host, port)
        where = resolve_device(device)
        require_impl("auto", where)
        precision, block_size = resolve_dtype(dtype, where), fast_block(block_size, where)
        from orthrus_triton.modules import ConsensusDecoder
        from orthrus_triton.serving import Scheduler
        from orthrus_triton.serving.app import create_app, require_origins
        from orthrus_triton.serving.server import Server

        require_origins(allow_origin or (), "--allow-origin")
        network, tokenizer, _ = load_apart(
            model, precision, where, int8_weights=int8_weights, int8_rows=int8_rows, int8_head=int8_head,
            int8_drafts=int8_drafts, template=chat_template_kwargs,
        )  # fmt: skip
        chunk = CPU_CHUNK if where.type == "cpu" else None
        decoder = ConsensusDecoder(
            network, block_size=block_size, batch_invariant_prefill=exact_prefill, prefill_chunk=chunk
        )
        scheduler = Scheduler(decoder, slots=slots, max_len=max_len, max_waiting=max_waiting, sampling=sampling)
        # the last part of a folder or hub id: clients need not know where it lies
        name = name or (DEMO_NAME if model is None else Path(model).resolve().name)
        app = create_app(
            scheduler, tokenizer, name, api_key=api_key, max_body_bytes=max_body_bytes, allow_origins=allow_origin or ()
        )
        place = f"[{host}]" if ":" in host else host
        status_console.print(f"{name} on http://{place}:{port}/v1, {slots} slots of {max_len} tokens")
        try:
            Server(app, scheduler, host, port).run()
        finally:
            scheduler.close()


def _require_free(host: str, port: int) -> None:
    """Raise an OSError before the model is loaded, rather than after."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        raise OSError(f"--host {host} --port {port}: {error.strerror or error}") from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
