"""The cycle benchmark end to end on a tiny shape: rows for who can run, reasons for who cannot, nothing when wrong."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import cycle, cycle_providers, shapes
from orthrus_triton import ops
from orthrus_triton.modules import ConsensusDecoder
from tests.modules.test_cuda_graph import StandInGraphs


def run(*arguments: str, ok: bool = True):
    app = typer.Typer()
    app.command()(cycle.main)
    result = CliRunner().invoke(app, ["--shape", "tiny", "--dtype", "fp32", "--device", "cpu", *arguments])
    assert (result.exit_code == 0) == ok, result.output
    return result


def test_rows_for_who_can_and_reasons_for_who_cannot(tmp_path: Path) -> None:
    in_int8 = "ours-int8-drafts,ours-int8-weights,ours-int8-rows,ours-int8-head"
    drafted = f"ours,ours-eager,{in_int8},ours-sampled,ours-rejection,ours-inexact"
    in_int8 = "ours-ar-int8-weights,ours-ar-int8-rows,ours-ar-int8-head"
    ours = f"{drafted},{in_int8},ours-ar,ours-ar-eager,ours-ar-sampled,ours-ar-inexact"
    providers = f"{ours},official,hf,hf-compiled"
    result = run(
        "--context", "40", "--batch", "1,2", "--cycles", "3", "--providers", providers, "--tokens-per-cycle", "4",
        "--out", str(tmp_path),
    )  # fmt: skip
    (path,) = tmp_path.rglob("*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["provider"], row["batch"]) for row in rows] == [(p, b) for b in "12" for p in providers.split(",")]
    timed = [row for row in rows if row["p50_ms"]]
    assert {row["provider"] for row in timed} == {*ours.split(","), "hf"}
    for row in timed:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) and int(row["samples"]) >= 3
        assumed = 4 if row["provider"] in drafted.split(",") else 1
        tokens_s = 1000 * int(row["batch"]) * assumed / float(row["p50_ms"])
        assert float(row["tokens_s"]) == pytest.approx(tokens_s, rel=0.01)
        assert float(row["ttft_s"]) > 0
    floors = {row["provider"]: float(row["floor_ms"]) for row in timed}
    assert floors["ours-ar"] < floors["ours-int8-drafts"] < floors["ours"]
    assert floors["ours-int8-rows"] == floors["ours-int8-weights"] < floors["ours-int8-drafts"]
    assert floors["ours-int8-head"] < floors["ours-int8-weights"]
    assert floors["ours-ar-int8-head"] < floors["ours-ar-int8-weights"] < floors["ours-ar"]
    notes = {row["provider"]: row["note"] for row in rows if not row["p50_ms"]}
    assert "needs --official PATH" in notes["official"] and "on a GPU only" in notes["hf-compiled"]
    assert "acceptance is not measured" in result.output and "assumes 4 tokens per drafted cycle" in result.output
    assert "the official cycle takes" not in result.output
    times = {(row["provider"], row["batch"]): float(row["p50_ms"]) for row in timed}
    for batch in "12":
        tax = 100 * (times["ours", batch] / times["ours-inexact", batch] - 1)
        assert f"context 40, batch {batch}: exactness costs {tax:+.1f} % of a cycle" in result.output
    assert path.with_suffix(".md").read_text() in result.output + "\n"
    if importlib.util.find_spec("matplotlib"):
        assert path.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_cycles_are_timed_where_the_host_is_a_step_behind(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the first steps report nothing, and a replay in AR mode is several cycles."""
    monkeypatch.setattr(cycle_providers, "ConsensusDecoder", StandInGraphs)
    model = shapes.build(shapes.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    measured = cycle_providers.ours(cycle._workload(model, 40, 2, 6, None), mode, impl="torch")
    assert len(measured.seconds) >= 6 and all(0 < seconds < 5 for seconds in measured.seconds)


@pytest.mark.usefixtures("without_c")
def test_the_inexact_cycle_has_products_of_the_library_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, also where ours are fused, in the passes of both views; and the prefill is not part of it."""
    model = shapes.build(shapes.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    used = []
    for name in ("linear", "linear_norm", "linear_swiglu", "qkv_rope_cache", "lm_head_choice"):
        original = getattr(ops, name)

        def noted(*arguments, original=original, name=name, **options):
            used.append((name, options["impl"]))
            return original(*arguments, **options)

        monkeypatch.setattr(ops, name, noted)
    decoder = cycle_providers.LibraryProducts(model, impl="torch")
    run = decoder.open(1, 200, eos_token_id=[])
    run.admit(0, torch.arange(20), 100)
    used.clear()
    run.step()
    # of two views, each two layers of four products and the head
    assert used == 2 * (2 * 4 + 1) * [("linear", "library")]
    run.poll(lag=0)
    assert 2 <= len(run.slots[0].tokens)


def test_what_others_code_does_costs_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cycle_providers.PROVIDERS, "official", lambda load: 1 / 0)
    result = run("--context", "40", "--cycles", "2", "--providers", "ours,official", "--out", str(tmp_path))
    assert "ZeroDivisionError: division by zero" in result.output and list(tmp_path.rglob("*.md"))


def test_a_red_gate_prints_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    verify = ConsensusDecoder.verify

    def broken(self, candidate, *arguments):
        choice = verify(self, candidate, *arguments)
        return (choice + 1) % self.model.vocab_size if candidate.shape[1] > 1 else choice

    monkeypatch.setattr(ConsensusDecoder, "verify", broken)
    result = run("--context", "40", "--cycles", "2", "--providers", "ours", ok=False)
    assert "gate is red" in result.output and "p50_ms" not in result.output


def test_the_gate_sees_weights_that_are_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shapes.build(shapes.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    load = cycle._workload(model, 80, 2, 2, None)
    assert cycle_providers.problems(load, ["ours", "hf"]) == []
    transformers_model = shapes.transformers_model

    def other(model):
        theirs = transformers_model(model)
        theirs.model.layers[1].self_attn.q_norm.weight = torch.nn.Parameter(torch.full((64,), 3.0))
        return theirs

    monkeypatch.setattr(shapes, "transformers_model", other)
    (problem,) = cycle_providers.problems(load, ["ours", "hf"])
    assert problem.startswith("transformers' AR logits are not ours")


def test_copies_that_fill_the_memory_are_not_left_to_the_next_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shapes.build(shapes.SHAPES["tiny"], torch.float32, torch.device("cpu"))

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model.model.layers[1].mlp, "quantize_for_drafts", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        cycle_providers.ours_int8_drafts(cycle._workload(model, 40, 1, 2, None))
    assert all(getattr(module, "draft_weight", None) is None for module in model.modules())


def test_bytes_of_a_pass() -> None:
    model = shapes.build(shapes.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    # per layer: q, k, v, o, their norms, gate, up, down, two norms; then the final norm and the tied head
    layer = 64 * (256 + 128 + 128) + 256 * 64 + 2 * 64 + 3 * 64 * 128 + 2 * 64
    weights = 4 * (2 * layer + 64 + 256 * 64)
    for view in ("ar", "diffusion"):
        assert shapes.bytes_per_pass(model, view, context=0, batch=1) == weights
        assert shapes.bytes_per_pass(model, view, context=10, batch=3) == weights + 3 * 10 * 2 * (2 * 2 * 64 * 4)


def test_unknown_names_are_named() -> None:
    result = run("--providers", "ours,theirs", ok=False)
    assert "but got 'theirs'" in " ".join(result.output.replace("│", " ").split())


def test_the_command_in_a_report_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["cycle.py", "--out=/home/me/a b", "--official", "/home/me/o", "--batch", "1,2"])
    assert cycle._command() == "python -m benchmarks.cycle --out PATH --official PATH --batch 1,2"
