"""Models of true shape with random weights, made on the device: right for the time of a pass, silent about acceptance.
The baselines run on the very same weights."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from orthrus_triton.models import OrthrusConfig, OrthrusForCausalLM


@dataclass(frozen=True)
class Shape:
    """A Qwen3 architecture, under transformers' names."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    block_size: int = 32

    def config(self) -> OrthrusConfig:
        """No token ends a sequence; the last one is the mask."""
        fields = asdict(self)
        block_size = fields.pop("block_size")
        base = Qwen3Config(
            **fields, max_position_embeddings=131_072 + 1024, eos_token_id=None, bos_token_id=None, pad_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )  # fmt: skip
        return OrthrusConfig.from_base_config(base, block_size=block_size, mask_token_id=self.vocab_size - 1)


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 64, 128, 256, True, block_size=8),
    "cpu-768": Shape(768, 12, 12, 4, 64, 2048, 40_960, True),
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151_936, True),
    "qwen3-1.7b": Shape(2048, 28, 16, 8, 128, 6144, 151_936, True),
    "qwen3-4b": Shape(2560, 36, 32, 8, 128, 9728, 151_936, True),
    "qwen3-8b": Shape(4096, 36, 32, 8, 128, 12_288, 151_936, False),
}


@torch.no_grad()
def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> OrthrusForCausalLM:
    """A dual-view model whose two views have different random weights, so that drafts are no copies of AR tokens."""
    with torch.device("meta"):
        model = OrthrusForCausalLM(shape.config())
    model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
        else:
            parameter.normal_(std=1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def share_weights(model: OrthrusForCausalLM, other: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model of another class over the same memory; it must know the published parameter names."""
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        shared = other(config)
    wanted = shared.state_dict().keys()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    missing = shared.load_state_dict(weights, strict=False, assign=True).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise ValueError(f"config must name the same parameters, but {missing[:3]} have no weight here")
    if config.tie_word_embeddings:
        shared.lm_head.weight = shared.model.embed_tokens.weight
    rotary = type(shared.model.rotary_emb)  # its frequencies are computed, not loaded
    with torch.device(model.device):
        shared.model.rotary_emb = rotary(config)
    return shared.eval()


def transformers_model(model: OrthrusForCausalLM) -> PreTrainedModel:
    """The AR view as transformers' own model of its family."""
    config = model.config.base_config()
    return share_weights(model, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


def official_model(model: OrthrusForCausalLM, checkout: Path) -> PreTrainedModel:
    """The official implementation over the same weights; `checkout` is its repository, whose code this runs.

    Raises:
        FileNotFoundError: there is no src/model.py in it.
    """
    module = load_module(checkout / "src" / "model.py")
    config = model.config.base_config()
    config.block_size, config.mask_token_id = model.block_size, model.mask_token_id
    return share_weights(model, module.OrthrusLM, config)


def load_module(path: Path) -> ModuleType:
    """A Python file as a module of its own."""
    if not path.is_file():
        raise FileNotFoundError(f"--official must be a checkout of the official repository, but there is no {path}")
    spec = importlib.util.spec_from_file_location("orthrus_official_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bytes_per_pass(model: OrthrusForCausalLM, view: str, context: int, batch: int) -> int:
    """What one pass of a view must read: its weights once, and every sequence's K/V. Of an embedding only if it is
    also the LM head. The views "diffusion-int8" and "ar-int8" read their layers' matrices in int8, those that end in
    "-int8-head" the LM head, too."""
    view, of_int8, of_head = view.partition("-int8")
    unused = {"ar": "_diff.", "diffusion": "\0"}[view]
    total = 0
    for name, parameter in model.named_parameters():
        of_ar_only = any(part in name for part in (".qkv_proj.", ".o_proj.", ".q_norm.", ".k_norm."))
        if unused in name or "_diff." not in name and view == "diffusion" and of_ar_only:
            continue
        if "embed_tokens" in name and model.lm_head is not None:
            continue
        of_delta = "_diff.up." in name or "_diff.down." in name
        is_matrix = ".layers." in name and parameter.dim() == 2 and not of_delta
        in_int8 = of_int8 and is_matrix or of_head and name.startswith(("model.embed_tokens", "lm_head"))
        total += parameter.numel() + 4 * len(parameter) if in_int8 else parameter.nbytes
    config, width = model.config, model.dtype.itemsize
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.attention_head_dim * width
    return total + batch * context * row
