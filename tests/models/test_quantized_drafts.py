"""`quantize_drafts`: the diffusion view reads int8 copies, the AR view does not, and what is said stays the same."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton._triton import is_interpreted
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.ops.int8_product import dequantize_rows
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view

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


def stand_in(model: OrthrusForCausalLM) -> None:
    """Give `model`, whose drafts are quantized, the weights that its copies stand for, and no copies."""
    for module in model.modules():
        if getattr(module, "draft_weight", None) is not None:
            module.weight.data = dequantize_rows(module.draft_weight, module.draft_scale, module.weight.dtype)
            module.draft_weight = module.draft_scale = None


@pytest.mark.parametrize("case", ["llama biases, wide heads, tied", "qwen3", "mistral window"])
@torch.inference_mode()
def test_the_diffusion_view_reads_the_copies_and_the_ar_view_does_not(case: str) -> None:
    model, ids = dual_view(case), random_ids(BLOCK, batch=2)
    said, drafted = (model(ids, view, impl="torch") for view in ("ar", "diffusion"))
    names = set(model.state_dict())
    model.quantize_drafts()
    assert set(model.state_dict()) == names, "the copies are not saved"
    assert torch.equal(model(ids, "ar", impl="torch"), said)
    quantized = model(ids, "diffusion", impl="torch")
    assert not torch.equal(quantized, drafted)
    assert (quantized - drafted).abs().max() < 0.05 * drafted.abs().max()
    stand_in(model)
    torch.testing.assert_close(quantized, model(ids, "diffusion", impl="torch"))


@pytest.mark.parametrize(
    ("dtype", "anchor_view", "impl"),
    [
        (torch.float32, "diffusion", "torch"), (torch.float32, "ar", "torch"), (torch.bfloat16, "diffusion", "torch"),
        (torch.bfloat16, "ar", "torch"), (torch.bfloat16, "diffusion", "triton"),
    ],
)  # fmt: skip
def test_text_stays_the_ar_views_own(dtype: torch.dtype, anchor_view: str, impl: str) -> None:
    model = dual_view("qwen3", dtype, anchor_view).to(DEVICE)
    interpreted = impl == "triton" and is_interpreted()
    lengths, tokens = ((5,), 4) if interpreted else ((5, 11), 32)
    prompts = [random_ids(length, seed=length)[0].to(DEVICE) for length in lengths]
    said = ConsensusDecoder(model, mode="ar", impl=impl).generate(prompts, max_new_tokens=tokens)
    model.quantize_drafts()
    drafted = ConsensusDecoder(model, impl=impl).generate(prompts, max_new_tokens=tokens)
    for ours, theirs in zip(drafted.sequences, said.sequences):
        assert ours.tolist() == theirs.tolist()
    # the frozen view's token comes out of a draft pass there, so its MLP must read the weights themselves
    copied = [layer.mlp.down_proj.draft_weight is not None for layer in model.model.layers]
    assert copied == [anchor_view == "diffusion"] * len(copied)


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
    copied = [name for name, module in model.named_modules() if getattr(module, "draft_weight", None) is not None]
    assert copied and all(".mlp." in name for name in copied)
