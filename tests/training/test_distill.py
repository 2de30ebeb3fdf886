"""Distillation data: rows are the model's own answers, a broken run goes on without loss, and nothing is mixed up."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.decode_run import DecodeRun
from orthrus_triton.training.data import read_rows
from orthrus_triton.training.distill import distill
from orthrus_triton.training.prompts import Prompt, encode
from orthrus_triton.training.shards import ShardFolder
from tests.models.tiny_bases import base_config, build_base

NEW = 7
SETTINGS = {"max_new_tokens": NEW, "batch_size": 3, "shard_rows": 4}
DOMAINS = ("code", "chat", "docs")


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [
        Prompt(" ".join(f"w{20 + (7 * n + i) % 60}" for i in range(1 + n % 5)), DOMAINS[n % 3], chat=n % 2 == 0)
        for n in range(11)
    ]


@pytest.fixture(scope="module")
def unbroken(model, tokenizer, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "unbroken"
    return folder, distill(model, tokenizer, prompts, folder, **SETTINGS)


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_rows_are_the_models_own_answers(model, tokenizer, prompts, unbroken):
    folder, manifest = unbroken
    decoder, rows = ConsensusDecoder(model, mode="ar"), rows_of(folder)
    assert [row["id"] for row in rows] == [str(n) for n in range(len(prompts))]
    for row, prompt in zip(rows, prompts):
        assert set(row) == {"id", "domain", "prompt_ids", "answer_ids"}
        assert row["domain"] == prompt.domain and row["prompt_ids"] == encode(tokenizer, prompt)
        assert (row["prompt_ids"][0] == 88) == prompt.chat
        alone = decoder.generate([torch.tensor(row["prompt_ids"])], max_new_tokens=NEW).sequences[0]
        assert row["prompt_ids"] + row["answer_ids"] == alone.tolist()
    lengths = {len(row["answer_ids"]) for row in rows}
    assert max(lengths) == NEW and len(lengths) > 1  # some ended early, and their slots were taken again


@pytest.mark.parametrize(("batch_size", "prefill_batch"), [(5, 2), (4, 4), (11, 3), (40, 40)])
def test_prompts_read_together_get_the_same_answers(
    model, tokenizer, prompts, unbroken, tmp_path, monkeypatch, batch_size, prefill_batch
):
    together, admit_together = [], DecodeRun.admit_together

    def counted(run, slots, *arguments):
        together.append(len(slots))
        admit_together(run, slots, *arguments)

    monkeypatch.setattr(DecodeRun, "admit_together", counted)
    options = {**SETTINGS, "batch_size": batch_size}
    distill(model, tokenizer, prompts, tmp_path, **options, prefill_batch=prefill_batch)
    assert rows_of(tmp_path) == rows_of(unbroken[0])
    assert sum(together) == len(prompts) and max(together) >= min(prefill_batch, len(prompts))


def test_a_time_limit_leaves_whole_answers(model, tokenizer, prompts, unbroken, tmp_path, monkeypatch):
    clock, answered = iter(range(100)), []  # a second an answer
    timer = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("orthrus_triton.training.distill.time", timer)
    manifest = distill(
        model, tokenizer, prompts, tmp_path, **{**SETTINGS, "batch_size": 1}, seconds=6, on_row=answered.append
    )
    monkeypatch.undo()
    # in order, seven of them: a shard of four, and three that wait for the shard's fourth
    assert len(answered) == 7 and not manifest["complete"] and manifest["finished_rows"] == 4
    assert rows_of(tmp_path) == rows_of(unbroken[0])[:4]
    part = (tmp_path / "shard-00001.part").read_text().splitlines()
    assert [json.loads(line) for line in part] == rows_of(unbroken[0])[4:7]
    assert len(read_rows(tmp_path, max_len=64)[0]) <= 4  # what trains sees whole shards
    again = []
    distill(model, tokenizer, prompts, tmp_path, **SETTINGS, on_row=again.append)
    assert len(again) == len(prompts) - 7
    assert rows_of(tmp_path) == rows_of(unbroken[0])


def test_shards_and_manifest_agree(unbroken, prompts):
    folder, manifest = unbroken
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "run.lock", "shard-00000.jsonl", "shard-00001.jsonl", "shard-00002.jsonl",
    ]  # fmt: skip
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert manifest["complete"] and manifest["finished_rows"] == manifest["rows"] == len(prompts)
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 3]
    assert manifest["domains"] == Counter(prompt.domain for prompt in prompts)
    assert manifest["answer_tokens"] == sum(len(row["answer_ids"]) for row in rows_of(folder))
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    rows, skipped = read_rows(folder, max_len=64)  # the trainer's own reader
    assert len(rows) + skipped == len(prompts) and {row.domain for row in rows} <= set(DOMAINS)


@pytest.mark.parametrize("stop_after", [1, 4, 7, 10])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_run_goes_on(model, tokenizer, prompts, unbroken, tmp_path, stop_after, torn):
    class Killed(BaseException):
        pass

    def on_disk() -> int:
        return sum(len(path.read_text().splitlines()) for name in ("*.jsonl", "*.part") for path in tmp_path.glob(name))

    seen = []

    def kill(tokens: int) -> None:
        seen.append(tokens)
        assert on_disk() == len(seen)  # whatever kills it
        if len(seen) in (stop_after, stop_after + 1):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            distill(model, tokenizer, prompts, tmp_path, **SETTINGS, on_row=kill)
        complete = json.loads((tmp_path / "manifest.json").read_text())["complete"]
        assert complete == (len(seen) == len(prompts))
        for part in tmp_path.glob("*.part") if torn else ():
            with open(part, "a") as file:
                file.write('{"id": "9", "domain": "co')
    plan, again = [], []
    manifest = distill(
        model, tokenizer, prompts, tmp_path, **{**SETTINGS, "batch_size": 2}, on_row=again.append,
        on_plan=lambda *counts: plan.append(counts),
    )  # fmt: skip
    assert plan == [(len(seen), len(prompts))] and len(again) == len(prompts) - len(seen)  # no answer was lost
    assert manifest["complete"] and manifest["shards"] == unbroken[1]["shards"]
    assert rows_of(tmp_path) == rows_of(unbroken[0])
    assert not list(tmp_path.glob("*.part"))


def test_killed_between_a_shard_and_its_manifest(model, tokenizer, prompts, unbroken, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(self) -> None:
        if self._shards:
            raise Killed
        original(self)

    original = ShardFolder._write_manifest
    monkeypatch.setattr(ShardFolder, "_write_manifest", kill)
    with pytest.raises(Killed):
        distill(model, tokenizer, prompts, tmp_path, **SETTINGS)
    monkeypatch.undo()
    assert json.loads((tmp_path / "manifest.json").read_text())["shards"] == []
    (tmp_path / "shard-00000.part").write_text("{}\n")  # as where its removal was what did not come to pass
    again = []
    distill(model, tokenizer, prompts, tmp_path, **SETTINGS, on_row=again.append)
    assert not list(tmp_path.glob("*.part"))
    assert len(again) <= len(prompts) - SETTINGS["shard_rows"] and rows_of(tmp_path) == rows_of(unbroken[0])


@pytest.mark.parametrize("change", [{"prompt_ids": [30]}, {"answer_ids": []}], ids=str)
def test_a_row_that_answers_nothing_asked_is_not_taken_over(model, tokenizer, prompts, tmp_path, change):
    def kill(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(model, tokenizer, prompts, tmp_path, **SETTINGS, on_row=kill)
    (part,) = tmp_path.glob("*.part")
    part.write_text(json.dumps(json.loads(part.read_text()) | change) + "\n")
    with pytest.raises(ValueError, match="shard-00000.part must hold answers to these prompts, but"):
        distill(model, tokenizer, prompts, tmp_path, **SETTINGS)


def test_killed_before_a_whole_shard_has_its_name(model, tokenizer, prompts, unbroken, tmp_path, monkeypatch):
    """And the seconds of both runs are counted."""
    clock = itertools.count(step=100)
    monkeypatch.setattr("orthrus_triton.training.shards.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", interrupt_shards(Path.replace))
        distill(model, tokenizer, prompts, tmp_path, **SETTINGS)
    earlier = json.loads((tmp_path / "manifest.json").read_text())["seconds"]
    assert not list(tmp_path.glob("*.jsonl")) and earlier == 100
    kept = sum(len(part.read_text().splitlines()) for part in tmp_path.glob("*.part"))
    again = []
    manifest = distill(model, tokenizer, prompts, tmp_path, **SETTINGS, on_row=again.append)
    assert len(again) == len(prompts) - kept and rows_of(tmp_path) == rows_of(unbroken[0])
    assert manifest["seconds"] == earlier + 400  # its manifest was written four times


def interrupt_shards(replace):
    def rename(path, target):
        if str(target).endswith(".jsonl"):
            raise KeyboardInterrupt
        return replace(path, target)

    return rename


def test_a_finished_run_is_left_as_it_is(model, tokenizer, prompts, unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken[0].glob("*.jsonl")}
    again = []
    manifest = distill(model, tokenizer, prompts, unbroken[0], **SETTINGS, on_row=again.append)
    assert manifest["complete"] and again == []
    assert before == {path: path.stat().st_mtime_ns for path in unbroken[0].glob("*.jsonl")}


def test_one_run_at_a_time_writes_into_a_folder(model, tokenizer, prompts, tmp_path):
    folder, inner = tmp_path / "run", []

    def start_another(tokens):
        if not inner:
            inner.append(tokens)
            distill(model, tokenizer, prompts[:4], folder, **SETTINGS)

    with pytest.raises(ValueError, match="run must have one run at a time, but another is writing into it"):
        distill(model, tokenizer, prompts[:4], folder, **SETTINGS, on_row=start_another)
    assert inner
    assert distill(model, tokenizer, prompts[:4], folder, **SETTINGS)["complete"]  # the lock ended with its run


def test_runs_are_not_mixed(model, tokenizer, prompts, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    distill(model, tokenizer, prompts[:4], folder, **SETTINGS)
    with pytest.raises(ValueError, match=r"other settings \(max_new_tokens\)"):
        distill(model, tokenizer, prompts[:4], folder, **{**SETTINGS, "max_new_tokens": NEW + 1})
    with pytest.raises(ValueError, match="other settings.*prompts"):
        distill(model, tokenizer, prompts[1:5], folder, **SETTINGS)
    with pytest.raises(ValueError, match="other settings.*prompts"):
        distill(model, tokenizer, [dataclasses.replace(one, domain="docs") for one in prompts[:4]], folder, **SETTINGS)
    generation = copy.deepcopy(model.generation_config)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"other settings \(stop_tokens\)"):
        generation.eos_token_id = [2]
        patch.setattr(model, "generation_config", generation)
        distill(model, tokenizer, prompts[:4], folder, **SETTINGS)
    other = OrthrusForCausalLM.from_base(build_base(base_config("llama"), seed=5), block_size=4, mask_token_id=1)
    with pytest.raises(ValueError, match="other settings.*model"):
        distill(other, tokenizer, prompts[:4], folder, **SETTINGS)
    shard = folder / "shard-00000.jsonl"
    lines = shard.read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    shard.write_text("".join([json.dumps({**row, "answer_ids": row["answer_ids"][::-1] + [7]}) + "\n", *lines[1:]]))
    with pytest.raises(ValueError, match="shard-00000.jsonl.*changed"):
        distill(model, tokenizer, prompts[:4], folder, **SETTINGS)
    shard.write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="must hold 4 rows, but has 3"):
        distill(model, tokenizer, prompts[:4], folder, **SETTINGS)
    for damaged in ("{", "[]", json.dumps({"format": 1})):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match="run/manifest.json must be a run's manifest, but"):
            distill(model, tokenizer, prompts[:4], folder, **SETTINGS)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or hold an earlier run"):
        distill(model, tokenizer, prompts[:4], tmp_path, **SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {"note.txt", "run"}


def test_long_prompts(model, tokenizer, tmp_path):
    long = " ".join(["w30"] * 20)
    mixed = [Prompt(long, chat=True), Prompt(long, chat=False), Prompt("w31", chat=True), Prompt(long)]
    manifest = distill(model, tokenizer, mixed, tmp_path, max_new_tokens=2, max_prompt_tokens=3)
    assert manifest["left_out"] == 2 and manifest["rows"] == 2  # the template is for what does not say, too
    assert [row["prompt_ids"] for row in rows_of(tmp_path)] == [[30] * 3, [88, 31, 89]]
    with pytest.raises(ValueError, match="at most 6 tokens"):
        distill(model, tokenizer, mixed[:1], tmp_path / "none", max_prompt_tokens=6)
    for wrong in ("max_new_tokens", "batch_size", "shard_rows", "max_prompt_tokens"):
        with pytest.raises(ValueError, match=f"{wrong} must be an integer >= 1"):
            distill(model, tokenizer, mixed, tmp_path, **{wrong: 0})
