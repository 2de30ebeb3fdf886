"""Options of a decoder that are checked against its model: block sizes and stop tokens; and that the model is whole."""

from __future__ import annotations

from numbers import Integral
from operator import index
from typing import Any, Literal

import torch

from orthrus_triton.modules.dual_view_model import DualViewModel

Mode = Literal["consensus", "ar"]
BlockSize = int | Literal["auto"]


def require_members(model: DualViewModel) -> None:
    """Raise a TypeError if `model` lacks a member of the protocol, a ValueError if one says what cannot be."""
    members = (*DualViewModel.__annotations__, "new_cache", "forward_view", "compute_logits")
    if absent := [name for name in members if not hasattr(model, name)]:
        raise TypeError(f"model must have the members of DualViewModel, but a {type(model).__name__} has no {absent}")
    if model.block_size < 2:
        raise ValueError(f"model.block_size must be at least 2, an anchor and a draft, but is {model.block_size}")


def widest_block(block_size: BlockSize | None, model: DualViewModel) -> int:
    """Rows of the largest block that `block_size` allows; None and "auto" allow the trained one.

    Raises:
        ValueError: it is not in 2..model.block_size.
    """
    if block_size is None or block_size == "auto":
        return model.block_size
    if not isinstance(block_size, Integral) or not 2 <= block_size <= model.block_size:
        raise ValueError(
            f"block_size must be in 2..{model.block_size}, the size the view was made for, or 'auto', "
            f"but got {block_size!r}"
        )
    return int(block_size)


def stop_ids(eos_token_id: int | list[int] | None, model: DualViewModel) -> list[int]:
    """The ids that end a sequence; None means the model's own.

    Raises:
        ValueError: one is outside the vocabulary, or the model's own are no list of ids.
    """
    if eos_token_id is None:
        try:
            return [index(token) for token in model.eos_token_ids]
        except TypeError:
            raise ValueError(
                f"model.eos_token_ids must be a list of ids, which may be empty, but is {model.eos_token_ids!r}"
            ) from None
    if isinstance(eos_token_id, torch.Tensor):
        eos_token_id = eos_token_id.flatten().tolist()
    ids = list(eos_token_id) if isinstance(eos_token_id, (list, tuple, set, range)) else [eos_token_id]
    for token in ids:
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < model.vocab_size:
            raise ValueError(f"eos_token_id must be in 0..{model.vocab_size - 1}, but got {token!r}")
    return [int(token) for token in ids]


def require_streamer(streamer: Any) -> None:
    """Raise a TypeError unless it is None or can be given tokens: before a prompt is read, not when it has been."""
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"streamer must have put(ids) and end(), but a {type(streamer).__name__} has not")


def require_one_device(model: DualViewModel) -> None:
    """Raise a ValueError if a model of several parameters has them on several devices."""
    if isinstance(model, torch.nn.Module):
        devices = {str(parameter.device): name for name, parameter in model.named_parameters()}
        if len(devices) > 1:
            raise ValueError(f"model must have all parameters on one device, but has one each on {devices}")
