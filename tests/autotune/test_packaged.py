"""Every packaged file parses, is current, fits its GPU's shared memory and compiles for its target without spilling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthrus_triton._triton import HAS_TRITON
from orthrus_triton.autotune import KernelConfig, files
from orthrus_triton.autotune.defaults import FAMILIES
from orthrus_triton.autotune.space import SPACES
from orthrus_triton.autotune.tuner import MODEL_ORIGIN
from orthrus_triton.autotune.worker import compiler_environment
from tests.compile_only.problems import that_count

PATHS = sorted(files.PACKAGED.glob("*.json"))
HOW = "tune again and export (docs/autotuning.md), or take the entries out"


def test_every_family_has_its_file():
    assert {f"{family}.json" for family in FAMILIES} <= {path.name for path in PATHS}
    assert not [path for path in files.PACKAGED.iterdir() if path.suffix != ".json"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_file_is_valid_and_says_how_it_was_made(path: Path):
    table = files.read_table(path)
    assert table.problems == [] and table.entries and table.family in FAMILIES
    assert path.name == (f"{table.family}.json" if table.gpu is None else files.file_name(table.gpu))
    assert len({entry.identity() for entry in table.entries}) == len(table.entries)
    for entry in table.entries:
        space = SPACES[entry.op]
        current = (entry.version, entry.source) == (space.version, space.source())
        assert current, f"{path.name}: {entry.problem} was made for other kernels: {HOW}"
        assert space.problem_with_key(entry.dtype, entry.key) is None
        assert space.problem_with(entry.config, entry.dtype, table.family, entry.key) is None
        if table.gpu is None:
            assert entry.origin == MODEL_ORIGIN and not entry.us and not entry.of_floor
        else:
            assert entry.origin == "measured" and entry.us and entry.date and entry.driver


PROGRAM = """
import json, sys
from orthrus_triton.autotune.jobs import handle
for line in sys.stdin:
    print(json.dumps(handle(json.loads(line))), flush=True)
"""


def tiles_of(config: KernelConfig) -> tuple:
    """What decides on registers and shared memory: all but the splits, which are bounds of loops."""
    tiles = {name: value for name, value in config.constants.items() if not name.startswith("SPLIT")}
    return KernelConfig(tiles, config.launch).identity()


def compilations(path: Path) -> list[dict]:
    """A job for every tile of the file and way it is used (plain, behind gate/up, in the head), but for the built-in
    rule's own tiles, which tests/compile_only compiles for every family."""
    table, jobs = files.read_table(path), {}
    for entry in table.entries:
        space = SPACES[entry.op]
        if tiles_of(entry.config) == tiles_of(space.default(entry.dtype, table.family, entry.key)):
            continue
        # what is fused behind a weight is no part of its key: a head is wide, gate/up twice as wide as deep or more
        ratio = entry.key.get("N", 0) / entry.key.get("K", 1)
        uses = ("head",) if ratio > 16 else ("gate_up",) if ratio > 4 else ()
        problem = {"op": entry.op, "dtype": entry.dtype, "key": space.stand_in(entry.key), "uses": uses}
        jobs[entry.op, uses, tiles_of(entry.config)] = {
            "stage": "compile", "home": "orthrus_triton.autotune.builtin", "problem": problem,
            "config": entry.config.as_json(), "family": table.family, "every": False,
        }  # fmt: skip
    return list(jobs.values())


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen]:
    """One for all files: it takes some seconds to start. A job is a line, and so is its answer."""
    folder = tmp_path_factory.mktemp("compiler")
    with (folder / "stderr").open("w+") as errors, subprocess.Popen(
        [sys.executable, "-c", PROGRAM], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        env=compiler_environment() | {"TRITON_CACHE_DIR": str(folder / "cache")},
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()
        assert process.wait(60) == 0, (folder / "stderr").read_text()[-2000:]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton's compiler")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_fits_and_compiles_for_its_target(path: Path, compiler: subprocess.Popen):
    jobs = compilations(path)
    assert jobs
    for job in jobs:
        print(json.dumps(job), file=compiler.stdin, flush=True)
        answer = json.loads(compiler.stdout.readline())
        assert that_count(answer["problems"]) == [], (job, answer)
        assert answer["kernels"] >= 1 and answer["shared"] > 0


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton's compiler")
def test_a_tuner_s_compilation_is_the_one_a_launch_finds_in_triton_s_cache(tmp_path: Path):
    """Or a GPU would wait for every candidate to be compiled again, one by one."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.autotune.cache_key"], text=True, capture_output=True, timeout=300,
        env=compiler_environment() | {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    lines = run.stdout.split()
    assert len(lines) >= 8 and set(lines) == {"same"}, run.stdout
    assert os.listdir(tmp_path) == []  # nothing was compiled for it
