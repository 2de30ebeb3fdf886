"""`orthrus-triton convert`: what becomes of a base model, and what is refused."""

from __future__ import annotations

import json
import shutil

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from orthrus_triton.models import OrthrusForCausalLM
from tests.cli_models import (
    CHAT_TEMPLATE,
    assert_bad_input,
    run,
)


def test_convert_keeps_the_ar_weights_and_copies_them_into_the_view(base_folder, model_folder):
    base = LlamaForCausalLM.from_pretrained(base_folder).state_dict()
    weights = OrthrusForCausalLM.from_pretrained(model_folder).state_dict()
    for name, tensor in base.items():
        assert torch.equal(weights[name], tensor), name
    views = [name for name in weights if "_diff" in name]
    assert len(views) == 2 * 4  # layers x (q, k, v, o)
    for name in views:
        assert torch.equal(weights[name], base[name.replace("_diff", "")]), name
    assert AutoTokenizer.from_pretrained(model_folder).chat_template == CHAT_TEMPLATE


def test_convert_options_reach_the_model(base_folder, tmp_path):
    target = tmp_path / "light"
    options = ("--view-rank", 3, "--mask-token-id", 0, "--dtype", "bf16", "--block-size", 6)
    result = run("convert", base_folder, target, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "" and "mask token 0" in result.stderr
    model = OrthrusForCausalLM.from_pretrained(target)
    assert (model.config.view_rank, model.mask_token_id, model.block_size) == (3, 0, 6)
    assert model.dtype == torch.bfloat16


def test_convert_finds_a_chat_template_in_a_file_of_its_own(base_folder, tmp_path):
    """As models have it that see images, too."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(base_folder, source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(source)
    for path in source.glob("chat_template*"):
        path.unlink()
    (source / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    assert AutoTokenizer.from_pretrained(source).chat_template is None
    assert run("convert", source, target).exit_code == 0
    assert AutoTokenizer.from_pretrained(target).chat_template == CHAT_TEMPLATE


def test_convert_refuses_a_target_that_is_not_empty_unless_forced(base_folder, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    assert_bad_input(run("convert", base_folder, tmp_path), "TARGET", "not empty", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert run("convert", base_folder, tmp_path, "--force").exit_code == 0
    assert note.read_text() == "mine" and (tmp_path / "model.safetensors").is_file()


def test_convert_bad_input(base_folder, model_folder, tmp_path):
    target = tmp_path / "target"
    file = tmp_path / "file"
    file.write_text("")
    assert_bad_input(run("convert", tmp_path / "missing", target), "missing")
    assert_bad_input(run("convert", tmp_path / "missing.gguf", target), "missing.gguf' must be a GGUF file")
    assert_bad_input(run("convert", base_folder, file), "TARGET", "is a file")
    for same in (base_folder, f"{base_folder}/../{base_folder.name}"):
        assert_bad_input(run("convert", base_folder, same, "--force"), "TARGET must not be SOURCE")
    assert_bad_input(run("convert", model_folder, target), "second view")
    assert_bad_input(run("convert", base_folder, target, "--block-size", 1), "block_size")
    assert_bad_input(run("convert", base_folder, target, "--view-rank", 0), "view_rank")
    assert_bad_input(run("convert", base_folder, target, "--mask-token-id", 10**6), "mask_token_id")
    bare = shutil.copytree(base_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert_bad_input(run("convert", bare, target), f"{bare} must have a tokenizer")
    assert not target.exists()
