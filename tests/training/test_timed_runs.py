"""Runs that a time bounds: both end together, and a resumed one has what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from orthrus_triton.training.config import ViewTrainingArguments
from orthrus_triton.training.trainer import ViewTrainer, last_checkpoint
from tests.training.view_runs import assert_same, make_args, make_model, make_trainer, saved_view, view_of


def timed_trainer(folder: Path, max_seconds: float, **options) -> ViewTrainer:
    """A trainer whose steps take two seconds each, by its clock."""
    options = {"save_steps": 1000, "warmup_steps": 100, "logging_steps": 1, **options}
    trainer = make_trainer(make_model(), folder, 1000, max_seconds=max_seconds, **options)
    step, now = trainer.training_step, [0]

    def two_seconds(*args, **options):
        now[0] += 2
        return step(*args, **options)

    trainer.clock.clock, trainer.training_step = lambda: now[0], two_seconds
    return trainer


def rates_of(trainer: ViewTrainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_a_run_ends_with_its_time_and_its_schedule(tmp_path):
    trainer = timed_trainer(tmp_path, 50)
    trainer.train()
    assert trainer.state.global_step == 26  # 25 steps of two seconds, and the first
    rates, peak = rates_of(trainer), trainer.args.learning_rate
    assert rates[0] < 0.02 * peak and max(rates) > 0.9 * peak and rates[-1] < 0.1 * peak
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-26"


def test_a_timed_run_is_resumed_with_the_time_that_is_left(tmp_path):
    stopped = timed_trainer(tmp_path, 50, save_steps=16)
    save = stopped._save_checkpoint

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    stopped._save_checkpoint = save_and_die
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = timed_trainer(tmp_path, 50)
    resumed.train(resume_from_checkpoint=True)
    # 30 of 50 seconds were gone after step 16; then a first step, which is not counted, and ten more
    assert resumed.state.global_step == 27 and resumed.clock.spent == 50
    rates, peak = rates_of(resumed), resumed.args.learning_rate
    assert len(rates) == 27 and max(rates[16:]) < 0.5 * peak and rates[-1] < 0.1 * peak
    # its time is up: given again, the command changes nothing
    finished, trained = timed_trainer(tmp_path, 50), saved_view(tmp_path, 27)
    finished.train(resume_from_checkpoint=True)
    assert finished.state.global_step == 27 and finished.clock.started is None
    assert_same(view_of(finished.orthrus), trained)
    # and from the start, it has all of it
    fresh = timed_trainer(tmp_path, 8)
    for _ in range(2):
        fresh.train()
        assert fresh.state.global_step == 5


@pytest.mark.parametrize("asked", ["steps", "no"])
def test_what_is_asked_for_is_done_when_the_time_is_up(tmp_path, asked):
    strategies = dict.fromkeys(("save_strategy", "eval_strategy"), asked)
    trainer = timed_trainer(tmp_path, 8, eval_rows=1, eval_steps=1000, logging_steps=1000, **strategies)
    trainer.train()
    figures = ("loss", "eval_loss") if asked == "steps" else ("loss",)
    found = [(name, entry["step"]) for entry in trainer.state.log_history for name in entry]
    assert [one for one in found if one[0] in ("loss", "eval_loss")] == [(name, 5) for name in figures]
    assert (last_checkpoint(tmp_path / "run") is not None) == (asked == "steps")


def test_a_clock_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(ViewTrainingArguments, "world_size", 2)
    make_args(tmp_path, 4)
    with pytest.raises(ValueError, match="max_seconds must be null on several processes, but got 5"):
        make_args(tmp_path, 4, max_seconds=5)
