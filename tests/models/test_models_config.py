"""OrthrusConfig keeps the base's fields; the default mask token is a row that nothing else uses; a loader is heard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orthrus_triton.models import OrthrusConfig, OrthrusForCausalLM
from orthrus_triton.models.loading_options import loading_options
from tests.models.tiny_bases import CASES, base_config, build_base, tiny_tokenizer


@pytest.mark.parametrize("case", CASES)
def test_base_fields_survive_json_and_the_way_back(case: str):
    base = base_config(case)
    config = OrthrusConfig.from_base_config(base, block_size=8, mask_token_id=3, view_rank=4)
    again = OrthrusConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert (again.base_model_type, again.block_size, again.mask_token_id, again.view_rank) == (base.model_type, 8, 3, 4)
    assert again.base_config().to_dict() == base.to_dict()


def test_fields_left_out_take_the_family_defaults_and_old_rope_fields_are_read():
    config = OrthrusConfig.from_dict(
        {"model_type": "qwen3", "block_size": 32, "mask_token_id": 151669, "rope_theta": 1e6, "rope_scaling": None}
    )
    assert config.vocab_size == 151936 and config.attention_head_dim == 128 and config.rms_norm_eps == 1e-6
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    llama = OrthrusConfig.from_dict(
        {"model_type": "orthrus", "base_model_type": "llama", "block_size": 2, "mask_token_id": 0, "hidden_size": 128,
         "num_attention_heads": 4}
    )  # fmt: skip
    assert llama.num_key_value_heads == 4 and llama.attention_head_dim == 32


def test_a_base_config_may_name_its_mask_token():
    base = build_base(base_config("llama", mask_token_id=17))
    assert OrthrusForCausalLM.from_base(base).mask_token_id == 17
    assert OrthrusForCausalLM.from_base(base, mask_token_id=18).mask_token_id == 18


@pytest.mark.parametrize(
    ("token_ids", "fields", "expected"),
    [
        (list(range(90)), {"pad_token_id": 5}, 90),  # the first row behind the tokenizer
        ([i for i in range(101) if i != 40], {"pad_token_id": 5}, 40),  # a hole in it
        (list(range(1, 101)), {"pad_token_id": 5}, 0),
        (list(range(101)), {"pad_token_id": 5}, 5),  # no free row: padding
        (list(range(101)), {"pad_token_id": 2}, 100),  # which must not end sequences
        (list(range(101)), {"pad_token_id": 5, "eos_token_id": [2, 5]}, 100),
        (None, {"pad_token_id": 5}, 5),  # no tokenizer
        (None, {}, 100),
    ],
)
def test_the_default_mask_token_of_a_folder(token_ids: list[int] | None, fields: dict, expected: int, tmp_path: Path):
    build_base(base_config("qwen3", **fields)).save_pretrained(tmp_path)
    if token_ids is not None:
        tiny_tokenizer(token_ids).save_pretrained(tmp_path)
    assert OrthrusForCausalLM.from_base(tmp_path).mask_token_id == expected


def test_stop_tokens_of_the_generation_config_rule_out_padding_as_mask(tmp_path: Path):
    build_base(base_config("qwen3", pad_token_id=5)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert OrthrusForCausalLM.from_base(tmp_path).mask_token_id == 100


def test_a_tokenizer_that_cannot_be_read_asks_for_the_mask_token(tmp_path: Path):
    build_base(base_config("qwen3")).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match="mask_token_id must be given, because the tokenizer in"):
        OrthrusForCausalLM.from_base(tmp_path)
    assert OrthrusForCausalLM.from_base(tmp_path, mask_token_id=1).mask_token_id == 1


@pytest.mark.parametrize(
    ("dtype", "device", "options", "expected"),
    [
        (None, None, {}, (None, None)),
        ("auto", None, {"device_map": "cpu"}, (None, "cpu")),
        ("bfloat16", None, {"device_map": {"": "cuda:1"}}, (torch.bfloat16, "cuda:1")),
        (torch.float16, None, {"device_map": {"": 1}}, (torch.float16, "cuda:1")),
        (None, None, {"torch_dtype": "torch.float32", "device_map": 0}, (torch.float32, "cuda:0")),
        (None, "cpu", {"device_map": "cuda"}, (None, "cpu")),
    ],
)
def test_where_and_as_what_a_loader_wants_the_model(dtype, device, options: dict, expected: tuple):
    assert loading_options(dtype, device, options) == expected


def test_a_device_map_of_the_loader(monkeypatch: pytest.MonkeyPatch):
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert loading_options(None, None, {"device_map": "auto"}) == (None, device)
    with pytest.raises(ValueError, match="device_map must name one device for the whole model, but got .*lm_head"):
        loading_options(None, None, {"device_map": {"model": 0, "lm_head": 1}})
