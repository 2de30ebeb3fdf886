"""From a configuration's rope parameters to a RotaryEmbedding; transformers computes the frequencies of every type.
What depends on the sequence's length (longrope, dynamic) becomes a rule that looks at a position alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from orthrus_triton.models.families import FAMILIES
from orthrus_triton.modules.rotary import RotaryEmbedding, RotarySets

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
KINDS = ("full_attention", "sliding_attention")  # of layers, in the order of their rotary sets


def rotary_dims(config: PreTrainedConfig) -> tuple[int, int]:
    """The size of a head, and how many of its first numbers a family that may rotate a part of it does rotate.

    Raises:
        ValueError: these cannot be pairs, or are more than there are.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
    if not FAMILIES[config.model_type].partial_rotary:
        return head_dim, head_dim
    rotated = int(head_dim * factor)
    if not 0 < rotated <= head_dim or rotated % 2:
        raise ValueError(
            f"rope_parameters: partial_rotary_factor must give an even number of a head's {head_dim} numbers, "
            f"but {factor} gives {rotated}"
        )
    return head_dim, rotated


def rotary_from_config(config: PreTrainedConfig) -> RotaryEmbedding | RotarySets:
    """Rotary embedding of a base configuration, its buffers fp32 on the CPU; a set for each of `KINDS` where layers of
    one kind rotate otherwise than those of the other.

    They are real even inside `torch.device("meta")`: they are computed, never loaded.

    Raises:
        ValueError: an unknown rope type, rope parameters per kind of layer, or a rotation of part of a head that its
            family or its type does not have.
    """
    parameters = config.rope_parameters
    if FAMILIES[config.model_type].rotary_by_kind and set(parameters) == set(KINDS):
        first, second = (parameters[kind] for kind in KINDS)
        if first == second:
            return rotary_from_config(_with_rope(config, first))
        return RotarySets([rotary_from_config(_with_rope(config, one)) for one in (first, second)])
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(f"rope_parameters must be one set for all layers, but got {parameters}")
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_parameters: rope_type must be one of {ROPE_TYPES}, but got {kind!r}")
    family = FAMILIES[config.model_type]
    rule = family.rotary.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    head_dim, rotated = rotary_dims(config)
    if kind == "dynamic" and rotated != head_dim:
        raise ValueError(f"rope_parameters: rope_type 'dynamic' must rotate whole heads, but got {parameters}")

    def frequencies(**length: int) -> tuple[torch.Tensor, float]:
        """inv_freq [head_dim // 2], 0 where a partial rotation leaves a pair alone; and what scales cos and sin."""
        inv_freq, scaling = rule(config, **length)
        return F.pad(inv_freq, (0, (head_dim - rotated) // 2)), scaling

    options = {}
    with torch.device("cpu"):
        inv_freq, attention_scaling = frequencies()
        if kind == "longrope":
            original = parameters["original_max_position_embeddings"]
            long_inv_freq, _ = frequencies(seq_len=original + 1)
            options = {"long_inv_freq": long_inv_freq, "original_max_len": original}
        elif kind == "dynamic":
            # the stretch is relative to max_position_embeddings, as in transformers
            stretch = (parameters["rope_theta"], parameters["factor"])
            options = {"dynamic_ntk": stretch, "original_max_len": config.max_position_embeddings}
        rotary = RotaryEmbedding(inv_freq, attention_scaling, **options)
    if 2 * rotary.inv_freq.shape[0] != head_dim:
        raise ValueError(
            f"rope_parameters: the rotation must cover head_dim={head_dim}, but covers {2 * rotary.inv_freq.shape[0]} "
            f"(partial_rotary_factor={parameters.get('partial_rotary_factor')})"
        )
    return rotary


def _with_rope(config: PreTrainedConfig, parameters: dict[str, Any]) -> PreTrainedConfig:
    """`config` with one set of rope parameters for all layers."""
    changed = copy.deepcopy(config)
    changed.rope_parameters = dict(parameters)
    return changed
