"""The prefill benchmark end to end on a tiny shape: rows and prices, and no figure where a prefill is wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import prefill
from orthrus_triton.modules import ConsensusDecoder


def run(*arguments: object):
    app = typer.Typer()
    app.command()(prefill.main)
    arguments = ("--shape", "tiny", "--dtype", "fp32", "--device", "cpu", "--contexts", "600,210", *arguments)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows_of(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*/prefill_tiny_fp32.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_and_prices(tmp_path: Path) -> None:
    result = run("--others-up-to", 300, "--out", tmp_path)
    assert result.exit_code == 0, (result.output, result.exception)
    rows = rows_of(tmp_path)
    cells = [("ours", "210"), ("ours-invariant", "210"), ("hf", "210"), ("ours", "600")]
    assert [(row["provider"], row["context"]) for row in rows] == cells
    assert all(float(row["ttft_s"]) > 0 and int(row["tokens_s"]) > 0 and not row["note"] for row in rows)
    price = float(rows[1]["ttft_s"]) / float(rows[0]["ttft_s"])
    assert f"210 tokens: batch-invariant prefill takes {price:.2f}x the library's" in result.stdout


def test_all_providers_say_the_same_first_token() -> None:
    model = prefill.build(prefill.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    prompt = torch.randint(0, 255, (150,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = {name: prefill._make(name, model, 150)(prompt) for name in prefill.PROVIDERS}
    assert len(set(tokens.values())) == 1, tokens


def test_what_was_measured_and_what_others_raise_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(model):
        return lambda prompt: 1 / 0

    monkeypatch.setattr(prefill, "hf", cannot)
    timed = prefill._timed

    def stops_at_the_longest(make, prompt, *others):
        if len(prompt) == 600:
            raise KeyboardInterrupt
        return timed(make, prompt, *others)

    monkeypatch.setattr(prefill, "_timed", stops_at_the_longest)
    result = run("--out", tmp_path)
    assert result.exit_code != 0 and "| hf | 210 |  |  |  | ZeroDivisionError |" in result.stdout
    assert [row["provider"] for row in rows_of(tmp_path)] == ["ours", "ours-invariant", "hf"]


def test_a_prefill_that_depends_on_its_chunks_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ConsensusDecoder.prefill

    def depends(self, prompt, cache, *arguments):
        original(self, prompt, cache, *arguments)
        if self.prefill_chunk:
            cache.layers[1].k[:, :, 0] += 1e-6

    monkeypatch.setattr(ConsensusDecoder, "prefill", depends)
    result = run()
    assert result.exit_code == 1 and result.stdout == ""
    assert "layer 1: batch-invariant prefill depends on its chunks" in result.stderr
