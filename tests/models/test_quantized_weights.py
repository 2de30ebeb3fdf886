"""`quantize_weights`: a frozen model in int8, of which the cycle is as exact as of any other."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthrus_triton._triton import is_interpreted
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.view import load_view, save_view
from orthrus_triton.models.view_checkpoint import load_checkpoint_view
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.projection import Linear, LowRankDelta
from orthrus_triton.ops.int8_product import dequantize_rows
from orthrus_triton.training.student import BlockStudent
from tests.models.test_quantized_drafts import BLOCK, DEVICE, copied, dual_view
from tests.models.tiny_bases import random_ids
from tests.training.view_runs import make_model, make_trainer


def matrices(model: OrthrusForCausalLM) -> list[Linear]:
    """The layers' own, without what is a low-rank view's."""
    of_deltas = [part for module in model.modules() if isinstance(module, LowRankDelta) for part in module.modules()]
    return [
        module for module in model.model.layers.modules()
        if isinstance(module, Linear) and not any(module is part for part in of_deltas)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["llama biases, wide heads, tied", "qwen3", "mistral window"])
@torch.inference_mode()
def test_both_views_read_what_the_weights_were_rounded_to(case: str, dtype: torch.dtype, rounded: bool) -> None:
    model, ids = dual_view(case, dtype), random_ids(BLOCK, batch=2)
    before = {view: model(ids, view=view, impl="torch").logits for view in ("ar", "diffusion")}
    nbytes = sum(module.weight.nbytes for module in matrices(model))
    stand_in = copy.deepcopy(model)
    model.quantize_weights()
    assert model.has_int8_weights and not stand_in.has_int8_weights and model.dtype == dtype
    assert sum(module.weight.nbytes for module in matrices(model)) * dtype.itemsize == nbytes
    assert not any(parameter.requires_grad for parameter in model.parameters() if parameter.dtype == torch.int8)
    for ours, theirs in zip(matrices(model), matrices(stand_in), strict=True):
        theirs.weight.data = dequantize_rows(ours.weight, ours.weight_scale, torch.float32).to(dtype)
    for view, logits in before.items():
        ours, theirs = (one(ids, view=view, impl="torch").logits for one in (model, stand_in))
        scale = logits.abs().max()
        assert not torch.equal(ours, logits) and (ours - logits).abs().max() < 0.1 * scale
        error = (ours - theirs).abs().max()
        if rounded and view == "diffusion":
            assert 0 < error < 0.06 * scale
        else:
            assert error < (1e-5 if dtype == torch.float32 else 0.03) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_an_anchor_that_the_frozen_view_reads_is_no_draft(dtype: torch.dtype) -> None:
    """However drafts multiply: its token is said."""
    model, ids = dual_view("qwen3", dtype, "ar"), random_ids(BLOCK, batch=2)
    model.quantize_weights()
    cache = model.new_cache(2, 16, BLOCK)
    drafted = model.forward_view(ids, cache, cache.draft_pass(BLOCK, 1, impl="torch"))
    said = model.forward_view(ids[:, :1], cache, cache.view_pass("ar", 1, impl="torch"))
    assert torch.equal(drafted[:, :1], said)


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.parametrize("also", [{}, {"round_rows": True}, {"round_rows": True, "head": True}], ids=str)
@pytest.mark.parametrize(
    ("case", "dtype", "anchor_view", "options"),
    [
        ("qwen3", torch.float32, "diffusion", {}), ("qwen3", torch.bfloat16, "ar", {}),
        ("llama biases, wide heads, tied", torch.bfloat16, "diffusion", {}),
        ("mistral window", torch.float16, "ar", {}), ("gemma3", torch.bfloat16, "diffusion", {}),
        ("olmo2", torch.bfloat16, "ar", {}), ("qwen2", torch.bfloat16, "diffusion", {"view_rank": 2}),
    ],
)  # fmt: skip
def test_consensus_is_ar_to_the_bits_of_the_cache(case, dtype, anchor_view, options, also: dict[str, bool]) -> None:
    assert_consensus_is_ar(dual_view(case, dtype, anchor_view, **options), (5, 11), 32, "torch", **also)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
def test_consensus_is_ar_in_triton(dtype: torch.dtype, anchor_view: str) -> None:
    lengths, tokens = ((5,), 4) if is_interpreted() else ((5, 11, 300), 64)
    model = dual_view("qwen3", dtype, anchor_view).to(DEVICE)
    assert_consensus_is_ar(model, lengths, tokens, "triton", head=anchor_view == "ar")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_consensus_is_ar_beside_many_others(dtype: torch.dtype) -> None:
    """In graphs, of more rows than small tiles are made for."""
    lengths = tuple(range(3, 43))  # of 40 sequences: 160 rows in a block
    assert_consensus_is_ar(dual_view("qwen3", dtype, "ar").to(DEVICE), lengths, 64, "triton")


def assert_consensus_is_ar(
    model: OrthrusForCausalLM, lengths: tuple[int, ...], tokens: int, impl: str, **also: bool
) -> None:
    model.quantize_weights(**also)
    prompts = [random_ids(length, seed=length)[0].to(DEVICE) for length in lengths]
    decoders = [ConsensusDecoder(model, mode=mode, impl=impl) for mode in ("consensus", "ar")]
    ours, theirs = (decoder.generate(prompts, max_new_tokens=tokens).sequences for decoder in decoders)
    for b, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.tolist() == other.tolist()
        known = len(one) - 1
        for layer, same in zip(*(decoder.cache.layers for decoder in decoders)):
            assert torch.equal(layer.k[b, :, :known], same.k[b, :, :known])
            assert torch.equal(layer.v[b, :, :known], same.v[b, :, :known])


def test_a_row_of_a_prompt_may_be_read_in_any_company() -> None:
    """A prefill that is batch-invariant leaves the bits of one token at a time."""
    model, ids = dual_view("qwen3", torch.bfloat16), random_ids(40)[0]
    model.quantize_weights()
    texts = []
    for chunk in (7, 512):
        decoder = ConsensusDecoder(model, impl="torch", batch_invariant_prefill=True, prefill_chunk=chunk)
        decoder.generate(ids, max_new_tokens=8)
        texts.append(torch.stack([layer.k[0, :, :40] for layer in decoder.cache.layers]))
    assert torch.equal(*texts)


def test_what_is_a_low_rank_views_own_stays() -> None:
    model = dual_view("qwen2", view_rank=2)
    model.quantize_weights()
    assert all(module.is_quantized for module in matrices(model))
    deltas = [module for module in model.modules() if isinstance(module, LowRankDelta)]
    assert deltas and all(not part.is_quantized for delta in deltas for part in (delta.down, delta.up))


def test_drafts_need_no_copies_then() -> None:
    model = dual_view("llama")
    model.quantize_drafts()
    assert copied(model)
    model.quantize_weights()
    assert copied(model) == []
    model.quantize_drafts()
    assert copied(model) == []
    model = dual_view("qwen2", anchor_view="ar", view_rank=2)
    model.quantize_weights()
    model.quantize_drafts()


def test_a_decoder_notices() -> None:
    model, prompt = dual_view("qwen3"), random_ids(9)[0]
    decoder = ConsensusDecoder(model)
    (before,) = decoder.generate(prompt, max_new_tokens=40, reuse_cache=True).sequences
    model.quantize_weights()
    (after,) = decoder.generate(prompt, max_new_tokens=40, reuse_cache=True).sequences
    (fresh,) = ConsensusDecoder(model).generate(prompt, max_new_tokens=40).sequences
    assert after.tolist() == fresh.tolist() != before.tolist()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float64])
def test_a_cast_leaves_integers_and_scales(cast: torch.dtype) -> None:
    model = dual_view("llama biases, wide heads, tied")
    model.quantize_weights()
    before = [(module.weight.clone(), module.weight_scale) for module in matrices(model)]
    model.to(cast)
    assert model.dtype == cast and matrices(model)[0].bias.dtype == cast
    for module, (values, scale) in zip(matrices(model), before, strict=True):
        assert torch.equal(module.weight, values) and torch.equal(module.weight_scale, scale)
        assert module.weight_scale.dtype == torch.float32


def test_a_state_dict_goes_into_a_model_of_its_kind_alone() -> None:
    model, other, plain = dual_view("llama"), dual_view("llama", anchor_view="ar"), dual_view("llama")
    with torch.no_grad():
        for parameter in other.model.layers.parameters():
            parameter.mul_(0.5)
    for quantized in (model, other):
        quantized.quantize_weights()
    state, ids = model.state_dict(), random_ids(6)
    prefix = "model.layers.0.self_attn."
    assert state[f"{prefix}k_proj.weight"].dtype == torch.int8
    assert state[f"{prefix}k_proj.weight_scale"].shape == state[f"{prefix}k_proj.weight"].shape[:1]
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(*(one(ids, impl="torch").logits for one in (other, model)))
    with pytest.raises(RuntimeError, match="must have torch.float32, but the state dict has torch.int8"):
        plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match="must have torch.int8, but the state dict has torch.float32"):
        model.load_state_dict(dual_view("llama").state_dict(), strict=False)
    for name in ("q_proj", "o_proj"):  # a part of a product, and a whole one
        mixed = plain.state_dict() | {f"{prefix}{name}.weight": state[f"{prefix}{name}.weight"]}
        with pytest.raises(RuntimeError, match=f"mismatch for {prefix}{name}.weight: it must have torch.float32"):
            plain.load_state_dict(mixed)


@pytest.mark.parametrize("options", [{}, {"view_rank": 2}, {"anchor_view": "ar", "chain_width": 8}], ids=str)
@torch.inference_mode()
def test_it_is_saved_and_loaded_as_it_is(options: dict, tmp_path: Path) -> None:
    model, ids = dual_view("llama biases, wide heads, tied", torch.bfloat16, **options), random_ids(BLOCK)
    model.save_pretrained(tmp_path / "before")
    model.quantize_weights()
    model.save_pretrained(tmp_path / "after")
    size = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "after")]
    assert size[1] < 0.8 * size[0]
    loaded = OrthrusForCausalLM.from_pretrained(tmp_path / "after")
    assert (
        loaded.has_int8_weights
        and loaded.dtype == torch.bfloat16
        and set(loaded.state_dict()) == set(model.state_dict())
    )
    for view in ("ar", "diffusion"):
        assert torch.equal(*(one(ids, view=view, impl="torch").logits for one in (loaded, model)))
    in_fp32 = OrthrusForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    for ours, theirs in zip(matrices(in_fp32), matrices(model), strict=True):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.weight_scale, theirs.weight_scale)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (True, "missing tensor 'model.layers.0.self_attn.q_proj.weight_scale'.*"),
        (False, "unexpected tensor 'model.layers.0.mlp.down_proj.weight_scale'"), (1, "int8_weights must be true or f"),
    ],
)  # fmt: skip
def test_a_folder_must_hold_what_its_config_says(said: object, message: str, tmp_path: Path) -> None:
    model = dual_view("llama")
    if said is False:
        model.quantize_weights()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"int8_weights": said}))
    with pytest.raises(ValueError, match=message):
        OrthrusForCausalLM.from_pretrained(tmp_path)


def test_integers_are_not_taken_for_numbers_nor_numbers_for_integers(tmp_path: Path) -> None:
    model = dual_view("llama")
    model.quantize_weights()
    model.save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    weights = load_file(path)
    save_file(weights | {name: weights[name].float()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"tensor '{name}' must have a dtype of \['I8'\], but got F32"):
        OrthrusForCausalLM.from_pretrained(tmp_path)
    name = f"{name}_scale"
    save_file(weights | {name: weights[name].to(torch.int8)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"tensor '{name}' must have a dtype of .*, but got I8"):
        OrthrusForCausalLM.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_leave_a_model_as_it_was() -> None:
    model = dual_view("llama")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match="layers.1.mlp.down_proj are not"):
        model.quantize_weights()
    assert not model.has_int8_weights and all(module.weight.dtype == torch.float32 for module in matrices(model))


def test_models_of_one_config_do_not_speak_for_each_other(tmp_path: Path) -> None:
    config = dual_view("llama").config
    quantized, other = OrthrusForCausalLM(config), OrthrusForCausalLM(config)
    quantized.quantize_weights()
    assert quantized.has_int8_weights and not other.has_int8_weights
    for model, name in ((quantized, "quantized"), (other, "other")):
        model.save_pretrained(tmp_path / name)
        loaded = OrthrusForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.has_int8_weights == OrthrusForCausalLM(loaded.config).has_int8_weights == (model is quantized)
    quantized.save_pretrained(tmp_path / "given", state_dict=other.state_dict())
    assert not OrthrusForCausalLM.from_pretrained(tmp_path / "given").has_int8_weights


def test_what_was_quantized_in_inference_mode_can_be_loaded_into() -> None:
    model = dual_view("llama")
    with torch.inference_mode():
        model.quantize_weights()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not any(parameter.is_inference() for parameter in (*model.parameters(), *model.buffers()))


def test_a_trainer_does_not_take_integers_for_weights(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(model, tmp_path, 1)
    model.quantize_weights()
    with pytest.raises(ValueError, match="must not be in int8"):
        trainer.train()


def test_what_needs_the_weights_themselves_is_refused(tmp_path: Path) -> None:
    model, view = make_model(), tmp_path / "view.safetensors"
    save_view(model, view)
    model.quantize_weights()
    kept = [module.weight.clone() for module in matrices(model)]
    for action, attempt in {
        "save_view": lambda: save_view(model, tmp_path / "other.safetensors"),
        "load_view": lambda: load_view(model, view),
        "load_checkpoint_view": lambda: load_checkpoint_view(model, view),
        "reset_view": model.reset_view,
        "training": lambda: make_trainer(model, tmp_path / "run", 1),
        "training ": lambda: BlockStudent(model),
    }.items():
        with pytest.raises(ValueError, match=f"{action.strip()} needs a model whose weights are not in int8"):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["view.safetensors"]
    assert all(torch.equal(module.weight, before) for module, before in zip(matrices(model), kept, strict=True))
