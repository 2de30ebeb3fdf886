"""Every Python block of the README runs as it stands, in a fresh process, in a folder with a base model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli_models import make_tokenizer, save_base_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
TITLES = [re.search(r"\b(OrthrusDecoderLayer|from_base|lookup)\b", block).group() for block in BLOCKS]


def test_the_three_uses_are_there_and_short():
    assert TITLES == ["OrthrusDecoderLayer", "from_base", "lookup"]
    assert all(len(block.splitlines()) <= 15 for block in BLOCKS)
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("block", BLOCKS, ids=TITLES)
def test_block_runs(block: str, tmp_path: Path):
    save_base_model(make_tokenizer(), tmp_path / "base-model")
    # compiled kernels or none: the interpreter is for tests of kernels
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    # the comment behind a print says what it prints
    for expected in re.findall(r"^print\(.*\)  # (torch\.Size.*)$", block, flags=re.MULTILINE):
        assert expected in done.stdout


def test_links_into_the_repository_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
