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

CASES = [
    "exaone4", "gemma biases, untied", "gemma3 linear, biases, untied, other scores",
    "glm", "glm4", "granite", "llama", "llama dynamic", "mistral window", "olmo2",
    "olmo3 yarn",
    "phi3 partial", "qwen2",
    "qwen3 longrope", "seed_oss",
    "smollm3 biases, untied, window where nothing is rotated",
]  # fmt: skip


@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_consensus_emits_what_the_ar_view_emits(case: str, dtype: torch.dtype, anchor_view: str):
    base = build_base(base_config(case, eos_token_id=None), dtype)
    model = randomise_view(OrthrusForCausalLM.from_base(base, block_size=4, anchor_view=anchor_view), scale=0.02)
    prompts = [random_ids(length, seed=length)[0] for length in (5, 11)]
    run = {
        mode: ConsensusDecoder(model, mode=mode, impl="torch").generate(prompts, max_new_tokens=24)
        for mode in ("consensus", "ar")
    }
    for drafted, plain in zip(run["consensus"].sequences, run["ar"].sequences):
        assert drafted.tolist() == plain.tolist()
    # the draft was neither always right nor always wrong, or the test would be about something else; but behind a
    # frozen anchor, nothing that a random view drafts is right
    histogram = run["consensus"].stats.accepted_histogram
    assert histogram[0] > 0 and (sum(histogram[1:]) > 0 or anchor_view == "ar")


def test_an_anchor_that_is_the_mask_token_reads_as_itself():
    """Where the frozen view reads the anchor, the mask token's trained embedding is not for it."""
    base = build_base(base_config("llama", eos_token_id=None))
    prompt = random_ids(5, seed=5)[0]
    said = ConsensusDecoder(OrthrusForCausalLM.from_base(base), mode="ar", impl="torch").generate(
        [prompt], max_new_tokens=30
    )
    answer = said.sequences[0][5:]
    options = {"block_size": 4, "mask_embedding": True, "anchor_view": "ar"}
    for mask_token_id in set(answer.tolist()):
        model = OrthrusForCausalLM.from_base(base, mask_token_id=mask_token_id, **options)
        model.model.mask_embedding_diff.data.normal_()
        for right in ([0], [1, 3, 0, 2]):
            decoder = ScriptedDrafts(model, [answer], right, impl="torch")
            output = decoder.generate([prompt], max_new_tokens=30)
            assert torch.equal(output.sequences[0], said.sequences[0]), mask_token_id


@cache
def dual_view(case: str, dtype: torch.dtype, anchor_view: str) -> OrthrusForCausalLM:
    base = build_base(base_config(case, eos_token_id=None), dtype)
    return randomise_view(OrthrusForCausalLM.from_base(base, block_size=6, anchor_view=anchor_view))


@pytest.mark.parametrize("case", CASES)
@given(
    seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]), tokens=st.integers(1, 18),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=2), block_size=st.integers(2, 6),
    right=st.lists(st.integers(-1, 5), min_size=1, max_size=3), stop=st.integers(0, 17),
    anchor_view=st.sampled_from(["diffusion", "ar"]),
)  # fmt: skip
def test_any_draft_gives_the_ar_tokens(case, seed, dtype, tokens, lengths, block_size, right, stop, anchor_view):
    model = dual_view(case, dtype, anchor_view)
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


@pytest.mark.parametrize("case", CASES)
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


def test_a_compiled_cycle_multiplies_the_embedding_as_the_eager_one_does():
    """Of what rounds, Granite's factor alone is before the compiler's eyes."""
    base = build_base(base_config("granite", eos_token_id=None), torch.bfloat16)
    model = OrthrusForCausalLM.from_base(base, block_size=4)
    said = [
        ConsensusDecoder(model, mode=mode, impl="torch", compile=compiled).generate(
            [random_ids(5)[0]], max_new_tokens=20
        )
        for mode, compiled in (("ar", False), ("consensus", True))
    ]
    assert said[0].sequences[0].tolist() == said[1].sequences[0].tolist()
