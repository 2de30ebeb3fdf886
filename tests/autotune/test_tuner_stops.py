"""A tuning run whose workers die, that is interrupted, or whose time is up: what is known is kept, and said."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from orthrus_triton.autotune import files, run, store
from orthrus_triton.autotune.worker import NOT_RUN, Worker, ask_all, compiler_environment
from tests.autotune import planted
from tests.autotune.test_tuner import HANDLER, PRODUCT, SCALE, configs_of, run_tune, stages


def test_a_configuration_that_ends_its_process_ends_nothing_else(fakes, monkeypatch):
    names = list(configs_of("planted_scale"))
    monkeypatch.setattr(run, "GATE_TIMEOUT", 3.0)
    fates = {
        "compile": {names[0]: "crash"},
        "gate": {names[1]: "hang", names[2]: "memory"},
        "time": {names[3]: "killed"},
    }
    fakes(**fates, us={names[3]: 1.0, names[-1]: 50.0},
    )  # fmt: skip
    (outcome,) = run_tune(SCALE).outcomes
    assert outcome.rejected == {
        names[0]: "ended its process with signal 11",
        names[1]: "took longer than 3 s",
        names[2]: "MemoryError: no memory left",
        names[3]: "while being timed: was killed, most likely for want of memory",
    }
    assert str(outcome.entry.config) == names[-1]


@pytest.mark.parametrize(
    "fate, said", [("crash", "signal 11"), ("killed", "for want of memory"), ("memory", "MemoryError"),
                   ("exit", "exit code 3"), ("raise", "out of resource"), ("hang", "took longer than 1 s")]
)  # fmt: skip
def test_a_worker_survives_its_jobs(fate, said, fakes):
    fakes(compile={"A=1": fate})
    worker = Worker(HANDLER, compiler_environment())
    jobs = [{"stage": "compile", "config": {"constants": {"A": n}, "launch": {}}} for n in (0, 1, 2)]
    answers = [worker.ask(job, timeout) for job, timeout in zip(jobs, (60.0, 1.0, 60.0))]
    worker.close()
    assert said in answers[1]["error"] and answers[0] == answers[2] != answers[1]


def test_workers_share_the_jobs_and_stop_in_time(fakes):
    log = fakes(compile={"A=3": "hang"})
    workers = [Worker(HANDLER, compiler_environment()) for _ in range(2)]
    jobs = [{"stage": "compile", "config": {"constants": {"A": n}, "launch": {}}} for n in range(8)]
    answers: dict[int, dict] = {}
    begun = itertools.count()
    ask_all(workers, jobs, 6.0, answers.__setitem__, lambda: 5 - next(begun))
    for worker in workers:
        worker.close()
    assert sorted(answers) == list(range(8)) and "took longer" in answers[3]["error"]
    not_run = {n for n, answer in answers.items() if answer.get("error") == NOT_RUN}
    assert not_run == {5, 6, 7} and len(stages(log)) == 5


def test_nothing_is_written_if_no_candidate_gets_through(fakes, folder):
    fakes(gate=dict.fromkeys(configs_of("planted_scale"), "raise"))
    (outcome,) = run_tune(SCALE).outcomes
    assert outcome.entry is None and len(outcome.rejected) == 6
    assert not (folder / "Test_GPU_9000.json").exists()


def test_an_interrupted_run_goes_on_where_it_was(fakes, folder):
    log = fakes()
    problems = (SCALE, PRODUCT)
    seen = []

    def interrupt(done: int, total: int, text: str) -> None:
        seen.append(text)
        if "planted_product" in text and "checking" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tune(*problems, advance=interrupt)
    assert len(store.files.read_table(folder / "Test_GPU_9000.json").entries) == 1  # the first one is safe
    before = stages(log)
    result = run_tune(*problems)
    again = stages(log)[len(before) :]
    total = len(configs_of("planted_scale")) + len(configs_of("planted_product"))
    assert [outcome.entry is not None for outcome in result.outcomes] == [True, True]
    # no compilation and no check twice; a job that was under way when the run was stopped may be asked again
    assert before.count("compile") + again.count("compile") <= total + 1
    assert before.count("gate") + again.count("gate") <= total + 1
    assert again.count("time") == 2  # of the second problem alone: a first look, then the near-winners
    assert not list(folder.glob("*.journal.jsonl"))


@pytest.mark.parametrize("changed", ["kernels", "compiler"])
def test_answers_about_other_kernels_or_by_another_compiler_are_asked_for_again(changed, fakes, monkeypatch):
    log, many = fakes(), len(configs_of("planted_scale"))

    def interrupt(done: int, total: int, text: str) -> None:
        if "timing" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tune(SCALE, advance=interrupt)
    if changed == "kernels":
        monkeypatch.setattr(planted.scale.space, "_source", "another")
    else:
        monkeypatch.setattr(run, "versions", lambda: {"torch": "9.9", "triton": "9.9"})
    (outcome,) = run_tune(SCALE).outcomes
    assert outcome.entry is not None
    assert stages(log).count("compile") == stages(log).count("gate") == 2 * many


@pytest.mark.parametrize("file", ["there", "gone"])
def test_a_run_that_is_out_of_time_keeps_what_it_found_out(file, fakes, folder, monkeypatch):
    """Also where what it had written is gone by then: that is tuned again."""
    log, hours = fakes(), [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: 3600 * hours[0]))

    def late(done: int, total: int, text: str) -> None:
        hours[0] = max(hours[0], float(text == f"{SCALE}: timed"))

    first = run_tune(SCALE, PRODUCT, budget=60.0, advance=late)
    assert [outcome.problem for outcome in first.outcomes] == [SCALE] and first.unfinished == [PRODUCT]
    hours[0] = 0.0
    if file == "gone":
        first.path.unlink()
    result = run_tune(SCALE, PRODUCT)
    assert {entry.problem for entry in files.read_table(result.path).entries} == {SCALE, PRODUCT}
    total = len(configs_of("planted_scale")) + len(configs_of("planted_product"))
    assert result.unfinished == [] and stages(log).count("gate") == total
    assert stages(log).count("time") == (6 if file == "gone" else 4)


def test_a_compilation_that_the_end_of_the_budget_kills_is_tried_again(fakes):
    fakes(compile=dict.fromkeys(configs_of("planted_scale"), "hang"))
    result = run_tune(SCALE, budget=3.0)
    assert result.unfinished == [SCALE]
    fakes()
    (outcome,) = run_tune(SCALE).outcomes
    assert outcome.rejected == {} and outcome.tried == len(configs_of("planted_scale"))


def test_out_of_budget_says_what_is_left(fakes):
    result = run_tune(SCALE, PRODUCT, budget=1e-3)
    assert result.outcomes == [] and result.unfinished == [SCALE, PRODUCT]


def test_a_short_budget_tries_fewer_candidates_and_still_chooses(fakes, folder):
    names = [*configs_of("planted_scale"), *configs_of("planted_product")]
    fakes(gate=dict.fromkeys(names, "slow"))
    result = run_tune(SCALE, PRODUCT, budget=6.0)  # the checks alone would take seven
    first = result.outcomes[0]
    assert first.entry is not None and 1 <= first.tried < len(configs_of("planted_scale"))
    assert files.read_table(result.path).entries[-1].problem in (SCALE, PRODUCT)
