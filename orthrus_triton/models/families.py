"""The families of models that can be frozen: pre-norm layers with SwiGLU MLPs, and how each differs from the others.
To add one, add it here, and tiny models of it to tests/models/tiny_bases.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import (
    Ernie4_5Config,
    GlmConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5RotaryEmbedding
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.seed_oss.modeling_seed_oss import SeedOssRotaryEmbedding
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RotaryEmbedding


@dataclass(frozen=True)
class Family:
    """A family as transformers has it.

    config, rotary: its classes of the configuration and of the rotary embedding.
    qk_norm: whether each head of q and k is normed.
    qkv_bias, o_bias, mlp_bias: whether these projections have biases, or the field of the configuration that says so.
    windows: which layers slide if the configuration has a window: none can, all do, or those that it lists.
    skips_rope: the configuration lists layers that rotate nothing (`no_rope_layers`).
    partial_rotary: the rotation may cover the first part of a head only.
    rotates_neighbours: it turns pairs (2i, 2i + 1) of a head, and not numbers that lie half of it apart.
    """

    config: type[PreTrainedConfig]
    rotary: type[nn.Module]
    qk_norm: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    windows: Literal["none", "all", "listed"] = "none"
    skips_rope: bool = False
    partial_rotary: bool = False
    rotates_neighbours: bool = False


FAMILIES: dict[str, Family] = {
    "ernie4_5": Family(
        Ernie4_5Config, Ernie4_5RotaryEmbedding, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias",
        rotates_neighbours=True,
    ),
    "glm": Family(
        GlmConfig, GlmRotaryEmbedding, qkv_bias="attention_bias", partial_rotary=True, rotates_neighbours=True
    ),
    "llama": Family(
        LlamaConfig, LlamaRotaryEmbedding, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": Family(MistralConfig, MistralRotaryEmbedding, windows="all"),
    "phi3": Family(Phi3Config, Phi3RotaryEmbedding, windows="all", partial_rotary=True),
    "qwen2": Family(Qwen2Config, Qwen2RotaryEmbedding, qkv_bias=True, windows="listed"),
    "qwen3": Family(
        Qwen3Config, Qwen3RotaryEmbedding, qk_norm=True, qkv_bias="attention_bias", o_bias="attention_bias",
        windows="listed",
    ),
    "seed_oss": Family(
        SeedOssConfig, SeedOssRotaryEmbedding, qkv_bias="attention_bias", o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "smollm3": Family(
        SmolLM3Config, SmolLM3RotaryEmbedding, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias",
        windows="listed", skips_rope=True,
    ),
}  # fmt: skip
