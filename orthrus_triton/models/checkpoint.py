"""Checkpoint folders: safetensors in and out, names and shapes checked from the headers before any data is read.
Nothing is unpickled, and what is saved appears under its final name only when it is complete."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_FILES = [
    "config.json", "generation_config.json", "model*.safetensors", INDEX,
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template*",
    "additional_chat_templates/*.jinja",
]  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INT8 = "I8"


@dataclass(frozen=True)
class WeightSource:
    """Named tensors whose shapes and dtypes are known before their data is read.

    name: what holds them, for messages. shapes, dtypes: by tensor name; dtypes as safetensors spells them.
    read: yields (name, tensor) for every tensor, one file at a time.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    read: Callable[[], Iterable[tuple[str, torch.Tensor]]]

    def dtype(self) -> torch.dtype:
        """That of the embedding, which every model has; fp32 if it has none after all."""
        return FLOAT_DTYPES.get(self.dtypes.get("model.embed_tokens.weight", ""), torch.float32)


def resolve_folder(model_or_path: str | PathLike[str], **hub: Any) -> Path:
    """A local folder as it is; a hub id as the folder it was downloaded to, with huggingface_hub's options `hub`.

    Raises:
        FileNotFoundError: neither. NotADirectoryError: a file.
    """
    folder = Path(model_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"model_or_path must be a folder or a hub id, but {str(folder)!r} is a file")
    if not HUB_ID.fullmatch(str(model_or_path)):
        raise FileNotFoundError(f"model_or_path must be a folder or a hub id, but there is no folder {str(folder)!r}")
    try:
        return Path(snapshot_download(str(model_or_path), allow_patterns=HUB_FILES, **hub))
    except Exception as error:
        raise FileNotFoundError(
            f"model_or_path: there is no local folder {str(model_or_path)!r}, "
            f"and it could not be had from the hub: {error}"
        ) from error


@contextmanager
def open_safetensors(path: str | PathLike[str]) -> Iterator[Any]:
    """safetensors' reader of a file.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} must be a complete safetensors file, but: {error}") from error


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file that whoever the umask grants may read; safetensors would leave it to its owner alone."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} must be in a checkpoint folder, but {str(path.parent)!r} has none")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must hold JSON, but: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} must hold a JSON object, but got a {type(content).__name__}")
    return content


def folder_source(folder: Path) -> WeightSource:
    """The tensors of a folder with model.safetensors, or with shards and their index.

    Raises:
        FileNotFoundError: no such file, or a shard that the index names is missing.
        ValueError: the folder has only pickle files, or a file is damaged or disagrees with the index.
    """
    shapes, dtypes = {}, {}
    paths = _weight_files(folder)
    for path, indexed in paths.items():
        with open_safetensors(path) as file:
            names = list(file.keys())
            for name in names:
                if name in shapes:
                    raise ValueError(f"tensor {name!r} must be in one file, but {str(path)!r} repeats it")
                view = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(view.get_shape()), view.get_dtype()
        absent = sorted(indexed - set(names))
        if absent:
            raise ValueError(f"{INDEX} says that {path.name!r} holds {absent[0]!r}, but it does not")

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for path in paths:
            with open_safetensors(path) as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)

    return WeightSource(str(folder), shapes, dtypes, read)


def state_dict_source(name: str, state_dict: dict[str, torch.Tensor]) -> WeightSource:
    """The tensors of a state dict."""
    spelled = {torch.int8: INT8} | {dtype: text for text, dtype in FLOAT_DTYPES.items()}
    return WeightSource(
        name,
        {key: tuple(tensor.shape) for key, tensor in state_dict.items()},
        {key: spelled.get(tensor.dtype, str(tensor.dtype)) for key, tensor in state_dict.items()},
        state_dict.items,
    )


def check_weights(
    source: WeightSource, expected: dict[str, tuple[int, ...]], tied: bool, in_int8: Collection[str] = ()
) -> None:  # fmt: skip
    """Compare names, shapes and kinds of dtype with what the model needs; no data is read.

    A tied model may or may not repeat its embedding as lm_head.weight, and old Llama files hold rotary frequencies.

    Raises:
        ValueError: tensors are missing, misshapen, unexpected, not in int8 that must be (`in_int8`, by name), or not
            floating point though they must; it lists them.
    """
    found = {name for name in source.shapes if not _is_redundant(name, tied)}
    complaints = [f"missing tensor {name!r}, expected shape {expected[name]}" for name in expected if name not in found]
    complaints += [
        f"tensor {name!r} must have shape {expected[name]}, but got {source.shapes[name]}"
        for name in expected
        if name in found and source.shapes[name] != expected[name]
    ]
    complaints += [
        f"unexpected tensor {name!r} of shape {source.shapes[name]}" for name in sorted(found - set(expected))
    ]
    for name in sorted(found & set(expected)):
        fitting = [INT8] if name in in_int8 else sorted(FLOAT_DTYPES)
        if source.dtypes[name] not in fitting:
            complaints.append(f"tensor {name!r} must have a dtype of {fitting}, but got {source.dtypes[name]}")
    if complaints:
        shown = "\n  ".join(complaints[:10])
        more = f"\n  and {len(complaints) - 10} more" if len(complaints) > 10 else ""
        raise ValueError(f"{source.name!r} does not hold the weights its config describes:\n  {shown}{more}")


@torch.no_grad()
def copy_weights(source: WeightSource, state_dict: dict[str, torch.Tensor]) -> None:
    """Copy every tensor into the tensor of that name, which may be a view of a fused one; dtype and device follow it.

    Raises:
        ValueError: a tied model's file holds an lm_head.weight that is not its embedding.
    """
    tied_copy = None
    for name, tensor in source.read():
        if name in state_dict:
            state_dict[name].copy_(tensor)
        elif name == "lm_head.weight":
            tied_copy = tensor
    if tied_copy is not None:
        embedding = state_dict["model.embed_tokens.weight"]
        if not torch.equal(embedding, tied_copy.to(embedding)):
            raise ValueError(
                "tie_word_embeddings must be false in config.json when lm_head.weight differs from "
                "model.embed_tokens.weight, but got true"
            )


def write_weights(folder: Path, state_dict: dict[str, torch.Tensor], max_shard_size: int | str) -> None:
    """Write model.safetensors, or shards of at most `max_shard_size` and their index. Parts of one fused tensor stay in
    one file; a shard's tensors are copied out of their fused storage as it is written, not all at once."""
    split = split_torch_state_dict_into_shards(state_dict, max_shard_size=max_shard_size)
    for filename, names in split.filename_to_tensors.items():
        shard = {name: state_dict[name].detach().clone(memory_format=torch.contiguous_format) for name in names}
        write_safetensors(folder / filename, shard, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def atomic_folder(folder: str | PathLike[str]) -> Iterator[Path]:
    """A staging folder to write into; on success its files become those of `folder`, on any exception nothing does.

    A new folder appears by one rename. In an existing one each file is replaced by a rename once all are written;
    weight files of an earlier save go, other files stay.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be a folder or not exist, but {str(folder)!r} is a file")
    exists = folder.is_dir()
    # beside a new folder, inside an existing one: always the same file system, even if the folder is a mount point
    parent = folder if exists else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    staging = parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    staging.mkdir()
    try:
        yield staging
        if exists:
            written = {path.name for path in staging.iterdir()}
            for path in staging.iterdir():
                target = folder / path.name
                if target.is_dir():  # a rename replaces a file, but no filled folder (a tokenizer's extra templates)
                    shutil.rmtree(target)
                path.replace(target)
            for path in folder.iterdir():
                if WEIGHT_FILE.fullmatch(path.name) and path.name not in written:
                    path.unlink()
        else:
            staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Each safetensors file of the folder, and the tensors the index says it holds (none without an index)."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{INDEX} must have a weight_map of tensor names to files, but got {weight_map!r}")
        files: dict[Path, set[str]] = {}
        for name, filename in weight_map.items():
            if Path(filename).name != filename or not filename.endswith(".safetensors"):
                raise ValueError(f"{INDEX} must name safetensors files in its own folder, but got {filename!r}")
            files.setdefault(folder / filename, set()).add(name)
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(f"{INDEX} names {path.name!r}, but {str(folder)!r} has no such file")
        return files
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: set()}
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{str(folder)!r} holds only pickle files ({', '.join(pickles[:3])}), which can run code when they are "
            "read and are refused. Where you trust it, convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    raise FileNotFoundError(f"{WEIGHTS} or {INDEX} must be in a checkpoint folder, but {str(folder)!r} has neither")


def _is_redundant(name: str, tied: bool) -> bool:
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
