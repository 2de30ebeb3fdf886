"""`orthrus-triton distill-data` on a tiny model."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from orthrus_triton.cli import app


def distill_data(model_folder: Path, out: Path, *options: object, max_new_tokens: int) -> Result:
    """Run the command in this process: the model in `model_folder`, in fp32 on the CPU."""
    fixed = ("distill-data", out, "--model", model_folder, "--max-new-tokens", max_new_tokens, "--device", "cpu",
             "--dtype", "fp32")  # fmt: skip
    return CliRunner().invoke(app, [str(option) for option in (*fixed, *options)])
