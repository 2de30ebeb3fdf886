"""What cannot be loaded is refused before any weight is read; the error names it, what was expected and what came."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from orthrus_triton.models import OrthrusConfig, OrthrusForCausalLM, checkpoint
from orthrus_triton.models.families import FAMILIES
from orthrus_triton.models.language_model import INSIDE
from tests.models.tiny_bases import base_config, build_base

LAYER = "model.layers.1."


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    build_base(base_config("qwen3")).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def no_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_or_allocate(*_args: object, **_options: object) -> None:
        raise AssertionError("weights were touched before the check")

    monkeypatch.setattr(checkpoint, "copy_weights", read_or_allocate)
    monkeypatch.setattr(OrthrusForCausalLM, "to_empty", read_or_allocate)


def edit_config(folder: Path, **changes: object) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(f"{LAYER}mlp.up_proj.weight"), rf"missing tensor '{LAYER}mlp.up_proj.weight', expected shape \(96, 64\)"),
        (drop("lm_head.weight"), r"missing tensor 'lm_head.weight', expected shape \(101, 64\)"),
        (
            put(f"{LAYER}self_attn.k_norm.weight", torch.ones(16)),
            rf"'{LAYER}self_attn.k_norm.weight' must have shape \(32,\), but got \(16,\)",
        ),
        (
            put(f"{LAYER}self_attn.q_proj.bias", torch.ones(128)),
            rf"unexpected tensor '{LAYER}self_attn.q_proj.bias' of shape \(128,\)",
        ),
        (
            put("model.norm.weight", torch.ones(64, dtype=torch.int8)),
            r"'model.norm.weight' must have a dtype of \[.*BF16.*\], but got I8",
        ),
        (put("model.layers.2.mlp.up_proj.weight", torch.ones(96, 64)), r"unexpected tensor 'model.layers.2.mlp"),
    ],
)
@pytest.mark.usefixtures("no_data_is_read")
def test_tensors_that_do_not_fit_are_named(edit: Callable, message: str, base_folder: Path):
    edit_weights(base_folder, edit)
    with pytest.raises(ValueError, match=message):
        OrthrusForCausalLM.from_base(base_folder)


@pytest.mark.usefixtures("no_data_is_read")
def test_many_misfits_are_counted_not_listed(base_folder: Path):
    edit_config(base_folder, hidden_size=32)
    with pytest.raises(ValueError, match=r"must have shape[\s\S]*and \d+ more") as error:
        OrthrusForCausalLM.from_base(base_folder)
    assert len(str(error.value).splitlines()) == 12


def test_a_view_that_is_missing_from_a_dual_view_checkpoint_is_named(tmp_path: Path):
    OrthrusForCausalLM.from_base(build_base(base_config("qwen3"))).save_pretrained(tmp_path / "saved")
    edit_weights(tmp_path / "saved", drop(f"{LAYER}self_attn.v_proj_diff.weight"))
    with pytest.raises(ValueError, match=rf"missing tensor '{LAYER}self_attn.v_proj_diff.weight'"):
        OrthrusForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path):
    build_base(base_config("llama biases, wide heads, tied")).save_pretrained(tmp_path)
    edit_weights(tmp_path, put("lm_head.weight", torch.ones(101, 64)))
    with pytest.raises(ValueError, match=r"tie_word_embeddings must be false .* when lm_head.weight differs"):
        OrthrusForCausalLM.from_base(tmp_path)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be one of .*'silu', 'gelu_pytorch_tanh'.*but got 'gelu'"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation must be one of .* but got 'relu'"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping must be absent.* but got 30.0"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive, but got 0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be absent.* got True"),
        ("qwen3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config must be absent"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
            "rope_parameters: the rotation must cover head_dim=16, but covers 8",
        ),
        (
            "glm",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.35}},
            "partial_rotary_factor must give an even number of a head's 32 numbers, but 0.35 gives 11",
        ),
        (
            "glm",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2.0}},
            "partial_rotary_factor must give an even number of a head's 32 numbers, but 2.0 gives 64",
        ),
        (
            "glm",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic' must rotate whole heads, but got .*'partial_rotary_factor': 0.5",
        ),
        (
            "smollm3",
            {"no_rope_layers": [1, 0]},
            r"no_rope_layers must hold a 0 or a 1 for each of 3 layers, but got \[1, 0\]|config must be readable as",
        ),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type must be one of .* got 'spiral'"),
        (
            "qwen2",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            # some versions of transformers refuse it first
            "rope_parameters must be one set for all layers|config must be readable as that of a qwen2, but",
        ),
        (
            "qwen3",
            {"layer_types": ["chunked_attention", "full_attention"]},
            r"layer_types must hold full_attention or sliding_attention .* got \['chunked_attention'\]",
        ),
        ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding_window must be set"),
        (
            "mistral window",
            {"layer_types": ["full_attention"] * 2},
            "layer_types must hold sliding_attention in a mistral",
        ),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier must be a positive number, but got 0.0"),
        ("granite", {"attention_multiplier": -0.1}, "attention_multiplier must be a positive number, but got -0.1"),
        ("granite", {"logits_scaling": 6.0}, "logits_scaling must be a power of two, .* but got 6.0"),
        ("llama", {"sliding_window": 8}, "sliding_window must be absent from a llama config, but got 8"),
        ("qwen3", {"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads=4, but got 3"),
    ],
)
@pytest.mark.usefixtures("no_data_is_read")
def test_options_that_are_not_implemented_are_named(case: str, changes: dict, message: str, tmp_path: Path):
    build_base(base_config(case)).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        OrthrusForCausalLM.from_base(tmp_path)


@pytest.mark.parametrize("family", ["ernie4_5", "granite", "gemma3_text", "olmo2"])
def test_a_checkpoint_whose_weights_lie_as_a_bases_do_is_not_read_as_ours(family: str):
    with pytest.raises(ValueError, match=f"model_type must be 'orthrus' in a dual-view checkpoint of a {family}"):
        OrthrusConfig.from_dict({"model_type": family, "block_size": 4, "mask_token_id": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_token_id": 101}, r"mask_token_id must be in 0\.\.100, but got 101"),
        ({"mask_token_id": -1}, r"mask_token_id must be in 0\.\.100, but got -1"),
        ({"block_size": 1}, "block_size must be an integer >= 2, but got 1"),
        ({"view_rank": 0}, "view_rank must be an integer >= 1 or None, but got 0"),
        ({"mask_token_id": True}, "mask_token_id must be .* but got True"),
        ({"view_rank": True}, "view_rank must be an integer >= 1 or None, but got True"),
        ({"anchor_view": "both"}, "anchor_view must be 'diffusion' or 'ar', but got 'both'"),
    ],
)
@pytest.mark.usefixtures("no_data_is_read")
def test_options_out_of_range_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        OrthrusForCausalLM.from_base(build_base(base_config("qwen3")), **options)
    with pytest.raises(TypeError, match="dtype must be a floating torch.dtype or None, but got torch.int8"):
        OrthrusForCausalLM.from_base(build_base(base_config("qwen3")), dtype=torch.int8)


def test_a_published_config_without_a_mask_token_is_refused():
    fields = {"model_type": "qwen3", "block_size": 8, **base_config("qwen3").to_dict()}
    with pytest.raises(ValueError, match=r"mask_token_id must be in 0\.\.100, but got None"):
        OrthrusConfig.from_dict(fields)


def test_unsupported_architectures_are_named(tmp_path: Path):
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    message = re.escape(f"must have a model_type of {[*FAMILIES, *INSIDE]}, but got 'gpt2'")
    with pytest.raises(ValueError, match=f"'GPT2LMHeadModel' {message}"):
        OrthrusForCausalLM.from_base(other)
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        OrthrusForCausalLM.from_base(tmp_path)
    with pytest.raises(TypeError, match="model_or_path must be .* but got a int"):
        OrthrusForCausalLM.from_base(7)
    edit_config(tmp_path, block_size=4, mask_token_id=3)
    with pytest.raises(ValueError, match=r"base_model_type must be one of \['ernie4_5'.* but got 'gpt2'"):
        OrthrusForCausalLM.from_pretrained(tmp_path)


def test_base_and_dual_view_checkpoints_are_not_confused(base_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="block_size must be set .* plain 'qwen3' .*OrthrusForCausalLM.from_base"):
        OrthrusForCausalLM.from_pretrained(base_folder)
    model = OrthrusForCausalLM.from_base(base_folder)
    model.save_pretrained(tmp_path / "saved")
    for dual_view in (model, tmp_path / "saved"):
        with pytest.raises(ValueError, match="must be a base model, but it has a second view: use from_pretrained"):
            OrthrusForCausalLM.from_base(dual_view)
    edit_config(base_folder, block_size=8, mask_token_id=1)
    with pytest.raises(ValueError, match="must be a base model"):
        OrthrusForCausalLM.from_base(base_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickle_is_refused_with_the_way_out(name: str, base_folder: Path):
    (base_folder / "model.safetensors").rename(base_folder / name)
    with pytest.raises(ValueError, match=rf"only pickle files \({re.escape(name)}\).*refused[\s\S]*save_pretrained"):
        OrthrusForCausalLM.from_base(base_folder)


def test_folders_without_the_files_they_need(base_folder: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no folder '.*/nothing/here'"):
        OrthrusForCausalLM.from_base(tmp_path / "nothing" / "here")
    with pytest.raises(NotADirectoryError, match="config.json' is a file"):
        OrthrusForCausalLM.from_base(base_folder / "config.json")
    (base_folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors or model.safetensors.index.json must be in"):
        OrthrusForCausalLM.from_base(base_folder)
    (base_folder / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="config.json' must hold JSON, but"):
        OrthrusForCausalLM.from_base(base_folder)
    (base_folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json' must hold a JSON object, but got a list"):
        OrthrusForCausalLM.from_base(base_folder)
    (base_folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json must be in a checkpoint folder"):
        OrthrusForCausalLM.from_base(base_folder)


def test_what_a_loader_passes_is_heeded_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = OrthrusForCausalLM.from_base(build_base(base_config("llama")), block_size=8)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.block_size = 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path, config=config).block_size == 4
    config.block_size = 1
    with pytest.raises(ValueError, match="block_size must be"):
        OrthrusForCausalLM.from_pretrained(tmp_path, config=config)
    with pytest.raises(TypeError, match="config must be an OrthrusConfig or None, but got a dict"):
        OrthrusForCausalLM.from_pretrained(tmp_path, config={})
    with pytest.raises(ValueError, match="revision is not an option"):
        OrthrusForCausalLM.from_pretrained(tmp_path, revision="other")
    asked = {}
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda name, **options: asked.update(options) or tmp_path)
    OrthrusForCausalLM.from_pretrained("someone/tiny", token="secret", local_files_only=True)
    assert asked["token"] == "secret" and asked["local_files_only"]


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch: pytest.MonkeyPatch):
    def offline(*_args: object, **_options: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match="no local folder 'someone/tiny'.* could not be had from the hub: offline"
    ):
        OrthrusForCausalLM.from_base("someone/tiny")


def test_a_truncated_file_is_named(base_folder: Path):
    path = base_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors' must be a complete safetensors file"):
        OrthrusForCausalLM.from_base(base_folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"lm_head.weight": "model-00009-of-00009.safetensors"},
            FileNotFoundError,
            "'model-00009-of-00009.safetensors'",
        ),
        ({"lm_head.weight": "../other.safetensors"}, ValueError, "in its own folder, but got '../other.safetensors'"),
        ({"lm_head.weight": "pytorch_model.bin"}, ValueError, "in its own folder, but got 'pytorch_model.bin'"),
        ({"extra.weight": "model-00001-of-"}, ValueError, "holds 'extra.weight', but it does not"),
    ],
)
def test_an_index_that_disagrees_with_its_files(change: dict, error: type[Exception], message: str, tmp_path: Path):
    build_base(base_config("qwen3")).save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    first = min(index["weight_map"].values())
    index["weight_map"] |= {name: first if first.startswith(file) else file for name, file in change.items()}
    (tmp_path / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        OrthrusForCausalLM.from_base(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path: Path):
    """Which of the two is meant, nobody knows."""
    build_base(base_config("qwen3")).save_pretrained(tmp_path, max_shard_size="40KB")
    first, *_, last = sorted(tmp_path.glob("model-*.safetensors"))
    repeated = next(iter(load_file(first).items()))
    save_file(load_file(last) | dict([repeated]), last)
    with pytest.raises(ValueError, match=f"tensor {repeated[0]!r} must be in one file, but .* repeats it"):
        OrthrusForCausalLM.from_base(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_frozen_vocabulary_is_not_resized(tied: bool):
    model = OrthrusForCausalLM.from_base(build_base(base_config("llama", tie_word_embeddings=tied)), block_size=4)
    with pytest.raises(NotImplementedError, match="resize_token_embeddings must be called on the base model"):
        model.resize_token_embeddings(120)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3).shape == (1, 5)
