"""`orthrus-triton export-view`: the trained view of a model or of a training checkpoint as one small file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orthrus_triton.cli.common import busy, one_line_errors, status_console

if TYPE_CHECKING:
    from orthrus_triton.models import OrthrusForCausalLM


def export_view(
    source: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder of a trained Orthrus model, or a checkpoint of a training run."),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The .safetensors file to write.")],
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Of a checkpoint: the model its training began with.", show_default="the demo model"
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Keep the best rank-r approximation of each delta; by default all of it.")
    ] = None,
    storage: Annotated[
        Literal["int8", "fp16", "bf16"], typer.Option(help="How deltas are stored; int8 has one scale per row.")
    ] = "int8",
    block_size: Annotated[
        int | None,
        typer.Option(help="Rows of its draft blocks, by default and at most those it was trained with."),
    ] = None,
    max_mb: Annotated[float, typer.Option(help="Refuse to write a larger file.")] = 30.0,
) -> None:
    """Write a trained diffusion view as a delta to its frozen AR weights; it loads over the same base only.

    \b
    orthrus-triton export-view ./trained view.safetensors
    orthrus-triton export-view ./trained view.safetensors --rank 64 --storage fp16
    orthrus-triton export-view ./run/checkpoint-3000 view.safetensors --block-size 8
    orthrus-triton export-view ./run/checkpoint-3000 view.safetensors --base ./orthrus-model
    orthrus-triton demo --view view.safetensors
    """
    with one_line_errors():
        if target.suffix != ".safetensors":
            raise ValueError(f"OUT must end in .safetensors, but got {str(target)!r}")
        with busy(f"Reading {source}"):
            from orthrus_triton.models.view import save_view

            model = read_trained(source, block_size, base)
        with busy(f"Writing {target}"):
            size = save_view(model, target, rank=rank, storage=storage, max_bytes=int(max_mb * 1e6))
        kept = "full rank" if rank is None else f"rank {rank}"
        status_console.print(f"{target}: {size / 1e6:.2f} MB, {kept}, {storage}")


def read_trained(source: Path, block_size: int | None = None, base: Path | None = None) -> OrthrusForCausalLM:
    """A trained model's folder, or a checkpoint over the model that its training began with, in fp32.

    Args:
        source: either.
        block_size: of the model that is returned, by default the one it was trained with.
        base: of a checkpoint: folder of the Orthrus model its training began with, by default the demo model.

    Raises:
        FileNotFoundError: it is neither. ValueError: a block size that is missing, or larger than the view's own; a
            base of another shape, or beside a model that has its own.
    """
    import torch

    from orthrus_triton.models import OrthrusForCausalLM
    from orthrus_triton.models.demo import load_demo_model
    from orthrus_triton.models.view_checkpoint import adopt_form, load_checkpoint_view, read_checkpoint_metadata

    if (source / "config.json").is_file():
        if base is not None:
            raise ValueError(f"--base is for checkpoints, but {source} is a model with a base of its own")
        model = OrthrusForCausalLM.from_pretrained(source, dtype=torch.float32)
        model.config.block_size = _at_most(model.block_size, block_size)
        return model
    weights = source / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"MODEL must be a folder with model.safetensors, but {source} has none")
    about = read_checkpoint_metadata(weights)
    if "block_size" in about:
        block_size = _at_most(about["block_size"], block_size)
    if block_size is None:
        raise ValueError(f"--block-size must be given, for {source} does not name its own")
    if base is None:
        model, _ = load_demo_model(block_size=block_size, view="copy", mask_embedding=about["mask_embedding"])
    elif not base.is_dir():
        raise FileNotFoundError(f"--base must be the folder of an Orthrus model, but {base} is none")
    else:
        model = OrthrusForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.config.block_size = block_size
        if about["mask_embedding"]:
            model.add_mask_embedding()
    adopt_form(model, about)
    try:
        load_checkpoint_view(model, weights)
    except ValueError as error:
        raise ValueError(f"{error}: is it of another model than {base or 'the demo model'}? See --base") from error
    return model


def _at_most(of_model: int, asked: int | None) -> int:
    if asked is not None and not 2 <= asked <= of_model:
        raise ValueError(f"--block-size must be at least 2 and at most the view's own {of_model}, but got {asked}")
    return asked or of_model
