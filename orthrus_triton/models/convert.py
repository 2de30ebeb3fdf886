"""What a base model brings: its configuration, its weights, its stop tokens, and a token to stand for the mask."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from orthrus_triton.models.base_weights import as_ours
from orthrus_triton.models.checkpoint import (
    WeightSource,
    folder_source,
    read_json,
    resolve_folder,
    state_dict_source,
)
from orthrus_triton.models.config import OrthrusConfig, family_config
from orthrus_triton.models.families import FAMILIES
from orthrus_triton.models.language_model import INSIDE, language_config, language_fields, language_weights

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class BaseModel:
    """A base model, opened: nothing but headers has been read. `folder` is None for a model object."""

    config: PreTrainedConfig
    weights: WeightSource
    generation_config: GenerationConfig | None
    dtype: torch.dtype
    device: torch.device
    folder: Path | None


def open_base(model_or_path: PreTrainedModel | str | PathLike[str]) -> BaseModel:
    """Open a transformers model, a folder or a hub id.

    Raises:
        TypeError: something else. ValueError: an unsupported architecture. FileNotFoundError: no such folder or file.
    """
    if isinstance(model_or_path, PreTrainedModel):
        config, name = language_config(model_or_path), type(model_or_path).__name__
        _check_family(config.model_type, name)
        source = state_dict_source(name, model_or_path.state_dict())
        if config is not model_or_path.config:
            source = language_weights(source)
        return BaseModel(
            config=config,
            weights=as_ours(source, config),
            generation_config=copy.deepcopy(getattr(model_or_path, "generation_config", None)),
            dtype=model_or_path.dtype,
            device=model_or_path.device,
            folder=None,
        )
    if not isinstance(model_or_path, (str, PathLike)):
        raise TypeError(
            "model_or_path must be a transformers model, a folder or a hub id, "
            f"but got a {type(model_or_path).__name__}"
        )
    folder = resolve_folder(model_or_path)
    of_whole = read_json(folder / "config.json")
    fields = language_fields(of_whole)
    _check_family(fields.get("model_type"), str(model_or_path), "block_size" in fields)
    config = family_config(fields["model_type"], fields)
    config.name_or_path = str(model_or_path)
    source = folder_source(folder)
    if fields is not of_whole:
        source = language_weights(source)
        if "tie_word_embeddings" not in fields:  # a text's default is no word on the whole
            config.tie_word_embeddings = "lm_head.weight" not in source.shapes
    return BaseModel(
        config=config,
        weights=as_ours(source, config),
        generation_config=read_generation_config(folder),
        dtype=config.dtype or source.dtype(),
        device=torch.device("cpu"),
        folder=folder,
    )


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """generation_config.json, where the folder has one."""
    path = folder / "generation_config.json"
    return GenerationConfig.from_dict(read_json(path)) if path.is_file() else None


def choose_mask_token_id(base: BaseModel) -> int:
    """The default mask token: what the config names, else a row nothing else uses.

    In order: the config's mask_token_id; the first embedding row the folder's tokenizer has no token for (151669 for
    Qwen3); the padding token, unless it ends sequences; the last row.
    """
    config = base.config
    if getattr(config, "mask_token_id", None) is not None:
        return config.mask_token_id
    if base.folder is not None and any((base.folder / name).is_file() for name in TOKENIZER_FILES):
        used = set(_read_vocabulary(base.folder).values())
        unused = next((token for token in range(config.vocab_size) if token not in used), None)
        if unused is not None:
            return unused
    ends = eos_token_ids(base.generation_config) + eos_token_ids(config)
    if config.pad_token_id is not None and config.pad_token_id not in ends:
        return config.pad_token_id
    return config.vocab_size - 1


def eos_token_ids(config: Any) -> list[int]:
    """`eos_token_id` of a configuration, one, several or none, as a list; a ValueError if it is no id."""
    ids = getattr(config, "eos_token_id", None)
    if isinstance(ids, torch.Tensor):  # as transformers takes them, too
        return ids.flatten().tolist()
    if ids is None:
        return []
    several = list(ids) if isinstance(ids, (list, tuple, set)) else [ids]
    if not all(isinstance(one, Integral) and not isinstance(one, bool) for one in several):
        raise ValueError(f"eos_token_id must be one id, a list of ids or None, but got {ids!r}")
    return [int(one) for one in several]


def _read_vocabulary(folder: Path) -> dict[str, int]:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_vocab()
    except Exception as error:
        raise ValueError(
            f"mask_token_id must be given, because the tokenizer in {str(folder)!r} could not be read: {error}"
        ) from error


def _check_family(model_type: str | None, name: str, has_view: bool = False) -> None:
    if model_type == OrthrusConfig.model_type or (model_type in FAMILIES and has_view):
        raise ValueError(f"{name!r} must be a base model, but it has a second view: use from_pretrained")
    if model_type not in FAMILIES:
        known = [*FAMILIES, *INSIDE]
        raise ValueError(f"{name!r} must have a model_type of {known}, but got {model_type!r}")
