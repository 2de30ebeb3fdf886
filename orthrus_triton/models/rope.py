"""From a configuration's rope parameters to a RotaryEmbedding; transformers computes the frequencies of every type.
What depends on the sequence's length (longrope, dynamic) becomes a rule that looks at a position alone."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from orthrus_triton.modules.rotary import RotaryEmbedding

DEFAULT_RULE = {
    "llama": LlamaRotaryEmbedding.compute_default_rope_parameters,
    "mistral": MistralRotaryEmbedding.compute_default_rope_parameters,
    "qwen2": Qwen2RotaryEmbedding.compute_default_rope_parameters,
    "qwen3": Qwen3RotaryEmbedding.compute_default_rope_parameters,
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def rotary_from_config(config: PreTrainedConfig) -> RotaryEmbedding:
    """Rotary embedding of a Llama, Mistral, Qwen2 or Qwen3 configuration, its buffers fp32 on the CPU.

    They are real even inside `torch.device("meta")`: they are computed, never loaded.

    Raises:
        ValueError: an unknown rope type, rope parameters per kind of layer, or a rotation of part of a head.
    """
    parameters = config.rope_parameters
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(f"rope_parameters must be one set for all layers, but got {parameters}")
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_parameters: rope_type must be one of {ROPE_TYPES}, but got {kind!r}")
    rule = DEFAULT_RULE[config.model_type] if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    options = {}
    with torch.device("cpu"):
        inv_freq, attention_scaling = rule(config)
        if kind == "longrope":
            original = parameters["original_max_position_embeddings"]
            long_inv_freq, _ = rule(config, seq_len=original + 1)
            options = {"long_inv_freq": long_inv_freq, "original_max_len": original}
        elif kind == "dynamic":
            # the stretch is relative to max_position_embeddings, as in transformers
            stretch = (parameters["rope_theta"], parameters["factor"])
            options = {"dynamic_ntk": stretch, "original_max_len": config.max_position_embeddings}
        rotary = RotaryEmbedding(inv_freq, attention_scaling, **options)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if 2 * rotary.inv_freq.shape[0] != head_dim:
        raise ValueError(
            f"rope_parameters: the rotation must cover head_dim={head_dim}, but covers {2 * rotary.inv_freq.shape[0]} "
            f"(partial_rotary_factor={parameters.get('partial_rotary_factor')})"
        )
    return rotary
