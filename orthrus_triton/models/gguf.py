"""The model in a GGUF file: SmolLM2, whose tokenizer transformers takes for another, is read here, with nothing but the
`gguf` package's block formats; any other as transformers reads it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3
SCALING = "llama.rope.scaling."
SMOLLM = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}


class Fields(dict[str, Any]):
    """A file's fields by name."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"a GGUF file must have the field {name!r}, but this one has none")


def open_gguf(path: str | PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in a GGUF file, its weights dequantized to fp32, and its tokenizer.

    Raises:
        FileNotFoundError: there is no such file. ImportError: gguf is not installed. ValueError: the file is damaged,
            is of an architecture that transformers does not read, or has a stretched rotary embedding, which
            transformers would read as a plain one.
    """
    reader = _open(path)
    fields = _fields(reader)
    if all(fields.get(name) == expected for name, expected in SMOLLM.items()):
        config, weights, tokenizer = _load_smollm(reader, fields)
        return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights), tokenizer
    stretch = _stretch(reader, fields)
    if stretch is not None:
        raise ValueError(
            f"{str(path)!r} must have a plain rotary embedding, but has {stretch}: "
            "convert the model's original checkpoint instead"
        )
    where = {"pretrained_model_name_or_path": Path(path).parent, "gguf_file": Path(path).name}
    try:
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # of many types
        raise ValueError(f"{str(path)!r} must be a GGUF file that transformers can read, but: {error}") from error
    # says how the file stores what is fp32 now
    vars(model.config).pop("quantization_config", None)
    return model.eval(), tokenizer


def load_gguf(path: str | PathLike[str]) -> tuple[LlamaConfig, dict[str, torch.Tensor], PreTrainedTokenizerFast]:
    """SmolLM2 in GGUF as transformers would have it: configuration, fp32 weights by name, tokenizer.

    Raises:
        FileNotFoundError: there is no such file. ImportError: gguf is not installed. ValueError: the file is damaged,
            lacks a field, or has another architecture, another tokenizer, an unknown tensor or storage type, or a
            stretched rotary embedding of an unknown kind.
    """
    reader = _open(path)
    fields = _fields(reader)
    for name, expected in SMOLLM.items():
        if fields.get(name) != expected:
            raise ValueError(f"{str(path)!r} must have {name}={expected!r}, but got {fields.get(name)!r}")
    return _load_smollm(reader, fields)


def _load_smollm(
    reader: Any, fields: Fields
) -> tuple[LlamaConfig, dict[str, torch.Tensor], PreTrainedTokenizerFast]:  # fmt: skip
    state_dict = _read_weights(reader, fields)
    return _make_config(fields, tied="lm_head.weight" not in state_dict), state_dict, _make_tokenizer(fields)


def _fields(reader: Any) -> Fields:
    return Fields({name: field.contents() for name, field in reader.fields.items()})


def _stretch(reader: Any, fields: Fields) -> str | None:
    """What stretches the rotary embedding of a file of any architecture, if anything does."""
    rope = f"{fields['general.architecture']}.rope."
    kind = fields.get(f"{rope}scaling.type", "linear")
    factor = fields.get(f"{rope}scaling.factor", fields.get(f"{rope}scale_linear", 0.0))
    if kind != "none" and factor not in (0.0, 1.0):
        return f"one of type {kind!r} and factor {factor}"
    return next((f"the tensor {tensor.name!r}" for tensor in reader.tensors if tensor.name.startswith("rope_")), None)


def _open(path: str | PathLike[str]) -> Any:
    if not Path(path).is_file():  # said before the package is missed, which would not help
        raise FileNotFoundError(f"{str(path)!r} must be a GGUF file, but there is no such file")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading a GGUF file needs the package gguf: pip install gguf") from error

    class PlainReader(GGUFReader):
        """Reads through a plain array: slicing a numpy memmap, a hundred thousand times here, takes twice as long."""

        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._plain = mapped.view(np.ndarray)

    try:
        return PlainReader(path)
    except (ValueError, IndexError) as error:  # what a read past the end looks like
        raise ValueError(f"{str(path)!r} must be a complete GGUF file, but: {error}") from error


def _read_weights(reader: Any, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": _key_heads(fields)}
    state_dict = {}
    for tensor in reader.tensors:
        try:
            weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        except NotImplementedError as error:
            raise ValueError(
                f"tensor {tensor.name!r} must have a storage type that gguf reads, but: {error}"
            ) from error
        if tensor.name in TOP_NAMES:
            state_dict[TOP_NAMES[tensor.name]] = weight
            continue
        # blk.<layer>.<name>.weight
        block, layer, name, suffix = (tensor.name.split(".") + [""] * 4)[:4]
        if block != "blk" or name not in LAYER_NAMES or suffix != "weight":
            raise ValueError(
                f"unexpected tensor {tensor.name!r}, expected blk.N.NAME.weight with NAME in {[*LAYER_NAMES]}"
            )
        if name in heads:
            weight = _undo_rotary_permutation(weight, heads[name])
        state_dict[f"model.layers.{layer}.{LAYER_NAMES[name]}.weight"] = weight
    return state_dict


def _key_heads(fields: dict[str, Any]) -> int:
    return fields.get("llama.attention.head_count_kv", fields["llama.attention.head_count"])


def _undo_rotary_permutation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring pairs (2i, 2i + 1) of a head; transformers rotates (i, i + D / 2)."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()


def _make_config(fields: dict[str, Any], tied: bool) -> LlamaConfig:
    # stored as fp32: its shortest decimal is the number that was meant (1e-05)
    eps = float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"])))
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=_key_heads(fields),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=eps,
        rope_parameters=_make_rope(fields),
        tie_word_embeddings=tied,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _make_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """A file's rotary embedding and how it is stretched, with llama.cpp's defaults."""
    head_dim = fields["llama.embedding_length"] // fields["llama.attention.head_count"]
    rotated = fields.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ValueError(f"llama.rope.dimension_count must be the {head_dim} of a whole head, but is {rotated}")
    theta = {"rope_theta": float(fields.get("llama.rope.freq_base", 10_000.0))}
    scaling = {"factor": fields.get("llama.rope.scale_linear", 0.0)}  # its name in the first files
    scaling |= {name.removeprefix(SCALING): value for name, value in fields.items() if name.startswith(SCALING)}
    scaling.pop("finetuned", None)  # how it was trained, which changes nothing here
    kind, factor = scaling.pop("type", "linear"), float(scaling.pop("factor"))
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{SCALING}type must be 'none', 'linear' or 'yarn', but got {kind!r}")
    original = scaling.pop("original_context_length", fields["llama.context_length"])
    if kind == "none" or factor in (0.0, 1.0):
        return {"rope_type": "default", **theta}
    stretch = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        stretch["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if f"yarn_{name}" in scaling:
                stretch[name] = float(scaling.pop(f"yarn_{name}"))
    if scaling:
        raise ValueError(f"{SCALING}{min(scaling)} must be absent with type {kind!r}: it is not supported")
    return {**theta, **stretch}


def _make_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """SmolLM's byte-level BPE. Digits are split one by one first, a step that generic GGUF conversions leave out."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds) if kind == CONTROL_TOKEN]
    )
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {f"{ours}_token": fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    special = {name: tokens[token] for name, token in ids.items() if token is not None}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast
