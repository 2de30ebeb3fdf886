"""Tiny random models of every family, every config field that changes the arithmetic in some of them.
Weights are drawn wide enough that a wrong rotation, bias, norm or window moves the logits far beyond rounding."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.families import FAMILIES

SIZES = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
ORIGINAL_LEN = 20  # where the length-dependent rope types change their frequencies
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL_LEN, "factor": 4.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.5 + 0.5 * i for i in range(8)],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama all heads have keys": ("llama", {"num_key_value_heads": None}),
    "llama biases, wide heads, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    ),
    "llama with fields of other families": (
        "llama",
        {
            "no_rope_layers": [0, 0], "partial_rotary_factor": 1.0, "residual_multiplier": 0.5,
            "attention_multiplier": 0.5,
        },
    ),
    "llama gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama linear": ("llama", rope("linear", factor=2.5)),
    "llama yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama yarn, mscale": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.5, beta_fast=8.0),
    ),
    "llama llama3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama proportional": ("llama", rope("proportional", partial_rotary_factor=0.5, factor=2.0)),
    "llama longrope": ("llama", {"rope_parameters": LONGROPE}),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL_LEN}),
    "ernie4_5": ("ernie4_5", {"head_dim": 32}),
    "ernie4_5 biases, untied": ("ernie4_5", {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False}),
    "exaone4": ("exaone4", {"num_hidden_layers": 3, "sliding_window": 6, "sliding_window_pattern": 3}),
    "exaone4 no window, tied": (
        "exaone4",
        {
            "sliding_window": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True,
            "rms_norm_eps": 1e-2,
        },
    ),
    "gemma": ("gemma", {"head_dim": 32, "hidden_size": 48}),
    "gemma biases, untied": ("gemma", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": False}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3, "head_dim": 32, "sliding_window": 6, "sliding_window_pattern": 3,
            "rms_norm_eps": 1e-2,
        },
    ),
    # as in Gemma 3 of 4B and more: layers without a window are stretched
    "gemma3 linear, biases, untied, other scores": (
        "gemma3_text",
        {
            "head_dim": 16, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"],
            "attention_bias": True, "tie_word_embeddings": False, "query_pre_attn_scalar": 40,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 20000.0,
            "rope_local_base_freq": 500.0, "hidden_activation": "silu",
        },
    ),
    "glm": ("glm", {"head_dim": 32}),
    "glm no biases, three quarters rotated, tied": (
        "glm",
        {
            "head_dim": 16, "attention_bias": False, "tie_word_embeddings": True,
            **rope("default", partial_rotary_factor=0.75),
        },
    ),
    "glm4": ("glm4", {"head_dim": 32}),
    "glm4 no biases, tied": ("glm4", {"head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 0.3, "residual_multiplier": 0.22, "attention_multiplier": 0.4,
            "logits_scaling": 4.0, "rms_norm_eps": 1e-2,
        },
    ),
    "granite biases, tied, nothing multiplied": (
        "granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral window": ("mistral", {"sliding_window": 7}),
    "olmo2": ("olmo2", {}),
    "olmo2 biases, all heads have keys, tied": (
        "olmo2",
        {"attention_bias": True, "num_key_value_heads": None, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    ),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "sliding_window": 6}),
    "olmo3 yarn": (
        "olmo3",
        {
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ),
    "phi3": ("phi3", {}),
    "phi3 window, tied": ("phi3", {"sliding_window": 7, "tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "phi3 longrope": ("phi3", {"original_max_position_embeddings": ORIGINAL_LEN, "rope_parameters": LONGROPE}),
    # as in Phi-4-mini: 12 of a head's 16 numbers are rotated, and only these are scaled
    "phi3 partial longrope": (
        "phi3",
        {
            "original_max_position_embeddings": ORIGINAL_LEN,
            "rope_parameters": LONGROPE | {
                "partial_rotary_factor": 0.75,
                **{name: LONGROPE[name][:6] for name in ("short_factor", "long_factor")},
            },
        },
    ),
    "phi3 partial": ("phi3", rope("default", partial_rotary_factor=0.25)),
    "qwen2": ("qwen2", {}),
    "qwen2 window in upper layers": (
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2 window asked for but not used": ("qwen2", {"use_sliding_window": False, "sliding_window": 6}),
    "qwen2 tied, dynamic": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL_LEN},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 biases, tied, window by layer types": (
        "qwen3",
        {
            "head_dim": 64, "attention_bias": True, "tie_word_embeddings": True, "use_sliding_window": True,
            "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3 yarn": ("qwen3", {"head_dim": 32, **rope("yarn", factor=4.0, original_max_position_embeddings=32)}),
    "seed_oss": ("seed_oss", {"head_dim": 32}),
    "seed_oss no biases but those of o and MLP": (
        "seed_oss", {"head_dim": 16, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 3, "no_rope_layer_interval": 2}),
    "smollm3 biases, untied, window where nothing is rotated": (
        "smollm3",
        {
            "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "no_rope_layers": [0, 1],
            "use_sliding_window": True, "sliding_window": 6,
        },
    ),
    "qwen3 longrope": ("qwen3", {"head_dim": 16, "rope_parameters": LONGROPE}),
}  # fmt: skip


def base_config(case: str = "qwen3", **changes: Any) -> PreTrainedConfig:
    """The transformers config of a case, with changes."""
    family, fields = CASES[case]
    fields = {**SIZES, **fields, **changes}
    # transformers completes these dictionaries in place
    return FAMILIES[family].config(**{k: dict(v) if isinstance(v, dict) else v for k, v in fields.items()})


def build_base(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, rounded_to: torch.dtype | None = None, seed: int = 0
) -> PreTrainedModel:
    """A random transformers model with eager attention; its weights are rounded to `rounded_to`, or to `dtype`."""
    # not .to(dtype): that would round the rotary frequencies, which from_pretrained does not
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_draw(name, parameter.shape, generator).to(rounded_to or dtype))
    return model.requires_grad_(False)


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.3 * noise
    if name.endswith("bias"):
        return 0.5 * noise
    return noise if "embed_tokens" in name else noise / shape[-1] ** 0.5


def randomise_view(model: OrthrusForCausalLM, scale: float = 0.3, seed: int = 1) -> OrthrusForCausalLM:
    """Move the diffusion view away from its copy of the AR weights, `scale` times their own spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_diff" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                spread = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0
                parameter.add_((scale * spread * noise).to(parameter))
    return model


def random_ids(length: int, batch: int = 1, vocab_size: int = SIZES["vocab_size"], seed: int = 2) -> torch.Tensor:
    """[batch, length] token ids."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def tiny_tokenizer(ids: list[int]) -> PreTrainedTokenizerFast:
    """A tokenizer that uses exactly these ids."""
    vocab = {f"w{token}": token for token in ids}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token=f"w{ids[0]}")))
