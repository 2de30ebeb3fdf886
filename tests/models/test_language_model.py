"""The language model of a model that sees images, too: from the model, and from a folder by the names of either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

from orthrus_triton.models import OrthrusForCausalLM
from tests.models.tiny_bases import base_config, build_base, random_ids

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def build_whole(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "gemma3":
        text = base_config("gemma3", eos_token_id=None).to_dict()
        config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, eos_token_id=[2, 5])
        return Gemma3ForConditionalGeneration(config).eval()
    text = base_config("mistral").to_dict()
    config = Mistral3Config(text_config=text, vision_config={**VISION, "head_dim": 8}, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config).eval()


def rename_as_in_memory(folder: Path) -> None:
    """Files have the names of an older transformers, which the newer one translates."""
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.layers.") for name in tensors)
    renamed = {
        name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head.", "lm_head.")
        : tensor for name, tensor in tensors.items()
    }  # fmt: skip
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_it_says_what_the_whole_says_of_text(kind: str, tmp_path: Path):
    whole = build_whole(kind)
    whole.save_pretrained(tmp_path / "written")
    whole.save_pretrained(tmp_path / "renamed")
    rename_as_in_memory(tmp_path / "renamed")
    ids = random_ids(12, batch=2)
    expected = whole(ids).logits
    for source in (whole, tmp_path / "written", tmp_path / "renamed"):
        model = OrthrusForCausalLM.from_base(source, block_size=4)
        assert (model.lm_head is None) == (kind == "gemma3")
        assert model.config.base_model_type == {"gemma3": "gemma3_text", "mistral3": "mistral"}[kind]
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=0)
        if kind == "gemma3":
            assert model.config.eos_token_id == [2, 5]
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(OrthrusForCausalLM.from_pretrained(tmp_path / "ours")(ids).logits, model(ids).logits)


def edit_config(folder: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    for name in drop:
        fields.pop(name, None)
        fields["text_config"].pop(name, None)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def test_whether_the_head_is_tied_is_what_the_weights_say_where_the_file_does_not(tmp_path: Path):
    """As of Mistral Small 3.1: by the default of its class it would be tied."""
    whole = build_whole("mistral3")
    whole.save_pretrained(tmp_path)
    edit_config(tmp_path, drop=("tie_word_embeddings",))
    loaded = Mistral3ForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings
    ids = random_ids(5)
    for source in (loaded, tmp_path):
        model = OrthrusForCausalLM.from_base(source, block_size=4)
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=2e-4, rtol=0)


def test_a_head_that_the_file_promises_must_be_there(tmp_path: Path):
    build_whole("mistral3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("language_model.lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing tensor 'lm_head.weight'"):
        OrthrusForCausalLM.from_base(tmp_path)


def test_one_without_a_head_is_found_wanting():
    with pytest.raises(ValueError, match="'Gemma3Model' does not hold the weights"):
        OrthrusForCausalLM.from_base(build_whole("gemma3").model)


def test_a_quantised_one_is_refused_by_name(tmp_path: Path):
    build_whole("gemma3").save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(ValueError, match="quantization_config must be absent"):
        OrthrusForCausalLM.from_base(tmp_path)


def test_a_tensor_that_it_lacks_is_named(tmp_path: Path):
    build_whole("mistral3").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight") and "language" in name)
    tensors.pop(lost)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing tensor 'model.layers.1.mlp.down_proj.weight'"):
        OrthrusForCausalLM.from_base(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "text_config must describe a language model, but got None"),
        ({"text_config": {"model_type": "gemma2"}}, "must have a model_type of .*'gemma3'.* but got 'gemma2'"),
        ({"model_type": "llava"}, "must have a model_type of .*'gemma3', 'mistral3'.* but got 'llava'"),
    ],
)
def test_one_that_is_not_there_is_named(changes: dict, message: str, tmp_path: Path):
    build_base(base_config("gemma3")).save_pretrained(tmp_path)
    fields = {"model_type": "gemma3", "text_config": base_config("gemma3").to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        OrthrusForCausalLM.from_base(tmp_path)
