"""Checkpoints that hold q, k and v as one matrix, and gate and up as another: the same weights under the names of ours.
A rotation of part of a head is made one of the whole head, by another order of its rows."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

from orthrus_triton.models.checkpoint import WeightSource

FUSED = re.compile(r"(?P<where>.+\.)(?P<what>qkv_proj|gate_up_proj)(?P<kind>\.weight|\.bias)")


def taken_apart(source: WeightSource, config: PreTrainedConfig) -> WeightSource:
    """`source` with a tensor for each of q, k, v, gate and up. One whose rows are not those that `config` describes
    stays as it is, to be complained of under its own name."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    parts = {
        "qkv_proj": {"q_proj": query, "k_proj": key, "v_proj": key},
        "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
    }
    order = _row_order(head_dim, int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0)))

    def new_names(name: str) -> dict[str, int]:
        """What becomes of a tensor: names and their rows; nothing of one that stays."""
        fused = FUSED.fullmatch(name)
        if fused is None:
            return {}
        rows = parts[fused["what"]]
        if not source.shapes[name] or source.shapes[name][0] != sum(rows.values()):
            return {}
        return {f"{fused['where']}{part}{fused['kind']}": number for part, number in rows.items()}

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source.read():
            names = new_names(name)
            if not names:
                yield name, tensor
            for part, rows in zip(names, tensor.split(list(names.values())) if names else ()):
                is_rotated = ".q_proj." in part or ".k_proj." in part
                yield part, rows.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1) if is_rotated else rows

    shapes, dtypes = {}, {}
    for name, shape in source.shapes.items():
        for part, rows in (new_names(name) or {name: None}).items():
            shapes[part] = shape if rows is None else (rows, *shape[1:])
            dtypes[part] = source.dtypes[name]
    return WeightSource(source.name, shapes, dtypes, read)


def _row_order(head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Rows of a head [head_dim]. A rotation of the first `rotary_dim` turns pairs (i, i + rotary_dim // 2); ours turns
    pairs (i, i + head_dim // 2), so what is not turned goes to the end of both halves. Scores are sums over a head and
    care for no order."""
    turned, rest = torch.arange(rotary_dim).view(2, -1), torch.arange(rotary_dim, head_dim).view(2, -1)
    return torch.cat((turned, rest), dim=1).flatten()
