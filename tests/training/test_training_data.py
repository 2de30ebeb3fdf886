"""Rows of training data: what is skipped is counted and said, what is wrong is named."""

from __future__ import annotations

import json

import pytest
import torch

from orthrus_triton.training.config import ViewTrainingArguments
from orthrus_triton.training.data import TextRow, pack_rows, read_rows
from orthrus_triton.training.run import load_rows, train_view
from orthrus_triton.training.trainer import ViewTrainer
from tests.models.tiny_bases import tiny_tokenizer
from tests.training.view_runs import make_args, make_model, own_rows


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


def test_wrong_domain_weights_are_named_before_the_cache_is_made(tmp_path):
    model = make_model()
    args = make_args(tmp_path / "run", 1, cache_dir=str(tmp_path / "cache"), domain_weights={"code": 1.0})
    with pytest.raises(ValueError, match="domain_weights must give each domain"):
        ViewTrainer(model, args, own_rows(model, 2))
    assert not (tmp_path / "cache").exists()
