"""`orthrus-triton convert`: a base model, or a GGUF file of the demo model, to an Orthrus folder with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orthrus_triton.cli.common import busy, one_line_errors, resolve_dtype, status_console
from orthrus_triton.cli.load import load_tokenizer

if TYPE_CHECKING:
    from orthrus_triton.models import OrthrusForCausalLM


def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Base model: a folder, a hub id, or a .gguf file.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write: config, safetensors, tokenizer.")],
    block_size: Annotated[int, typer.Option(help="Rows of a draft block, anchor included.")] = 32,
    mask_token_id: Annotated[
        int | None, typer.Option(help="Token that stands for a position to be drafted; by default an unused one.")
    ] = None,
    view_rank: Annotated[
        int | None, typer.Option(help="Store the diffusion view as rank-r deltas; by default full matrices.")
    ] = None,
    dtype: Annotated[Literal["keep", "bf16", "fp16", "fp32"], typer.Option(help="keep: the source's own.")] = "keep",
    force: Annotated[bool, typer.Option("--force", help="Replace the model in a TARGET that is not empty.")] = False,
) -> None:
    """Give a frozen base model a diffusion view that starts as a copy of its AR weights. Llama, Mistral, Phi-3, Qwen2,
    Qwen3, SmolLM3, Gemma and Gemma 3, Granite, OLMo 2 and 3, EXAONE 4, ERNIE 4.5, GLM and Seed-OSS can be one: what
    counts is the model_type in its config.json. Of a model that sees images, too, the language model is taken.

    The AR weights are stored unchanged (Granite's last norm divided by a power of two), or rounded to --dtype. The
    view drafts poorly until it is trained.

    \b
    orthrus-triton convert ./Qwen3-0.6B ./orthrus-0.6b
    orthrus-triton convert ./Qwen3-0.6B ./light --view-rank 64 --dtype bf16
    orthrus-triton convert SmolLM2-135M.Q4_1.gguf ./smollm2 --block-size 8
    """
    with one_line_errors():
        _require_free(target, source, force)
        import torch

        precision = None if dtype == "keep" else resolve_dtype(dtype, torch.device("cpu"))
        with busy(f"Reading {source}"):
            from orthrus_triton.models import OrthrusForCausalLM

            base, tokenizer, mask = _open_gguf(source) if source.endswith(".gguf") else (source, None, None)
            model = OrthrusForCausalLM.from_base(
                base,
                block_size=block_size,
                mask_token_id=mask if mask_token_id is None else mask_token_id,
                view_rank=view_rank,
                dtype=precision,
            )
            tokenizer = tokenizer or load_tokenizer(source)
        with busy(f"Writing {target}"):
            model.save_pretrained(target, tokenizer=tokenizer)
        status_console.print(_summary(model, target))


def _require_free(target: Path, source: str, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"TARGET must be a folder, but {target} is a file")
    if Path(source).exists() and Path(source).resolve() == target.resolve():
        raise ValueError(f"TARGET must not be SOURCE: {target}")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ValueError(f"TARGET {target} is not empty: name another folder, or --force to replace the model in it")


def _open_gguf(source: str) -> tuple[Any, Any, int | None]:
    """The base model, its tokenizer, and a mask token if it is one of SmolLM2's: the file does not name any."""
    from transformers.utils.logging import disable_progress_bar

    from orthrus_triton.models.demo import DEMO_MASK_TOKEN
    from orthrus_triton.models.gguf import open_gguf

    disable_progress_bar()
    model, tokenizer = open_gguf(source)
    return model, tokenizer, tokenizer.get_vocab().get(DEMO_MASK_TOKEN)


def _summary(model: OrthrusForCausalLM, target: Path) -> str:
    parameters = dict(model.named_parameters())
    view = sum(tensor.numel() for name, tensor in parameters.items() if "_diff" in name)
    total = sum(tensor.numel() for tensor in parameters.values())
    return (
        f"{target}: {total / 1e6:.1f} M parameters, {view / 1e6:.1f} M of them the diffusion view, "
        f"block {model.block_size}, mask token {model.mask_token_id}"
    )
