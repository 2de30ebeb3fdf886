"""The command line on a tiny saved model: text, statistics, the machine, help, and what bad input looks like."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import orthrus_triton
from orthrus_triton.cli import common
from orthrus_triton.cli.load import load_apart
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.ops.cpu import kernels
from tests.cli_models import (
    BLOCK_SIZE,
    assert_bad_input,
    expected_text,
    run,
)


def test_generate_prints_the_models_own_text_and_nothing_else(model_folder):
    result = run("generate", model_folder, "the text", "--raw", "--max-new-tokens", 24, "--dtype", "fp32")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected_text(model_folder, "the text", 24) + "\n"
    assert "tokens/s" in result.stderr and "TPF" in result.stderr


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_generate_reads_stdin_and_ends_with_json(model_folder, mode):
    options = ("--raw", "--max-new-tokens", 11, "--dtype", "fp32", "--stats", "json", "--mode", mode)
    options += ("--block-size", BLOCK_SIZE) if mode == "consensus" else ()
    result = run("generate", model_folder, *options, stdin="the text\n")
    assert result.exit_code == 0, result.stderr
    text, last = result.stdout.removesuffix("\n").rsplit("\n", 1)
    assert text == expected_text(model_folder, "the text", 11)
    stats = json.loads(last)
    passes = 2 if mode == "consensus" else 1
    assert (stats["mode"], stats["dtype"]) == (mode, "float32")
    assert stats["block_size"] == (BLOCK_SIZE if mode == "consensus" else 1)
    assert 1 <= stats["tokens"] <= 11
    assert stats["stopped_by"] == ("length" if stats["tokens"] == 11 else "eos")
    assert stats["forward_passes"] == 1 + passes * stats["cycles"]
    assert stats["tpf"] == pytest.approx(stats["tokens"] / stats["forward_passes"])
    assert sum(stats["accepted_histogram"]) == stats["cycles"]
    assert result.stderr == ""


@pytest.mark.parametrize("chosen", [(), ("--block-size", "auto")], ids=["by default", "named"])
def test_a_block_of_whatever_size_is_fastest_gives_the_same_text(model_folder, chosen):
    options = ("--raw", "--max-new-tokens", 24, "--dtype", "fp32", "--stats", "json", "--device", "cpu", *chosen)
    result = run("generate", model_folder, "the text", *options)
    assert result.exit_code == 0, result.stderr
    text, last = result.stdout.removesuffix("\n").rsplit("\n", 1)
    assert text == expected_text(model_folder, "the text", 24) and json.loads(last)["block_size"] == "auto"


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_int8_drafts_are_drafts_of_the_same_text(model_folder, command, monkeypatch, tmp_path):
    quantized = []
    original = OrthrusForCausalLM.quantize_drafts
    monkeypatch.setattr(
        OrthrusForCausalLM, "quantize_drafts", lambda model: quantized.append(model) or original(model)
    )  # fmt: skip
    options = ("--raw", "--max-new-tokens", 24, "--dtype", "fp32")
    if command == "generate":
        result = run(command, model_folder, "the text", *options, "--int8-drafts")
        assert result.stdout == expected_text(model_folder, "the text", 24) + "\n"
        run(command, model_folder, "the text", *options, "--int8-drafts", "--mode", "ar")  # drafts nothing
    else:
        (tmp_path / "code.txt").write_text("the text\n")
        named = ("--model", model_folder, "--prompts", tmp_path / "code.txt", "--no-baseline", "--json")
        result = run(command, *named, *options, "--int8-drafts")
        report = json.loads(result.stdout.splitlines()[-1])
        assert report["int8_drafts"] is True and report["exactness"]["equal"] == 1
    assert result.exit_code == 0 and len(quantized) == 1


@pytest.mark.parametrize("command", ["generate", "evaluate", "verify"])
def test_int8_weights_are_another_model_of_which_text_is_as_exact(model_folder, command, tmp_path):
    options = ("--max-new-tokens", 24, "--dtype", "fp32", "--int8-weights", "--raw")
    if command == "generate":
        result = run(command, model_folder, "the text", *options, "--stats", "json")
        text, report = result.stdout.removesuffix("\n").rsplit("\n", 1)
        assert text == expected_text(model_folder, "the text", 24, int8_weights=True)
        assert text != expected_text(model_folder, "the text", 24) and json.loads(report)["int8_weights"] is True
        model = OrthrusForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        for also in ({}, {"round_rows": True}, {"round_rows": True, "head": True}):
            model.quantize_weights(**also)
            model.save_pretrained(tmp_path / "int8", AutoTokenizer.from_pretrained(model_folder))
            expected = expected_text(model_folder, "the text", 24, int8_weights=True, **also)
            flags = [name for name, key in (("--int8-rows", "round_rows"), ("--int8-head", "head")) if key in also]
            for named in ([tmp_path / "int8", "the text"], [model_folder, "the text", *flags]):
                saved = run(command, *named, *options, "--stats", "json")
                assert saved.stdout.startswith(expected), saved.output
                report = json.loads(saved.stdout.splitlines()[-1])
                said = [report[f"int8_{part}"] for part in ("weights", "rows", "head")]
                assert said == [True, "round_rows" in also, "head" in also]
        return
    (tmp_path / "code.txt").write_text("the text\n")
    result = run(command, "--model", model_folder, "--prompts", tmp_path / "code.txt", "--json", *options)
    report = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0 and report["model"] == f"{model_folder}, weights in int8"
    assert (report["identical"] if command == "verify" else report["exactness"]["equal"]) == 1


def test_generate_samples_what_its_options_say_in_either_mode(model_folder):
    command = ("generate", model_folder, "the text", "--raw", "--max-new-tokens", 24, "--dtype", "fp32")
    sampled = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.001, "--seed")
    texts = {}
    for seed in (1, 2):
        for mode in ("consensus", "ar"):
            result = run(*command, *sampled, seed, "--mode", mode)
            assert result.exit_code == 0, result.stderr
            texts[seed, mode] = result.stdout
    params = SamplingParams(temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, seed=1)
    assert texts[1, "consensus"] == texts[1, "ar"] == expected_text(model_folder, "the text", 24, params) + "\n"
    assert texts[2, "consensus"] == texts[2, "ar"] != texts[1, "ar"]


def test_a_text_that_ends_itself_with_its_last_token_says_so(model_folder, monkeypatch):
    options = ("--raw", "--max-new-tokens", 1, "--dtype", "fp32", "--stats", "json")
    stopped_by = []
    for ends in (range(270), []):  # any token, or none
        monkeypatch.setattr(OrthrusForCausalLM, "eos_token_ids", property(lambda _, ends=ends: list(ends)))
        result = run("generate", model_folder, "the text", *options)
        stopped_by.append(json.loads(result.stdout.splitlines()[-1])["stopped_by"])
    assert stopped_by == ["eos", "length"]


def test_generate_stats_none_is_silent(model_folder):
    result = run("generate", model_folder, "the", "--raw", "--max-new-tokens", 3, "--stats", "none")
    assert result.exit_code == 0 and result.stderr == ""


def test_chat_template_is_the_default_and_system_goes_into_it(model_folder, tokenizer):
    def prompt_tokens(*options: str) -> int:
        result = run("generate", model_folder, "hey", "--max-new-tokens", 1, "--stats", "json", *options)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])["prompt_tokens"]

    raw = len(tokenizer("hey")["input_ids"])
    assert prompt_tokens("--raw") == raw
    assert prompt_tokens() == prompt_tokens("--chat") == raw + 3
    assert prompt_tokens("--system", "the") == raw + 3 + 2 + len(tokenizer("the")["input_ids"])


def test_generate_bad_input(model_folder, tmp_path, monkeypatch):
    generate = ("generate", model_folder)
    assert_bad_input(run("generate", tmp_path / "missing" / "model", "hey"), "missing/model")
    assert_bad_input(run(*generate, " "), "PROMPT must not be empty")
    assert_bad_input(run(*generate, stdin=""), "PROMPT must not be empty")
    assert_bad_input(run(*generate, "hey", "--raw", "--system", "be kind"), "--system")
    assert_bad_input(run(*generate, "hey", "--block-size", BLOCK_SIZE + 1), "block_size")
    for size in ("wide", "--3"):
        result = run(*generate, "hey", "--block-size", size)
        message = " ".join(result.output.replace("│", " ").split())  # typer's box
        assert result.exit_code == 2 and f"rows or auto, but got '{size}'" in message
    assert_bad_input(run(*generate, "hey", "--max-new-tokens", 0), "max_new_tokens")
    assert_bad_input(run(*generate, "hey", "--temperature", -1), "temperature must be in 0..")
    assert_bad_input(run(*generate, "hey", "--device", "toaster"), "--device", "toaster")
    assert_bad_input(run(*generate, "hey", "--device", "meta"), "--device", "meta")
    too_many = f"cuda:{torch.cuda.device_count()}"
    assert_bad_input(run(*generate, "hey", "--device", too_many), "--device", too_many)
    assert run(*generate, "hey", "--dtype", "fp7").exit_code == 2
    assert run(*generate, "hey", "--mode", "magic").exit_code == 2
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert_bad_input(run(*generate, "hey", "--impl", "triton", "--device", "cpu"), "impl='triton'")


def test_chat_without_a_template_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no.*template|template.*none"):
        common.encode_prompt(bare, "hey", chat=True)
    assert torch.equal(common.encode_prompt(bare, "hey", chat=None), common.encode_prompt(tokenizer, "hey", chat=False))


@pytest.mark.parametrize("text", ["naïve 日本語 and 🙂🙂 too", "def f(x):\n    return x\n\n", "🙂"])
@pytest.mark.parametrize("step", [1, 3])
def test_streaming_never_breaks_a_letter(tokenizer, capsys, text, step):
    """Letters of several tokens, fed in pieces, come out whole."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    assert len(ids) > 3
    streamer = common.text_streamer(tokenizer)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt, not printed
    for start in range(0, len(ids), step):
        streamer.put(ids[start : start + step])
        assert "\ufffd" not in (piece := capsys.readouterr().out), piece
        text = text.removeprefix(piece)
    streamer.end()
    assert capsys.readouterr().out == text + "\n"


def test_ctrl_c_ends_with_130(model_folder, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ConsensusDecoder, "generate", interrupted)
    assert run("generate", model_folder, "hey").exit_code == 130


def test_paths_and_domains_are_text_not_markup(model_folder, tmp_path):
    folder, prompts = tmp_path / "a [/b] :cat:" / "[red]", tmp_path / "prompts.jsonl"
    shutil.copytree(model_folder, folder)
    prompts.write_text('{"prompt": "the text", "domain": "[/x]", "chat": false}')
    options = ("--max-new-tokens", 3, "--dtype", "fp32", "--device", "cpu")
    assert run("generate", folder, "hey", "--raw", *options).exit_code == 0
    result = run("evaluate", "--model", folder, "--prompts", prompts, *options)
    assert result.exit_code == 0, result.exception
    assert "[/x]" in result.stdout and ":cat:/[red]" in result.stdout
    result = run("distill-data", folder / "rows", "--model", folder, "--prompts", prompts, *options)
    assert result.exit_code == 0 and "'[/x]': 1" in result.stderr, (result.stderr, result.exception)
    assert run("export-view", folder, folder / "[/view].safetensors").exit_code == 0


# --- dtypes, doctor, help


def test_what_auto_is_depends_on_the_device(monkeypatch):
    cpu = torch.device("cpu")
    instructions = common.cpu_bf16_instructions()
    monkeypatch.setattr(common, "cpu_bf16_instructions", lambda: [])
    has_ours = kernels.c_library() is not None and "amx_bf16" not in instructions
    assert common.resolve_dtype("auto", cpu) == (torch.bfloat16 if has_ours else torch.float32)
    monkeypatch.setattr(kernels, "c_library", lambda: None)
    assert common.resolve_dtype("auto", cpu) == torch.float32
    assert common.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(common, "cpu_bf16_instructions", lambda: ["amx_bf16"])
    assert common.resolve_dtype("auto", cpu) == torch.bfloat16
    assert common.resolve_dtype("fp16", cpu) == torch.float16
    # so is the size of a block, which is the model's own where rows cost little
    sizes = [common.fast_block(size, torch.device(kind)) for kind in ("cpu", "cuda") for size in (None, 4)]
    assert sizes == ["auto", 4, None, 4]


def test_what_a_server_has_loaded_is_not_looked_through_for_garbage(model_folder):
    try:
        load_apart(str(model_folder), torch.float32, torch.device("cpu"))
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


def test_doctor_says_what_runs_where_and_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = run("doctor")
    assert result.exit_code == 0, result.stderr
    report = " ".join(result.stdout.split())
    assert f"torch {torch.__version__.partition('+')[0]}" in report
    assert "attention torch implementation" in report
    assert "because no CUDA or ROCm GPU" in report
    assert "TRITON_INTERPRET 1" in report


def test_doctor_sees_a_triton_whose_package_has_another_name(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr("orthrus_triton.cli.doctor._installed", lambda name: f"no {name}")
    report = " ".join(run("doctor").stdout.split())
    assert f"triton {triton.__version__} transformers no transformers" in report


def test_help_teaches_and_imports_nothing_heavy():
    source = """
import sys
from typer.testing import CliRunner
from orthrus_triton.cli import app
for command in ([], ["generate"], ["convert"], ["demo"], ["doctor"], ["evaluate"], ["export-view"], ["distill-data"]):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    name = command[0] if command else "demo"
    assert f"orthrus-triton {name}" in result.stdout, result.stdout
print(*[name for name in ("torch", "transformers", "triton", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_python_dash_m_gives_the_version():
    command = [sys.executable, "-m", "orthrus_triton.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.stdout.strip() == orthrus_triton.__version__
