"""The model a command works on: a folder or hub id with its tokenizer, or the demo model with its shipped view."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus_triton.cli.common import busy, status_console

if TYPE_CHECKING:
    import torch

    from orthrus_triton.models import OrthrusForCausalLM

DEMO_NAME = "SmolLM2-135M-Instruct"
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="MODEL", help="Folder of an Orthrus model, or its hub id.",
        show_default=f"{DEMO_NAME} with the shipped view",
    ),
]  # fmt: skip


def load_demo(
    view: str, dtype: torch.dtype, device: torch.device, block_size: int | None = None
) -> tuple[OrthrusForCausalLM, Any, str]:
    """The demo model with "shipped", "copy" or a view file; its tokenizer; and a name that says which it got."""
    with busy(f"Loading {DEMO_NAME}"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        from orthrus_triton.models.demo import SHIPPED_VIEW, load_demo_model, resolve_demo_view

        view_file = resolve_demo_view(view)
        model, tokenizer = load_demo_model(dtype=dtype, block_size=block_size, device=device, view=view_file or "copy")
    for warning in caught:
        status_console.print(f"note: {warning.message}", style="yellow")
    if view_file is None:
        return model, tokenizer, f"{DEMO_NAME}, untrained copy"
    return model, tokenizer, f"{DEMO_NAME}, {'shipped view' if view_file == SHIPPED_VIEW else view_file.name}"


def load_model(
    name: str | None, dtype: torch.dtype, device: torch.device, *, view: str = "shipped", int8_weights: bool = False,
    int8_rows: bool = False, int8_head: bool = False, int8_drafts: bool = False, template: dict[str, Any] | None = None,
) -> tuple[OrthrusForCausalLM, Any, str]:  # fmt: skip
    """Model, tokenizer and a name for reports; the demo model with `view` where `name` is None. With `int8_weights`,
    its layers' matrices are in int8, with `int8_head` also the LM head, with `int8_rows` also what CPUs multiply them
    with; with `int8_drafts`, its drafts come from int8 copies; `template` are options of the chat template.

    Raises:
        ValueError, OSError: it cannot be had; see `OrthrusForCausalLM.from_pretrained`.
    """
    import torch

    int8_weights = int8_weights or int8_rows or int8_head
    first = torch.device("cpu") if int8_weights else device  # a GPU's memory may hold no more than the int8 weights
    model, tokenizer, name = load_demo(view, dtype, first) if name is None else _load_folder(name, dtype, first)
    if int8_weights:
        with busy("Turning weights to int8"):
            model.quantize_weights(int8_rows or None, int8_head)
            model.to(device)
    if model.has_int8_weights:
        parts = ["weights", *["LM head"] * model.has_int8_head, *["rows"] * model.rounds_rows]
        name = f"{name}, {' and '.join(parts)} in int8"
    if int8_drafts:
        model.quantize_drafts()
    if template:
        from orthrus_triton.models.chat_template import set_template_options

        set_template_options(tokenizer, template)
    return model, tokenizer, name


def load_apart(
    name: str | None, dtype: torch.dtype, device: torch.device, **options: Any
) -> tuple[OrthrusForCausalLM, Any, str]:
    """`load_model` in a thread that ends with it, for a server's main thread must not compute (see `run_apart`)."""
    from orthrus_triton.serving.apart import run_apart

    try:
        loaded = run_apart(lambda: load_model(name, dtype, device, **options))
        gc.collect()
        gc.freeze()  # all of this stays; to look through it in the middle of a request would take 0.2 s
        return loaded
    except KeyboardInterrupt:  # the other thread hid the cursor, and ends with the process
        status_console.show_cursor()
        raise


def _load_folder(name: str, dtype: torch.dtype, device: torch.device) -> tuple[OrthrusForCausalLM, Any, str]:
    with busy(f"Loading {name}"):
        from orthrus_triton.models import OrthrusForCausalLM

        model = OrthrusForCausalLM.from_pretrained(name, dtype=dtype, device=device)
        return model, load_tokenizer(name), name


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a model's folder, or of its hub id.

    Raises:
        ValueError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _chat_template_apart(name)
        return tokenizer
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} must have a tokenizer that transformers can read, but: {error}") from error


def _chat_template_apart(name: str) -> str | None:
    """The chat template that models that see images, too, have in a file of its own, which no tokenizer reads."""
    from huggingface_hub import try_to_load_from_cache

    from orthrus_triton.models.checkpoint import read_json

    path = Path(name, "chat_template.json")
    if not Path(name).is_dir():  # whoever has the weights from the hub has it, too
        cached = try_to_load_from_cache(name, path.name)
        path = Path(cached) if isinstance(cached, str) else path
    return read_json(path).get("chat_template") if path.is_file() else None
