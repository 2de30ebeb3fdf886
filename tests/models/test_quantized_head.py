"""`quantize_weights(head=True)`: an LM head in int8, its own even where it was tied to the embedding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton._triton import is_interpreted
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.ops.cpu.kernels import has_integer_product
from orthrus_triton.ops.int8_product import dequantize_rows
from tests.models.test_quantized_drafts import BLOCK, DEVICE, dual_view
from tests.models.tiny_bases import random_ids

TIED, OWN = "llama biases, wide heads, tied", "qwen3"


@pytest.mark.parametrize("case", [TIED, OWN])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@torch.no_grad()
def test_logits_and_choices_come_of_what_the_head_was_rounded_to(case: str, impl: str) -> None:
    model = dual_view(case).to(DEVICE)
    head = (model.model.embed_tokens if model.lm_head is None else model.lm_head).weight.clone()
    embedding = model.model.embed_tokens.weight.clone()
    hidden = torch.randn(1, 3 if is_interpreted() else BLOCK, head.shape[1], device=DEVICE)
    model.quantize_weights(head=True)
    assert model.has_int8_head and torch.equal(model.model.embed_tokens.weight, embedding)
    logits = model.compute_logits(hidden, impl)
    rounded = dequantize_rows(*ops.quantize_rows(head), torch.float32)
    assert not torch.equal(rounded, head)
    torch.testing.assert_close(logits, hidden @ rounded.T, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.choose(hidden, impl), logits.argmax(-1))
    assert torch.equal(model.choose(hidden[:, :1], impl), logits[:, :1].argmax(-1))
    assert torch.equal(model.choose(hidden, "reference"), logits.argmax(-1))


@torch.no_grad()
def test_rows_are_rounded_for_the_head_as_well() -> None:
    model, hidden = dual_view(TIED), torch.randn(1, 4, 64)
    model.quantize_weights(head=True)
    before = model.compute_logits(hidden, "torch")
    model.quantize_weights(round_rows=True)  # the head stays in int8
    after = model.compute_logits(hidden, "torch")
    assert model.has_int8_head and torch.equal(before, after) != has_integer_product()
    assert torch.equal(model.choose(hidden, "torch"), after.argmax(-1))


@pytest.mark.parametrize("case", [TIED, OWN])
@torch.no_grad()
def test_it_is_saved_and_loaded_as_it_is(case: str, tmp_path: Path) -> None:
    model, other, ids = dual_view(case, torch.bfloat16), dual_view(case, torch.bfloat16), random_ids(BLOCK)
    shared = OrthrusForCausalLM(model.config)  # of the same config, which must not speak for the quantized one
    model.quantize_weights(head=True)
    assert (shared.lm_head is None) == (case == TIED) == model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = OrthrusForCausalLM.from_pretrained(tmp_path)
    assert loaded.has_int8_head and not loaded.config.tie_word_embeddings and loaded.lm_head.weight.dtype == torch.int8
    assert torch.equal(*(one(ids, impl="torch").logits for one in (loaded, model)))
    loaded.save_pretrained(tmp_path / "again")
    again = OrthrusForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(*(one(ids, impl="torch").logits for one in (again, model)))
    floats = other.state_dict()
    model.save_pretrained(tmp_path / "floats", state_dict=floats)  # which decide, not the model
    plain = OrthrusForCausalLM.from_pretrained(tmp_path / "floats")
    assert torch.equal(*(one(ids, impl="torch").logits for one in (plain, other)))
    other.quantize_weights()
    other.save_pretrained(tmp_path / "without")
    without = OrthrusForCausalLM.from_pretrained(tmp_path / "without")
    assert not without.has_int8_head and without.config.tie_word_embeddings == (case == TIED)


@pytest.mark.parametrize("case", [TIED, OWN])
def test_a_chain_drafts_with_it(case: str) -> None:
    """What a pair of tokens is given comes of the same rows of the head as their logits."""
    model, prompt = dual_view(case, chain_width=8), random_ids(9)[0]
    with torch.no_grad():
        model.model.draft_chain_diff.out_proj.weight.normal_()
    model.quantize_weights(head=True)
    ids = torch.tensor([[3, 1], [4, 5]])
    weight, how = model.lm_head.factor(draft=False)
    assert torch.equal(model._head_rows(ids), dequantize_rows(weight, how["weight_scale"], torch.float32)[ids])
    ours, theirs = (
        ConsensusDecoder(model, mode=mode).generate(prompt, max_new_tokens=40) for mode in ("consensus", "ar")
    )
    assert ours.sequences[0].tolist() == theirs.sequences[0].tolist()


def test_a_head_that_is_not_finite_leaves_a_model_as_it_was() -> None:
    model = dual_view(TIED)
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 2] = torch.inf
    with pytest.raises(ValueError, match="those of the LM head are not"):
        model.quantize_weights(head=True)
    assert not model.has_int8_weights and model.lm_head is None
