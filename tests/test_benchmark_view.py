"""The visit that makes a view, whole, on a model of two layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_rehearsal_passes_through_all_stages(tmp_path: Path, device: str) -> None:
    prompts = ({"prompt": f"put {n} words into order", "domain": ("code", "chat", "docs")[n % 3]} for n in range(24))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    changes = ("num_anchors=4", "per_device_train_batch_size=4", "dataloader_num_workers=1", "logging_steps=5",
               f"compile_layers={device == 'cuda'}")  # fmt: skip
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
        "figures.json", "rows.tgz", "view.safetensors.0",
    ]  # fmt: skip
