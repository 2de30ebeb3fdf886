"""The benchmark of waits end to end on a tiny model: rows for chunks, and for prompts that begin alike or not."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import serving_waits
from orthrus_triton.modules import DecodeRun


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, copied = [], []
    admit, copy = DecodeRun.admit, DecodeRun.copy_prefix

    def admitted(run, b, prompt, max_new_tokens, params, cached, **how) -> None:
        read.append(prompt.numel() - cached)
        admit(run, b, prompt, max_new_tokens, params, cached, **how)

    def noted(run, source, b, prompt) -> None:
        copied.append(run.cached_prefix(source, prompt))
        copy(run, source, b, prompt)

    monkeypatch.setattr(DecodeRun, "admit", admitted)
    monkeypatch.setattr(DecodeRun, "copy_prefix", noted)
    app = typer.Typer()
    app.command()(serving_waits.main)
    sizes = ("--long-tokens", "300", "--chunks", "64,512", "--shared-tokens", "100", "--clients", "3")
    result = CliRunner().invoke(app, ["--shape", "tiny", "--device", "cpu", *sizes, "--out", str(tmp_path)])
    assert result.exit_code == 0, (result.output, result.exception)
    (path,) = tmp_path.rglob("serving_waits_tiny.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    columns = ("chunk", "prompt_tokens", "shared_tokens", "clients")
    assert [tuple(int(row[name]) for name in columns) for row in rows] == [
        (64, 300, 0, 1), (512, 300, 0, 1), (64, 120, 0, 3), (64, 120, 100, 3),
    ]  # fmt: skip
    for row in rows[:2]:
        assert 0 < float(row["other_median_s"]) <= float(row["other_longest_s"])
    assert all(float(row["first_text_s"]) > 0 for row in rows)
    # what was left to `admit`: of 300 tokens 44 behind four chunks, and all of them where a chunk is 512
    assert 300 - 4 * 64 in read and 300 in read
    # those that ask at once find the beginning in the slot of the first, or in copies of it
    assert sum(tokens >= 100 for tokens in copied) >= 2 and read[-3:] == [20, 20, 20]
