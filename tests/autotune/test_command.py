"""`orthrus-triton autotune`: options, what it prints, a dry run that really compiles, and the example."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orthrus_triton._triton import HAS_TRITON
from orthrus_triton.autotune import KernelConfig, files, store
from orthrus_triton.autotune.config import Problem
from orthrus_triton.autotune.run import Outcome, Result
from orthrus_triton.autotune.tunable_op import OPS
from orthrus_triton.autotune.tuner import MODEL_ORIGIN, DryOutcome, tune_dry
from orthrus_triton.autotune.worker import compiler_environment
from orthrus_triton.cli.autotune import _print
from orthrus_triton.cli.common import parse_seconds
from tests.autotune.conftest import interpreted
from tests.cli_models import assert_bad_input, run

ROOT = Path(__file__).parents[2]
LINEAR = Problem.of("linear", "bf16", N=512, K=512)


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "nothing to tune: give --model PATH, --shape NAME or --key"),
        (["--shape", "gpt-2"], "--shape must name some of qwen3-0.6b"),
        (["--model", "no-such-folder"], "--model must be a folder"),
        (["--key", "linear"], "must look like linear:N=6144,K=4096"),
        (["--key", "linear:N=4"], "the key must hold N, K"),
        (["--shape", "qwen3-8b", "--ops", "conv"], "an op must be one of"),
        (["--shape", "qwen3-8b", "--budget", "soon"], "--budget must be a time like"),
        (["--shape", "qwen3-8b", "--repeat", "0"], "--repeat must be >= 1"),
        (["--shape", "qwen3-8b", "--target", "sm_90"], "--target goes with --dry-run"),
        (["--shape", "qwen3-8b", "--dry-run", "--target", "sm_75"], "target must be one of sm_80"),
        (["--module", "no_such_file.py", "--shape", "qwen3-8b"], "--module must be a Python file"),
        (["--show", "--export", "mine.json"], "leave out --export"),
        (["--module", "LICENSE", "--show"], "--module must be a Python file, but LICENSE is none"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(options, said):
    assert_bad_input(run("autotune", *options), said)


@pytest.mark.parametrize(
    "code, said",
    [
        ("a = 1\ndef f(:\n", "SyntaxError: invalid syntax (own.py, line 2)"),
        ("a = 1\nb\n", "NameError: name 'b' is not defined (line 2 of"),
        ("raise ImportError('no kernels')", "ImportError: no kernels (line 1 of"),
    ],
)
def test_a_module_that_fails_is_one_line(tmp_path, code, said):
    (tmp_path / "own.py").write_text(code)
    assert_bad_input(run("autotune", "--module", tmp_path / "own.py", "--shape", "qwen3-8b"), "own.py fails", said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done():
    assert_bad_input(run("autotune", "--shape", "qwen3-8b"), "timing needs a GPU", "--dry-run --target sm_90")
    assert_bad_input(run("autotune", "--shape", "qwen3-8b", "--dry-run"), "needs --target")


def test_times_of_a_budget():
    assert [parse_seconds(text) for text in ("90", "90s", "5m", "0.5h", "none")] == [90.0, 90.0, 300.0, 1800.0, None]


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton's compiler")
def test_a_dry_run_compiles_and_exports(tmp_path):
    """Two real compilations; the file that is exported is one the package could carry."""
    out = tmp_path / "sm90.json"
    options = ("--key", "linear:K=512,N=512", "--dry-run", "--target", "sm_90", "--candidates", 2, "--jobs", 1)
    result = run("autotune", *options, "--export", out)
    assert result.exit_code == 0, (result.stdout, result.stderr)
    text = " ".join(result.stdout.split())
    assert "linear:K=512,N=512 bf16: 2 of 2 candidates fit sm_90; by the compile-time model: BLOCK_M=" in text
    table = files.read_table(out)
    assert (table.gpu, table.family, table.problems) == (None, "sm90", [])
    (entry,) = table.entries
    assert entry.origin == MODEL_ORIGIN and store.SPACES["linear"].problem_with(
        entry.config, "bf16", "sm90", {"N": 512, "K": 512}
    ) is None  # fmt: skip


def test_a_dry_run_rejects_what_does_not_fit_and_prefers_by_the_model(monkeypatch, tmp_path):
    """The compiler's word is final; without a large promise the default stays."""
    from orthrus_triton.autotune import worker

    script = tmp_path / "compiler.py"
    script.write_text(
        "def handle(job):\n"
        "    stages = job['config']['launch']['num_stages']\n"
        "    problems = ['needs more'] if stages == 5 else []\n"
        "    return {'problems': problems, 'shared': 1024, 'registers': 64, 'kernels': 1}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path) in worker.compiler_environment()["PYTHONPATH"]
    (outcome,) = tune_dry(Problem.of("linear", "bf16", N=4096, K=4096), "sm_90", jobs=1, handler="compiler:handle")
    assert outcome.rejected and set(outcome.rejected.values()) == {"needs more"}
    assert all("num_stages=5" in config for config in outcome.rejected)
    a, b = KernelConfig({"A": 1}), KernelConfig({"A": 2})
    assert DryOutcome(LINEAR, [(a, 0, 0, 100.0), (b, 0, 0, 95.0)]).pick == a
    assert DryOutcome(LINEAR, [(a, 0, 0, 100.0), (b, 0, 0, 80.0)]).pick == b
    assert DryOutcome(LINEAR).pick is None


@pytest.mark.parametrize(
    "launch, said", [("return x", "'none' must launch a kernel of Triton"), ("config['TILE']", "KeyError: 'TILE'")]
)
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton's compiler")
def test_a_dry_run_in_which_nothing_fits_says_why_and_fails(tmp_path, launch, said):
    (tmp_path / "own.py").write_text(
        "from orthrus_triton.autotune import tunable\n"
        "@tunable('none', kernels=[], space={'BLOCK': [16]}, default={'BLOCK': 16}, key={'H': len},\n"
        "         inputs=lambda key, rows, randn: [randn(rows)], reference=lambda x: x)\n"
        f"def launch(x, config):\n    {launch}\n"
    )
    result = run(
        "autotune", "--module", tmp_path / "own.py", "--key", "none:H=3", "--dry-run", "--target", "sm_90", "--jobs", 1
    )
    OPS.pop("none"), store.SPACES.pop("none")
    assert result.exit_code == 1 and said in result.stdout, (result.stdout, result.stderr)


def test_nothing_but_a_json_file_is_written_over(folder, tmp_path):
    for target in (tmp_path, tmp_path / "notes.txt"):
        options = ("--key", "linear:K=512,N=512", "--dry-run", "--target", "sm_90", "--export", target)
        result = run("autotune", *options)
        assert result.exit_code == 2 and "--export must be a .json file" in result.stderr
    assert tmp_path.is_dir()


def test_show(folder):
    result = run("autotune", "--show", "--key", "linear:K=512,N=512", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()  # whole, however narrow the terminal
    assert line.startswith("linear:K=512,N=512 bf16: BLOCK_M=") and line.endswith("[built-in default, not measured]")


def test_doctor_names_the_files(folder, on_gpu, monkeypatch, tmp_path):
    from orthrus_triton.cli.doctor import _configs

    cpu = torch.device("cpu")
    assert _configs("torch", cpu).startswith("not used")
    assert "not tuned on this GPU: orthrus-triton autotune" in _configs("triton", cpu)
    files.merge_entries(folder / files.file_name(on_gpu.name), on_gpu.name, "sm90", "9.0", [])
    mine = f"0 in {folder / files.file_name(on_gpu.name)}"
    assert _configs("triton", cpu) == f"{mine}; else the defaults of family sm90"
    monkeypatch.setattr(files, "PACKAGED", tmp_path)  # asked for what the user's own does not have
    packaged = tmp_path / files.file_name(on_gpu.name)
    files.merge_entries(packaged, on_gpu.name, "sm90", "9.0", [])
    assert _configs("triton", cpu) == f"{mine}; 0 in {packaged}; else the defaults of family sm90"


def test_what_is_printed_of_a_run(capsys, tmp_path):
    config = KernelConfig({"BLOCK_M": 16}, {"num_warps": 4})
    entry = files.Entry(
        "linear", 1, "0" * 16, "bf16", LINEAR.shape, config.constants, config.launch, us={"rows=32": 12.34},
        of_floor={"rows=32": 0.87},
    )  # fmt: skip
    other = KernelConfig({"BLOCK_M": 32}, {"num_warps": 4})
    done = Outcome(LINEAR, entry, 32, 30, {}, other, [(config, 0.0), (other, 0.004)])
    failed = Outcome(Problem.of("linear", "bf16", N=1, K=1), None, 2, 0, {"a": "took longer than 8 s"})
    _print(Result(tmp_path / "GPU.json", [done, failed], [Problem.of("linear", "bf16", N=2, K=2)]))
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "BLOCK_M=16 num_warps=4 (rows=32 12.3 us, 87% of floor; 30 timed of 32; another winner than last time" in text
    )
    assert "2 winner(s) in 2 repetitions, at most 0.4% behind" in text
    assert "none of 2 candidates may be used, the default stays no: a: took longer than 8 s" in text
    assert "out of time, not done: linear:K=2,N=2. The same command goes on" in text


def test_options_of_a_run_arrive_and_a_key_without_a_winner_ends_with_1(monkeypatch, tmp_path):
    config, heard, outcomes = KernelConfig({"BLOCK_M": 16}, {"num_warps": 4}), [], []
    entry = files.Entry("linear", 1, "0" * 16, "fp16", LINEAR.shape, config.constants, config.launch)
    monkeypatch.setattr(
        "orthrus_triton.autotune.tuner.tune",
        lambda problems, **how: heard.append((problems, how)) or Result(tmp_path / "GPU.json", outcomes, []),
    )
    options = ("--key", "linear:K=512,N=512", "--dtype", "fp16", "--device", "cpu", "--budget", "90s", "--jobs", 2)
    for code, found in enumerate((entry, None)):
        outcomes.append(Outcome(LINEAR, found, 2, 2, {}))
        assert run("autotune", *options, "--candidates", 3, "--repeat", 4, "--fresh").exit_code == code
    problems, how = heard[0]
    del how["advance"]
    assert problems == [Problem.of("linear", "fp16", N=512, K=512)]
    assert how == {
        "device": torch.device("cpu"), "budget": 90.0, "jobs": 2, "candidates": 3, "repeats": 4, "fresh": True
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available() or not HAS_TRITON, reason="for the interpreter")
def test_the_example(tmp_path):
    path = ROOT / "examples" / "tune_your_kernel.py"
    env = compiler_environment() | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    env[files.CONFIG_DIR_VARIABLE] = str(tmp_path)
    done = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "timing needs a GPU" in done.stdout and "scaled_add:H=4096 bf16: BLOCK=1024" in done.stdout
    lines = path.read_text().splitlines()
    first = lines.index("@tunable(")
    assert lines.index(")", first) - first < 20


@interpreted
def test_the_example_is_tuned_and_found_like_the_ops(fakes, folder, on_gpu):
    """The whole way with a fake clock: the worker imports the script by its path."""
    from orthrus_triton.autotune import tune
    from orthrus_triton.autotune.jobs import load_op

    op = load_op(str(ROOT / "examples" / "tune_your_kernel.py"), "scaled_add")
    fakes(real=True, us={"BLOCK=256 num_warps=8": 30.0})
    problem = op.problem("fp32", H=300)
    result = tune(problem, device="cpu", gpu=on_gpu, handler="tests.autotune.fake_jobs:handle", jobs=1, candidates=4)
    (outcome,) = result.outcomes
    assert outcome.rejected == {} and outcome.timed == 4
    found = store.lookup("scaled_add", torch.float32, torch.device("cpu"), H=300)
    assert found == KernelConfig({"BLOCK": 256}, {"num_warps": 8})
    assert json.loads(result.path.read_text())["entries"][0]["op"] == "scaled_add"
    x, scale = torch.randn(2, 300), torch.randn(300)
    torch.testing.assert_close(op(x, x, scale), x + x * scale)
