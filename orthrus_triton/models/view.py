"""View files: a trained diffusion view alone, as a small delta to the frozen AR weights it was trained on.
Such a file is refused on another base, for there its drafts would be noise."""

from __future__ import annotations

import hashlib
import json
import uuid
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from orthrus_triton.models.checkpoint import open_safetensors, write_safetensors
from orthrus_triton.models.config import VIEW_FIELDS
from orthrus_triton.models.modeling import OrthrusForCausalLM

Storage = Literal["int8", "fp16", "bf16"]
FORMAT = "orthrus-view-1"
VIEW_OPTIONS = [name for name in VIEW_FIELDS if name != "base_model_type"]
MAX_BYTES = 30_000_000
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
# a base is recognised in whichever of these dtypes it was loaded
FINGERPRINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLES = 4096  # values of each tensor that enter the fingerprint: any training moves some of them
PROJECTION = "_proj_diff.weight"
EMBEDDING = "model.embed_tokens.weight"


@torch.no_grad()
def save_view(
    model: OrthrusForCausalLM,
    path: str | PathLike[str],
    *,
    rank: int | None = None,
    storage: Storage = "int8",
    max_bytes: int = MAX_BYTES,
) -> int:
    """Write the diffusion view of `model` as a delta to its own AR weights; complete or not at all.

    Args:
        model: its view has full matrices or low-rank deltas.
        path: the file, by custom `.safetensors`.
        rank: keep the best rank-r approximation of each projection's delta (SVD); None keeps all of it.
        storage: "int8" with one fp32 scale per row, "fp16" or "bf16". Biases, norms, the mask embedding and the
            chain are stored as they are in fp32.
        max_bytes: refuse to write a larger file.

    Returns:
        Its size in bytes.

    Raises:
        ValueError: an option out of range, weights that are not finite or are in int8, or a file that would be too
            large.
    """
    model.require_float_weights("save_view")
    if storage not in ("int8", *HALF):
        raise ValueError(f"storage must be one of {['int8', *HALF]}, but got {storage!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be >= 1 or None, but got {rank}")
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _full_view(state).items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"model must hold finite weights, but {name!r} does not")
        if not name.endswith(PROJECTION):
            tensors[name] = tensor.clone()
            continue
        delta = tensor - state[name.replace("_diff", "")]
        for key, matrix in _factor(name, delta, rank).items():
            tensors |= _pack(key, matrix, storage)
    config = {name: getattr(model.config, name) for name in VIEW_OPTIONS}
    metadata = {
        "format": FORMAT,
        **base_metadata(model.state_dict()),
        "config": json.dumps({**config, "view_rank": None}),
        "rank": json.dumps(rank),
        "storage": storage,
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > max_bytes:
        raise ValueError(
            f"a view file must be at most {max_bytes / 1e6:g} MB, but with rank={rank} and storage={storage!r} it "
            f"would be {size / 1e6:.1f} MB: lower the rank, use int8, or raise max_bytes (--max-mb)"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write_safetensors(staged, tensors, metadata)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return path.stat().st_size


def read_view_config(path: str | PathLike[str]) -> dict[str, Any]:
    """The options of `OrthrusConfig.from_base_config` that a model needs for this view: block_size, mask token, ...

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not a view file, or has other options.
    """
    stored = json.loads(_read(path, metadata_only=True)[0]["config"])
    options = {"anchor_view": "diffusion", "chain_width": None, **stored}  # the first files were of no other form
    differing = sorted(set(options) ^ set(VIEW_OPTIONS))
    if differing:
        raise ValueError(f"{str(path)!r} must have the options {VIEW_OPTIONS}, but {differing[0]!r} does not match")
    return options


@torch.no_grad()
def merge_view(path: str | PathLike[str], base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The full `_diff` weights of a view file over the frozen weights `base`, by name.

    The sum is formed in fp32 (products of factors in fp64) and comes back in fp32 on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a view file, is damaged, or was made for other base weights.
    """
    metadata, stored = _read(path)
    require_base(path, metadata, base)
    low_rank = json.loads(metadata["rank"]) is not None
    view = {}
    for name in dict.fromkeys(key.split(PROJECTION)[0] + PROJECTION for key in stored if PROJECTION in key):
        if low_rank:
            up, down = _unpack(f"{name}.up_t", stored).double().T, _unpack(f"{name}.down", stored).double()
            delta = (up @ down).float()
        else:
            delta = _unpack(name, stored)
        frozen = base[name.replace("_diff", "")]
        _require_shape(path, name, delta, frozen)  # a sum would stretch a delta of one row
        view[name] = frozen.float().cpu() + delta
    return view | {name: tensor for name, tensor in stored.items() if PROJECTION not in name}


@torch.no_grad()
def load_view(model: OrthrusForCausalLM, path: str | PathLike[str], *, longer_blocks: bool = False) -> None:
    """Put the view of a file into `model`, in place of the one it has.

    Args:
        model: with full view matrices (view_rank None), over the base the view was trained on, in any of fp32, bf16
            and fp16.
        path: what `save_view` wrote.
        longer_blocks: also into a model of longer blocks than the view was trained for, to train it on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a view file, another base, or a model whose options do not fit the view or whose weights are in
            int8.
    """
    model.require_float_weights("load_view")
    options = read_view_config(path)
    if model.block_size > options["block_size"] and not longer_blocks:
        raise ValueError(f"model.block_size must be at most the view's {options['block_size']}, got {model.block_size}")
    for name, value in options.items():
        if name != "block_size" and getattr(model.config, name) != value:
            raise ValueError(f"model must have {name}={value!r} for this view, but has {getattr(model.config, name)!r}")
    state = model.state_dict()
    view = merge_view(path, state)
    needed = {name for name in state if "_diff" in name}
    if needed != set(view):
        raise ValueError(
            f"{str(path)!r} must hold the whole view, but {sorted(needed ^ set(view))[0]!r} does not match"
        )
    for name, tensor in view.items():
        _require_shape(path, name, tensor, state[name])
    for name, tensor in view.items():
        state[name].copy_(tensor)
    model.unquantize_drafts()  # copies would be of the view before


def base_metadata(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """What a file says of the base that its view was trained over."""
    return {
        "base": json.dumps({name: fingerprint(state, dtype) for name, dtype in FINGERPRINT_DTYPES.items()}),
        "base_dtype": _name(state[EMBEDDING].dtype),
    }


def require_base(path: str | PathLike[str], metadata: dict[str, str], state: dict[str, torch.Tensor]) -> None:
    """Raise a ValueError unless the view in a file with this metadata was trained over the weights in `state`."""
    dtype, known = state[EMBEDDING].dtype, json.loads(metadata["base"])
    if _name(dtype) not in FINGERPRINT_DTYPES:
        raise ValueError(f"base must be in one of {list(FINGERPRINT_DTYPES)} for a view file, but got {dtype}")
    # a base in higher precision is also known by what it is in the dtype that the view was trained over
    names = {_name(dtype), metadata.get("base_dtype")} & FINGERPRINT_DTYPES.keys()
    if not any(fingerprint(state, FINGERPRINT_DTYPES[name]) == known.get(name) for name in names):
        raise ValueError(
            f"the view in {str(path)!r} was trained over other base weights than these: its drafts would be noise here"
        )


def fingerprint(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    """SHA-256 over names, shapes and evenly spaced values of the AR weights, as they are in `dtype`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        if "_diff" in name:
            continue
        values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // SAMPLES)].to("cpu", dtype).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_shape(path: str | PathLike[str], name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.shape != expected.shape:
        raise ValueError(
            f"{str(path)!r} must hold {name!r} with shape {tuple(expected.shape)}, but has {tuple(found.shape)}"
        )


def _full_view(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The view's tensors, low-rank projections multiplied out and added to the frozen ones."""
    full = {}
    for name, tensor in state.items():
        if "_proj_diff.down." in name:
            frozen = name.replace("_diff.down", "")
            up = state[name.replace(".down.", ".up.")]
            full[name.replace(".down.", ".")] = state[frozen] + (up.double() @ tensor.double()).float()
            bias = frozen.replace(".weight", ".bias")
            if bias in state:
                full[name.replace(".down.weight", ".bias")] = state[bias]
        elif "_diff" in name and "_proj_diff.up." not in name:
            full[name] = tensor
    return full


def _factor(name: str, delta: torch.Tensor, rank: int | None) -> dict[str, torch.Tensor]:
    """What is stored of one delta [out, in]: itself, or up_t [r, out] and down [r, in] with delta ~ up_t.T @ down."""
    if rank is None:
        return {name: delta}
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    root = s[:rank, None].sqrt()
    return {f"{name}.up_t": (u.T[:rank] * root).float(), f"{name}.down": (vt[:rank] * root).float()}


def _pack(key: str, matrix: torch.Tensor, storage: Storage) -> dict[str, torch.Tensor]:
    if storage in HALF:
        return {key: matrix.to(HALF[storage]).contiguous()}
    scale = matrix.abs().amax(dim=1) / 127
    steps = matrix / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return {f"{key}.int8": steps.round().to(torch.int8).contiguous(), f"{key}.scale": scale}


def _unpack(key: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    if key in stored:
        return stored[key].float()
    steps, scale = stored.get(f"{key}.int8"), stored.get(f"{key}.scale")
    if steps is None or scale is None or scale.shape != steps.shape[:1]:
        raise ValueError(f"a view file must hold {key!r} whole: its values, or int8 steps with one scale for each row")
    return steps.float() * scale[:, None]


def _read(path: str | PathLike[str], metadata_only: bool = False) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no view file {str(path)!r}")
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} must be a view file ({FORMAT}), but got {metadata.get('format')!r}")
        if absent := sorted({"base", "config", "rank"} - set(metadata)):
            raise ValueError(f"{str(path)!r} must say {absent[0]!r} in its metadata, but does not")
        return metadata, {} if metadata_only else {name: file.get_tensor(name) for name in file.keys()}
