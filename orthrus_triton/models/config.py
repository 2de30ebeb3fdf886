"""OrthrusConfig: a base model's configuration, kept field by field, and what the second view adds to it.
Reads the published Orthrus checkpoints too, whose config.json is Qwen3's with a block size and a mask token."""

from __future__ import annotations

import copy
import math
from typing import Any

from transformers import PreTrainedConfig

from orthrus_triton.models.families import FAMILIES
from orthrus_triton.modules.decoder_layer import ACTIVATIONS

VIEW_FIELDS = (
    "base_model_type",
    "block_size",
    "mask_token_id",
    "view_rank",
    "mask_embedding",
    "anchor_view",
    "chain_width",
)
OWN_FIELDS = (*VIEW_FIELDS, "int8_weights", "int8_rows", "int8_head")  # no base has
# of the file rather than of the model: written anew on saving, and auto_map names code that we neither ship nor run
FILE_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version")


def family_config(model_type: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """The base's own configuration class over `fields`: it has the defaults, and reads those of older transformers.

    Raises:
        ValueError: that class cannot make sense of the fields.
    """
    try:
        return FAMILIES[model_type].config(**copy.deepcopy(fields))
    except Exception as error:
        raise ValueError(f"config must be readable as that of a {model_type}, but: {error}") from error


class OrthrusConfig(PreTrainedConfig):
    """Configuration of a dual-view model: every field of its base, and

    Args:
        base_model_type: a key of `FAMILIES`, such as "qwen3"; fields left out take that family's defaults.
        block_size: rows of the block the diffusion view drafts, anchor included, >= 2.
        mask_token_id: the token that stands for a position to be drafted, inside the vocabulary.
        view_rank: None when the diffusion view has full projections, r when it is a rank-r delta of the AR ones.
        mask_embedding: the diffusion view embeds mask_token_id with a trained vector of its own, not with the row that
            the AR view has for it.
        anchor_view: the view that reads a draft block's anchor. "diffusion" is the paper's: the whole block is the
            trained view's. "ar": the frozen model reads the anchor, so that the token after it is exact and costs no
            verification, and the masks behind it see its AR key; a cycle then commits two tokens at least.
        chain_width: None, or the width of a `DraftChain`, which lets each mask know what the row before it drafted.
        int8_weights: the layers' matrices are in int8; see `OrthrusForCausalLM.quantize_weights`.
        int8_rows: and CPUs may round what they multiply them with.
        int8_head: so is the LM head.

    Raises:
        ValueError: a field that is out of range or that no kernel here implements; it names the field.
    """

    model_type = "orthrus"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]

    base_model_type: str = "qwen3"
    block_size: int | None = None
    mask_token_id: int | None = None
    view_rank: int | None = None
    mask_embedding: bool = False
    anchor_view: str = "diffusion"
    chain_width: int | None = None
    int8_weights: bool = False
    int8_rows: bool = False
    int8_head: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.base_model_type not in FAMILIES:
            raise ValueError(f"base_model_type must be one of {list(FAMILIES)}, but got {self.base_model_type!r}")
        base = family_config(self.base_model_type, kwargs)
        common = PreTrainedConfig().to_dict()
        fields = {name: value for name, value in base.to_dict().items() if name not in common}
        self.dtype = self.dtype or base.dtype  # base read it if the file has the older torch_dtype
        super().__post_init__(name_or_path=base.name_or_path)
        for name, value in fields.items():
            setattr(self, name, value)
        self._check()

    @classmethod
    def from_base_config(
        cls,
        base: PreTrainedConfig,
        *,
        block_size: int,
        mask_token_id: int,
        view_rank: int | None = None,
        mask_embedding: bool = False,
        anchor_view: str = "diffusion",
        chain_width: int | None = None,
    ) -> OrthrusConfig:
        """The configuration of `base` with a second view."""
        fields = {name: value for name, value in base.to_dict().items() if name not in FILE_FIELDS}
        fields |= {"block_size": block_size, "mask_token_id": mask_token_id, "view_rank": view_rank}
        fields |= {"mask_embedding": mask_embedding, "anchor_view": anchor_view, "chain_width": chain_width}
        return cls(**{**fields, "base_model_type": base.model_type})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the content of a config.json, ours or a published one (model_type "qwen3", or "orthrus" over Qwen3).

        Raises:
            ValueError: it has no `block_size`, so it describes a model without a second view; or its weights lie as a
                base's do, of a family that has them otherwise than we do.
        """
        fields = {name: value for name, value in config_dict.items() if name not in FILE_FIELDS}
        model_type = config_dict.get("model_type")
        if model_type != cls.model_type:
            fields.setdefault("base_model_type", model_type)
        if fields.get("block_size") is None:
            raise ValueError(
                f"config: block_size must be set in a dual-view checkpoint, but this is a plain {model_type!r} one; "
                "OrthrusForCausalLM.from_base, or orthrus-triton convert, makes a dual-view model of it"
            )
        if model_type in FAMILIES and not FAMILIES[model_type].has_our_layout:
            raise ValueError(
                f"config: model_type must be {cls.model_type!r} in a dual-view checkpoint of a {model_type}, whose "
                "weights are not ours as they lie in its files; OrthrusForCausalLM.from_base reads the base itself"
            )
        return super().from_dict(fields, **kwargs)

    def base_config(self) -> PreTrainedConfig:
        """The base model's own configuration."""
        fields = {k: v for k, v in self.to_dict().items() if k not in FILE_FIELDS and k not in OWN_FIELDS}
        return family_config(self.base_model_type, fields)

    @property
    def attention_head_dim(self) -> int:
        """`head_dim`, which only some families store."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads

    def norm_options(self) -> dict[str, float]:
        """Of the norms over our residual stream, which is the base's divided by its `residual_multiplier` (Granite):
        so what is added to it needs no factor, and norms of the two are alike but for their epsilon."""
        eps = self.rms_norm_eps / self._multiplier("residual_multiplier") ** 2
        return {"eps": eps, "offset": FAMILIES[self.base_model_type].norm_offset}

    def embedding_options(self) -> dict[str, Any]:
        """What a row of the embedding is multiplied by to begin that stream, as options of `TokenEmbedding`."""
        if FAMILIES[self.base_model_type].scales_embedding:
            return {"scale": self.hidden_size**0.5, "rounds_scale": True}
        return {"scale": self._multiplier("embedding_multiplier") / self._multiplier("residual_multiplier")}

    def _multiplier(self, name: str) -> float:
        return getattr(self, name) if FAMILIES[self.base_model_type].has_multipliers else 1.0

    def layer_options(self) -> list[dict[str, Any]]:
        """For each layer, the options of `OrthrusDecoderLayer` beyond its sizes."""
        family = FAMILIES[self.base_model_type]
        biases = {name: getattr(family, name) for name in ("qkv_bias", "o_bias", "mlp_bias")}
        scale = None
        if family.has_multipliers:
            scale = self.attention_multiplier
        elif family.scales_queries:
            scale = self.query_pre_attn_scalar**-0.5
        shared = {
            **{f"norm_{name}": value for name, value in self.norm_options().items()},
            "norms": family.norms,
            "activation": getattr(self, family.activation_field),
            "scale": scale,
            "qk_norm": family.qk_norm,
            **{name: getattr(self, said) if isinstance(said, str) else said for name, said in biases.items()},
            "view_rank": self.view_rank,
        }
        windows = self._windows()
        rotated = [True] * self.num_hidden_layers
        if family.skips_rope == "listed":
            rotated = self.no_rope_layers  # despite its name, 1 where there is a rotation
        elif family.skips_rope == "unwindowed" and self.sliding_window is not None:
            rotated = [window is not None for window in windows]
        return [
            {
                **shared, "window": window, "use_rope": bool(use_rope),
                "rope_set": int(family.rotary_by_kind and window is not None),
            }
            for window, use_rope in zip(windows, rotated)
        ]  # fmt: skip

    def _windows(self) -> list[int | None]:
        """The sliding window of each layer."""
        windows = FAMILIES[self.base_model_type].windows
        if windows == "listed":
            return [self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types]
        return [self.sliding_window if windows == "all" else None] * self.num_hidden_layers

    def _check(self) -> None:
        # True is an int, too
        if type(self.block_size) is not int or self.block_size < 2:
            raise ValueError(f"block_size must be an integer >= 2, but got {self.block_size!r}")
        if type(self.mask_token_id) is not int or not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id must be in 0..{self.vocab_size - 1}, but got {self.mask_token_id!r}")
        for name in ("view_rank", "chain_width"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an integer >= 1 or None, but got {value!r}")
        for name in ("mask_embedding", "int8_weights", "int8_rows", "int8_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, but got {getattr(self, name)!r}")
        for name in ("int8_rows", "int8_head"):
            if getattr(self, name) and not self.int8_weights:
                raise ValueError(f"{name} must be false where int8_weights is, but got true")
        if self.int8_head and self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be false with int8_head, but got true")
        if self.anchor_view not in ("diffusion", "ar"):
            raise ValueError(f"anchor_view must be 'diffusion' or 'ar', but got {self.anchor_view!r}")
        field = FAMILIES[self.base_model_type].activation_field
        if getattr(self, field) not in ACTIVATIONS:
            raise ValueError(
                f"{field} must be one of the activations that are implemented, {ACTIVATIONS}, "
                f"but got {getattr(self, field)!r} (of which Gemma's first files say 'gelu' for the second)"
            )
        if getattr(self, "quantization_config", None) is not None:
            raise ValueError(
                "quantization_config must be absent: quantized checkpoints are not supported; dequantize it"
            )
        if getattr(self, "is_heterogeneous", False):
            raise ValueError("per_layer_config must be absent: layers of different shapes are not supported")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads={self.num_attention_heads}, "
                f"but got {self.num_key_value_heads}"
            )
        if FAMILIES[self.base_model_type].skips_rope == "listed" and len(self.no_rope_layers) < self.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers must hold a 0 or a 1 for each of {self.num_hidden_layers} layers, "
                f"but got {self.no_rope_layers}"
            )
        for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
            value = self._multiplier(name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, but got {value!r}")
        scaling = self._multiplier("logits_scaling")
        if math.frexp(scaling)[0] != 0.5:
            raise ValueError(
                f"logits_scaling must be a power of two, which weights can be divided by, but got {scaling}"
            )
        for name in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
            if getattr(self, name, None):
                raise ValueError(f"{name} must be absent: it is not implemented, but got {getattr(self, name)!r}")
        if FAMILIES[self.base_model_type].scales_queries and not self.query_pre_attn_scalar > 0:
            raise ValueError(f"query_pre_attn_scalar must be positive, but got {self.query_pre_attn_scalar}")
        self._check_layer_types()

    def _check_layer_types(self) -> None:
        layer_types, window = getattr(self, "layer_types", None), getattr(self, "sliding_window", None)
        windows = FAMILIES[self.base_model_type].windows
        if windows == "none" and window is not None:
            raise ValueError(f"sliding_window must be absent from a {self.base_model_type} config, but got {window}")
        if layer_types is None:
            return
        known = ["full_attention", "sliding_attention"]
        if windows != "listed":  # one kind of layer, whatever the list says
            known = [known[window is not None]]
        unknown = sorted(set(layer_types) - set(known))
        if unknown:
            raise ValueError(
                f"layer_types must hold {' or '.join(known)} in a {self.base_model_type}, but got {unknown}"
            )
        if "sliding_attention" in layer_types and window is None:
            raise ValueError(
                "sliding_window must be set (and use_sliding_window true) with sliding layers, but got None"
            )
