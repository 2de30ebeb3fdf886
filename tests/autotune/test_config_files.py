"""Configuration files: what is no file, no entry or not allowed is a warning and the default; writers lose nothing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_triton.autotune import files, store
from orthrus_triton.autotune.config import Problem
from orthrus_triton.autotune.space import SPACES
from tests.autotune.conftest import GPU
from tests.autotune.test_store import CPU, KEY, NAME, entry, find, write

HOSTILE = {
    "empty": b"",
    "not json": b"{",
    "binary": bytes(range(256)),
    "a list": b"[]",
    "no entries": b'{"format": 1, "gpu": "Test GPU 9000", "family": "sm90", "capability": "9.0"}',
    "other format": b'{"format": 2, "gpu": "Test GPU 9000", "family": "sm90", "capability": "9.0", "entries": []}',
    "deep": b"[" * 100_000,
    "huge integer": b'{"format": 1' + b"0" * 10_000 + b"}",
    "NaN": b'{"format": NaN, "entries": []}',
    "other gpu": b'{"format": 1, "gpu": "RTX", "family": "sm90", "capability": "9.0", "entries": []}',
    "too large": b" " * (files.MOST_BYTES + 1),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_that_is_none_is_one_warning_and_the_default(content, caplog, folder, on_gpu):
    folder.mkdir()
    (folder / NAME).write_bytes(content)
    expected = SPACES["linear"].default("bf16", "sm90", KEY)
    assert find().config == expected and find().config == expected
    store.find("linear", torch.bfloat16, CPU, N=24, K=40)
    warnings = [r for r in caplog.records if str(folder / NAME) in r.message]
    assert len(warnings) == 1 and warnings[0].levelno == logging.WARNING
    # tuning does not lose what was there: it is moved aside
    write(folder, entry(64))
    assert find().config["BLOCK_N"] == 64
    assert (folder / f"{NAME}.invalid").read_bytes() == content


def test_a_file_of_another_gpu_lends_nothing(caplog, folder, on_gpu):
    path = write(folder, entry(64))
    theirs = path.read_text().replace(GPU.name, "RTX")
    path.write_text(theirs)
    store.forget()
    assert find().place == store.BUILT_IN and "it is for 'RTX'" in caplog.text
    # nor to the file that takes its place
    write(folder, entry(32, key={"N": 256, "K": 256}))
    assert find().place == store.BUILT_IN
    assert (folder / f"{NAME}.invalid").read_text() == theirs


def test_a_truncated_file_is_one_warning_and_the_default(caplog, folder, on_gpu):
    path = write(folder, entry(64))
    whole = path.read_bytes()
    expected = SPACES["linear"].default("bf16", "sm90", KEY)
    for length in range(0, len(whole) - 2, 29):
        path.write_bytes(whole[:length])
        store.forget()
        assert find().config == expected
    assert len([r for r in caplog.records if str(path) in r.message]) == 1


@pytest.mark.parametrize("kind", ["folder", "fifo", "unreadable link"])
def test_what_is_no_file_is_not_waited_for(kind, folder, on_gpu):
    import os

    folder.mkdir()
    path = folder / NAME
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path)
    assert find().place == store.BUILT_IN


FIELDS = [
    ({"constants": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}}, "must hold BLOCK_M"),
    ({"constants": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT_K": 1, "M": 2}}, "must hold BLOCK_M"),
    ({"constants": {"BLOCK_M": 16, "BLOCK_N": 48, "BLOCK_K": 64, "SPLIT_K": 1}}, "BLOCK_N must be one of"),
    ({"constants": {"BLOCK_M": 2**40, "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT_K": 1}}, "integers in"),
    ({"constants": {"BLOCK_M": 16.0, "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT_K": 1}}, "integers in"),
    ({"constants": {"BLOCK_M": True, "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT_K": 1}}, "integers in"),
    ({"constants": {"BLOCK_M": "16", "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT_K": 1}}, "integers in"),
    ({"constants": {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 256, "SPLIT_K": 1},
      "launch": {"num_warps": 8, "num_stages": 5}}, "shared memory"),
    ({"constants": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT_K": 8}}, "leaves less than two tiles"),
    ({"launch": {"num_warps": -4, "num_stages": 3}}, "integers in"),
    ({"launch": [4, 3]}, "must be an object"),
    ({"launch": {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": 1}}, "must hold BLOCK_M"),
    ({"us": {"rows=1": -1}}, "numbers in 0..1e12"),
    ({"us": dict.fromkeys(map(str, range(33)), 1.0)}, "at most 32 fields"),
    ({"origin": 7}, "`origin`"),
    ({"op": "../../etc"}, "`op`"),
    ({"version": "1"}, "`version`"),
    ({"surprise": 1}, "surprise"),
]  # fmt: skip


@pytest.mark.parametrize("changes, said", FIELDS, ids=[said + str(n) for n, (_, said) in enumerate(FIELDS)])
def test_a_hostile_entry_is_a_warning_and_the_default(changes, said, caplog, folder, on_gpu):
    path = write(folder, entry(64))
    content = json.loads(path.read_text())
    content["entries"][0].update(changes)
    path.write_text(json.dumps(content))
    store.forget()
    assert find().config == SPACES["linear"].default("bf16", "sm90", KEY)
    assert said in "".join(record.message for record in caplog.records if str(path) in record.message)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(field=st.sampled_from(sorted(files.Entry.__dataclass_fields__)), value=json_values)
def test_any_value_in_any_field_is_an_allowed_configuration_or_none(field, value, tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / NAME
    content = json.loads(write(path.parent, entry(64)).read_text())
    content["entries"][0][field] = value
    path.write_text(json.dumps(content))
    table = files.read_table(path)
    problem = Problem.of("linear", "bf16", **KEY)
    found = store._current(table, problem, "sm90")
    if found is not None:
        assert SPACES["linear"].problem_with(found.config, "bf16", "sm90", KEY) is None


WRITER = """
import sys
from tests.autotune.test_store import CPU, KEY, NAME, entry, find, write
from pathlib import Path
for n in range(12):
    write(Path(sys.argv[1]), entry(key={"N": int(sys.argv[2]) + n, "K": 512}))
"""


def test_two_writers_lose_nothing(folder):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(start)]) for start in (1, 101)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    table = files.read_table(folder / NAME)
    assert not table.problems
    assert sorted(e.key["N"] for e in table.entries) == [*range(1, 13), *range(101, 113)]


def test_a_writer_that_dies_leaves_the_old_file(folder, monkeypatch):
    path = write(folder, entry(64))
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "fsync", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(folder, entry(32))
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir() if "lock" not in p.name) == [NAME]


def test_users_of_one_folder_may_read_each_others_files(folder):
    assert write(folder, entry(64)).stat().st_mode & 0o044 == 0o044


def test_what_could_not_be_read_again_is_not_written(folder):
    before = write(folder, entry(64)).read_bytes()
    for wrong in ({"constants": {"BLOCK": 0}}, {"us": {"rows=1": float("inf")}}, {"key": {"a name": 1}}):
        with pytest.raises(ValueError, match=f"`{min(wrong)}`"):
            write(folder, entry(**wrong))
    assert (folder / NAME).read_bytes() == before


def test_entries_of_another_family_do_not_join_a_file(tmp_path, caplog):
    path = tmp_path / "mine.json"
    files.merge_entries(path, None, "gfx942", "gfx942", [entry(16, dtype="fp16")])
    merged = files.merge_entries(path, None, "sm90", "sm_90", [entry(32)])
    assert [e.dtype for e in merged.entries] == [e.dtype for e in files.read_table(path).entries] == ["bf16"]
    assert files.read_table(tmp_path / "mine.json.invalid").family == "gfx942"
    assert "it is for 'gfx942'; what it was is now mine.json.invalid" in caplog.text
