"""`train` and its configuration: options out of range are named, examples are configs, and a killed run resumes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from orthrus_triton.cli import app
from orthrus_triton.cli.train import parse_changes
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.training.config import ViewTrainingArguments, read_config
from orthrus_triton.training.trainer import ViewTrainer
from tests.cli_models import make_tokenizer, save_base_model
from tests.models.tiny_bases import tiny_tokenizer
from tests.training.view_runs import make_model, make_trainer, own_rows, saved_view

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "max_steps must be >= 1, but got -1"),
        ({"num_anchors": 0}, "num_anchors must be >= 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be >= 1, but got 0"),
        ({"output_dir": __file__}, "output_dir must be a folder, but got 'the file .*test_train_command.py'"),
        ({"cache_dir": __file__}, "cache_dir must be a folder, but got 'the file .*test_train_command.py'"),
        ({"loss": "mse"}, "loss must be 'kl' or 'ce', but got 'mse'"),
        ({"position_decay": 0.0}, "position_decay must be > 0 or null"),
        ({"anchor_focus": 1.0}, r"anchor_focus must be in \[0, 1\), but got 1.0"),
        ({"max_seconds": 0}, "max_seconds must be > 0 or null, but got 0"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 200},
            "load_best_model_at_end must be false",
        ),
        ({"domain_weights": "code"}, "domain_weights must be a share for each domain or null, but got 'code'"),
        ({"frozen_dtype": "int8"}, "frozen_dtype must be auto, float32, bfloat16 or float16"),
        ({"gradient_checkpointing": True}, "(gradient|activation)_checkpointing must be off"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be off .*, but got 5.0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be off"),
    ],
)
def test_options_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ViewTrainingArguments(**{"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, **options})


def test_a_config_names_what_is_wrong_in_it(tmp_path):
    path = tmp_path / "view.yaml"
    with pytest.raises(FileNotFoundError, match="there is no config"):
        read_config(path)
    with pytest.raises(ValueError, match="config must be a YAML file, but .* is a folder"):
        read_config(tmp_path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="view.yaml must hold YAML, but: 'utf-8' codec"):
        read_config(path)
    for text, message in (
        ("- a", "must hold a mapping of options, but got a list"),
        ("a: [", "must hold YAML"),
        ("max_stps: 3", r"has no such option: max_stps \(max_steps.*\?\)"),
        ("train_data: rows\n12: 3", r"has no such option: 12, train_data \(.*eval_data.*\?\)"),
        ("max_steps: 3\nlearning_rate: 1e-3", "learning_rate must be a number, but got the text '1e-3'"),
        ("max_steps: 3\nchain_width: wide", "chain_width must be a number, but got the text 'wide'"),
        ("max_steps:", "max_steps must be a number, but is empty"),
        ("max_steps: 3\nuse_cpu: true\nblock_size: 0", "block_size must be >= 2 or null, but got 0"),
        ("max_steps: 3\nuse_cpu: true\nchain_width: 0", "chain_width must be >= 1 or null, but got 0"),
        ("max_steps: 3\nchain_width: 3.5", "chain_width must be a whole number, but got 3.5"),
        ("max_steps: 3\nnum_anchors: true", "num_anchors must be a whole number, but got True"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(path)
    path.write_text(
        f"output_dir: {tmp_path}\nmax_steps: 3\ndomain_weights: {{code: 0.5}}\nuse_cpu: true\nsave_strategy: no"
    )
    args = read_config(path, max_steps=7, remove_unused_columns=True)
    assert not args.remove_unused_columns  # a batch has none
    assert args.save_strategy == "no"  # which YAML reads as false
    assert not args.dataloader_pin_memory  # of which torch would warn on a CPU
    assert args.max_steps == 7 and args.domain_weights == {"code": 0.5} and args.learning_rate == 1e-3


@pytest.mark.parametrize("name", ["train_smollm2", "train_smollm2_gpu"])
def test_examples_are_configs(name):
    args = read_config(ROOT / "examples" / f"{name}.yaml", use_cpu=True)
    assert args.data == "rows" and args.eval_data == "held-out"


@pytest.mark.parametrize("file", ["examples/train_smollm2.yaml", "examples/train_smollm2_gpu.yaml", "docs/training.md"])
def test_commands_in_examples_and_docs_are_commands(file):
    text = re.sub(r"\\\n#? *", "", (ROOT / file).read_text(encoding="utf-8"))
    # a line of its own, or code in a sentence; what follows two spaces is a remark
    lines = re.findall(r"^(?:# +)?orthrus-triton (.+?)(?:   .*)?$", text, flags=re.M)
    lines += re.findall(r"`orthrus-triton (.+?)`", text)
    assert len(lines) >= 4
    commands = typer.main.get_command(app).commands
    for line in lines:
        name, *arguments = shlex.split(line.replace("--package ...", "--package pip"))
        commands[name].make_context(name, arguments)  # raises where an option is unknown


def test_a_block_larger_than_the_models_is_refused(tmp_path):
    with pytest.raises(ValueError, match="block_size must be in 2..4, the model's, but got 5"):
        make_trainer(make_model(), tmp_path, 1, block_size=5)


def test_the_command_trains_resumes_and_leaves_a_model(tmp_path, monkeypatch):
    model = make_model(mask_embedding=False)
    model.save_pretrained(tmp_path / "no-tokenizer")
    model.save_pretrained(tmp_path / "orthrus", tiny_tokenizer(list(range(101))))
    rows = own_rows(model, 5)
    lines = [
        {"domain": row.domain, "prompt_ids": row.ids[: row.prompt_len], "answer_ids": row.ids[row.prompt_len :]}
        for row in rows
    ]
    lines.append({**lines[0], "answer_ids": []})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tmp_path / "view.yaml"
    config.write_text(f"""
        model: {tmp_path}/orthrus
        data: {tmp_path}/rows.jsonl
        output_dir: {tmp_path}/run
        cache_dir: {tmp_path}/cache
        max_steps: 4
        save_steps: 2
        num_anchors: 3
        block_size: 3
        anchor_view: ar
        chain_width: 8
        per_device_train_batch_size: 2
        use_cpu: true
        disable_tqdm: true
    """.replace("        ", ""))  # fmt: skip
    command = ["train", "--config", str(config)]
    done = CliRunner().invoke(app, [*command, "--set", "max_steps=2"])
    assert done.exit_code == 0, done.output
    step, steps = ViewTrainer.training_step, []
    with monkeypatch.context() as patch:
        patch.setattr(ViewTrainer, "training_step", lambda *all, **options: steps.append(1) or step(*all, **options))
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "the trained model" in " ".join(done.output.split())
    assert len(steps) == 2  # it went on
    trained = OrthrusForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.mask_embedding and trained.block_size == 3
    assert (trained.config.anchor_view, trained.config.chain_width) == ("ar", 8)
    for name, tensor in saved_view(tmp_path, 4).items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
    save = ViewTrainer._save_checkpoint

    def interrupted(trainer, *arguments):
        save(trainer, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ViewTrainer, "_save_checkpoint", interrupted)
        done = CliRunner().invoke(app, [*command, "--set", f"output_dir={tmp_path}/stopped"])
    assert done.exit_code == 130 and "checkpoint-2 is the last checkpoint" in " ".join(done.output.split())
    with monkeypatch.context() as patch:
        steps.clear()
        patch.setattr(ViewTrainer, "training_step", lambda *all, **options: steps.append(1) or step(*all, **options))
        done = CliRunner().invoke(app, [*command, "--fresh", "--set", "max_steps=1"])
    assert done.exit_code == 0 and len(steps) == 1
    start = model.state_dict()
    name = "model.layers.0.self_attn.q_proj_diff.weight"
    assert not torch.equal(trained.state_dict()[name], start[name])
    done = CliRunner().invoke(app, [*command, "--set", f"model={tmp_path}/no-tokenizer"])
    assert done.exit_code == 2 and "error: model must have a tokenizer" in done.output
    done = CliRunner().invoke(app, [*command, "--set", "max_steps=-3"])
    assert done.exit_code == 2 and "error: max_steps must be >= 1, but got -3" in done.output
    done = CliRunner().invoke(app, [*command, "--set", "eval_strategy=steps", "--set", "eval_steps=1"])
    assert done.exit_code == 2 and "go together, but they are None and 'steps'" in " ".join(done.output.split())
    done = CliRunner().invoke(app, [*command, "--set", "learning_rate=fast"])
    assert done.exit_code == 2 and "learning_rate must be a number, but got the text 'fast'" in " ".join(
        done.output.split()
    )
    done = CliRunner().invoke(app, [*command, "--set", "domain_weights={code: 0.8"])
    assert done.exit_code == 2 and "--set domain_weights must be a YAML value" in done.output


def test_numbers_on_the_command_line_are_what_python_reads():
    changes = ["learning_rate=2e-3", "max_steps=1e3", "eval_steps=1e2", "seed=7", "run_name=1e3", "max_seconds=null"]
    parsed = parse_changes(changes)
    assert parsed == {
        "learning_rate": 0.002, "max_steps": 1000, "eval_steps": 100, "seed": 7, "run_name": "1e3", "max_seconds": None,
    }  # fmt: skip
    assert isinstance(parsed["max_steps"], int)
    # what is none stays text, which is refused by its option's name
    odd = {"learning_rate": "nan", "max_steps": "1e-3", "num_anchors": "few", "unknown": "1e3", "run_name": "a=b"}
    assert parse_changes([f"{name}={value}" for name, value in odd.items()]) == odd


def test_the_python_example_trains(tmp_path):
    save_base_model(make_tokenizer(), tmp_path / "base", torch.bfloat16)  # as most are; the view is trained in fp32
    (tmp_path / "prompts.txt").write_text("hello there\n\nand then\nwhat is it\n")
    command = [sys.executable, str(ROOT / "examples" / "train_view.py"), "base", "prompts.txt", "out", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "tokens per cycle on the prompts" in done.stdout
    trained = OrthrusForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for name, tensor in load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors").items():
        own = trained.state_dict()[name]
        assert torch.equal(tensor.to(own.dtype), own), name
