"""Checkpoints: what is saved comes back bit for bit, in the layout of the published ones, complete or not at all."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

from orthrus_triton.models import OrthrusConfig, OrthrusForCausalLM, checkpoint
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view, tiny_tokenizer

TIED = "qwen3 biases, tied, window by layer types"


def build(case: str = "qwen3", **options) -> OrthrusForCausalLM:
    return randomise_view(OrthrusForCausalLM.from_base(build_base(base_config(case)), block_size=6, **options))


def assert_same_weights(a: OrthrusForCausalLM, b: OrthrusForCausalLM) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}  # as transformers writes it
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return shapes


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("view_rank", [None, 4])
@pytest.mark.parametrize(
    "case",
    [
        "qwen3",
        TIED,
        "llama biases, wide heads, tied",
        "qwen2",
        "mistral window",
        "gemma3",
        "glm",
        "phi3 partial longrope",
        "smollm3",
        "granite",
        "exaone4",
        "glm4",
        "olmo2",
        "olmo3 yarn",
    ],
)
def test_round_trip_gives_identical_weights_and_logits(
    case: str, view_rank: int | None, max_shard_size: str, tmp_path: Path
):
    model = build(case, view_rank=view_rank, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    assert (tmp_path / "saved" / checkpoint.INDEX).exists() == (max_shard_size == "40KB")
    loaded = OrthrusForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_weights(model, loaded)
    assert loaded.dtype == torch.bfloat16 and loaded.config.to_json_string() == model.config.to_json_string()
    ids = random_ids(6)
    for view in ("ar", "diffusion"):
        assert torch.equal(*(one(ids, view=view, impl="torch").logits for one in (model, loaded)))


def test_dtype_on_loading_overrides_the_file(tmp_path: Path):
    model = build()
    model.save_pretrained(tmp_path / "saved")
    assert OrthrusForCausalLM.from_pretrained(tmp_path / "saved").dtype == torch.float32
    loaded = OrthrusForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert_same_weights(model.to(torch.bfloat16), loaded)


def test_weights_gathered_elsewhere_can_be_saved(tmp_path: Path):
    """What transformers' Trainer does: it hands over a state dict, and the folder exists already."""
    model = build()
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    assert all(
        torch.equal(tensor, gathered[name])
        for name, tensor in OrthrusForCausalLM.from_pretrained(tmp_path).state_dict().items()
    )


def test_only_the_view_is_trainable_after_loading(tmp_path: Path):
    build().save_pretrained(tmp_path / "saved")
    for model in (build(), OrthrusForCausalLM.from_pretrained(tmp_path / "saved")):
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            name for name, _ in model.named_parameters() if "_diff" in name
        }
        assert not model.training


@pytest.mark.parametrize("case", ["qwen3", TIED])
def test_what_is_saved_is_the_published_layout(case: str, tmp_path: Path):
    config = base_config(case)
    build(case).save_pretrained(tmp_path / "saved")
    base = {name: tuple(tensor.shape) for name, tensor in Qwen3ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del base["lm_head.weight"]
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    view = {}
    for name, shape in base.items():
        *path, kind, parameter = name.split(".")
        if kind in kinds:
            view[".".join([*path, f"{kind}_diff", parameter])] = shape
    biases = 4 if config.attention_bias else 0
    assert len(view) == config.num_hidden_layers * (len(kinds) + biases)
    assert saved_shapes(tmp_path / "saved") == base | view
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert fields["model_type"] == "orthrus" and fields["base_model_type"] == "qwen3"
    assert fields["block_size"] == 6 and fields["mask_token_id"] == 100
    # every field that Qwen3Config itself would have written
    written = json.loads(config.to_json_string())
    del written["model_type"], written["transformers_version"]
    assert {name: fields.get(name) for name in written} == written


@pytest.mark.parametrize("model_type", ["qwen3", "orthrus"])
def test_a_published_checkpoint_loads(model_type: str, tmp_path: Path):
    """Written here by hand: Qwen3's tensors, `_diff` twins, and a config without any field of our own."""
    base = build_base(base_config("qwen3"))
    tensors, generator = {}, torch.Generator().manual_seed(5)
    for name, tensor in base.state_dict().items():
        tensors[name] = tensor.clone()
        if ".self_attn." in name:
            tensors[name.replace(".weight", "_diff.weight")] = torch.randn(tensor.shape, generator=generator)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = {**json.loads(base.config.to_json_string()), "block_size": 32, "mask_token_id": 99}
    fields |= {"model_type": model_type, "architectures": ["OrthrusLM"], "torch_dtype": "bfloat16"}
    fields.pop("dtype", None)
    fields["auto_map"] = {"AutoModelForCausalLM": "model.OrthrusLM"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = OrthrusForCausalLM.from_pretrained(tmp_path)
    assert (model.block_size, model.mask_token_id, model.config.base_model_type) == (32, 99, "qwen3")
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "auto_map")
    assert model.state_dict().keys() == tensors.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name].bfloat16()), name


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize("case", ["qwen3", TIED])
def test_a_folder_and_a_model_object_give_the_same_view(case: str, max_shard_size: str, tmp_path: Path):
    base = build_base(base_config(case), torch.bfloat16)
    base.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    from_folder = OrthrusForCausalLM.from_base(tmp_path, block_size=4)
    assert_same_weights(OrthrusForCausalLM.from_base(base, block_size=4), from_folder)
    for name, tensor in from_folder.state_dict().items():
        if "_diff" in name:
            assert torch.equal(tensor, from_folder.state_dict()[name.replace("_diff", "")]), name
        elif name != "lm_head.weight":
            assert torch.equal(tensor, base.state_dict()[name]), name


@pytest.mark.parametrize(("named", "expected"), [("float16", torch.float16), (None, torch.bfloat16)])
def test_a_base_comes_in_the_dtype_its_config_names_else_in_that_of_its_weights(named, expected, tmp_path: Path):
    build_base(base_config("llama"), torch.bfloat16).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields.pop("dtype") == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(fields | ({"dtype": named} if named else {})))
    assert OrthrusForCausalLM.from_base(tmp_path).dtype == expected


def test_a_base_model_object_keeps_its_generation_config():
    base = build_base(base_config("llama"))
    OrthrusForCausalLM.from_base(base).generation_config.max_new_tokens = 7
    assert base.generation_config.max_new_tokens is None


def test_redundant_tensors_of_old_files_are_left_out(tmp_path: Path):
    base = build_base(base_config("llama biases, wide heads, tied"))
    base.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_weights(OrthrusForCausalLM.from_base(tmp_path), OrthrusForCausalLM.from_base(base))


def test_stop_tokens_come_from_the_generation_config_first(tmp_path: Path):
    build_base(base_config("qwen3", eos_token_id=7)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert OrthrusForCausalLM.from_base(tmp_path).eos_token_ids == [7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.6}))
    model = OrthrusForCausalLM.from_base(tmp_path)
    assert model.eos_token_ids == [7, 9]
    model.save_pretrained(tmp_path / "saved")
    assert OrthrusForCausalLM.from_pretrained(tmp_path / "saved").eos_token_ids == [7, 9]


def test_the_tokenizer_is_saved_beside_the_weights_and_autoclasses_read_the_folder(tmp_path: Path):
    model, tokenizer = build(), tiny_tokenizer(list(range(50)))
    model.save_pretrained(tmp_path / "saved", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    assert isinstance(config, OrthrusConfig) and config.block_size == 6
    modes = {path.stat().st_mode for path in (tmp_path / "saved").iterdir() if path.suffix in (".json", ".safetensors")}
    assert len(modes) == 1, "weights must be as readable as the config"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_over_an_earlier_checkpoint_leaves_no_stale_weights(tmp_path: Path):
    first, second = build(), build("qwen2")
    first.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    for mine in ("notes.txt", "model.safetensors.before"):
        (tmp_path / "saved" / mine).write_text("mine")
    second.save_pretrained(tmp_path / "saved")
    assert_same_weights(OrthrusForCausalLM.from_pretrained(tmp_path / "saved"), second)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "model.safetensors.before", "notes.txt",
    }  # fmt: skip


def test_a_tokenizer_with_several_templates_is_saved_over_itself(tmp_path: Path):
    """transformers writes all but the first into a folder."""
    model, tokenizer = build(), tiny_tokenizer(list(range(50)))
    for text in ("w5", "w6"):
        tokenizer.chat_template = {"default": "w4", "tool_use": text}
        model.save_pretrained(tmp_path / "saved", tokenizer=tokenizer)
        assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == tokenizer.chat_template
    assert any(path.is_dir() for path in (tmp_path / "saved").iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_save_leaves_nothing_half_written(exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "saved"
    if exists:
        build().save_pretrained(folder, max_shard_size="40KB")
    before = files(folder) if exists else None
    written = []

    def save_two_then_ctrl_c(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_two_then_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        build("qwen2").save_pretrained(folder, max_shard_size="40KB")
    assert len(written) == 2
    assert (files(folder) if exists else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["saved"] if exists else [])


def test_a_hub_id_downloads_weights_config_and_tokenizer_and_no_code_or_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build().save_pretrained(tmp_path / "snapshot")
    asked = []

    def snapshot_download(repo_id: str, allow_patterns: list[str], **options: object) -> str:
        asked.append((repo_id, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    assert_same_weights(OrthrusForCausalLM.from_pretrained("someone/Orthrus-tiny"), build())
    ((repo_id, patterns),) = asked
    assert repo_id == "someone/Orthrus-tiny"

    def wanted(name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    for name in ("config.json", "generation_config.json", "model.safetensors", "model-00001-of-00002.safetensors",
                 "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
                 "merges.txt", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
                 "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):  # fmt: skip
        assert wanted(name), name
    for name in ("pytorch_model.bin", "modeling_orthrus.py", "consolidated.00.pth", "original/params.json",
                 "training_args.bin", "model.onnx"):  # fmt: skip
        assert not wanted(name), name
