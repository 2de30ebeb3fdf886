"""`distill-data`: its options arrive, bad input is named, and Ctrl-C leaves whole files."""

from __future__ import annotations

from functools import partial

from orthrus_triton.training.prompts import Prompt, read_prompts
from tests.training.distill_command import distill_data
from tests.training.test_distill import rows_of

run = partial(distill_data, max_new_tokens=3)


def test_command(model_folder, tmp_path):
    (tmp_path / "code.txt").write_text("w30 w31 w32 w33 w34\nw40 w41 w42 w43 w44\nw50\n")
    (tmp_path / "held.txt").write_text("W40, w41 w42 w43 w44?\n")
    result = run(
        model_folder, tmp_path / "data", "--prompts", tmp_path / "code.txt", "--held-out", tmp_path / "held.txt"
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    rows = rows_of(tmp_path / "data")
    assert [row["prompt_ids"] for row in rows] == [[88, 30, 31, 32, 33, 34, 89], [88, 50, 89]]
    assert {row["domain"] for row in rows} == {"code"}
    assert "1 prompts repeat held-out ones" in result.stderr and result.stdout == ""


def test_prompts_written_for_another_machine(model_folder, tmp_path, monkeypatch):
    (tmp_path / "code.txt").write_text("w30 w31 w32 w33 w34\nw40 w41\u2028w42 w43 w44\nw50\n")
    (tmp_path / "held.txt").write_text("W40, w41 w42 w43 w44?\n")
    options = ("--prompts", tmp_path / "code.txt", "--held-out", tmp_path / "held.txt", "--prompts-only")
    result = run(model_folder, tmp_path / "carried.jsonl", *options)
    assert result.exit_code == 0, (result.stderr, result.exception)
    carried = read_prompts(tmp_path / "carried.jsonl")
    assert carried == [Prompt("w30 w31 w32 w33 w34", "code"), Prompt("w50", "code")]
    monkeypatch.setattr("orthrus_triton.cli.distill_data._gather", None)  # a name that cannot be is refused before
    result = run(model_folder, tmp_path / "carried.txt", *options)
    assert result.exit_code == 2 and ".jsonl" in result.stderr


def test_command_stopped_by_hand(model_folder, tmp_path, monkeypatch):
    (tmp_path / "q.txt").write_text("w30\nw40\n")

    def interrupted(*_args, on_row, **_options):
        on_row(3)
        raise KeyboardInterrupt

    monkeypatch.setattr("orthrus_triton.training.distill.distill", interrupted)
    result = run(model_folder, tmp_path / "data", "--prompts", tmp_path / "q.txt")
    assert result.exit_code == 130 and "1 new answers are kept" in result.stderr


def test_options_of_the_command_arrive(model_folder, tmp_path, monkeypatch):
    asked, done = [], {"finished_rows": 0, "answer_tokens": 0, "domains": {}, "left_out": 0, "complete": True}
    monkeypatch.setattr(
        "orthrus_triton.training.distill.distill",
        lambda _network, _tokenizer, prompts, folder, **how: asked.append((prompts, folder, how)) or done,
    )
    monkeypatch.setattr(
        "orthrus_triton.training.prompts_builtin.builtin_prompts",
        lambda *how: asked.append(how) or [Prompt("w40 w41 w42 w43 w44"), Prompt("w30"), Prompt("w50")],
    )
    (tmp_path / "held.txt").write_text("W40, w41 w42 w43 w44?\n")
    options = ("--builtin", "--seed", 5, "--corpus", tmp_path, "--package", "rich", "--phrasings", 2, "--limit", 1)
    options += ("--held-out", tmp_path / "held.txt", "--max-prompt-tokens", 9, "--batch-size", 3, "--shard-rows", 7)
    result = run(model_folder, tmp_path / "data", *options, "--budget", "2m")
    assert result.exit_code == 0 and "run it again" not in result.stderr
    done["complete"] = False
    result = run(model_folder, tmp_path / "data", *options, "--budget", "2m")
    assert result.exit_code == 0 and "not all shards are complete: run it again" in " ".join(result.stderr.split())
    built, (prompts, folder, how) = asked[:2]
    assert built == (5, tmp_path, ["rich"], 2) and folder == tmp_path / "data"
    assert prompts == [Prompt("w30")]  # the first that is not held out
    sizes = {"max_prompt_tokens": 9, "batch_size": 3, "shard_rows": 7, "seconds": 120.0}
    assert {name: how[name] for name in sizes} == sizes


def test_command_names_bad_input(model_folder, tmp_path):
    (tmp_path / "q.txt").write_text("w30\n")
    for options, complaint in (
        ((), "--prompts"),
        (("--prompts", tmp_path / "q.txt", "--builtin"), "one of them"),
        (("--prompts", tmp_path / "q.txt", "--corpus", tmp_path), "--corpus"),
        (("--prompts", tmp_path / "q.txt", "--package", "rich"), "--package"),
        (("--builtin", "--package", "numpy"), "held out"),
        (("--prompts", tmp_path / "q.txt", "--limit", 0), "--limit"),
        (("--prompts", tmp_path / "q.txt", "--budget", "soon"), "--budget"),
        (("--prompts", tmp_path / "missing.txt"), "missing.txt"),
        (("--prompts", tmp_path / "q.txt", "--held-out", tmp_path / "q.txt"), "--held-out"),
        (("--prompts", tmp_path / "q.txt", "--batch-size", 0), "--batch-size must be >= 1"),
    ):
        result = run(model_folder, tmp_path / "data", *options)
        assert result.exit_code == 2 and complaint in " ".join(result.stderr.split()), (result.stderr, result.exception)
