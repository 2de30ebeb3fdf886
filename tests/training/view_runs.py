"""Tiny runs that the training tests share: a model, text it wrote itself, a trainer in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.training.config import ViewTrainingArguments
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.trainer import ViewTrainer
from tests.models.tiny_bases import base_config, build_base

K = 4
RECIPE = {
    "use_cpu": True, "disable_tqdm": True, "seed": 3, "per_device_train_batch_size": 2, "num_anchors": 3,
    "learning_rate": 1e-2, "warmup_steps": 1, "position_decay": None, "logging_steps": 10,
}  # fmt: skip


def make_model(case: str = "llama", **options: Any) -> OrthrusForCausalLM:
    """The same model in every process."""
    options = {"block_size": K, "mask_token_id": 1, "mask_embedding": True, **options}
    return OrthrusForCausalLM.from_base(build_base(base_config(case)), **options)


def own_rows(model: OrthrusForCausalLM, count: int, tokens: int = 24) -> list[TextRow]:
    """Text the frozen model writes itself, of two domains in turn."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(2, model.vocab_size, (3 + n % 4,), generator=generator) for n in range(count)]
    output = ConsensusDecoder(model, mode="ar").generate(prompts, max_new_tokens=tokens, eos_token_id=[])
    return [
        TextRow("code" if n % 2 else "prose", ids.tolist(), [(len(prompt), len(ids))])
        for n, (ids, prompt) in enumerate(zip(output.sequences, prompts))
    ]


def make_args(folder: Path, max_steps: int, cached: bool = True, **options: Any) -> ViewTrainingArguments:
    """A run in `folder`/run, with its frozen cache beside it."""
    options = {**RECIPE, "cache_dir": str(folder / "cache") if cached else None, **options}
    return ViewTrainingArguments(output_dir=str(folder / "run"), max_steps=max_steps, **options)


def make_trainer(
    model: OrthrusForCausalLM, folder: Path, max_steps: int, eval_rows: int = 0, **options: Any
) -> ViewTrainer:
    """A trainer of `model` on four rows of its own."""
    rows = own_rows(model, 4 + eval_rows)
    return ViewTrainer(model, make_args(folder, max_steps, **options), rows[:4], rows[4:])


@torch.no_grad()
def draft_logits(model: OrthrusForCausalLM, row: TextRow, anchor: int) -> torch.Tensor:
    """Logits [K, V] of the decoder's own draft at an anchor of a text."""
    buffers = model.new_cache(1, 64, K)
    model.forward_view(torch.tensor([row.ids[:anchor]]), buffers, buffers.view_pass("ar", anchor))
    buffers.context_len.fill_(anchor)
    block = torch.tensor([[row.ids[anchor]] + [model.mask_token_id] * (K - 1)])
    hidden = model.forward_view(block, buffers, buffers.draft_pass(K, model.anchor_rows))
    return model.compute_logits(hidden[:, model.anchor_rows :])[0]


def view_of(model: OrthrusForCausalLM) -> dict[str, torch.Tensor]:
    """A copy of the diffusion view's weights, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "_diff" in name}


def saved_view(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The view in a checkpoint of the run in `folder`."""
    return load_file(folder / "run" / f"checkpoint-{step}" / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same weights, bit for bit."""
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]
