"""A base model's weights as our layers have them: q, k, v, gate and up each under a name of its own, the rows of q's
and k's heads in the order in which our rotation pairs them, and norms by our names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig

from orthrus_triton.models.checkpoint import WeightSource
from orthrus_triton.models.families import FAMILIES
from orthrus_triton.models.rope import rotary_dims

FUSED = re.compile(r"(?P<where>.+\.)(?P<what>qkv_proj|gate_up_proj)(?P<kind>\.weight|\.bias)")
FINAL_NORM = "model.norm.weight"
ROTATED = re.compile(r".+\.self_attn\.[qk]_proj\.(weight|bias)")


def as_ours(source: WeightSource, config: PreTrainedConfig) -> WeightSource:
    """`source` with fused matrices (of Phi-3, GLM) taken apart, rows put in order, norms renamed, and the last one
    divided by `logits_scaling` (Granite), a power of two. A tensor that has not the rows that `config` describes stays
    as it is, to be complained of under its own name."""
    family = FAMILIES[config.model_type]
    head_dim, rotated = rotary_dims(config)
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    parts = {
        "qkv_proj": {"q_proj": query, "k_proj": key, "v_proj": key},
        "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
    }
    order = row_order(head_dim, rotated, family.rotates_neighbours)

    def new_names(name: str) -> dict[str, int]:
        """What becomes of a tensor: names and their rows; nothing of one that stays."""
        where, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in family.norm_names and source.shapes[name] == (config.hidden_size,):
            return {f"{where}.{family.norm_names[norm]}.weight": config.hidden_size}
        fused = FUSED.fullmatch(name)
        if fused is None:
            return {}
        rows = parts[fused["what"]]
        if not source.shapes[name] or source.shapes[name][0] != sum(rows.values()):
            return {}
        return {f"{fused['where']}{part}{fused['kind']}": number for part, number in rows.items()}

    def numbers(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if family.has_multipliers and name == FINAL_NORM:
            return tensor / config.logits_scaling
        if order is None or not ROTATED.fullmatch(name) or tensor.shape[0] % head_dim:
            return tensor
        return tensor.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in source.read():
            names = new_names(name) or {name: tensor.shape[0] if tensor.dim() else 0}
            pieces = tensor.split([*names.values()]) if len(names) > 1 else [tensor]
            yield from ((part, numbers(part, piece)) for part, piece in zip(names, pieces))

    shapes, dtypes = {}, {}
    for name, shape in source.shapes.items():
        names = new_names(name)
        shapes |= {part: (rows, *shape[1:]) for part, rows in names.items()} or {name: shape}
        dtypes |= dict.fromkeys(names or [name], source.dtypes[name])
    return WeightSource(source.name, shapes, dtypes, read)


def row_order(head_dim: int, rotated: int, neighbours: bool) -> torch.Tensor | None:
    """Where our rows of a head [head_dim] lie in the base's; None where the order is the same.

    Ours turns pairs (i, i + head_dim // 2). A base may turn the first R = `rotated` numbers of a head only, and there
    pairs (i, i + R // 2), or `neighbours` (2i, 2i + 1). What is not turned goes to the end of both halves. Scores are
    sums over a head and care for no order."""
    turned, rest = torch.arange(rotated), torch.arange(rotated, head_dim)
    turned = turned.view(-1, 2).T if neighbours else turned.view(2, -1)
    order = torch.cat((turned, rest.view(2, -1)), dim=1).flatten()
    return None if torch.equal(order, torch.arange(head_dim)) else order
