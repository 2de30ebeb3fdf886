"""Tier B on real architectures: consensus mode emits the AR mode's tokens, and in fp32 those are transformers' own."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view
from tests.modules.drafts import ScriptedDrafts

FAMILIES = ["llama", "llama dynamic", "mistral window", "qwen2", "qwen3 longrope"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", FAMILIES)
def test_consensus_emits_what_the_ar_view_emits(case: str, dtype: torch.dtype):
    base = build_base(base_config(case, eos_token_id=None), dtype)
    model = randomise_view(OrthrusForCausalLM.from_base(base, block_size=4), scale=0.02)
    prompts = [random_ids(length, seed=length)[0] for length in (5, 11)]
    run = {
        mode: ConsensusDecoder(model, mode=mode, impl="torch").generate(prompts, max_new_tokens=24)
        for mode in ("consensus", "ar")
    }
    for drafted, plain in zip(run["consensus"].sequences, run["ar"].sequences):
        assert drafted.tolist() == plain.tolist()
    # the draft was neither always right nor always wrong, or the test would be about something else
    histogram = run["consensus"].stats.accepted_histogram
    assert histogram[0] > 0 and sum(histogram[1:]) > 0


@cache
def dual_view(case: str, dtype: torch.dtype) -> OrthrusForCausalLM:
    base = build_base(base_config(case, eos_token_id=None), dtype)
    return randomise_view(OrthrusForCausalLM.from_base(base, block_size=6))


@pytest.mark.parametrize("case", FAMILIES)
@given(
    seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]), tokens=st.integers(1, 18),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=2), block_size=st.integers(2, 6),
    right=st.lists(st.integers(-1, 5), min_size=1, max_size=3), stop=st.integers(0, 17),
)  # fmt: skip
def test_any_draft_gives_the_ar_tokens(case, seed, dtype, tokens, lengths, block_size, right, stop):
    model = dual_view(case, dtype)
    prompts = [random_ids(length, seed=seed + length)[0] for length in lengths]
    ar = ConsensusDecoder(model, mode="ar", impl="torch", block_size=block_size)
    answers = [ar.generate([prompt], max_new_tokens=18).sequences[0][len(prompt) :] for prompt in prompts]
    eos = int(answers[0][stop])
    decoder = ScriptedDrafts(model, answers, right, impl="torch", block_size=block_size)
    output = decoder.generate(prompts, max_new_tokens=tokens, eos_token_id=eos)
    for prompt, answer, sequence in zip(prompts, answers, output.sequences):
        said = answer.tolist()
        length = min(tokens, said.index(eos) + 1 if eos in said else tokens)
        assert sequence.tolist() == prompt.tolist() + said[:length]


@pytest.mark.parametrize("case", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(case: str):
    base = build_base(base_config(case, eos_token_id=None))
    prompt = random_ids(9)
    expected = base.generate(prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
    model = OrthrusForCausalLM.from_base(base, block_size=4)
    out = ConsensusDecoder(model, impl="torch").generate(prompt, max_new_tokens=20)
    assert out.sequences[0].tolist() == expected[0].tolist()


def test_the_model_brings_its_own_stop_tokens():
    base = build_base(base_config("qwen3", eos_token_id=None))
    model = OrthrusForCausalLM.from_base(base, block_size=4)
    free = ConsensusDecoder(model, impl="torch").generate(random_ids(9), max_new_tokens=20).sequences[0].tolist()
    stop = free[9 + 6]
    stopping = OrthrusForCausalLM.from_base(build_base(base_config("qwen3", eos_token_id=[100, stop])), block_size=4)
    assert stopping.eos_token_ids == [100, stop]
    ids = ConsensusDecoder(stopping, impl="torch").generate(random_ids(9), max_new_tokens=20).sequences[0].tolist()
    assert ids == free[: free.index(stop, 9) + 1]
