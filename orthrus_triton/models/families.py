"""The families of models that can be frozen: layers with RMS norms and gated MLPs, and how each differs from others.
To add one, add it here, and tiny models of it to tests/models/tiny_bases.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from transformers import (
    Ernie4_5Config,
    Exaone4Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    SmolLM3Config,
)
from transformers.models.ernie4_5.modeling_ernie4_5 import Ernie4_5RotaryEmbedding
from transformers.models.exaone4.modeling_exaone4 import Exaone4RotaryEmbedding
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.glm4.modeling_glm4 import Glm4RotaryEmbedding
from transformers.models.granite.modeling_granite import GraniteRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.olmo2.modeling_olmo2 import Olmo2RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.seed_oss.modeling_seed_oss import SeedOssRotaryEmbedding
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RotaryEmbedding

# how files name the norms of layers that have others than Llama's, and how we do
BEHIND = {"post_attention_layernorm": "post_self_attn_layernorm", "post_feedforward_layernorm": "post_mlp_layernorm"}
AROUND = {**BEHIND, "pre_feedforward_layernorm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Family:
    """A family as transformers has it.

    config, rotary: its classes of the configuration and of the rotary embedding.
    qk_norm: whether each head of q and k is normed, or the "whole" of each, as in `DualViewAttention`.
    qkv_bias, o_bias, mlp_bias: whether these projections have biases, or the field of the configuration that says so.
    windows: which layers slide if the configuration has a window: none can, all do, or those that it lists.
    skips_rope: which layers rotate nothing: those that the configuration lists (`no_rope_layers`), or in a model with a
        window those that have none; None if all rotate.
    rotary_by_kind: layers with a window may have rope parameters of their own.
    partial_rotary: the rotation may cover the first part of a head only.
    rotates_neighbours: it turns pairs (2i, 2i + 1) of a head, and not numbers that lie half of it apart.
    norms: where a layer has them, as in `OrthrusDecoderLayer`.
    norm_names: what its files call norms that we call otherwise.
    norm_offset: added to the weights of all norms.
    activation_field: the field of the configuration that names the MLP's activation.
    scales_embedding: a token's row is multiplied by the root of its size.
    scales_queries: scores have the factor query_pre_attn_scalar ** -0.5.
    has_multipliers: the configuration has factors for the embedding, scores, logits, and what is added to the residual
        stream.
    """

    config: type[PreTrainedConfig]
    rotary: type[nn.Module]
    qk_norm: bool | Literal["whole"] = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    windows: Literal["none", "all", "listed"] = "none"
    skips_rope: Literal["listed", "unwindowed"] | None = None
    rotary_by_kind: bool = False
    partial_rotary: bool = False
    rotates_neighbours: bool = False
    norms: Literal["before", "behind", "both"] = "before"
    norm_names: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    activation_field: str = "hidden_act"
    scales_embedding: bool = False
    scales_queries: bool = False
    has_multipliers: bool = False

    def __post_init__(self) -> None:
        if self.has_multipliers and (self.qk_norm or self.norms != "before"):
            raise NotImplementedError("only norms over the residual stream have an epsilon that goes with its factor")

    @property
    def has_our_layout(self) -> bool:
        """Whether a base's weights are ours as they lie in its files; what is done to others is in base_weights.py."""
        return not (self.partial_rotary or self.rotates_neighbours or self.has_multipliers or self.norm_names)


FAMILIES: dict[str, Family] = {
    "ernie4_5": Family(
        Ernie4_5Config, Ernie4_5RotaryEmbedding, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias",
        rotates_neighbours=True,
    ),
    "exaone4": Family(
        Exaone4Config, Exaone4RotaryEmbedding, qk_norm=True, windows="listed", skips_rope="unwindowed", norms="behind",
        norm_names=BEHIND,
    ),
    "gemma": Family(
        GemmaConfig, GemmaRotaryEmbedding, qkv_bias="attention_bias", o_bias="attention_bias", norm_offset=1.0,
        scales_embedding=True,
    ),
    # its default frequencies are Gemma's
    "gemma3_text": Family(
        Gemma3TextConfig, GemmaRotaryEmbedding, qk_norm=True, qkv_bias="attention_bias", o_bias="attention_bias",
        windows="listed", rotary_by_kind=True, norms="both", norm_names=AROUND, norm_offset=1.0,
        activation_field="hidden_activation", scales_embedding=True, scales_queries=True,
    ),
    "glm": Family(
        GlmConfig, GlmRotaryEmbedding, qkv_bias="attention_bias", partial_rotary=True, rotates_neighbours=True
    ),
    "glm4": Family(
        Glm4Config, Glm4RotaryEmbedding, qkv_bias="attention_bias", partial_rotary=True, rotates_neighbours=True,
        norms="both",
    ),
    "granite": Family(
        GraniteConfig, GraniteRotaryEmbedding, qkv_bias="attention_bias", o_bias="attention_bias",
        mlp_bias="mlp_bias", has_multipliers=True,
    ),
    "llama": Family(
        LlamaConfig, LlamaRotaryEmbedding, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": Family(MistralConfig, MistralRotaryEmbedding, windows="all"),
    "olmo2": Family(
        Olmo2Config, Olmo2RotaryEmbedding, qk_norm="whole", qkv_bias="attention_bias", o_bias="attention_bias",
        norms="behind", norm_names=BEHIND,
    ),
    # its default frequencies are OLMo 2's
    "olmo3": Family(
        Olmo3Config, Olmo2RotaryEmbedding, qk_norm="whole", qkv_bias="attention_bias", o_bias="attention_bias",
        norms="behind", norm_names=BEHIND, windows="listed", rotary_by_kind=True,
    ),
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
        windows="listed", skips_rope="listed",
    ),
}  # fmt: skip
