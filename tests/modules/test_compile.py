"""torch.compile of models, layers and the cycle: whole graphs, none for a longer context, and the eager bits."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.test_consensus_decoder import DEVICE, MODELS, make_model, prompts_of


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_same_run(compiled: ConsensusDecoder, eager: ConsensusDecoder, tokens: int, lengths: list[int]) -> None:
    prompts = prompts_of(17, lengths)
    outputs = [decoder.generate(prompts, max_new_tokens=tokens) for decoder in (compiled, eager)]
    assert [s.tolist() for s in outputs[0].sequences] == [s.tolist() for s in outputs[1].sequences]
    assert outputs[0].stats.accepted_histogram == outputs[1].stats.accepted_histogram
    for ours, theirs in zip(compiled.cache.layers, eager.cache.layers):
        for b, length in enumerate(compiled.cache.context_len.tolist()):
            assert torch.equal(ours.k[b, :, :length], theirs.k[b, :, :length])
            assert torch.equal(ours.v[b, :, :length], theirs.v[b, :, :length])


@pytest.mark.parametrize("name", ["low_rank", "bf16", "frozen_anchor"])
def test_the_cycle_is_one_graph_whatever_the_lengths(name: str) -> None:
    eager = ConsensusDecoder(MODELS[name], impl="torch")
    compiled = ConsensusDecoder(MODELS[name], impl="torch", compile="aot_eager")
    assert_same_run(compiled, eager, 14, [5, 3])
    assert graphs() == 1
    assert_same_run(compiled, eager, 20, [3, 40])
    assert graphs() == 1
    compiled.generate(prompts_of(2, [3, 4]), max_new_tokens=6, block_size=3)  # a graph per block size
    assert graphs() == 2


def test_ar_compiles_and_follows_new_weights() -> None:
    model = make_model(qk_norm=True)
    eager = ConsensusDecoder(model, impl="torch", mode="ar")
    compiled = ConsensusDecoder(model, impl="torch", mode="ar", compile="aot_eager")
    assert_same_run(compiled, eager, 12, [5])
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    assert_same_run(compiled, eager, 12, [5])
    assert (
        graphs() == 2
    )  # K/V of other weights are worth nothing: a new cache, and what was compiled over the old one goes


def test_many_decoders_do_not_exhaust_the_compiler() -> None:
    """Dynamo recompiles a piece of code eight times and then gives up: decoders must not share theirs."""
    for _ in range(10):
        decoder = ConsensusDecoder(make_model(num_layers=1), mode="ar", impl="torch", compile="eager")
        decoder.generate(prompts_of(1, [3]), max_new_tokens=2)
    assert graphs() == 10


@pytest.mark.parametrize("view", ["ar", "diffusion"])
def test_a_transformers_model_compiles_whole(view: str) -> None:
    from orthrus_triton.models import OrthrusForCausalLM
    from tests.models.tiny_bases import base_config, build_base, random_ids

    model = OrthrusForCausalLM.from_base(build_base(base_config("qwen3", eos_token_id=None)), block_size=4)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        for seed in (1, 2):
            ids = random_ids(4, seed=seed)
            mask = (torch.arange(4) >= seed).long()[None] if view == "ar" else None
            assert torch.equal(compiled(ids, mask, view=view).logits, model(ids, mask, view=view).logits)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a C++ compiler")
def test_inductor_keeps_the_bits() -> None:
    """What Inductor generates here is elementwise on integers, and copies: whatever rounds is an opaque op."""
    torch.manual_seed(2)
    model = TinyDualViewModel(num_layers=1, qk_norm=True).to(DEVICE)
    eager, compiled = ConsensusDecoder(model, impl="torch"), ConsensusDecoder(model, impl="torch", compile=True)
    assert_same_run(compiled, eager, 12, [5, 3])


@pytest.mark.gpu
@pytest.mark.parametrize("anchor_rows", [0, 1])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_gpu_inductor_keeps_the_bits(cuda_graph: bool, anchor_rows: int) -> None:
    model = make_model(torch.bfloat16, qk_norm=True, anchor_rows=anchor_rows)
    eager = ConsensusDecoder(model, cuda_graph=False)
    assert_same_run(ConsensusDecoder(model, compile=True, cuda_graph=cuda_graph), eager, 100, [50, 3])
