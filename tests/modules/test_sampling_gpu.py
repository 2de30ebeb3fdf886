"""Sampling on a GPU: captured cycles give AR's tokens, Triton gives torch's, and nothing waits for the host."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.modules import Choosing, ConsensusDecoder, SamplingParams
from orthrus_triton.ops import rejection_choice, sample_choice
from orthrus_triton.ops.gumbel import DRAFT
from orthrus_triton.testing import TinyDualViewModel
from tests.ops.sampling_cases import make_logits, mixed_sampling, positions_of

pytestmark = pytest.mark.gpu
OPTIONS = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 5, "repetition_penalty": 1.2, "min_new_tokens": 4}


def model() -> TinyDualViewModel:
    torch.manual_seed(3)
    return TinyDualViewModel(vocab_size=4096, hidden_size=256, intermediate_size=512).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("vocab", [1000, 151_936])
def test_triton_gives_torchs_ids(vocab: int) -> None:
    """On the GPU, and torch on the CPU the same: nothing in the choice rounds differently anywhere."""
    logits, positions, how = make_logits(1, 8, 8, vocab), positions_of(8, 8), mixed_sampling(3)
    ids = sample_choice(logits, positions, how, impl="triton")
    assert torch.equal(ids, sample_choice(logits, positions, how, impl="torch"))
    on_cpu = type(how)(*(tensor.cpu() for tensor in how))
    assert torch.equal(ids.cpu(), sample_choice(logits.cpu(), positions.cpu(), on_cpu, impl="torch"))
    q = logits[:, :7] + 0.3 * make_logits(2, 8, 7, vocab).nan_to_num(neginf=0.0)
    drafted = sample_choice(q, positions[:, :7], how, stream=DRAFT, impl="triton")
    candidate = torch.cat((drafted[:, :1], drafted), dim=1)
    choices = [rejection_choice(logits, q, candidate, positions, how, impl=impl) for impl in ("triton", "torch")]
    assert torch.equal(*choices)


@pytest.mark.parametrize("sampling", ["coupled", "rejection"])
def test_graphs_give_what_eager_gives(sampling: str) -> None:
    network, prompts = model(), [torch.arange(5), torch.arange(3, 40)]
    texts = []
    for options in ({}, {"cuda_graph": False}, {"mode": "ar"}):
        if options.get("mode") == "ar" and sampling == "rejection":
            continue
        decoder = ConsensusDecoder(network, **options)
        for _ in range(2):  # the second run replays
            output = decoder.generate(prompts, max_new_tokens=60, sampling=sampling, **OPTIONS)
            texts.append([ids.tolist() for ids in output.sequences])
    assert all(text == texts[0] for text in texts)


def test_a_sampled_cycle_does_not_wait_for_the_host() -> None:
    decoder = ConsensusDecoder(model(), cuda_graph=False)
    run = decoder.open(2, 200, choosing=Choosing(sampled=True, processed=True))
    for b in range(2):
        run.admit(b, torch.arange(4), 100, SamplingParams(**OPTIONS))
    run.step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decoder.run_cycle(run.cache, run.state, decoder.block_size, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
