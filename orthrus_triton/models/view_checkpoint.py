"""The view inside a training checkpoint: its `_diff` weights as they are, and what the file says about them."""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

import torch

from orthrus_triton.models.checkpoint import open_safetensors
from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.models.view import base_metadata, require_base

ABOUT = ("block_size", "anchor_view", "chain_width", "mask_token_id")


def checkpoint_metadata(model: OrthrusForCausalLM, block_size: int) -> dict[str, str]:
    """What a training checkpoint's safetensors file says about the view it holds, and of the base under it."""
    about = (block_size, model.config.anchor_view, model.config.chain_width, model.mask_token_id)
    named = {name: json.dumps(value) for name, value in zip(ABOUT, about)}
    return {"format": "pt"} | named | base_metadata(model.state_dict())


def read_checkpoint_metadata(path: str | PathLike[str]) -> dict[str, Any]:
    """block_size, anchor_view, chain_width and mask_token_id of a training checkpoint, as far as its file names them,
    and whether it holds a mask_embedding.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not a complete safetensors file.
    """
    with open_safetensors(path) as file:
        found = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in ABOUT}
        return found | {"mask_embedding": any(name.endswith("mask_embedding_diff") for name in file.keys())}


@torch.no_grad()
def load_checkpoint_view(model: OrthrusForCausalLM, path: str | PathLike[str]) -> None:
    """Put the `_diff` weights of a training checkpoint, which holds nothing else, into `model`.

    Args:
        path: its safetensors file; names may have a prefix before "model.".

    Raises:
        FileNotFoundError: there is no such file. ValueError: its names or shapes are not those of this model's view,
            it was trained for another anchor_view or mask token or over other base weights, or the model's weights are
            in int8.
    """
    model.require_float_weights("load_checkpoint_view")
    about = read_checkpoint_metadata(path)
    for name in ("anchor_view", "mask_token_id"):
        own = getattr(model.config, name)
        if about.get(name, own) != own:
            raise ValueError(f"{str(path)!r} was trained with {name}={about[name]!r}, not {own!r}")
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        stored = {name[max(name.find("model."), 0) :]: file.get_tensor(name) for name in file.keys()}
    needed = {name: tensor for name, tensor in model.state_dict().items() if "_diff" in name}
    for name in sorted({*needed, *stored}):
        found, expected = (tuple(t[name].shape) if name in t else None for t in (stored, needed))
        if found != expected:
            raise ValueError(f"{str(path)!r} must hold {name!r} with shape {expected}, but has {found}")
    if "base" in metadata:  # older files do not say
        require_base(path, metadata, model.state_dict())
    for name, tensor in needed.items():
        tensor.copy_(stored[name])
    model.unquantize_drafts()  # copies would be of the view before


def adopt_form(model: OrthrusForCausalLM, about: dict[str, Any]) -> None:
    """Give `model` the anchor_view and the chain that a checkpoint, or a view file, says its view has."""
    model.config.anchor_view = about.get("anchor_view", model.config.anchor_view)
    if about.get("chain_width") is not None:
        model.add_chain(about["chain_width"])
