"""A model that the official implementation saves: both views give its logits here, and the same text in as many passes.
ORTHRUS_OFFICIAL=path of a checkout of chiennv2000/orthrus runs it; nothing of it is in this repository."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from orthrus_triton import ConsensusDecoder, OrthrusForCausalLM

CHECKOUT = os.environ.get("ORTHRUS_OFFICIAL")
PROMPT_LEN, BLOCK_SIZE, MASK, STOP = 23, 6, 7, 3

pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="ORTHRUS_OFFICIAL names no checkout of the official code")


@pytest.fixture(scope="module")
def official():
    """A tiny model of theirs with random weights; its view is near the AR weights, so that some drafts are accepted."""
    sys.path.insert(0, CHECKOUT)
    try:
        configuration, model = (importlib.import_module(f"src.{name}") for name in ("configuration", "model"))
    finally:
        sys.path.remove(CHECKOUT)
    config = configuration.OrthrusConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, block_size=BLOCK_SIZE, mask_token_id=MASK,
        tie_word_embeddings=False, eos_token_id=STOP,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    network = model.OrthrusLM(config).eval()
    parameters = dict(network.named_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else 1 + 0.1 * noise)
        for name, parameter in parameters.items():
            if "_diff" in name:
                parameter.copy_(parameters[name.replace("_diff", "")] + 0.02 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="module", params=["orthrus", "qwen3"])
def ours(official, request, tmp_path_factory) -> OrthrusForCausalLM:
    folder: Path = tmp_path_factory.mktemp(request.param)
    official.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": request.param}))
    return OrthrusForCausalLM.from_pretrained(folder)


@torch.no_grad()
def test_both_views_give_the_same_logits(official, ours) -> None:
    from transformers.cache_utils import DynamicCache

    prompt = torch.randint(8, 400, (1, PROMPT_LEN), generator=torch.Generator().manual_seed(1))
    theirs, cache = DynamicCache(config=official.config), ours.new_cache(1, 64, BLOCK_SIZE)
    cache.prompt_len.fill_(PROMPT_LEN)
    expected = official(input_ids=prompt, past_key_values=theirs, use_cache=True).logits
    hidden = ours.forward_view(prompt, cache, cache.view_pass("ar", PROMPT_LEN))
    torch.testing.assert_close(ours.compute_logits(hidden, "auto"), expected, rtol=0, atol=2e-5)
    cache.context_len.fill_(PROMPT_LEN)
    block = torch.tensor([[55] + [MASK] * (BLOCK_SIZE - 1)])
    expected = official(
        input_ids=block, position_ids=torch.arange(PROMPT_LEN, PROMPT_LEN + BLOCK_SIZE)[None], past_key_values=theirs,
        use_cache=False, is_diffusion_pass=True, ar_seq_len=PROMPT_LEN,
    ).logits  # fmt: skip
    hidden = ours.forward_view(block, cache, cache.view_pass("diffusion", BLOCK_SIZE))
    torch.testing.assert_close(ours.compute_logits(hidden, "auto"), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_text_in_as_many_passes(official, ours, seed: int, monkeypatch) -> None:
    passes, forward = [], official.forward
    monkeypatch.setattr(official, "forward", lambda *args, **options: passes.append(1) or forward(*args, **options))
    prompt = torch.randint(8, 400, (1, 11 + seed), generator=torch.Generator().manual_seed(seed))
    expected = official.generate(prompt, max_new_tokens=80)
    output = ConsensusDecoder(ours).generate(prompt, max_new_tokens=80)
    assert output.sequences[0].equal(expected[0])
    # near the limit, theirs cuts its last block
    assert abs(output.stats.forward_passes - len(passes)) <= 2
    assert output.stats.tokens_per_cycle > 1.1
