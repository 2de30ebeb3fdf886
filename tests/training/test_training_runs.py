"""Runs that are stopped, resumed, spread over processes, or go wrong: never other bits, never a broken checkpoint."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.models.view import load_view, save_view
from orthrus_triton.training import trainer as trainer_module
from orthrus_triton.training.run import remove_checkpoints, save_model, start_from, train_view
from orthrus_triton.training.trainer import STAGING, ViewTrainer, last_checkpoint
from tests.models.tiny_bases import tiny_tokenizer
from tests.training.distributed_run import MODEL
from tests.training.killed_run import OPTIONS, STEPS
from tests.training.view_runs import assert_same, make_args, make_model, make_trainer, own_rows, saved_view, view_of

THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def run_module(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"tests.training.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **THREADS})


def test_a_run_killed_in_a_checkpoint_resumes_to_the_bits_of_an_unbroken_one(tmp_path):
    killed = tmp_path / "killed"
    killed.mkdir()
    done = run_module("killed_run", killed)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # the one being written is no checkpoint
    assert last_checkpoint(killed / "run").name == "checkpoint-4" and (killed / "run" / STAGING).is_dir()
    model = make_model()
    make_trainer(model, tmp_path, STEPS, **OPTIONS).train()
    unbroken = view_of(model)
    model.reset_view()
    trainer = make_trainer(model, killed, STEPS, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert_same(view_of(model), unbroken)
    assert_same(saved_view(killed, STEPS), unbroken)
    assert not (killed / "run" / STAGING).exists()
    # what the test compares did change
    model.reset_view()
    assert all(not torch.equal(tensor, unbroken[name]) for name, tensor in view_of(model).items())


@pytest.mark.parametrize("chain_width", [None, 8])
def test_a_run_starts_from_another_view(tmp_path, chain_width):
    model = make_model(chain_width=chain_width)
    make_trainer(model, tmp_path, 2, save_steps=2).train()
    trained = view_of(model)
    model.reset_view()
    start_from(model, tmp_path / "run" / "checkpoint-2")
    assert_same(view_of(model), trained)
    other = make_model(anchor_view="ar")
    start_from(other, tmp_path / "run" / "checkpoint-2")
    assert (other.config.anchor_view, other.config.chain_width) == ("diffusion", chain_width)
    assert_same(view_of(other), trained)
    save_view(model, tmp_path / "view.safetensors")
    reset = make_model(anchor_view="ar", block_size=2 * model.block_size)  # to learn longer blocks
    with pytest.raises(ValueError, match="model.block_size must be at most the view's"):
        load_view(reset, tmp_path / "view.safetensors")
    start_from(reset, tmp_path / "view.safetensors")
    assert (reset.config.anchor_view, reset.config.chain_width) == ("diffusion", chain_width)
    for name, tensor in view_of(reset).items():
        assert torch.allclose(tensor, trained[name], atol=1e-3), name  # int8
    # its anchors would be read by the wrong view
    model.config.anchor_view = "ar"
    with pytest.raises(ValueError, match="anchor_view='diffusion', not 'ar'"):
        make_trainer(model, tmp_path, 4).train(resume_from_checkpoint=True)


EVALUATED = {"eval_rows": 3, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    start = view_of(make_model(**MODEL))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Adam divides by the root of small squares: compare with how far training went
        assert (found[name] - tensor).norm() <= 1e-3 * (tensor - start[name]).norm(), name


def test_two_processes_and_accumulation_do_what_one_process_does(tmp_path):
    (tmp_path / "shared").mkdir()
    done = run_module("distributed_run", tmp_path / "shared", "ddp", "fsdp2")
    assert done.returncode == 0, done.stderr
    for folder, more in (("one", {}), ("halves", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})):
        trainer = make_trainer(make_model(**MODEL), tmp_path / folder, 4, **EVALUATED, **more)
        trainer.train()
    expected = saved_view(tmp_path / "one", 4)
    metrics = next(entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    for folder in ("halves", "shared/ddp", "shared/fsdp2"):
        assert_near(saved_view(tmp_path / folder, 4), expected)
    for mode in ("ddp", "fsdp2"):
        found = json.loads((tmp_path / "shared" / mode / "metrics.json").read_text())
        for name in ("eval_tokens_per_cycle", "eval_tokens_per_cycle_code", "eval_match_1"):
            assert found[name] == metrics[name]


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_does_what_one_process_does(tmp_path):
    done = run_module("distributed_run", tmp_path, "zero1", "zero2")
    assert done.returncode == 0, done.stderr
    make_trainer(make_model(**MODEL), tmp_path / "one", 4, **EVALUATED).train()
    for mode in ("zero1", "zero2"):
        assert_near(saved_view(tmp_path / mode, 4), saved_view(tmp_path / "one", 4))


@pytest.mark.parametrize("writer", ["view", "optimizer"])
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path, monkeypatch, writer):
    model = make_model()
    make_trainer(model, tmp_path, 4, save_steps=2).train()
    unbroken = view_of(model)
    owner, name = (trainer_module, "save_file") if writer == "view" else (torch, "save")
    save, calls = getattr(owner, name), []

    def save_once(*arguments, **options):
        calls.append(arguments)
        if len(calls) > (1 if writer == "view" else 3):  # optimizer, scheduler and random state of one checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments, **options)

    folder = tmp_path / "full"
    model.reset_view()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="checkpoint-4 could not be written .* No space"):
        patch.setattr(owner, name, save_once)
        make_trainer(model, folder, 4, save_steps=2).train()
    assert [path.name for path in (folder / "run").iterdir()] == ["checkpoint-2"]
    model.reset_view()
    make_trainer(model, folder, 4, save_steps=2).train(resume_from_checkpoint=True)
    assert_same(view_of(model), unbroken)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path, 4, save_steps=2)
    trainer.train()
    before = saved_view(tmp_path, 4)
    poisoned = make_trainer(model, tmp_path, 6, save_steps=2)
    collate = poisoned.data_collator

    def poison(examples):
        batch = collate(examples)
        batch["context"][:] = torch.nan
        return batch

    poisoned.data_collator = poison
    with pytest.raises(FloatingPointError, match="loss is nan in step 5: lower .*weights are those of step 4"):
        poisoned.train(resume_from_checkpoint=True)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-4"
    assert_same(saved_view(tmp_path, 4), before)


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path, 2)
    before = view_of(model)
    model.model.mask_embedding_diff.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match="gradient's norm is (nan|inf) in step 1"):
        trainer.train()
    assert_same(view_of(model), before)


def deferred_and_poisoned(folder, step: int, **options) -> ViewTrainer:
    """A trainer that notes numbers as on a GPU, with a gradient that is not finite from `step` on."""
    model = make_model()
    trainer = make_trainer(model, folder, 4, **options)
    trainer.watch.deferred = True
    model.model.mask_embedding_diff.register_hook(
        lambda gradient: gradient * torch.inf if trainer.state.global_step + 1 >= step else gradient
    )
    return trainer


def test_what_a_gpu_found_is_told_before_a_log_or_a_checkpoint(tmp_path):
    for name, options in (("log", {"save_steps": 100, "logging_steps": 3}), ("save", {"save_steps": 3})):
        trainer = deferred_and_poisoned(tmp_path / name, 2, **options)
        with pytest.raises(FloatingPointError, match="gradient's norm was not finite in step 2: lower learning_rate"):
            trainer.train()
        assert trainer.state.global_step == 3 and last_checkpoint(tmp_path / name / "run") is None


def test_what_a_gpu_found_in_the_last_steps_is_told_before_the_model_is_written(tmp_path):
    trainer = deferred_and_poisoned(tmp_path, 4, save_strategy="no", logging_strategy="no")
    with pytest.raises(FloatingPointError, match="gradient's norm was not finite in step 4"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_only_as_many_checkpoints_are_kept_as_asked_for(tmp_path):
    make_trainer(make_model(), tmp_path, 8, save_steps=2, save_total_limit=3).train()
    kept = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert kept == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_a_checkpoint_takes_the_place_of_an_earlier_runs(tmp_path):
    make_trainer(make_model(), tmp_path, 2, save_steps=2).train()
    earlier, model = saved_view(tmp_path, 2), make_model()
    make_trainer(model, tmp_path, 2, save_steps=2, seed=4).train()
    assert_same(saved_view(tmp_path, 2), view_of(model))
    assert any(not torch.equal(tensor, earlier[name]) for name, tensor in view_of(model).items())


def test_the_last_checkpoint_is_that_of_the_most_steps(tmp_path):
    for step in (200, 1000, 800):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-1000"


def test_what_a_killed_run_left_half_written_joins_no_checkpoint(tmp_path):
    left = tmp_path / "run" / ".checkpoint-being-written" / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "training_clock.json").write_text('{"seconds_spent": 9}')
    make_trainer(make_model(), tmp_path, 2).train()
    assert not left.exists() and not (tmp_path / "run" / "checkpoint-2" / "training_clock.json").exists()


def test_a_fresh_run_is_not_mistaken_for_the_one_before(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "model", tokenizer=tiny_tokenizer(list(range(2, 90))))
    rows = [
        {"id": str(n), "domain": row.domain, "prompt_ids": row.ids[:3], "answer_ids": row.ids[3:]}
        for n, row in enumerate(own_rows(model, 4))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl"), "save_total_limit": 1}
    run = tmp_path / "run"
    train_view(make_args(tmp_path, 6, save_steps=3, **options))
    (run / "checkpoint-notes").mkdir()
    (run / "checkpoint-notes" / "trainer_state.json").touch()  # as in a copy of a checkpoint
    old = saved_view(tmp_path, 6)
    with pytest.raises(ValueError, match="init_view must not be among the checkpoints that a fresh run removes"):
        train_view(make_args(tmp_path, 4, init_view=str(run / "checkpoint-6"), **options), resume=False)
    with pytest.raises(ValueError, match="init_view must not be among the checkpoints"):
        remove_checkpoints(make_args(tmp_path, 4, init_view=str(run / "checkpoint-6" / "view.safetensors"), **options))
    trainer = train_view(make_args(tmp_path, 4, save_steps=2, **options), resume=False)
    assert trainer.state.global_step == 4 and last_checkpoint(run).name == "checkpoint-4"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-4", "checkpoint-notes", "model"]
    assert any(not torch.equal(tensor, old[name]) for name, tensor in saved_view(tmp_path, 4).items())
    assert_same(view_of(OrthrusForCausalLM.from_pretrained(run / "model")), saved_view(tmp_path, 4))
    other = make_args(tmp_path / "other", 1, init_view=str(run / "checkpoint-4"), learning_rate=0.0, **options)
    assert_same(view_of(train_view(other).orthrus), saved_view(tmp_path, 4))


def test_a_checkpoint_of_another_view_is_refused(tmp_path):
    make_trainer(make_model(), tmp_path, 2, save_steps=2).train()
    other = make_trainer(make_model(view_rank=2), tmp_path, 2)
    with pytest.raises(ValueError, match="must hold"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint must be a training checkpoint"):
        other.train(resume_from_checkpoint=str(tmp_path))


@pytest.mark.parametrize("mask_embedding", [False, True])
def test_a_trained_model_keeps_the_dtype_of_its_frozen_weights(tmp_path, mask_embedding):
    """In training its view is fp32, and the mask's embedding is the model's first parameter."""
    model = make_model(mask_embedding=mask_embedding, dtype=torch.bfloat16)
    start = view_of(model)
    trainer = make_trainer(model, tmp_path, 1, frozen_dtype="bfloat16", learning_rate=1e-5, warmup_steps=0)
    trainer.train()
    for name, tensor in view_of(model).items():  # steps that half precision would lose
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, start[name].float()), name
    trainer.save_trained(tmp_path / "model")
    loaded = OrthrusForCausalLM.from_pretrained(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {loaded.dtype} == {torch.bfloat16}
    assert own_rows(loaded, 1) == own_rows(model.to(model.dtype), 1)
    assert_same(view_of(loaded), view_of(model))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_trained_model_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """Interrupted at every rename, over a folder that an earlier run left and that differs in each file."""
    run = tmp_path / "run"
    folder = run / "model"
    earlier = make_trainer(make_model(mask_embedding=False), tmp_path, 1)
    trainer = make_trainer(make_model(), tmp_path, 1)
    save_model(trainer, folder)
    new = files_of(folder)
    assert [path.name for path in run.iterdir()] == ["model"]
    rename, renamed = os.replace, 0

    def interrupt(*paths) -> None:
        nonlocal renamed
        if renamed == last:
            raise KeyboardInterrupt
        renamed += 1
        rename(*paths)

    found = []
    for last in range(20):
        save_model(earlier, folder)
        old = files_of(folder)
        assert old.keys() == new.keys() and all(old[name] != new[name] for name in ("config.json", "model.safetensors"))
        renamed = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupt)
            patch.setattr(Path, "replace", interrupt)
            try:
                save_model(trainer, folder)
            except KeyboardInterrupt:
                pass
        files = files_of(folder) if folder.exists() else None
        found.append("none" if files is None else "new" if files == new else "old" if files == old else "mixed")
        if renamed < last:
            break
    assert found[-1] == "new" and set(found) == {"old", "none", "new"}, found
    # what an interrupted one left is gone, and the model loads
    assert [path.name for path in run.iterdir()] == ["model"]
    assert OrthrusForCausalLM.from_pretrained(folder).config.mask_embedding
