"""Where the library of C kernels comes from: compiled once, kept, and done without where it cannot be had."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.ops.cpu import library as c

needs_c = pytest.mark.skipif(c.c_library() is None, reason="no C kernels here")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """`c_library` as a process begins with it, an empty cache folder, and few kernels: all take seconds to compile."""
    sources = tmp_path / "few"
    sources.mkdir()
    for name in ("vectors.h", "gated.c", "void_rows.c"):
        shutil.copy(c.SOURCES / name, sources)
    monkeypatch.setattr(c, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ORTHRUS_TRITON_CONFIG_DIR", raising=False)
    c.c_library.cache_clear()
    yield tmp_path / "cache" / "orthrus_triton" / "cpu"
    c.c_library.cache_clear()


def compiler_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """The only compiler on PATH: a shell script."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    monkeypatch.setattr(c.shutil, "which", lambda name: str(folder / "cc") if name == "cc" else None)
    return folder


@needs_c
def test_the_library_is_compiled_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert c.c_library() is not None and c.c_library() is c.c_library()
    assert [(path.suffix, path.stat().st_mode & 0o777) for path in fresh.iterdir()] == [(".so", 0o644)]
    commands, run = [], c._run
    monkeypatch.setattr(c, "_run", lambda *command: commands.append(command) or run(*command))
    c.c_library.cache_clear()
    assert c.c_library() is not None
    assert len(commands) == 1 and "-E" in commands[0]  # only asked what it means by native


@needs_c
def test_another_source_is_another_library(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(c.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(c, "SOURCES", tmp_path / "sources")
    for text in ("/* one */", "/* two */"):
        (tmp_path / "sources" / "vectors.h").write_text((c.SOURCES / "vectors.h").read_text() + text)
        c.c_library.cache_clear()
        assert c.c_library() is not None
    assert len(list(fresh.iterdir())) == 2


@needs_c
def test_without_a_place_to_keep_it_the_library_is_used_all_the_same(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert c.c_library() is not None


@needs_c
def test_a_kept_library_that_is_not_whole_is_compiled_again(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    """As a machine that lost its power may leave it."""
    c.c_library()
    (first,) = fresh.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))  # a process opens no name twice
    kept = tmp_path / "other" / "orthrus_triton" / "cpu" / first.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(first.read_bytes()[:100])
    c.c_library.cache_clear()
    assert c.c_library() is not None
    assert kept.read_bytes() == first.read_bytes() and list(kept.parent.iterdir()) == [kept]


@needs_c
def test_a_temporary_folder_that_runs_no_code_is_no_obstacle(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    load = c.ctypes.CDLL

    def load_but(path: str):
        if not path.startswith(str(fresh)):
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(c.ctypes, "CDLL", load_but)
    assert c.c_library() is not None


@needs_c
def test_without_a_home_nothing_is_kept_where_the_process_runs(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    """A user that has none, as in a container, has no cache folder either."""
    monkeypatch.setattr(c, "cache_folder", lambda: Path("~/.cache/orthrus_triton"))
    monkeypatch.chdir(tmp_path)
    before, paths, load = sorted(tmp_path.rglob("*")), [], c.ctypes.CDLL
    monkeypatch.setattr(c.ctypes, "CDLL", lambda path: paths.append(path) or load(path))
    assert c.c_library() is not None
    assert sorted(tmp_path.rglob("*")) == before
    assert paths and all(map(os.path.isabs, paths))  # nor is one taken from there


@needs_c
def test_what_a_compiler_says_may_be_in_any_encoding(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    compiler_that(tmp_path, monkeypatch, f"printf 'Warnung: \\374\n' >&2; exec {compiler} \"$@\"")
    assert c.c_library() is not None


@needs_c
def test_a_compiler_that_fails_leaves_it_to_the_next(fresh: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    broken = compiler_that(tmp_path, monkeypatch, "echo 'cannot find -lomp' >&2; exit 1") / "cc"
    monkeypatch.setattr(c.shutil, "which", {"cc": str(broken), "gcc": compiler, "clang": None}.get)
    assert c.c_library() is not None and not caplog.messages


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'attention.c: needs fused multiply-adds' >&2; exit 1", "needs fused multiply-adds"),
        ("exit 0", ".so: cannot open shared object file"),
        ("sleep 5", "timed out"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_a_compiler_that_fails_is_named_and_done_without(script, reason, fresh, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(c.sys, "platform", "linux")
    monkeypatch.setattr(c, "COMPILE_SECONDS", 1)
    compiler_that(tmp_path, monkeypatch, script)
    x = torch.randn(3, 8)
    with caplog.at_level(logging.WARNING):
        assert torch.allclose(ops.rms_norm(x, torch.ones(8), 1e-6, impl="torch"), torch.rms_norm(x, (8,), eps=1e-6))
        ops.rms_norm(x, torch.ones(8), 1e-6, impl="torch")
    assert c.c_library() is None and len(caplog.messages) == 1 and reason in caplog.messages[0]


def test_without_a_compiler_one_line_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(c.sys, "platform", "linux")
    monkeypatch.setattr(c.shutil, "which", lambda name: None)
    assert c.c_library() is None and c.c_library() is None
    (message,) = caplog.messages
    assert "no C compiler (cc, gcc, clang) is installed" in message


def test_what_a_compiler_made_is_taken_and_nothing_said(fresh: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    made = SimpleNamespace()
    monkeypatch.setattr(c.sys, "platform", "linux")
    monkeypatch.setattr(c, "_load", lambda *_: made)
    compiler_that(tmp_path, monkeypatch, "exit 1")
    assert c.c_library() is made and not caplog.messages


def test_elsewhere_than_on_linux_no_compiler_is_looked_for(fresh: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(c.sys, "platform", "darwin")
    monkeypatch.setattr(c.shutil, "which", lambda name: pytest.fail(f"looked for {name}"))
    assert c.c_library() is None and not caplog.messages


def test_a_compiler_of_two_names_is_tried_once(fresh: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(c.sys, "platform", "linux")
    folder = compiler_that(tmp_path, monkeypatch, "echo broken >&2; exit 1")
    (folder / "gcc").symlink_to(folder / "cc")
    monkeypatch.setattr(c.shutil, "which", lambda name: str(folder / name) if name != "clang" else None)
    assert c.c_library() is None and caplog.text.count("broken") == 1


@needs_c
def test_another_compiler_is_another_library(fresh: Path, tmp_path: Path, monkeypatch) -> None:
    assert c.c_library() is not None
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    compiler_that(tmp_path, monkeypatch, f'exec {compiler} "$@"')
    c.c_library.cache_clear()
    assert c.c_library() is not None and len(list(fresh.iterdir())) == 2


@needs_c
def test_a_library_that_cannot_be_put_in_its_place_leaves_nothing_there(fresh: Path, monkeypatch) -> None:
    def replace(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(c.os, "replace", replace)
    assert c.c_library() is not None and not list(fresh.iterdir())


@needs_c
def test_without_threads_it_is_compiled_all_the_same(fresh: Path, monkeypatch) -> None:
    def no_threads(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(c, "ThreadPoolExecutor", no_threads)
    assert c.c_library() is not None
