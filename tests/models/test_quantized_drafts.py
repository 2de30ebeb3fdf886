"""`quantize_drafts`: the diffusion view reads int8 copies, the AR view does not, and what is said stays the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orthrus_triton._triton import is_interpreted
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.view import load_view, save_view
from orthrus_triton.models.view_checkpoint import load_checkpoint_view
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.ops.int8_product import dequantize_rows
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view
from tests.training.view_runs import make_model, make_trainer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 4


def dual_view(
    case: str, dtype: torch.dtype = torch.float32, anchor_view: str = "diffusion", **options
) -> OrthrusForCausalLM:  # fmt: skip
    # a head size that kernels take
    heads = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    base = build_base(base_config(case, eos_token_id=None, **heads), dtype)
    model = OrthrusForCausalLM.from_base(base, block_size=BLOCK, anchor_view=anchor_view, **options)
    return randomise_view(model, scale=0.02)


def copied(model: OrthrusForCausalLM) -> list[str]:
    """Names of the products that have an int8 copy."""
    return [name for name, module in model.named_modules() if getattr(module, "draft_weight", None) is not None]


def stand_in(model: OrthrusForCausalLM) -> None:
    """Give `model`, whose drafts are quantized, the weights that its copies stand for, and no copies."""
    for module in model.modules():
        if getattr(module, "draft_weight", None) is not None:
            module.weight.data = dequantize_rows(module.draft_weight, module.draft_scale, module.weight.dtype)
            module.draft_weight = module.draft_scale = None


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
@pytest.mark.parametrize("case", ["llama biases, wide heads, tied", "qwen3", "mistral window", "gemma3"])
@torch.inference_mode()
def test_the_diffusion_view_reads_the_copies_and_the_ar_view_does_not(
    case: str, anchor_view: str, rounded: bool
) -> None:  # fmt: skip
    model, ids = dual_view(case, anchor_view=anchor_view), random_ids(BLOCK, batch=2)

    def drafts() -> list[torch.Tensor]:
        """As a pass over any rows, and as a decoder drafts."""
        cache = model.new_cache(2, 16, BLOCK)
        draft_pass = cache.draft_pass(BLOCK, int(anchor_view == "ar"), impl="torch")
        return [model(ids, view="diffusion", impl="torch").logits, model.forward_view(ids, cache, draft_pass)]

    said, drafted = model(ids, impl="torch").logits, drafts()
    names = set(model.state_dict())
    model.quantize_drafts()
    assert set(model.state_dict()) == names, "the copies are not saved"
    # q, k and v are one product, as gate and up are; where the frozen view reads the anchor, the MLP's are its own too
    assert len(copied(model)) == len(model.model.layers) * (4 if anchor_view == "diffusion" else 2)
    assert torch.equal(model(ids, impl="torch").logits, said)
    quantized = drafts()
    stand_in(model)
    for ours, before, theirs in zip(quantized, drafted, drafts(), strict=True):
        assert not torch.equal(ours, before)
        assert (ours - before).abs().max() < 0.05 * before.abs().max()
        if rounded:
            assert 0 < (ours - theirs).abs().max() < 0.05 * before.abs().max()
        else:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("case", "dtype", "anchor_view", "impl"),
    [
        ("qwen3", torch.float32, "diffusion", "torch"), ("qwen3", torch.float32, "ar", "torch"),
        ("qwen3", torch.bfloat16, "diffusion", "torch"), ("qwen3", torch.bfloat16, "ar", "torch"),
        ("llama biases, wide heads, tied", torch.bfloat16, "ar", "torch"),
        ("mistral window", torch.bfloat16, "ar", "torch"), ("qwen3", torch.bfloat16, "diffusion", "triton"),
    ],
)  # fmt: skip
def test_text_stays_the_ar_views_own(case: str, dtype: torch.dtype, anchor_view: str, impl: str) -> None:
    model = dual_view(case, dtype, anchor_view).to(DEVICE)
    interpreted = impl == "triton" and is_interpreted()
    lengths, tokens = ((5,), 4) if interpreted else ((5, 11), 32)
    prompts = [random_ids(length, seed=length)[0].to(DEVICE) for length in lengths]
    said = ConsensusDecoder(model, mode="ar", impl=impl).generate(prompts, max_new_tokens=tokens)
    model.quantize_drafts()
    drafted = ConsensusDecoder(model, impl=impl).generate(prompts, max_new_tokens=tokens)
    for ours, theirs in zip(drafted.sequences, said.sequences):
        assert ours.tolist() == theirs.tolist()
    # the frozen view's token comes out of a draft pass there, so its MLP must read the weights themselves
    of_mlps = [name for name in copied(model) if ".mlp." in name]
    assert len(of_mlps) == (2 * len(model.model.layers) if anchor_view == "diffusion" else 0)


@torch.inference_mode()
def test_copies_hardly_cost_drafts() -> None:
    """Of a view that is a copy of the AR view, whose first draft is mostly right."""
    model = OrthrusForCausalLM.from_base(build_base(base_config("qwen3", eos_token_id=None)), block_size=2)
    prompts = [random_ids(length, seed=length)[0] for length in (5, 11, 17)]

    def tokens_per_cycle() -> float:
        return ConsensusDecoder(model, impl="torch").generate(prompts, max_new_tokens=100).stats.tokens_per_cycle

    before = tokens_per_cycle()
    model.quantize_drafts()
    assert tokens_per_cycle() > 0.9 * before


@torch.inference_mode()
def test_a_low_rank_view_keeps_its_own_projections() -> None:
    model = dual_view("qwen2", view_rank=2)
    model.quantize_drafts()
    assert copied(model) and all(".mlp." in name for name in copied(model))
    model.config.anchor_view = "ar"
    with pytest.raises(ValueError, match="view_rank=2 and anchor_view='ar'"):
        model.quantize_drafts()


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_copies_outlive_a_cast_unrounded(cast: torch.dtype) -> None:
    model = dual_view("llama")
    model.quantize_drafts()
    before = {name: (m.draft_weight, m.draft_scale) for name, m in model.named_modules() if name in copied(model)}
    model.to(cast)
    assert copied(model) == list(before)
    for name, (weight, scale) in before.items():
        module = model.get_submodule(name)
        assert module.weight.dtype == cast and module.draft_scale.dtype == torch.float32
        assert torch.equal(module.draft_weight, weight) and torch.equal(module.draft_scale, scale)
    model.to("meta")
    assert all(model.get_submodule(name).draft_scale.is_meta for name in before)


@pytest.mark.parametrize("loading", ["view", "checkpoint", "state dict", "none"])
def test_drafts_are_of_the_view_that_was_loaded(loading: str, tmp_path: Path) -> None:
    other, model, ids = randomise_view(dual_view("llama"), seed=3), dual_view("llama"), random_ids(BLOCK)
    model.quantize_drafts()
    if loading == "view":
        save_view(other, tmp_path / "view.safetensors", storage="fp16")
        load_view(model, tmp_path / "view.safetensors")
        load_view(other, tmp_path / "view.safetensors")  # rounded
    elif loading == "checkpoint":
        view = {name: tensor.contiguous() for name, tensor in other.state_dict().items() if "_diff" in name}
        save_file(view, tmp_path / "model.safetensors")
        load_checkpoint_view(model, tmp_path / "model.safetensors")
    elif loading == "state dict":
        model.load_state_dict(other.state_dict())
    else:
        model.reset_view()
        other.reset_view()
    assert copied(model) == []
    with torch.no_grad():
        assert torch.equal(*(one(ids, view="diffusion", impl="torch").logits for one in (model, other)))


def test_training_drops_copies(tmp_path: Path) -> None:
    model = make_model()
    model.quantize_drafts()
    assert copied(model)
    make_trainer(model, tmp_path, 1)
    assert copied(model) == []
