"""What rounding changes: distances of a model from itself, and the table of a tiny one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import int8_weights
from orthrus_triton.ops.cpu.kernels import has_integer_product


def test_a_distance_is_what_it_says() -> None:
    exact = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]]).log()
    text, distance = torch.tensor([0, 2, 1]), int8_weights.Distance()
    distance.add(exact[:1], other[:1], text[:1])
    distance.add(exact[1:], other[1:], text[1:])
    kl = 0.25 * torch.tensor(2.0).log().item() / 3  # 0.5 log 2 - 0.25 log 2, over three tokens
    perplexity = (1 / (0.25 * 0.8 * 0.7)) ** (1 / 3)
    assert distance.row() == {
        "tokens": 3, "same_likeliest": "66.67%", "kl_nats": f"{kl:.5f}", "perplexity": f"{perplexity:.4f}",
    }  # fmt: skip


def test_int8_is_farther_than_the_dtype(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "code.txt").write_text("the text\nof the tokens\nthe\n")
    app = typer.Typer()
    app.command()(int8_weights.main)
    arguments = ("--model", model_folder, "--prompts", tmp_path / "code.txt", "--limit", 2, "--tokens", 20)
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--dtype", "fp32", "--out", tmp_path)])
    assert result.exit_code == 0, (result.output, result.exception)
    (path,) = tmp_path.rglob("int8_weights_fp32.csv")
    with path.open() as file:
        same, quantized, rounded, _ = csv.DictReader(file)
    assert (same["weights"], same["same_likeliest"], float(same["kl_nats"])) == ("as it is", "100.00%", 0)
    assert 2 <= int(same["tokens"]) == int(quantized["tokens"]) <= 40
    assert quantized["weights"] == "weights in int8" and float(quantized["kl_nats"]) > 0
    assert rounded["weights"] == "rows, too" and float(rounded["kl_nats"]) > 0
    assert (rounded["perplexity"] == quantized["perplexity"]) != has_integer_product()
    assert same["perplexity"] != quantized["perplexity"] and path.with_suffix(".md").read_text() in result.output


def test_a_prompt_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(typer.Exit):
        int8_weights.main([tmp_path / "none.txt"])
