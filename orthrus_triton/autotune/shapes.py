"""From a model to the problems its decode passes bring: the shapes of its weights, and its heads.
Models by name, or by the config.json that transformers writes; no weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthrus_triton.autotune.config import DTYPES, Problem
from orthrus_triton.autotune.space import SPACES


def _shape(hidden: int, intermediate: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> dict[str, int]:
    return {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab,
    }  # fmt: skip


SHAPES = {
    "qwen3-0.6b": _shape(1024, 3072, 16, 8, 128, 151_936),
    "qwen3-1.7b": _shape(2048, 6144, 16, 8, 128, 151_936),
    "qwen3-4b": _shape(2560, 9728, 32, 8, 128, 151_936),
    "qwen3-8b": _shape(4096, 12_288, 32, 8, 128, 151_936),
    "qwen3-14b": _shape(5120, 17_408, 40, 8, 128, 151_936),
    "llama-3.2-1b": _shape(2048, 8192, 32, 8, 64, 128_256),
    "llama-3.1-8b": _shape(4096, 14_336, 32, 8, 128, 128_256),
    "smollm2-135m": _shape(576, 1536, 9, 3, 64, 49_152),
}


def problems_of(model: str | Path | Mapping[str, Any], dtype: str | None = None) -> list[Problem]:
    """The problems of one model, those with the most bytes first.

    Args:
        model: a name in `SHAPES`, a folder with a config.json, that file, or its fields.
        dtype: "bf16", "fp16" or "fp32"; by default what the config says, else bf16.

    Raises:
        ValueError: no such name or folder, or a config that lacks a field.
    """
    config = model if isinstance(model, Mapping) else SHAPES.get(str(model)) or _read(Path(model))
    if dtype is None:
        named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(named, named)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}")
    hidden, intermediate, heads, vocab = (
        _integer(config, name) for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    )
    kv_heads = _integer(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads
    head_dim = _integer(config, "head_dim") if config.get("head_dim") else hidden // heads
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads must divide num_attention_heads={heads}, but got {kv_heads}")
    activation = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    weights = {
        (vocab, hidden): "head", (2 * intermediate, hidden): "gate_up" if activation == "silu" else "product",
        (hidden, intermediate): "followed", ((heads + 2 * kv_heads) * head_dim, hidden): "followed",
        (hidden, heads * head_dim): "followed",
    }  # fmt: skip
    if rank := config.get("view_rank"):
        rank = _integer(config, "view_rank")
        for width in (hidden, heads * head_dim):
            weights.setdefault((rank, width), "product")
        for width in (hidden, heads * head_dim, kv_heads * head_dim):
            weights.setdefault((width, rank), "product")
    ordered = sorted(weights, key=lambda weight: -weight[0] * weight[1])
    linears = [Problem.of("linear", dtype, (weights[n, k],), N=n, K=k) for n, k in ordered]
    attention = Problem.of("dual_view_attention", dtype, head_dim=head_dim, group=heads // kv_heads)
    return [*linears, attention]


def select(problems: Sequence[Problem], ops: Sequence[str] | None) -> list[Problem]:
    """Without repetition, and of these ops only; what is fused behind one weight shape is gathered from all.

    Raises:
        ValueError: an op that is not known, or a key that its op cannot have.
    """
    for op in [*(ops or ()), *(problem.op for problem in problems)]:
        if op not in SPACES:
            raise ValueError(f"an op must be one of {', '.join(SPACES)}, but got {op!r}")
    gathered: dict[Problem, set[str]] = {}
    for problem in problems:
        if wrong := SPACES[problem.op].problem_with_key(problem.dtype, problem.shape):
            raise ValueError(f"{problem}: {wrong}")
        if not ops or problem.op in ops:
            gathered.setdefault(problem, set()).update(problem.uses)
    return [Problem(p.op, p.dtype, p.key, tuple(sorted(uses))) for p, uses in gathered.items()]


def _read(path: Path) -> Mapping[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"a model must be one of {', '.join(SHAPES)} or a folder with a config.json, but got {path}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold an object")
    if "text_config" in config:
        raise ValueError(f"{file} is of a model that sees images, too: name the folder that convert makes of it")
    return config


def _integer(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1 in a model's config, but is {value!r}")
    return value
