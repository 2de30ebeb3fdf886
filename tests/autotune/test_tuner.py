"""The tuner from end to end on a CPU: real gate in the interpreter, real worker processes, fake compiler and clock."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from orthrus_triton.autotune import KernelConfig, files, store, tune
from orthrus_triton.autotune.config import Problem
from orthrus_triton.autotune.gate import Gate
from orthrus_triton.autotune.run import Result
from orthrus_triton.autotune.tunable_op import OPS, Variant
from orthrus_triton.autotune.tuner import tune_dry
from tests.autotune import planted
from tests.autotune.conftest import GPU, interpreted

CPU = torch.device("cpu")
HANDLER = "tests.autotune.fake_jobs:handle"
SCALE = planted.scale.problem("fp32", H=100)
PRODUCT = planted.product.problem("fp32", N=16, K=100)


def run_tune(*problems: Problem, **options: object) -> Result:
    return tune(problems, device="cpu", gpu=GPU, handler=HANDLER, jobs=1, **options)


def configs_of(op: str) -> dict[str, KernelConfig]:
    return {str(config): config for config in OPS[op].space.candidates("fp32", "sm90", {"N": 16, "K": 100, "H": 100})}


def stages(log: Path) -> list[str]:
    return [json.loads(line)[0] for line in log.read_text().splitlines()]


# --- the gate


@interpreted
def test_a_configuration_whose_bits_depend_on_the_row_count_is_rejected():
    gate = Gate.of(OPS["planted_product"], PRODUCT, CPU)
    good, bad = (
        KernelConfig({"BLOCK_K": 32, "WIDE_FROM": wide_from, "DROP": 1}) for wide_from in (1000, 8)
    )  # fmt: skip
    assert gate.problems(good) == []
    (problem,) = gate.problems(bad)
    assert "rows 0..0 alone have other bits than among 64 rows" in problem
    # nothing but the bits gives it away: its results are as near to fp64 as anyone's
    x, weight = gate.variants[0].inputs
    torch.testing.assert_close(planted.product(x, weight, config=bad), x @ weight.T, atol=1e-4, rtol=0)


def test_a_result_that_does_not_repeat_or_is_not_the_unfused_one_is_rejected():
    x, again = torch.ones(4, 2), itertools.count()
    cut = lambda inputs, start, stop: (inputs[0][start:stop],)  # noqa: E731
    fickle = Variant("fickle", (x,), lambda inputs, config: inputs[0] + (next(again) == 1), cut, [(0, 1)])
    same = Variant("same", (x,), lambda inputs, config: inputs[0], cut, [(0, 1)], same_as=lambda inputs, config: x)
    other = Variant("other", (x,), lambda inputs, config: inputs[0], cut, [(0, 1)], same_as=lambda inputs, config: -x)
    assert Gate(SCALE, [fickle, same, other], [None] * 3).problems(KernelConfig()) == [
        "fickle: other bits when it runs again", "other: other bits than the ops it stands for",
    ]  # fmt: skip


@interpreted
def test_a_wrong_result_is_rejected():
    gate = Gate.of(OPS["planted_product"], PRODUCT, CPU)
    assert "exceeds the budget" in gate.problems(KernelConfig({"BLOCK_K": 32, "WIDE_FROM": 1000, "DROP": 2}))[0]


@pytest.mark.parametrize(
    "problem",
    [
        Problem.of("linear", "bf16", ("followed", "gate_up", "head"), N=64, K=96),
        Problem.of("dual_view_attention", "fp32", head_dim=64, group=2),
    ],
    ids=str,
)
def test_the_built_in_ops_pass_the_gate(problem: Problem):
    from orthrus_triton.autotune import builtin  # noqa: F401

    space = OPS[problem.op].space
    gate = Gate.of(OPS[problem.op], problem, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    default = space.default(problem.dtype, "sm90", problem.shape)
    assert gate.problems(default) == []
    assert len(gate.variants) == (4 if problem.op == "linear" else 2)


# --- the pipeline


@pytest.mark.parametrize("name", ["jobs", "candidates", "repeats"])
def test_counts_below_one_are_refused_and_not_waited_for(name: str):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, but got -1"):
        tune(PRODUCT, device="cpu", gpu=GPU, **{name: -1})
    if name != "repeats":
        with pytest.raises(ValueError, match=f"{name} must be >= 1, but got -1"):
            tune_dry(PRODUCT, "sm_90", **{name: -1})


def test_a_dry_run_compiles_what_compiles_to_the_same_once(fakes):
    """What is fused behind a product is compiled with it, and may need more registers."""
    log, plain = fakes(), [Problem.of("linear", "bf16", N=64 * n, K=4096) for n in (16, 32)]
    fused = Problem.of("linear", "bf16", ("gate_up",), N=64 * 48, K=4096)
    outcomes = tune_dry([*plain, fused], "sm_90", handler=HANDLER, jobs=1, candidates=1)
    assert [outcome.pick for outcome in outcomes] and stages(log) == ["compile"] * 2


@interpreted
def test_the_planted_configuration_never_wins_however_fast(fakes, folder):
    every = configs_of("planted_product")
    bad = [name for name, config in every.items() if config["WIDE_FROM"] == 8 or config["DROP"] == 2]
    fakes(real=True, us=dict.fromkeys(bad, 1.0) | {"BLOCK_K=64 WIDE_FROM=1000 DROP=1": 50.0})
    (outcome,) = run_tune(PRODUCT).outcomes
    assert outcome.tried == len(every) and outcome.timed == len(every) - len(bad)
    assert set(outcome.rejected) == set(bad)
    assert outcome.entry.config == KernelConfig({"BLOCK_K": 64, "WIDE_FROM": 1000, "DROP": 1})


@interpreted
def test_what_is_written_and_looked_up(fakes, folder, on_gpu):
    fakes(real=True, us={"BLOCK=64 num_warps=2": 40.0}, noise=0.002)
    result = run_tune(SCALE)
    content = json.loads(result.path.read_text())
    assert result.path == folder / "Test_GPU_9000.json" and result.unfinished == []
    assert (content["gpu"], content["capability"], content["family"]) == ("Test GPU 9000", "9.0", "sm90")
    (entry,) = content["entries"]
    assert entry["constants"] == {"BLOCK": 64} and entry["launch"] == {"num_warps": 2}
    assert {"op", "version", "source", "date", "driver", "torch", "triton", "us", "of_floor"} <= set(entry)
    assert entry["us"] == {"rows=1": 40.0, "rows=32": 40.0} and entry["origin"] == "measured"
    # bytes / bandwidth / time: x, weight and result are 100 floats each, at 1 GB/s in 40 us
    assert entry["of_floor"]["rows=1"] == pytest.approx(3 * 400 / 1e9 / 40e-6, abs=1e-4)
    found = store.find("planted_scale", torch.float32, CPU, H=100)
    assert found.place == store.USER and found.config == KernelConfig({"BLOCK": 64}, {"num_warps": 2})
    # the op itself runs with it
    x, weight = torch.randn(3, 100), torch.randn(100)
    torch.testing.assert_close(planted.scale(x, weight), x * weight)
    assert not list(folder.glob("*.journal.jsonl")) and not list(folder.glob(".*tmp*"))


# --- the same again


def test_tuning_again_keeps_the_winner_within_noise_and_says_when_it_changed(fakes):
    names = list(configs_of("planted_scale"))
    fakes(us={names[3]: 90.0})
    (first,) = run_tune(SCALE).outcomes
    assert str(first.entry.config) == names[3] and first.previous is None
    fakes(us={names[3]: 90.0, names[1]: 89.5})  # another is faster by less than can be told
    (second,) = run_tune(SCALE, repeats=3).outcomes
    assert str(second.entry.config) == names[3] and not second.changed
    assert [str(config) for config, _ in second.choices] == [names[3]] * 3
    assert second.choices[0][1] == pytest.approx(90 / 89.5 - 1)
    fakes(us={names[3]: 90.0, names[1]: 50.0})
    (third,) = run_tune(SCALE).outcomes
    assert str(third.entry.config) == names[1] and third.changed and str(third.previous) == names[3]


def test_what_was_chosen_among_more_candidates_is_among_fewer(fakes):
    names = list(configs_of("planted_scale"))
    fakes(us={names[-1]: 50.0})
    (first,) = run_tune(SCALE).outcomes
    (second,) = run_tune(SCALE, candidates=2).outcomes
    assert str(first.entry.config) == str(second.entry.config) == names[-1] and second.tried == 3


def test_without_a_gpu_it_says_what_can_be_done(folder):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="timing needs a GPU.*--dry-run --target sm_90"):
        tune("qwen3-8b")
    assert not folder.exists()


@interpreted
def test_a_packaged_and_a_user_configuration_of_the_same_content_give_the_same_bits(
    fakes, folder, on_gpu, tmp_path, monkeypatch
):
    from orthrus_triton import ops

    config = KernelConfig(
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "SPLIT_K": 2}, {"num_warps": 4, "num_stages": 2}
    )
    space = store.SPACES["linear"]
    entry = files.Entry(
        "linear", space.version, space.source(), "fp32", {"N": 48, "K": 128}, config.constants, config.launch
    )
    x, weight = torch.randn(5, 128), torch.randn(48, 128)
    results = {"explicit": ops.linear(x, weight, impl="triton", config=config)}
    monkeypatch.setattr(files, "PACKAGED", tmp_path / "packaged")
    for place, where in ((store.USER, folder), (store.PACKAGED, tmp_path / "packaged")):
        files.merge_entries(where / files.file_name(GPU.name), GPU.name, GPU.family, GPU.capability, [entry])
        store.forget()
        assert store.find("linear", torch.float32, CPU, N=48, K=128).place == place
        results[place] = ops.linear(x, weight, impl="triton")
        (where / files.file_name(GPU.name)).unlink()
    store.forget()
    results["built-in"] = ops.linear(x, weight, impl="triton")
    assert torch.equal(results[store.USER], results["explicit"])
    assert torch.equal(results[store.PACKAGED], results["explicit"])
    # and the file's content does matter: the built-in rule sums in another order
    assert not torch.equal(results["built-in"], results["explicit"])
