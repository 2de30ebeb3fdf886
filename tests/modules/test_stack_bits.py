"""Tiers A and B of whole models, sized for a CPU: past the edges of KV tiles, in bits of hidden states and K/V."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder
from tests.modules.drafts import ScriptedDrafts
from tests.modules.stack_bits import assert_verify_rows_are_decode_rows, differing_caches
from tests.modules.test_consensus_decoder import DEVICE, make_model, prompts_of

ON_CPU = DEVICE.type == "cpu"
# tiles of the torch implementation are 256 keys: the rows of a pass lie on both sides of an edge
EDGES = [253, 509, 766]
# where norms are
QWEN3, OLMO2 = {"qk_norm": True}, {"qk_norm": "whole", "norms": "behind"}
GEMMA = {"norm_offset": 1.0, "activation": "gelu_pytorch_tanh", "intermediate_size": 97}
GEMMA3 = {"qk_norm": True, "norms": "both", "norm_offset": 1.0, "activation": "gelu_pytorch_tanh"}


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.skipif(not ON_CPU, reason="on a GPU the torch implementation promises no bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [QWEN3, OLMO2, GEMMA, GEMMA3], ids=str)
def test_torch_verify_rows_are_decode_rows(options: dict, dtype: torch.dtype) -> None:
    model = make_model(dtype, **options)
    assert_verify_rows_are_decode_rows(model, [0, *EDGES], rows=6, impl="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [QWEN3, OLMO2, GEMMA, GEMMA3], ids=str)
def test_triton_verify_rows_are_decode_rows(options: dict, dtype: torch.dtype) -> None:
    model = make_model(dtype, num_layers=1, num_heads=2, num_kv_heads=1, **options)
    assert_verify_rows_are_decode_rows(model, [62, 1], rows=3, impl="triton")


@pytest.mark.skipif(not ON_CPU, reason="about BLAS")
def test_the_check_can_fail(without_c: None) -> None:
    """A library's attention of one row rounds otherwise than its attention of several."""
    with pytest.raises(AssertionError, match="hidden states"):
        assert_verify_rows_are_decode_rows(make_model(), [9], rows=6, impl="torch", linear_impl="library")


@pytest.mark.usefixtures("with_and_without_c")
@pytest.mark.skipif(not ON_CPU, reason="on a GPU the torch implementation promises no bits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_consensus_is_ar_past_every_tile_edge(dtype: torch.dtype) -> None:
    """A ragged batch decodes across the edges at 256, 512 and 768: the same tokens, the same bits in the cache."""
    model, prompts, tokens = make_model(dtype, qk_norm=True), prompts_of(21, [250, 505, 758]), 24
    ar = ConsensusDecoder(model, mode="ar", impl="torch")
    answers = ar.generate(prompts, max_new_tokens=tokens).sequences
    new = [sequence[len(prompt) :] for sequence, prompt in zip(answers, prompts)]
    for decoder in (
        ConsensusDecoder(model, impl="torch"),
        ScriptedDrafts(model, new, [3, 0, 7, -1], impl="torch"),
    ):
        output = decoder.generate(prompts, max_new_tokens=tokens)
        assert [s.tolist() for s in output.sequences] == [s.tolist() for s in answers]
        assert differing_caches(decoder.cache, ar.cache) == []


@pytest.mark.skipif(not ON_CPU, reason="about BLAS")
def test_inexact_ar_leaves_other_bits(without_c: None) -> None:
    """The comparison of caches can fail: exact=False lets BLAS round single rows in its own way."""
    model, prompts = make_model(), prompts_of(22, [20])
    decoders = [ConsensusDecoder(model, impl="torch"), ConsensusDecoder(model, mode="ar", impl="torch", exact=False)]
    for decoder in decoders:
        decoder.generate(prompts, max_new_tokens=12)
    found = differing_caches(*(decoder.cache for decoder in decoders))
    assert found and "from position 20 on" in " ".join(found), found
