"""The training benchmark end to end on a tiny shape: a figure for every route that runs, none for a wrong gradient."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import training

TINY = ("--shape", "tiny", "--anchors", "4", "--block-size", "4", "--length", "24", "--dtype", "fp32", "--samples", "2")


def run(*arguments: str):
    app = typer.Typer()
    app.command()(training.main)
    return CliRunner().invoke(app, [*TINY, "--device", "cpu", *arguments])


def test_every_route_has_a_figure_or_a_reason(tmp_path: Path) -> None:
    result = run("--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.rglob("*.csv")
    with path.open() as file:
        rows = {(row["part"], row["route"]): row for row in csv.DictReader(file)}
    assert len(rows) == 8
    for (_, route), row in rows.items():
        # FlexAttention has no backward on a CPU
        assert (row["note"] == "NotImplementedError") == ("flex" in route) == (row["p50_ms"] == "")
    assert float(rows["step", "ours, ours"]["p50_ms"]) > float(rows["attention", "ours"]["p20_ms"])


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops_at_the_loss(batch, layers, attention, loss, *others):
        if loss is not None:
            raise KeyboardInterrupt
        return dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "peak_mib", "samples", "note"), "")

    monkeypatch.setattr(training, "problems", lambda *_: [])
    monkeypatch.setattr(training, "_timed", stops_at_the_loss)
    result = run("--out", str(tmp_path))
    (path,) = tmp_path.rglob("*.csv")
    assert result.exit_code == 130 and len(path.read_text().splitlines()) == 1 + 3
    assert result.stdout.count("| attention |") == 3


def test_a_wrong_gradient_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = training.our_loss
    monkeypatch.setattr(training, "our_loss", lambda batch, impl="auto": right(batch, impl) * (1 + (impl == "auto")))
    result = run()
    assert result.exit_code == 1 and "gradient of hidden" in result.stderr and "p50_ms" not in result.stdout


def test_anchors_must_fit_the_row() -> None:
    result = run("--anchors", "21")
    message = "--anchors must be in 1..length - block_size = 20, but got 21"
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
