"""Bases whose matrices are fused or whose rows are in another order: from a folder as from a model, and what is wrong
is said in the file's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.base_weights import FUSED, row_order
from tests.models.tiny_bases import base_config, build_base, random_ids


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
@pytest.mark.parametrize(
    "case",
    [
        "phi3",
        "phi3 partial longrope",
        "glm",
        "glm4",
        "granite",
        "exaone4",
        "olmo2",
        "gemma3",
        "ernie4_5 biases, untied",
    ],
)
def test_a_folder_gives_the_model_that_its_object_gives(case: str, max_shard_size: str, tmp_path: Path):
    base = build_base(base_config(case))
    base.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    held = [name for path in tmp_path.glob("*.safetensors") for name in load_file(path)]
    fused = {"phi3": 2, "glm": 1, "glm4": 1}.get(base.config.model_type, 0)
    assert sum(FUSED.fullmatch(name) is not None for name in held) == fused * base.config.num_hidden_layers
    of_folder, of_object = (OrthrusForCausalLM.from_base(source).state_dict() for source in (tmp_path, base))
    assert of_folder.keys() == of_object.keys()
    assert all(torch.equal(tensor, of_object[name]) for name, tensor in of_folder.items())


def test_rows_of_a_head_are_in_another_order_where_other_pairs_are_rotated():
    assert row_order(32, 32, neighbours=False) is None
    assert row_order(32, 32, neighbours=True).tolist() == [*range(0, 32, 2), *range(1, 32, 2)]
    halves = [*range(0, 16, 2), *range(16, 24)], [*range(1, 16, 2), *range(24, 32)]
    assert row_order(32, 16, neighbours=True).tolist() == [*halves[0], *halves[1]]
    for case, same in (("phi3", True), ("phi3 partial", False)):
        base = build_base(base_config(case))
        fused = base.state_dict()["model.layers.0.self_attn.qkv_proj.weight"].split([64, 32, 32])
        state = OrthrusForCausalLM.from_base(base).state_dict()
        ours = [state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
        assert [torch.equal(a, b) for a, b in zip(ours, fused)] == [same, same, True]
        assert all(
            torch.equal(a.view(-1, 16, 64).sort(1)[0], b.view(-1, 16, 64).sort(1)[0]) for a, b in zip(ours, fused)
        )


@pytest.mark.parametrize(
    ("name", "rows"), [("self_attn.qkv_proj", 127), ("self_attn.qkv_proj", 0), ("mlp.gate_up_proj", 190)]
)
def test_a_matrix_of_other_rows_is_named_as_in_the_file(name: str, rows: int, tmp_path: Path):
    build_base(base_config("phi3")).save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), f"model.layers.1.{name}.weight"
    save_file({**tensors, name: torch.zeros(rows, 64)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"(?s)does not hold the weights .*unexpected tensor '{name}' of shape \({rows}"
    ):
        OrthrusForCausalLM.from_base(tmp_path)


def test_a_low_rank_view_drafts_over_parts_of_a_fused_matrix():
    model = OrthrusForCausalLM.from_base(build_base(base_config("phi3 window, tied")), block_size=4, view_rank=2)
    output = model.generate(random_ids(6), max_new_tokens=12, do_sample=False)
    plain = model.generate(random_ids(6), max_new_tokens=12, do_sample=False, use_diffusion_mode=False)
    assert output.shape[1] > 6 and torch.equal(output, plain)
