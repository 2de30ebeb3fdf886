"""Look-up: the order of the files, what is said and how often, and keys that are none."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthrus_triton.autotune import describe, files, lookup, store
from orthrus_triton.autotune.config import KernelConfig, Problem
from orthrus_triton.autotune.space import SPACES
from tests.autotune.conftest import GPU

CPU = torch.device("cpu")
KEY = {"N": 512, "K": 512}
NAME = files.file_name(GPU.name)


def entry(block_n: int = 32, **changes: object) -> files.Entry:
    space = SPACES["linear"]
    fields = {
        "op": "linear", "version": space.version, "source": space.source(), "dtype": "bf16", "key": KEY,
        "constants": {"BLOCK_M": 16, "BLOCK_N": block_n, "BLOCK_K": 64, "SPLIT_K": 1},
        "launch": {"num_warps": 4, "num_stages": 3}, "origin": "measured",
    }  # fmt: skip
    return files.Entry(**(fields | changes))


def write(folder: Path, *entries: files.Entry, name: str = NAME, gpu: str | None = GPU.name) -> Path:
    files.merge_entries(folder / name, gpu, GPU.family, GPU.capability, list(entries))
    store.forget()
    return folder / name


def find() -> store.Found:
    return store.find("linear", torch.bfloat16, CPU, **KEY)


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(files, "PACKAGED", tmp_path / "packaged")
    return tmp_path / "packaged"


def test_order(folder, packaged, on_gpu):
    rule = SPACES["linear"].default("bf16", "sm90", KEY)
    assert find() == store.Found(rule, store.BUILT_IN)
    places = [(packaged, f"{GPU.family}.json", None, 16, store.FAMILY), (packaged, NAME, GPU.name, 32, store.PACKAGED)]
    for where, name, gpu, block_n, place in [*places, (folder, NAME, GPU.name, 64, store.USER)]:
        write(where, entry(block_n), name=name, gpu=gpu)
        found = find()
        assert (found.place, found.config["BLOCK_N"]) == (place, block_n)
    # explicit comes before all: an op's `config=` never asks
    assert lookup("linear", torch.float16, CPU, **KEY) == SPACES["linear"].default("fp16", "sm90", KEY)


def test_the_variable_is_read_at_look_up(folder, on_gpu, tmp_path, monkeypatch):
    write(folder, entry(16))
    write(tmp_path / "other", entry(64))
    assert find().config["BLOCK_N"] == 16
    monkeypatch.setenv(files.CONFIG_DIR_VARIABLE, str(tmp_path / "other"))
    assert find().config["BLOCK_N"] == 64


def test_the_users_folder_is_the_platforms_cache(monkeypatch):
    monkeypatch.delenv(files.CONFIG_DIR_VARIABLE)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(files.sys, "platform", "linux")
    for chosen, folder in (("", "/home/me/.cache"), ("/caches", "/caches")):
        monkeypatch.setenv("XDG_CACHE_HOME", chosen)
        assert files.user_folder() == Path(folder) / "orthrus_triton"
    monkeypatch.setattr(files.sys, "platform", "darwin")
    assert files.user_folder() == Path("/home/me/Library/Caches/orthrus_triton")


def test_a_configuration_stays_for_the_life_of_the_process(folder, on_gpu):
    write(folder, entry(16))
    assert find().config["BLOCK_N"] == 16
    files.merge_entries(folder / NAME, GPU.name, GPU.family, GPU.capability, [entry(64)])
    # what another process wrote is for the tuner alone to see
    assert store.on_file(Problem.of("linear", "bf16", **KEY), GPU, folder).config["BLOCK_N"] == 64
    assert find().config["BLOCK_N"] == 16
    store.forget()
    assert find().config["BLOCK_N"] == 64


def test_a_miss_logs_one_line_with_the_command(caplog, folder, packaged, on_gpu):
    write(packaged, entry(16, key={"N": 64, "K": 512}), name=f"{GPU.family}.json", gpu=None)
    caplog.set_level(logging.INFO, "orthrus_triton.autotune")
    for _ in range(3):
        find()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "orthrus-triton autotune --key linear:K=512,N=512 --dtype bf16" in record.message
    assert GPU.name in record.message
    # the next one does not shout; and what a model chose for the GPU's family was not measured on it
    store.find("linear", torch.bfloat16, CPU, N=64, K=512)
    assert [r.levelno for r in caplog.records] == [logging.WARNING, logging.INFO]
    assert store.FAMILY in caplog.records[1].message


def test_without_a_gpu_nothing_is_said_and_no_folder_is_looked_at(caplog, monkeypatch):
    monkeypatch.setattr(files, "user_folder", lambda: pytest.fail("looked"))
    caplog.set_level(logging.DEBUG)
    assert lookup("linear", torch.bfloat16, CPU, N=24, K=40) == SPACES["linear"].default(
        "bf16", "sm90", {"N": 24, "K": 40}
    )
    assert not caplog.records


@pytest.mark.parametrize("change", [{"source": "0123456789abcdef"}, {"version": 99}], ids=["source", "version"])
def test_stale_entries_are_ignored_and_said_so_once(change, caplog, folder, on_gpu):
    other = {"N": 256, "K": 256}
    write(folder, entry(**change), entry(key=other, **change))
    assert find().place == store.BUILT_IN
    store.find("linear", torch.bfloat16, CPU, **other)
    stale = [record for record in caplog.records if "another version" in record.message]
    assert len(stale) == 1 and "Tune again: orthrus-triton autotune" in stale[0].message
    # a current entry beside it counts
    write(folder, entry(64))
    assert find().config["BLOCK_N"] == 64
    assert len(files.read_table(folder / NAME).entries) == 3  # nothing of another version is thrown away


def test_describe_says_which_and_why(folder, on_gpu):
    timed = entry(64, us={"rows=32": 12.5}, of_floor={"rows=32": 0.8})
    write(folder, timed)
    find()
    store.find("linear", torch.bfloat16, CPU, N=24, K=40)
    rows = {row.problem: row for row in describe(device="cpu")}
    tuned = rows[Problem.of("linear", "bf16", **KEY)]
    assert (tuned.place, tuned.origin, tuned.us) == (store.USER, "measured", {"rows=32": 12.5})
    assert "12.5 us (80%) of floor" in str(tuned) and str(tuned.config) in str(tuned)
    untuned = rows[Problem.of("linear", "bf16", N=24, K=40)]
    assert untuned.place == store.BUILT_IN and "not measured" in untuned.origin


def test_keys_as_text():
    problem = Problem.of("linear", "fp16", N=6144, K=4096)
    assert str(problem) == "linear:K=4096,N=6144" and Problem.parse(str(problem), "fp16") == problem
    for wrong in ("linear", "linear:", "linear:N", "linear:N=x", "linear:N=1;K=2", "linear:N=99999999999"):
        with pytest.raises(ValueError, match="must look like linear:N=6144,K=4096"):
            Problem.parse(wrong, "bf16")


def test_an_unknown_op_is_named():
    with pytest.raises(KeyError, match="nonsense"):
        lookup("nonsense", torch.bfloat16, CPU, N=1)


@pytest.mark.parametrize(
    "dtype, key, said",
    [
        (torch.bfloat16, {"N": 512}, "linear: the key must hold N, K, but holds N"),
        (torch.bfloat16, {"N": 512, "K": -1}, "linear: K must be in 1"),
        (torch.float64, KEY, "linear: dtype must be one of bf16, fp16, fp32, but is 'float64'"),
    ],
)
def test_what_is_no_key_is_named(dtype, key, said):
    with pytest.raises(ValueError, match=said):
        lookup("linear", dtype, "cpu", **key)


@pytest.mark.parametrize(
    ("major", "family"), [(8, "sm80"), (9, "sm90"), (10, "sm100"), (11, "sm100"), (12, "sm80"), (13, "sm80")]
)
def test_a_gpu_is_of_the_family_whose_defaults_fit_it(major, family, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert store.device_family.__wrapped__(torch.device("cuda")) == family


def test_a_device_may_be_a_name():
    assert lookup("linear", torch.bfloat16, "cpu", **KEY) == lookup("linear", torch.bfloat16, CPU, **KEY)


def test_config_reads_and_writes_nothing_at_import(tmp_path):
    """With a home that cannot be entered, and a variable that points nowhere, importing is silent."""
    source = """
import builtins, io, os
import torch, einops  # whatever these read
opened = []
real = io.open
def spy(file, *args, **kwargs):
    opened.append(str(file))
    return real(file, *args, **kwargs)
builtins.open = io.open = spy
import orthrus_triton.autotune, orthrus_triton.autotune.store, orthrus_triton.ops, orthrus_triton.autotune.tuner
print([name for name in opened if name.endswith(("json", "jsonl"))])
"""
    env = {"PATH": "", "HOME": str(tmp_path / "home"), files.CONFIG_DIR_VARIABLE: str(tmp_path / "configs")}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", source], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert not (tmp_path / "configs").exists()


def test_equal_configurations_are_equal_whatever_the_order():
    assert KernelConfig({"A": 1, "B": 2}).identity() == KernelConfig({"B": 2, "A": 1}).identity()
