"""`orthrus-triton verify`: equal modes pass, planted differences are found and measured, bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from tests.cli_models import assert_bad_input, make_tokenizer, run, save_base_model

PROMPTS = ["the text", "", "of the tokens", "   ", "tokens"]
LINES = [1, 3, 5]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    save_base_model(make_tokenizer(), folder / "base")
    result = run("convert", folder / "base", folder / "orthrus", "--block-size", 4)
    assert result.exit_code == 0, result.stderr
    return folder / "orthrus"


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def verify(model: Path, prompts: Path, *options: object):
    fixed = ("--raw", "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", 9, "--batch-size", 2)
    return run("verify", "--model", model, "--prompts", prompts, *fixed, *options)


def ar_tokens(folder: Path, prompt: str) -> list[int]:
    model, tokenizer = OrthrusForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return ConsensusDecoder(model, mode="ar").generate(ids, max_new_tokens=9).sequences[0][ids.shape[1] :].tolist()


def test_equal_modes_pass_and_blank_lines_are_skipped(model_folder, prompt_file):
    result = verify(model_folder, prompt_file)
    assert result.exit_code == 0, (result.stdout, result.stderr)
    assert result.stdout.startswith("3 of 3 prompts identical (") and "float32 on cpu (torch), block 4" in result.stdout
    result = verify(model_folder, prompt_file, "--json", "--block-size", 3)
    report = json.loads(result.stdout)
    expected = sum(len(ar_tokens(model_folder, PROMPTS[line - 1])) for line in LINES)
    assert (report["prompts"], report["identical"], report["divergences"]) == (3, 3, [])
    assert (report["tokens"], report["block_size"]) == (expected, 3)


def plant(monkeypatch: pytest.MonkeyPatch, position: int, cut: bool = False) -> None:
    """Consensus says another token than AR from generated token `position` of the second prompt on; or nothing."""
    generate = ConsensusDecoder.generate

    def wrong(self, prompts, **options):
        output = generate(self, prompts, **options)
        if self.mode == "consensus" and len(prompts) == 2:
            start = len(prompts[1]) + position
            output.sequences[1] = output.sequences[1][: None if not cut else start]
            output.sequences[1][start:] = (output.sequences[1][start:] + 1) % self.model.vocab_size
        return output

    monkeypatch.setattr(ConsensusDecoder, "generate", wrong)


@pytest.mark.parametrize("position", [0, 3])
def test_a_difference_is_found_and_measured(model_folder, prompt_file, monkeypatch, position):
    expected = ar_tokens(model_folder, PROMPTS[2])
    plant(monkeypatch, position)
    result = verify(model_folder, prompt_file, "--json")
    assert result.exit_code == 1, result.stderr
    report = json.loads(result.stdout)
    assert (report["prompts"], report["identical"]) == (3, 2)
    (found,) = report["divergences"]
    assert (found["line"], found["position"], found["ar_token"]) == (3, position, expected[position])
    model, tokenizer = OrthrusForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    ids = tokenizer(PROMPTS[2], return_tensors="pt")["input_ids"]
    ids = torch.cat((ids, torch.tensor([expected[:position]], dtype=torch.int64)), dim=1)
    with torch.no_grad():
        logits, winners = model(ids).logits[0, -1].topk(2)
    assert int(winners[0]) == expected[position]
    assert found["margin"] == pytest.approx(float(logits[0] - logits[1]), rel=1e-3) and found["margin"] > 0
    text = verify(model_folder, prompt_file)
    assert text.exit_code == 1
    first, last = text.stdout.strip().splitlines()
    assert first.startswith(
        f"line 3: DIFFERS from generated token {position} on: dual-view {found['consensus_token']} "
    )
    assert f"AR {expected[position]} " in first and f"margin of the AR logits there {found['margin']:.3g}" in first
    assert last.startswith("2 of 3 prompts identical")


def test_a_sequence_that_ends_early_differs(model_folder, prompt_file, monkeypatch):
    plant(monkeypatch, 2, cut=True)
    result = verify(model_folder, prompt_file)
    assert result.exit_code == 1 and "DIFFERS from generated token 2 on: dual-view its end, AR " in result.stdout
    said = sum(len(ar_tokens(model_folder, PROMPTS[line - 1])) for line in LINES)  # the AR view's own
    assert f"2 of 3 prompts identical ({said} tokens)" in result.stdout


def test_bad_input(model_folder, prompt_file, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n  \n")
    assert_bad_input(verify(model_folder, empty), "prompts must hold at least one prompt")
    assert_bad_input(verify(model_folder, tmp_path / "missing.txt"), "missing.txt")
    assert_bad_input(verify(tmp_path / "nowhere", prompt_file), "nowhere")
    assert_bad_input(verify(model_folder, prompt_file, "--batch-size", 0), "--batch-size must be >= 1, but got 0")
    assert_bad_input(verify(model_folder, prompt_file, "--max-new-tokens", 0), "--max-new-tokens must be >= 1")
    assert_bad_input(verify(model_folder, prompt_file, "--block-size", 99), "block_size", "99")
    assert_bad_input(verify(model_folder, prompt_file, "--device", "tpu"), "--device")
    assert run("verify").exit_code == 2


def test_prompts_may_be_json_lines(model_folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "chat": False}) + "\n" for text in PROMPTS if text.strip()))
    result = run(
        "verify", "--model", model_folder, "--prompts", path, "--dtype", "fp32", "--max-new-tokens", 9, "--json"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["prompts"], report["identical"]) == (3, 3)
    assert report["tokens"] == sum(len(ar_tokens(model_folder, PROMPTS[line - 1])) for line in LINES)


def test_the_demo_model_is_the_default(prompt_file, monkeypatch, model_folder):
    asked = []

    def load(*arguments, **options):
        asked.append(arguments)
        model, tokenizer = OrthrusForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
        return model, tokenizer, "the demo"

    monkeypatch.setattr("orthrus_triton.cli.verify.load_model", load)
    options = ("--device", "cpu", "--dtype", "fp32", "--max-new-tokens", 2)
    result = run("verify", "--prompts", prompt_file, *options)
    assert result.exit_code == 0, result.stderr
    assert "the demo, float32 on cpu" in result.stdout
    assert asked == [(None, torch.float32, torch.device("cpu"))]
