"""The visit that makes a view, whole, on a model of two layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import view

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_rehearsal_passes_through_all_stages(tmp_path: Path, device: str) -> None:
    prompts = ({"prompt": f"put {n} words into order", "domain": ("code", "chat", "docs")[n % 3]} for n in range(24))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    changes = ("block_size=16", "num_anchors=4", "per_device_train_batch_size=4", "dataloader_num_workers=1",
               "logging_steps=5", f"compile_layers={device == 'cuda'}")  # fmt: skip
    command = [
        sys.executable, "-m", "benchmarks.view", tmp_path / "out", "--prompts", tmp_path / "prompts.jsonl",
        "--random", "tiny", "--work", tmp_path / "work", "--train-seconds", "2", "--batch-size", "8",
        "--eval-limit", "1", "--eval-tokens", "8", "--profile", "--device", device,
        *(word for change in changes for word in ("--set", change)),
    ]  # fmt: skip
    run = subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures["data"]["finished_rows"] == 24 and figures["train"]["steps"] > 1
    assert {"train_log", "step", "evaluation_k16", "evaluation_k8"} == figures["details"].keys()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "figures.json", "prompts.jsonl", "rows.tgz", "view.safetensors.0",
    ]  # fmt: skip


@pytest.fixture
def visit(tmp_path: Path) -> view.Visit:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "shard-00000.jsonl").write_text("{}\n")
    return view.Visit(tmp_path, tmp_path / "work", torch.device("cpu"), None, {}, {})


def test_a_failure_is_tried_again_without_compiling(visit, monkeypatch) -> None:
    tried = []

    def train_view(options, resume):
        tried.append(options["compile_layers"])
        if options["compile_layers"]:
            raise RuntimeError("no compiler")
        dataset, state = SimpleNamespace(rows=[0]), SimpleNamespace(global_step=7, log_history=[])
        return SimpleNamespace(clock=SimpleNamespace(started=1.0, ended=4.0), state=state, train_dataset=dataset)

    monkeypatch.setattr(view, "read_config", lambda path, **changes: changes)
    monkeypatch.setattr(view, "train_view", train_view)
    changes = {"compile_layers": True}
    view.train(visit, Path("view.yaml"), [visit.out / "rows"], Path("held-out"), changes, profile=False)
    assert tried == [True, False] and visit.figures["train"]["ms_per_step"] == 500
    # what it exports is this run's
    assert visit.checkpoint == visit.work / "run" / "checkpoint-7"
    with pytest.raises(ValueError, match="time for 25 steps, .* at rate 0.1"):
        view.try_rates(visit, [0.1], Path("view.yaml"), [visit.out / "rows"], Path("held-out"), changes=changes)


def test_without_a_checkpoint_there_is_nothing_to_export(visit) -> None:
    with pytest.raises(FileNotFoundError, match="a checkpoint must be in .*run, but there is none"):
        view.export(visit)


def test_a_config_may_leave_the_block_size_to_the_model(visit, monkeypatch) -> None:
    measured = []
    (visit.out / "view.yaml").write_text(f"output_dir: {visit.out}\nmax_steps: 1\nuse_cpu: true\n")
    monkeypatch.setattr(view, "measure", lambda *arguments: measured.append(arguments[-1]))
    application = typer.Typer()
    application.command()(view.main)
    arguments = (visit.out / "out", "--config", visit.out / "view.yaml", "--stages", "evaluate", "--device", "cpu",
                 "--work", visit.work)  # fmt: skip
    result = CliRunner().invoke(application, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and measured == [[8]], result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stages", "data,trian"), "--stages must be one of data, train, export, evaluate, none, but got 'trian'"),
        (("--block-sizes", "8,x"), "--block-sizes must be whole numbers >= 1"),
        (("--rates", "1e-3;2e-3"), "--rates must be numbers separated by commas"),
    ],
)
def test_bad_options_are_said_before_anything_runs(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    application = typer.Typer()
    application.command()(view.main)
    result = CliRunner().invoke(application, [str(tmp_path / "out"), *options, "--device", "cpu"])
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
