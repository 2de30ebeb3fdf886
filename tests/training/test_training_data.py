"""Rows, frozen cache and options: what is skipped is counted, what is stale is not reused, what is wrong is named."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

from orthrus_triton.cli import app
from orthrus_triton.cli.train import parse_changes
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.training import frozen_cache
from orthrus_triton.training.config import ViewTrainingArguments, read_config
from orthrus_triton.training.data import TextRow, pack_rows, read_rows
from orthrus_triton.training.frozen_cache import FrozenCache
from orthrus_triton.training.run import load_rows, train_view
from orthrus_triton.training.trainer import ViewTrainer
from tests.cli_models import make_tokenizer, save_base_model
from tests.models.tiny_bases import DYNAMIC, base_config, build_base, random_ids, tiny_tokenizer
from tests.training.view_runs import make_args, make_model, make_trainer, own_rows, saved_view

ROOT = Path(__file__).parents[2]


def test_rows_are_read_cut_and_counted(tmp_path):
    lines = [
        {"prompt_ids": [5, 6], "answer_ids": [7, 8, 9], "domain": "code"},
        {"prompt_ids": [5, 6], "answer_ids": []},
        {"prompt_ids": [5, 6], "answer_ids": [7]},
        {"prompt_ids": [1] * 10, "answer_ids": [2, 3]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    rows, skipped = read_rows(tmp_path, max_len=4)
    assert rows == [TextRow("code", [5, 6, 7, 8], [(2, 4)])] and skipped == 3
    for n in (11, 1, 7, 3, 10):  # the number of a row says when it is drawn
        (tmp_path / f"shard-{n:02d}.jsonl").write_text(json.dumps({"prompt_ids": [n], "answer_ids": [1, 2]}) + "\n")
    assert [row.ids[0] for row in read_rows(tmp_path, max_len=4)[0]] == [5, 1, 3, 7, 10, 11]
    (tmp_path / "b.jsonl").write_text('{"prompt": "text"}\n')
    with pytest.raises(ValueError, match="b.jsonl, line 1: expected an object with prompt_ids and answer_ids"):
        read_rows(tmp_path, max_len=4)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds none"):
        read_rows(empty, max_len=4)
    with pytest.raises(FileNotFoundError, match="rows must come from a .jsonl file or a folder of them, but there is"):
        read_rows(tmp_path / "missing", max_len=4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "got a list"),
        (b'{"prompt_ids": [1], "answer', "Invalid control character"),
        (b'{"answer_ids": [1, 2]}', "prompt_ids is no list of token ids"),
        (b'{"prompt_ids": "ab", "answer_ids": [1, 2]}', "prompt_ids is no list of token ids"),
        (b'{"prompt_ids": [1], "answer_ids": [1.5, 2]}', "answer_ids is no list of token ids"),
        (b'{"prompt_ids": [1], "answer_ids": [1, -2]}', "answer_ids is no list of token ids"),
        (b'{"prompt_ids": [true], "answer_ids": [1, 2]}', "prompt_ids is no list of token ids"),
        (b'{"prompt_ids": [1], "answer_ids": [1, 2], "domain": null}', "domain must be a string, not None"),
        (b'{"prompt_ids": [1], "answer_ids": [1, 2], "domain": "\xff"}', "codec can't decode byte"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt_ids": [1], "answer_ids": [1, 2]}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3: expected an object .* but .*{message}"):
        read_rows(path, 10)


@pytest.mark.parametrize("cached", [False, True])
def test_rows_that_cannot_be_trained_on_are_named(tmp_path, cached):
    model = make_model()
    known, unknown = (TextRow("all", [1, 2, token], [(1, 3)]) for token in (100, 101))
    foreign = r"tokens of the model's vocabulary, 0\.\.100, but one holds 101"
    for rows, held_out, message in (
        ([], [], "rows must not be empty"), ([known, unknown], [], foreign), ([known], [unknown], foreign),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ViewTrainer(model, make_args(tmp_path, 2, cached=cached), rows, held_out)


def test_what_is_skipped_is_said_with_the_option_that_may_keep_it(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"prompt_ids": [1] * length, "answer_ids": [5, 6, 7]}) + "\n" for length in (2, 9)
    ))  # fmt: skip
    assert len(load_rows(str(tmp_path), make_args(tmp_path, 2, max_row_len=9))) == 1
    assert "1 rows, 5 tokens; 1 rows skipped, without an answer of two tokens within max_row_len=9" in caplog.text


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ViewTrainingArguments, "n_gpu", property(lambda args: 2))
    with pytest.raises(ValueError, match=r"the number of GPUs that a process sees must be 1 \(torchrun .* but got 2"):
        make_args(tmp_path, 2)


def test_packed_rows_keep_their_answers_and_domains():
    rows = [TextRow(domain, [n] * 5, [(2, 5)]) for n, domain in enumerate(["code", "prose", "code", "code"])]
    packed = pack_rows(rows, 10)
    assert [row.domain for row in packed] == ["code", "code", "prose"]
    assert packed[0].ids == [0] * 5 + [2] * 5 and packed[0].answers == [(2, 5), (7, 10)]
    assert packed[0].prompt_len == 2 and packed[1].ids == [3] * 5


def test_packed_rows_and_rows_shorter_than_a_block_train(tmp_path):
    model = make_model()
    rows = [row._replace(domain="code") for row in own_rows(model, 3, tokens=2)]
    packed = pack_rows(rows, 100)
    assert len(packed) == 1
    for n, each in enumerate((rows, packed)):
        ViewTrainer(model, make_args(tmp_path / str(n), 2), each).train()


def test_rows_are_cut_and_packed_as_asked_and_held_out_ones_not_packed(tmp_path):
    """Their packed rows would show an evaluation one answer each."""
    model = make_model()
    model.save_pretrained(tmp_path / "orthrus", tiny_tokenizer(list(range(101))))
    rows = own_rows(model, 4)
    lines = [{"prompt_ids": row.ids[: row.prompt_len], "answer_ids": row.ids[row.prompt_len :]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {name: str(tmp_path / "rows.jsonl") for name in ("data", "eval_data")}
    options = {"model": str(tmp_path / "orthrus"), "pack": True, "eval_strategy": "steps", **data}
    trainer = train_view(make_args(tmp_path, 1, max_row_len=56, frozen_dtype="bfloat16", **options))
    assert [len(row.ids) for row in trainer.train_dataset.rows] == [27 + 28, 29, 30]
    assert [len(row.ids) for row in trainer.eval_dataset.rows] == [27, 28, 29, 30]
    assert trainer.orthrus.dtype == torch.bfloat16
    cut = load_rows(data["data"], make_args(tmp_path, 1, max_row_len=28))
    assert [row.ids for row in cut] == [row.ids[:28] for row in rows]


def test_a_cache_of_other_rows_or_weights_is_not_reused(tmp_path):
    model, path = make_model(), tmp_path / "manifest.json"
    rows = own_rows(model, 2)
    FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    manifest, written = path.read_text(), path.stat().st_mtime_ns
    FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    assert path.stat().st_mtime_ns == written
    first = rows[0]
    for changed in (
        first._replace(ids=[*first.ids[:-1], 1 + first.ids[-1] % 90]),
        first._replace(answers=[(first.prompt_len + 1, len(first.ids))]),
        first._replace(answers=[(first.prompt_len, 10), (12, len(first.ids))]),
    ):
        FrozenCache.open_or_build(tmp_path, model, [changed, rows[1]], top_k=4)
        assert path.read_text() != manifest, changed
    FrozenCache.open_or_build(tmp_path, model, rows[:1], top_k=4)
    assert path.read_text() != manifest
    FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    assert path.read_text() == manifest
    with torch.no_grad():
        model.model.layers[1].self_attn.qkv_proj.weight.mul_(1.1)
    FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    assert path.read_text() != manifest
    with pytest.raises(ValueError, match="top_k must be in 1..101, but got 102"):
        FrozenCache.open_or_build(tmp_path, model, rows, top_k=102)


def test_a_cache_of_the_same_weights_in_another_model_is_not_reused(tmp_path):
    rows = [TextRow("prose", random_ids(20)[0].tolist(), [(4, 20)])]

    def built(dtype=torch.float32, view_rank=None, **fields) -> tuple[str, torch.Tensor]:
        base = build_base(base_config("llama", **fields), rounded_to=torch.bfloat16)
        model = OrthrusForCausalLM.from_base(base, block_size=4, view_rank=view_rank, dtype=dtype)
        cache = FrozenCache.open_or_build(tmp_path, model, rows, top_k=4, dtype=torch.float32)
        return (tmp_path / "manifest.json").read_text(), cache.kv.clone()

    manifest, kv = built()
    for change in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rms_norm_eps": 0.1},
        {"dtype": torch.bfloat16},
    ):  # fmt: skip
        changed, other = built(**change)
        assert changed != manifest and not torch.equal(kv, other), change
    # from which length on the angles change
    short, of_short = built(rope_parameters=DYNAMIC, max_position_embeddings=3)
    long, of_long = built(rope_parameters=DYNAMIC)
    assert short != long and not torch.equal(of_short, of_long)
    again, same = built(view_rank=2)
    assert again == manifest and torch.equal(kv, same)


def test_a_new_cache_leaves_one_in_use_as_it_is(tmp_path):
    """A second run with the same cache_dir: other weights give files of the same size, fewer rows shorter ones."""
    model = make_model()
    rows = own_rows(model, 4)
    used = FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    before = [tensor.clone() for tensor in (used.kv, used.teacher_ids, used.teacher_probs)]
    with torch.no_grad():
        model.model.layers[1].self_attn.qkv_proj.weight.mul_(1.1)
    other = FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    assert not torch.equal(other.kv, before[0])
    assert all(map(torch.equal, (used.kv, used.teacher_ids, used.teacher_probs), before))
    inode = (tmp_path / "kv.bin").stat().st_ino
    FrozenCache.open_or_build(tmp_path, model, rows[:1], top_k=4)
    # a file that is cut short ends the process that still reads it, as `other` may
    assert (tmp_path / "kv.bin").stat().st_ino != inode and torch.isfinite(other.kv).all()


def test_a_cache_that_was_cut_short_is_completed(tmp_path, monkeypatch):
    model = make_model()
    rows = own_rows(model, 5)
    whole = FrozenCache.open_or_build(tmp_path / "whole", model, rows, top_k=4)
    monkeypatch.setattr(frozen_cache, "RECORD_EVERY", 2)
    fill_row, filled = FrozenCache._fill_row, []

    def fill_or_stop(cache, model, row, *arguments):
        if len(filled) == 3:
            raise KeyboardInterrupt
        filled.append(row)
        fill_row(cache, model, row, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FrozenCache, "_fill_row", fill_or_stop)
        FrozenCache.open_or_build(tmp_path / "cut", model, rows, top_k=4)

    def fill_and_note(cache, model, row, *arguments):
        filled.append(row)
        fill_row(cache, model, row, *arguments)

    monkeypatch.setattr(FrozenCache, "_fill_row", fill_and_note)
    cut = FrozenCache.open_or_build(tmp_path / "cut", model, rows, top_k=4)
    assert filled == [*rows[:3], *rows[2:]]  # recorded after two rows, so the third is made again
    assert torch.equal(cut.kv, whole.kv) and torch.equal(cut.teacher_ids, whole.teacher_ids)
    assert torch.equal(cut.teacher_probs, whole.teacher_probs)


def test_rows_are_on_the_disk_before_the_manifest_says_so(tmp_path, monkeypatch):
    """Else a machine that stops in between leaves rows of zeros, which the next run would learn from."""
    model, events = make_model(), []
    monkeypatch.setattr(frozen_cache, "RECORD_EVERY", 2)
    fill_row, sync, write = FrozenCache._fill_row, os.fsync, frozen_cache._write_json
    monkeypatch.setattr(FrozenCache, "_fill_row", lambda *all: (events.append("row"), fill_row(*all)))
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))
    monkeypatch.setattr(frozen_cache, "_write_json", lambda *all: (events.append("record"), write(*all)))
    FrozenCache.open_or_build(tmp_path, model, own_rows(model, 3), top_k=4)
    synced = ["sync"] * 3
    assert events == ["row", "row", *synced, "record", "row", *synced, "record"]


def test_two_processes_that_share_a_disk_build_a_cache_once(tmp_path, monkeypatch):
    """As the main processes of two nodes do. A lock is of the file that was opened, so threads can stand for them."""
    pytest.importorskip("fcntl", reason="needs file locks")
    model = make_model()
    rows = own_rows(model, 3)
    fill_row, filled, begun = FrozenCache._fill_row, [], threading.Event()

    def fill_slowly(cache, model, row, *arguments):
        filled.append(row)
        begun.set()
        time.sleep(0.1)
        fill_row(cache, model, row, *arguments)

    monkeypatch.setattr(FrozenCache, "_fill_row", fill_slowly)
    with ThreadPoolExecutor(2) as nodes:
        first = nodes.submit(FrozenCache.open_or_build, tmp_path, model, rows, top_k=4)
        assert begun.wait(20)
        second = nodes.submit(FrozenCache.open_or_build, tmp_path, copy.deepcopy(model), rows, top_k=4)
        assert torch.equal(first.result().kv, second.result().kv)
    assert filled == rows


@pytest.mark.parametrize("name", ["kv.bin", "teacher_ids.bin", "teacher_probs.bin", "manifest.json"])
@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_cache_is_made_again(tmp_path, name, lost):
    model = make_model()
    rows = own_rows(model, 2)
    whole = FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    expected = [tensor.clone() for tensor in (whole.kv, whole.teacher_ids, whole.teacher_probs)]
    if lost:
        (tmp_path / name).unlink()
    else:
        os.truncate(tmp_path / name, 100)
    again = FrozenCache.open_or_build(tmp_path, model, rows, top_k=4)
    assert all(map(torch.equal, (again.kv, again.teacher_ids, again.teacher_probs), expected))


def test_wrong_domain_weights_are_named_before_the_cache_is_made(tmp_path):
    model = make_model()
    args = make_args(tmp_path / "run", 1, cache_dir=str(tmp_path / "cache"), domain_weights={"code": 1.0})
    with pytest.raises(ValueError, match="domain_weights must give each domain"):
        ViewTrainer(model, args, own_rows(model, 2))
    assert not (tmp_path / "cache").exists()


def test_a_disk_without_room_for_the_cache_says_so(tmp_path, monkeypatch):
    def no_room(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    model = make_model()
    with pytest.raises(OSError, match=r"the frozen cache needs .* GB for .*kv.bin, but: .*No space left"):
        FrozenCache.open_or_build(tmp_path, model, own_rows(model, 1), top_k=4)
    assert not (tmp_path / "kv.bin").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "max_steps must be >= 1, but got -1"),
        ({"num_anchors": 0}, "num_anchors must be >= 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be >= 1, but got 0"),
        ({"output_dir": __file__}, "output_dir must be a folder, but got 'the file .*test_training_data.py'"),
        ({"cache_dir": __file__}, "cache_dir must be a folder, but got 'the file .*test_training_data.py'"),
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
        ({"gradient_checkpointing": True}, "gradient_checkpointing must be off"),
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
        ("max_stps: 3", "has no such option: max_stps"),
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
    save_base_model(make_tokenizer(), tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("hello there\n\nand then\nwhat is it\n")
    command = [sys.executable, str(ROOT / "examples" / "train_view.py"), "base", "prompts.txt", "out", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "tokens per cycle on the prompts" in done.stdout
    trained = OrthrusForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for name, tensor in load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors").items():
        assert torch.equal(tensor, trained.state_dict()[name]), name
