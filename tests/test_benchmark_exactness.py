"""The exactness benchmark on a tiny model: every prompt once, differences counted, and a count when interrupted."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import exactness
from orthrus_triton.modules import ConsensusDecoder


def run(*arguments: object):
    app = typer.Typer()
    app.command()(exactness.main)
    return CliRunner().invoke(app, [str(argument) for argument in ("--dtype", "fp32", "--tokens", 6, *arguments)])


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    (path,) = folder.glob("*/exactness_fp32.csv")
    with path.open() as file:
        return {row["compared"]: row for row in csv.DictReader(file)}


def test_shares_are_all_prompts_once(tokenizer) -> None:
    shares = exactness.shares_of(None, "bf16", 1000, 24, 128, 8)
    assert sorted(n for share in shares for n in share.numbers) == list(range(1000))
    assert len({n for share in shares for n in share.control}) == 24
    assert {(len(share.numbers), len(share.control)) for share in shares} == {(exactness.AR_BATCH, 3)}
    assert len({tuple(prompt.tolist()) for prompt in exactness.thousand_prompts(tokenizer)}) == 1000
    (only,) = exactness.shares_of(None, "bf16", 1, 0, 128, 8)
    assert (only.numbers, only.control) == ([0], [])


def test_the_command_counts_in_several_processes(model_folder: Path, tmp_path: Path) -> None:
    result = run("--model", model_folder, "--limit", 5, "--control", 2, "--processes", 2, "--out", tmp_path)
    rows = rows_of(tmp_path)
    assert {name: row["prompts"] for name, row in rows.items()} == {exactness.OURS: "5", exactness.CONTROL: "2"}
    assert rows[exactness.OURS]["identical"] == "5" and "| cycles, AR | 5 | 6 | 5 |" in result.stdout
    # in fp32 a random tiny model seldom parts from itself; what finds no difference proves nothing
    assert result.exit_code == int(rows[exactness.CONTROL]["identical"] == "2")


def test_a_difference_is_found(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = exactness._answers

    def wrong_once(decoder: ConsensusDecoder, prompts: list[torch.Tensor], tokens: int) -> list[list[int]]:
        said = answers(decoder, prompts, tokens)
        if decoder.mode == "consensus":
            said[-1][3] += 1
        return said

    monkeypatch.setattr(exactness, "_answers", wrong_once)
    result = run("--model", model_folder, "--limit", 3, "--control", 0, "--processes", 1, "--out", tmp_path)
    row = rows_of(tmp_path)[exactness.OURS]
    assert (result.exit_code, row["prompts"], row["identical"], row["median_first_difference"]) == (1, "3", "2", "3")


def test_what_was_counted_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def parts(shares):
        yield exactness.Part(exactness.OURS, [None] * 25)
        raise KeyboardInterrupt

    monkeypatch.setattr(exactness, "compare_all", parts)
    result = run("--out", tmp_path)
    assert result.exit_code != 0 and "| cycles, AR | 25 | 6 | 25 |" in result.stdout
    assert rows_of(tmp_path)[exactness.OURS]["identical"] == "25"


def test_figures_are_filed_under_the_dtype_that_auto_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exactness, "compare_all", lambda _: [exactness.Part(exactness.OURS, [None])])
    monkeypatch.setattr(exactness, "resolve_dtype", lambda name, _: {"auto": torch.float32}[name])
    run("--dtype", "auto", "--out", tmp_path)
    assert rows_of(tmp_path)[exactness.OURS]["prompts"] == "1"


def test_what_a_process_says_is_an_error() -> None:
    shares = exactness.shares_of("/no/such/model", "fp32", 2, 0, 4, 2)
    with pytest.raises(RuntimeError, match="no/such/model"):
        list(exactness.compare_all(shares))


def test_bad_options_are_one_line() -> None:
    for option, value in (("--limit", 0), ("--limit", 1001), ("--tokens", 0), ("--control", -1), ("--processes", -1)):
        result = run(option, value)
        assert result.exit_code == 2 and f"{option} must be" in result.stderr
