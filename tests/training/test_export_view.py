"""`export-view`: from a model and from a checkpoint, and what is neither."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from orthrus_triton.cli import app
from orthrus_triton.models import demo
from orthrus_triton.models.view import load_view, read_view_config, save_view
from orthrus_triton.models.view_checkpoint import checkpoint_metadata, load_checkpoint_view, read_checkpoint_metadata
from tests.models.tiny_bases import randomise_view
from tests.training.test_view_file import K, fresh, make_model, view_of, worst_error


def export(*arguments: object):
    return CliRunner().invoke(app, ["export-view", *map(str, arguments)])


def content_of(path) -> tuple[dict, dict]:
    """Metadata, whose order in a file is any, and tensors."""
    tensors = {name: (tensor.dtype, tensor.tolist()) for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        return file.metadata(), tensors


def test_export_from_a_model_and_from_a_checkpoint(tmp_path, monkeypatch):
    trained = make_model("llama")
    trained.save_pretrained(tmp_path / "model")
    out = tmp_path / "out" / "v.safetensors"
    result = export(tmp_path / "model", out, "--rank", 8, "--storage", "fp16")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert f"{out.stat().st_size / 1e6:.2f} MB, rank 8, fp16" in " ".join(result.stderr.split())
    for size, options in ((K, {"rank": 8, "storage": "fp16"}), (K - 1, {"storage": "bf16"})):
        trained.config.block_size = size
        save_view(trained, tmp_path / "direct.safetensors", **options)
        named = [part for name, value in options.items() for part in (f"--{name}", value)]
        result = export(tmp_path / "model", out, *named, "--block-size", size)
        assert result.exit_code == 0 and content_of(out) == content_of(tmp_path / "direct.safetensors")
    # what the trainer leaves: the view alone, under a prefix
    trained = make_model("llama", mask_embedding=True)
    (tmp_path / "checkpoint-3").mkdir()
    view = {f"orthrus.{name}": tensor.clone() for name, tensor in view_of(trained).items()}
    save_file(view, tmp_path / "checkpoint-3" / "model.safetensors")

    def load_copy(block_size, view, mask_embedding):
        assert (block_size, view, mask_embedding) == (K, "copy", True)
        return fresh(trained), None

    monkeypatch.setattr(demo, "load_demo_model", load_copy)
    result = export(tmp_path / "checkpoint-3", out, "--block-size", K)
    assert result.exit_code == 0, (result.stderr, result.exception)
    model = fresh(trained)
    load_view(model, out)
    assert worst_error(model, trained) < 0.005
    assert torch.equal(model.model.mask_embedding_diff, trained.model.mask_embedding_diff)


def test_a_checkpoint_of_any_model_goes_over_the_one_it_began_with(tmp_path, monkeypatch):
    began_with = make_model("llama", anchor_view="ar")
    began_with.save_pretrained(tmp_path / "base")
    trained = randomise_view(copy.deepcopy(began_with), scale=0.1)
    trained.add_mask_embedding()
    trained.add_chain(5)
    (tmp_path / "checkpoint-3").mkdir()
    view = {f"orthrus.{name}": tensor.clone() for name, tensor in view_of(trained).items()}
    metadata = checkpoint_metadata(trained, K - 1)
    save_file(view, tmp_path / "checkpoint-3" / "model.safetensors", metadata)
    monkeypatch.setattr(demo, "load_demo_model", lambda **_: (make_model("qwen3"), None))
    result = export(tmp_path / "checkpoint-3", tmp_path / "v.safetensors")
    assert result.exit_code == 2 and "of another model than the demo model? See --base" in " ".join(
        result.stderr.split()
    )
    other = copy.deepcopy(began_with)  # of the same shapes
    other.model.layers[1].mlp.down_proj.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    result = export(tmp_path / "checkpoint-3", tmp_path / "v.safetensors", "--base", tmp_path / "other")
    assert result.exit_code == 2 and "was trained over other base weights than these" in " ".join(result.stderr.split())
    assert not (tmp_path / "v.safetensors").exists()
    with pytest.raises(ValueError, match=f"was trained with mask_token_id={began_with.mask_token_id}, not 0"):
        other.config.mask_token_id = 0
        load_checkpoint_view(other, tmp_path / "checkpoint-3" / "model.safetensors")
    result = export(tmp_path / "base", tmp_path / "v.safetensors", "--base", tmp_path / "base")
    assert result.exit_code == 2 and "--base is for checkpoints" in result.stderr
    result = export(tmp_path / "checkpoint-3", tmp_path / "v.safetensors", "--base", tmp_path / "base")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert read_view_config(tmp_path / "v.safetensors")["block_size"] == K - 1
    model = fresh(trained)
    model.config.block_size = K - 1
    load_view(model, tmp_path / "v.safetensors")
    assert worst_error(model, trained) < 0.005 and model.config.anchor_view == "ar"


def test_a_file_of_something_else_is_no_checkpoint(tmp_path):
    """Whatever its metadata and its tensors are called."""
    weights = tmp_path / "model.safetensors"
    save_file({"bias": torch.ones(2)}, weights, metadata={"format": "pt", "made_by": "another program"})
    assert read_checkpoint_metadata(weights) == {"mask_embedding": False}
    with pytest.raises(ValueError, match=r"must hold 'bias' with shape None, but has \(2,\)"):
        load_checkpoint_view(make_model("llama"), weights)


def test_export_names_bad_input(tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "run").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "run" / "model.safetensors", checkpoint_metadata(make_model("llama"), K))
    for arguments, complaint in (
        ((tmp_path / "model", tmp_path / "v.bin"), "OUT"),
        ((tmp_path / "none", tmp_path / "v.safetensors"), "MODEL"),
        ((tmp_path / "model", tmp_path / "v.safetensors", "--block-size", K + 1), "--block-size"),
        ((tmp_path / "model", tmp_path / "v.safetensors", "--max-mb", 0.01), "at most 0.01 MB"),
        ((tmp_path / "run", tmp_path / "v.safetensors", "--base", tmp_path / "gone"), "--base must be the folder of"),
    ):
        result = export(*arguments)
        assert result.exit_code == 2 and complaint in result.stderr, (result.stderr, result.exception)
    assert not (tmp_path / "v.safetensors").exists()
