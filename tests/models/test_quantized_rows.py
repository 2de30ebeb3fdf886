"""`quantize_weights(round_rows=True)`: a frozen model that CPUs multiply in integers, if they can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.ops.cpu.kernels import has_integer_product
from tests.models.test_quantized_drafts import BLOCK, dual_view
from tests.models.tiny_bases import random_ids


@torch.no_grad()
def test_what_is_said_comes_of_rounded_rows_then() -> None:
    model, ids = dual_view("qwen3", torch.bfloat16), random_ids(BLOCK)
    model.quantize_weights()
    before = model(ids, impl="torch").logits
    model.quantize_weights(round_rows=True)
    after = model(ids, impl="torch").logits
    assert model.rounds_rows and torch.equal(after, before) != has_integer_product()
    assert (after - before).abs().max() < 0.1 * before.abs().max()
    model.quantize_weights(round_rows=False)
    assert not model.rounds_rows and torch.equal(model(ids, impl="torch").logits, before)
    model.quantize_weights(round_rows=True)
    model.quantize_weights(head=True)
    assert model.rounds_rows and model.lm_head.rounds_rows  # as long as nothing else is said


@pytest.mark.parametrize("options", [{}, {"mode": "ar", "exact": False}, {"batch_invariant_prefill": True}], ids=str)
@torch.no_grad()
def test_whoever_asks_for_a_product_gets_the_same_one(options: dict) -> None:
    """Prompts as well as what follows, in either mode: seen by the first layer's values, which attention has no part
    in."""
    model, ids = dual_view("qwen3", torch.bfloat16), random_ids(BLOCK)
    model.quantize_weights(round_rows=True)
    decoder = ConsensusDecoder(model, impl="torch", **options)
    text = decoder.generate(ids, max_new_tokens=8).sequences[0][:-1]
    layer, stored = model.model.layers[0], decoder.cache.layers[0].v[0, :, : len(text)]
    projection = layer.self_attn.qkv_proj
    qkv = projection(layer.input_layernorm(model.model.embed_tokens(text)), impl="torch")
    assert torch.equal(stored.transpose(0, 1).flatten(1), qkv.split(list(projection.parts.values()), dim=-1)[2])


def test_a_decoder_notices() -> None:
    model, prompt = dual_view("qwen3"), random_ids(9)[0]
    model.quantize_weights()
    decoder = ConsensusDecoder(model)
    before, after, again = [], [], []
    for texts, round_rows in ((before, False), (after, True), (again, False)):
        model.quantize_weights(round_rows)
        texts += decoder.generate(prompt, max_new_tokens=40, reuse_cache=True).sequences[0].tolist()
        assert texts == ConsensusDecoder(model).generate(prompt, max_new_tokens=40).sequences[0].tolist()
    assert (before != after) == has_integer_product() and before == again


@torch.no_grad()
def test_it_is_saved_and_loaded_as_it_is(tmp_path: Path) -> None:
    model, ids = dual_view("llama", torch.bfloat16), random_ids(BLOCK)
    model.quantize_weights(round_rows=True)
    model.save_pretrained(tmp_path)
    loaded = OrthrusForCausalLM.from_pretrained(tmp_path)
    assert loaded.rounds_rows and torch.equal(*(one(ids, impl="torch").logits for one in (loaded, model)))
    loaded.quantize_weights(round_rows=False)
    loaded.save_pretrained(tmp_path / "as they are")
    assert not OrthrusForCausalLM.from_pretrained(tmp_path / "as they are").rounds_rows


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"int8_rows": "yes"}, "int8_rows must be true or false, but got 'yes'"),
        ({"int8_weights": False}, "int8_rows must be false where int8_weights is, but got true"),
        ({"int8_rows": False, "int8_head": True, "int8_weights": False}, "int8_head must be false where int8_weights"),
        ({"int8_head": True, "tie_word_embeddings": True}, "tie_word_embeddings must be false with int8_head"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(said: dict, message: str, tmp_path: Path) -> None:
    model = dual_view("llama")
    model.quantize_weights(round_rows=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(ValueError, match=message):
        OrthrusForCausalLM.from_pretrained(tmp_path)
