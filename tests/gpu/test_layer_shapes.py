"""Tiers A and B on a GPU at the layer shapes of Qwen3-0.6B, 1.7B and 8B: tokens, hidden states and K/V, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.drafts import ScriptedDrafts
from tests.modules.stack_bits import assert_verify_rows_are_decode_rows, differing_caches

pytestmark = pytest.mark.gpu
BLOCK_SIZE = 32
TOKENS = 80
VOCAB = 4096
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = {
    "0.6B": {"hidden_size": 1024, "num_heads": 16, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "num_heads": 16, "intermediate_size": 6144},
    "8B": {"hidden_size": 4096, "num_heads": 32, "intermediate_size": 12288},
}
# around the edges of tiles and splits, up to 32k
CONTEXTS = [32_000, 0, 1, 511, 512, 513, 4095, 8192]
PROMPTS = {"long": [32_000], "ragged": [1, 300, 497, 511, 512, 513, 2000, 9000]}


def of_every_model(test: Callable) -> Callable:
    """Run for each shape and dtype; one process compiles the kernels of one model, for they are most of the time."""
    models = [
        pytest.param(shape, dtype, marks=pytest.mark.xdist_group(f"{shape}-{dtype}"), id=f"{shape}-{dtype}")
        for dtype in DTYPES for shape in SHAPES
    ]  # fmt: skip
    return pytest.mark.parametrize(("shape", "dtype"), models)(test)


@cache
def build(shape: str, dtype: torch.dtype) -> TinyDualViewModel:
    """Two random layers of this shape, with weights large enough for a text that moves."""
    build.cache_clear()  # one model at a time in memory
    torch.manual_seed(3)
    with torch.device("cuda"):
        model = TinyDualViewModel(
            VOCAB, num_layers=2, num_kv_heads=8, head_dim=128, block_size=BLOCK_SIZE, qk_norm=True, **SHAPES[shape]
        ).to(dtype)
    for layer in model.layers:
        layer.self_attn.o_proj.weight.data *= 8
        layer.self_attn.copy_ar_to_diffusion()
    return model


@of_every_model
@pytest.mark.parametrize("batch", [1, 8])
def test_verify_rows_are_decode_rows(batch: int, shape: str, dtype: torch.dtype) -> None:
    assert_verify_rows_are_decode_rows(build(shape, dtype), CONTEXTS[:batch], BLOCK_SIZE, impl="triton")


@of_every_model
@pytest.mark.parametrize("lengths", PROMPTS)
def test_consensus_is_ar(lengths: str, shape: str, dtype: torch.dtype) -> None:
    """The view's own drafts, replayed as graphs, and scripted ones of every acceptance, against AR mode."""
    model = build(shape, dtype)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, VOCAB, (length,), generator=generator) for length in PROMPTS[lengths]]
    ar = ConsensusDecoder(model, mode="ar")
    answers = ar.generate(prompts, max_new_tokens=TOKENS).sequences
    new = [sequence[len(prompt) :] for sequence, prompt in zip(answers, prompts)]
    assert len({int(token) for token in new[-1]}) > 8, "the text must move, or equality says little"
    for decoder in (ConsensusDecoder(model), ScriptedDrafts(model, new, [31, 0, 7, -1, 15])):
        output = decoder.generate(prompts, max_new_tokens=TOKENS)
        assert [s.tolist() for s in output.sequences] == [s.tolist() for s in answers]
        assert differing_caches(decoder.cache, ar.cache) == []
