"""The frozen cache: what is stale or damaged is made again, what is in use stays, two builders share one."""

from __future__ import annotations

import copy
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.training import frozen_cache
from orthrus_triton.training.data import TextRow
from orthrus_triton.training.frozen_cache import FrozenCache
from tests.models.tiny_bases import DYNAMIC, base_config, build_base, random_ids
from tests.training.view_runs import make_model, own_rows


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


def test_a_disk_without_room_for_the_cache_says_so(tmp_path, monkeypatch):
    def no_room(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    model = make_model()
    with pytest.raises(OSError, match=r"the frozen cache needs .* GB for .*kv.bin, but: .*No space left"):
        FrozenCache.open_or_build(tmp_path, model, own_rows(model, 1), top_k=4)
    assert not (tmp_path / "kv.bin").exists()
