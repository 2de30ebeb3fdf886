"""The language model inside a model that sees images, too, which is all of it that is frozen: its configuration and its
weights, under the names that they have in a model of its own."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from orthrus_triton.models.checkpoint import WeightSource

# types of a whole, and of what is inside it unless its configuration says otherwise
INSIDE = {"gemma3": "gemma3_text", "mistral3": "mistral"}
OF_THE_WHOLE = (
    "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    "quantization_config",
)  # fmt: skip
# what files hold, and what transformers has in memory
NAMES = (
    (re.compile(r"language_model\.(model\.|lm_head\.)"), r"\1"),
    (re.compile(r"model\.language_model\."), "model."),
    (re.compile(r"lm_head\."), "lm_head."),
)


def language_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json as that of its language model's; as it is, if it is one.

    Raises:
        ValueError: it should describe a language model, but does not.
    """
    if fields.get("model_type") not in INSIDE:
        return fields
    inside = fields.get("text_config")
    if not isinstance(inside, dict):
        raise ValueError(f"config: text_config must describe a language model, but got {inside!r}")
    of_whole = {name: fields[name] for name in OF_THE_WHOLE if fields.get(name) is not None}
    return {"model_type": INSIDE[fields["model_type"]], **inside, **of_whole}


def language_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The same of a model's configuration; whether its head is tied, the model itself tells."""
    config = model.config
    if config.model_type not in INSIDE:
        return config
    inside = copy.deepcopy(config.get_text_config())
    for name in OF_THE_WHOLE:
        if name != "torch_dtype" and getattr(config, name, None) is not None:
            setattr(inside, name, getattr(config, name))
    head = model.get_output_embeddings()
    if head is not None:  # without one, the weights are found wanting
        inside.tie_word_embeddings = head.weight is model.get_input_embeddings().weight
    return inside


def language_weights(source: WeightSource) -> WeightSource:
    """The tensors of the language model in those of a whole; no others."""
    names = {name: ours for name in source.shapes if (ours := _inside(name)) is not None}

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        return ((names[name], tensor) for name, tensor in source.read() if name in names)

    shapes, dtypes = (
        {ours: of[name] for name, ours in names.items()} for of in (source.shapes, source.dtypes)
    )  # fmt: skip
    return WeightSource(source.name, shapes, dtypes, read)


def _inside(name: str) -> str | None:
    for pattern, ours in NAMES:
        if pattern.match(name):
            return pattern.sub(ours, name, count=1)
    return None
