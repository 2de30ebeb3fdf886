"""The kernel benchmarks from end to end on a tiny shape: files and columns, and no figure where a result is wrong."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import attention, common, linear
from orthrus_triton import ops
from orthrus_triton.autotune import timing

OPTIONS = {
    linear: ("--rows", "1,9"),
    attention: ("--rows", "1,3", "--contexts", "40"),
}
OURS = {linear: 7 * 2, attention: 2}  # weights x rows, rows
CELLS = {linear: 2 * 7 * 2 + 5 * 2, attention: 2 * 2}  # as many of the library, and of five weights in int8


@pytest.fixture(autouse=True)
def no_long_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, attention):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: common.copy_bandwidth(device, 2**20))


def run(module, *options: object):
    app = typer.Typer()
    app.command()(module.main)
    arguments = ("--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--samples", 5, *options)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("module", OPTIONS, ids=lambda module: module.__name__)
def test_it_runs_from_end_to_end(module, tmp_path: Path) -> None:
    result = run(module, *OPTIONS[module], "--out", tmp_path)
    assert result.exit_code == 0, (result.output, result.exception)
    name = module.__name__.split(".")[-1] + "_fp32"
    (path,) = tmp_path.glob(f"*/{name}.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == CELLS[module]
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        # the share is of the very figures beside it
        assert float(row["of_copy"]) == pytest.approx(float(row["gb_s"]) / float(row["copy_gb_s"]), rel=0.1, abs=0.02)
        assert row["torch"] == torch.__version__ and row["git_sha"] and row["device"].endswith("threads")
    table = result.stdout.split("\n\n")[0].splitlines()
    assert len(table) == CELLS[module] + 2 and sum("| ours |" in line for line in table) == OURS[module]
    assert path.with_suffix(".md").read_text().startswith(table[0])
    assert path.with_suffix(".png").exists() == bool(importlib.util.find_spec("matplotlib"))


@pytest.mark.parametrize("module", OPTIONS, ids=lambda module: module.__name__)
def test_a_wrong_result_is_never_timed(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "linear_swiglu" if module is linear else "dual_view_attention"
    original = getattr(ops, name)

    def depends_on_the_row_count(x, *args, **options):
        rows = x.shape[0] if x.dim() == 2 else x.shape[1]
        return original(x, *args, **options) + (1e-6 if rows == 1 else 0)

    monkeypatch.setattr(ops, name, depends_on_the_row_count)
    monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("timed"))
    result = run(module, *OPTIONS[module], "--out", tmp_path)
    assert result.exit_code == 1 and result.stdout == ""
    assert "WRONG: " in result.stderr and "nothing was timed" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def stops_at_the_third(*arguments, **options):
        timed.append(arguments)
        if len(timed) == 3:
            raise KeyboardInterrupt
        return common.measure(*arguments, **options)

    monkeypatch.setattr(attention, "measure", stops_at_the_third)
    result = run(attention, *OPTIONS[attention], "--out", tmp_path)
    assert result.exit_code != 0 and result.output.count("| tiny |") == 2
    (path,) = tmp_path.glob("*/attention_fp32.csv")
    assert len(path.read_text().splitlines()) == 1 + 2


def test_a_bare_read_counts_the_bytes_of_the_weight_alone() -> None:
    matrix, int8 = torch.zeros(6, 4), [(torch.zeros(6, 4, dtype=torch.int8), torch.zeros(6))]
    moved = {
        name: linear.bytes_moved(name, matrix, int8, 1000) for name in ("ours", "library", "ours, int8", "bare read")
    }
    assert moved == {"ours": 1096, "library": 1096, "ours, int8": 1048, "bare read": 96}


def test_a_row_is_on_the_disk_as_soon_as_it_is_measured(tmp_path: Path) -> None:
    report = common.Report("x", torch.device("cpu"), tmp_path)
    for n in (1, 2):
        report.add(n=n)
        (path,) = tmp_path.glob("*/x.csv")
        assert len(path.read_text().splitlines()) == 1 + n


def test_flex_attention_is_compiled_once_for_all_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, compile = [], torch.compile

    def counted(function, **options):
        return compile(function, backend=lambda graph, _: graphs.append(graph) or graph.forward, **options)

    torch._dynamo.reset()  # what other tests compiled counts against the limit of recompilations
    monkeypatch.setattr(torch, "compile", counted)
    attention._compiled_flex.cache_clear()
    for rows in (1, 32):
        for context in (700, 1100, 1500):
            load = attention.make_pass(attention.SHAPES["tiny"], context, rows, torch.float32, torch.device("cpu"))
            torch.testing.assert_close(attention.flex(load)(), attention.sdpa(load)())
    assert len(graphs) == 2
    attention._compiled_flex.cache_clear()


def test_flex_attention_is_compiled_for_each_context_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_static(function, dynamic):
        return (lambda *_, **__: 1 / 0) if dynamic else (lambda q, *_, **__: q)

    monkeypatch.setattr(torch, "compile", only_static)
    attention._compiled_flex.cache_clear()
    load = attention.make_pass(attention.SHAPES["tiny"], 200, 3, torch.float32, torch.device("cpu"))
    assert torch.equal(attention.flex(load)(), load.q)
    attention._compiled_flex.cache_clear()


def test_bad_options_are_one_line() -> None:
    for module in OPTIONS:
        for options, fragment in ((("--dtype", "int8"), "--dtype must be one of"), (("--shape", "9b"), "--shape must")):
            result = run(module, *options)
            assert result.exit_code == 2 and fragment in result.stderr and result.stdout == ""
        assert "nothing is timed" in " ".join(run(module, "--help").stdout.split())


def test_percentiles_and_slug() -> None:
    timing = common.Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (timing.p20, timing.p50, timing.p80, timing.samples) == (2.0, 3.0, 5.0, 6)
    assert common.slug("NVIDIA H100 80GB HBM3 (SXM)") == "NVIDIA_H100_80GB_HBM3_SXM"


def test_steps_of_one_sample_are_averaged_and_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = [], [0.0]

    def step(name: str, seconds: float) -> None:
        log.append(name)
        now[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    steps = {"a": [lambda: step("a", 0.25)] * 3, "b": [lambda: step("b", 0.5)]}
    timings = timing.measure(steps, torch.device("cpu"), samples=8, seconds=2.0)
    # five samples whatever they cost
    assert timings == {"a": timing.Timing(0.25, 0.25, 0.25, 5), "b": timing.Timing(0.5, 0.5, 0.5, 5)}
    assert "".join(log[-20:]) == "aaab" * 5
    for most, samples in ((50, 16), (8, 8), (3, 3)):
        timings = timing.measure({"c": [lambda: step("c", 0.125)]}, torch.device("cpu"), samples=most, seconds=2.0)
        assert timings["c"].samples == samples


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", lambda *_, **__: {"copy": timing.Timing(1.0, 2.0, 3.0, 20)})
    assert timing.copy_bandwidth(torch.device("cpu"), 1000) == 1000.0


@pytest.mark.gpu
def test_gpu_times_the_device_and_not_the_host() -> None:
    """A kernel over 1 GiB takes as long captured as eager, and twice the bytes take twice as long. Not a copy: one in a
    graph is no kernel, and takes half as long again (0.78 ms for 0.51 on an H200)."""
    device = torch.device("cuda")
    one, two = (torch.empty(nbytes, dtype=torch.int8, device=device) for nbytes in (2**29, 2**30))
    targets = torch.empty_like(one), torch.empty_like(two)
    steps = {
        "one": [lambda: torch.bitwise_not(one, out=targets[0])],
        "two": [lambda: torch.bitwise_not(two, out=targets[1])],
    }
    captured = common.measure(steps, device, samples=20)
    eager = common.measure(steps, device, samples=20, graph=False)
    assert captured["two"].p50 == pytest.approx(2 * captured["one"].p50, rel=0.1)
    assert captured["two"].p50 == pytest.approx(eager["two"].p50, rel=0.1)


def test_an_out_that_is_a_file_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    (file := tmp_path / "figures").write_text("")
    result = run(linear, *OPTIONS[linear], "--out", file)
    assert result.exit_code == 2 and "--out must be a folder" in result.output
