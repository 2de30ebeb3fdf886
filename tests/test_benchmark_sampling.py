"""The acceptance of both sampling rules on a tiny model: a row for each rule and temperature, and options that are said
to be wrong."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from benchmarks import sampling_acceptance


def run(*arguments: object):
    app = typer.Typer()
    app.command()(sampling_acceptance.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_row_for_every_rule_and_temperature(model_folder: Path) -> None:
    result = run(model_folder, "--tokens", 6, "--block-size", 3)
    assert result.exit_code == 0, result.output
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[:2] for row in rows] == [
        ["0.0", "greedy"],
        *([temperature, rule] for temperature in ("0.5", "0.8", "1.0") for rule in ("coupled", "rejection")),
    ]
    assert all(1 <= float(tokens) <= 3 and cycles.isdecimal() for *_, tokens, _, cycles in rows)


def test_bad_options_are_one_line(model_folder: Path) -> None:
    result = run(model_folder, "--block-size", 99)
    assert result.exit_code == 2 and "block_size must" in " ".join(result.stderr.split()) and result.stdout == ""
