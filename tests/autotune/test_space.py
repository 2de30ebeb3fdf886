"""Spaces, keys of a model, fingerprints of source, choosing among timings, the journal."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from orthrus_triton.autotune import KernelConfig, problems_of
from orthrus_triton.autotune.choose import Timed, choose
from orthrus_triton.autotune.config import DTYPES, Problem
from orthrus_triton.autotune.defaults import FAMILIES, SHARED_MEMORY_LIMIT
from orthrus_triton.autotune.estimate import Work, estimate
from orthrus_triton.autotune.jobs import load_file
from orthrus_triton.autotune.journal import Journal
from orthrus_triton.autotune.shapes import SHAPES, select
from orthrus_triton.autotune.source import _normalised, fingerprint_of_files, fingerprint_of_functions
from orthrus_triton.autotune.space import MAX_CANDIDATES, SPACES, BuiltInSpace
from orthrus_triton.autotune.tunable_op import home_of, tunable
from tests.autotune import planted
from tests.autotune.conftest import interpreted

KEYS = [
    ("linear", {"N": 6144, "K": 4096}), ("linear", {"N": 576, "K": 576}), ("linear", {"N": 7, "K": 5}),
    ("dual_view_attention", {"head_dim": 128, "group": 4}), ("dual_view_attention", {"head_dim": 256, "group": 1}),
]  # fmt: skip


@pytest.mark.parametrize("op, key", KEYS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates(op: str, key: dict, family: str):
    space = SPACES[op]
    for dtype in DTYPES:
        found = space.candidates(dtype, family, key)
        assert found[0] == space.default(dtype, family, key)
        assert len({config.identity() for config in found}) == len(found) <= MAX_CANDIDATES
        assert found == space.candidates(dtype, family, key)  # the same everywhere, the same again
        for config in found:
            assert space.problem_with(config, dtype, family, key) is None
        # those that promise most, and the most promising first
        ranks = [space.rank(config, dtype, family, key) for config in found[1:]]
        every = [config for config in space._allowed(dtype, family, key) if config != found[0]]
        assert ranks == sorted(ranks) and ranks[:1] == sorted(space.rank(c, dtype, family, key) for c in every)[:1]
        for config in found[1:]:
            assert space.shared_bytes(config, dtype, family, key) < SHARED_MEMORY_LIMIT[family]
            assert set(config.constants) == set(found[0].constants)


def test_no_key_knows_a_row_count_or_a_context():
    assert {name: space.key for name, space in SPACES.items() if isinstance(space, BuiltInSpace)} == {
        "linear": ("N", "K"), "dual_view_attention": ("head_dim", "group"),
    }  # fmt: skip
    for op, key in KEYS:
        wrong = SPACES[op].problem_with_key("bf16", key | {"M": 32})
        assert "the key must hold" in wrong


def test_keys_of_qwen3_8b():
    problems = problems_of("qwen3-8b")
    assert [str(problem) for problem in problems] == [
        "linear:K=4096,N=151936", "linear:K=4096,N=24576", "linear:K=12288,N=4096", "linear:K=4096,N=6144",
        "linear:K=4096,N=4096", "dual_view_attention:group=4,head_dim=128",
    ]  # fmt: skip
    assert [problem.uses for problem in problems[:2]] == [("head",), ("gate_up",)]
    of_gelu = problems_of({**SHAPES["qwen3-8b"], "hidden_act": "gelu_pytorch_tanh"})  # behind it, nothing is fused
    assert [problem.uses for problem in of_gelu[:2]] == [("head",), ("product",)]
    assert {problem.dtype for problem in problems} == {"bf16"}


def test_a_model_that_sees_images_is_to_be_converted_first(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3", "text_config": {}}', encoding="utf-8")
    with pytest.raises(ValueError, match="sees images, too: name the folder that convert makes of it"):
        problems_of(tmp_path)


@interpreted
def test_keys_are_what_a_model_looks_up(tmp_path, monkeypatch):
    """A tiny model, full and of low rank, run with the Triton kernels: nothing is looked up that would not be tuned."""
    from orthrus_triton import ConsensusDecoder
    from orthrus_triton.autotune import store
    from orthrus_triton.testing import TinyDualViewModel

    config = {
        "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "intermediate_size": 96, "vocab_size": 61, "torch_dtype": "float32",
    }  # fmt: skip
    for rank in (None, 4):
        store.forget()
        (tmp_path / "config.json").write_text(json.dumps(config | {"view_rank": rank}))
        model = TinyDualViewModel(num_layers=1, block_size=4, view_rank=rank).eval()
        decoder = ConsensusDecoder(model, impl="triton", batch_invariant_prefill=True)
        decoder.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)
        asked = {problem for problem, _, _ in store.looked_up()}
        tuned = set(problems_of(tmp_path))
        # the gate/up weight goes through linear_swiglu, the head through lm_head_choice: the same keys
        assert asked and asked <= tuned, asked - tuned
        assert {p for p in tuned if p.op == "linear"} <= asked, tuned - asked


def test_a_model_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="qwen3-8b.*folder with a config.json"):
        problems_of("no-such-model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        problems_of(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": "many"}')
    with pytest.raises(ValueError, match="hidden_size must be an integer >= 1"):
        problems_of(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of bf16"):
        problems_of(SHAPES["qwen3-8b"] | {"dtype": "float8"})


def test_selection():
    problems = [*problems_of("qwen3-8b"), *problems_of("qwen3-4b"), Problem.of("linear", "bf16", N=4096, K=4096)]
    chosen = select(problems, ["dual_view_attention"])
    assert [str(problem) for problem in chosen] == ["dual_view_attention:group=4,head_dim=128"]
    with pytest.raises(ValueError, match="an op must be one of .*'conv'"):
        select(problems, ["conv"])
    with pytest.raises(ValueError, match="the key must hold N, K"):
        select([Problem.of("linear", "bf16", N=4)], None)


# --- fingerprints

KERNEL = '''def kernel(x_ptr, N):
    """What it does."""
    # why
    for n in range(0, N):
        x = tl.load(x_ptr + n)  # [1]
'''


def test_comments_docstrings_and_line_breaks_do_not_count():
    same = KERNEL.replace("What it does", "Said otherwise").replace("# why", "#").replace(
        "x_ptr + n)", "\n            x_ptr + n)"
    )  # fmt: skip
    assert _normalised(KERNEL) == _normalised(same)


@pytest.mark.parametrize(
    "old, new", [("x_ptr + n", "x_ptr + N"), ("range(0, N)", "range(1, N)"), ("        x =", "    x =")]
)
def test_code_counts(old: str, new: str):
    assert old in KERNEL and _normalised(KERNEL) != _normalised(KERNEL.replace(old, new))


def test_fingerprints_are_of_the_kernels():
    assert len(fingerprint_of_files("ops/linear.py")) == 16
    assert fingerprint_of_files("ops/linear.py") != fingerprint_of_files("ops/linear.py", "ops/lm_head.py")
    assert fingerprint_of_functions([planted.scale_kernel]) == planted.scale.space.source()
    assert fingerprint_of_functions([planted.scale_kernel]) != fingerprint_of_functions([planted.product_kernel])
    with pytest.raises(ValueError, match="must hold kernels"):
        fingerprint_of_files("autotune/config.py")


# --- the compile-time model


def test_the_estimate_knows_bandwidth_bytes_in_flight_and_idle_units():
    def seconds(programs: int, flight: int, shared: int = 32_768, **usage: int) -> float:
        return estimate("sm90", Work(2**28, 0, programs, flight), shared, **({"num_warps": 4} | usage))

    floor = 2**28 / 4.8e12
    assert floor < seconds(4096, 2**16) < 1.2 * floor
    assert seconds(4096, 2**10) > 2 * seconds(4096, 2**16)  # too little in flight
    assert seconds(16, 2**20) > 3 * seconds(4096, 2**16)  # too few units
    assert seconds(4096, 2**13, 200_000) > 1.5 * seconds(4096, 2**13, 20_000)  # one program a unit
    # or no more than two, for want of registers or of warps
    assert seconds(4096, 2**13, 20_000, registers=255) > 1.5 * seconds(4096, 2**13, 20_000, registers=64)
    assert seconds(4096, 2**13, 0, num_warps=32, registers=8) > 1.5 * seconds(4096, 2**13, 0, registers=8)


# --- choosing


def timer_of(first: dict[int, float], again: dict[int, float] | None = None, noise: float = 0.0):
    calls: list[list[int]] = []

    def timer(indices, closely):
        times = again if closely and again is not None else first
        calls.append(list(indices))
        return [Timed(i, {"a": times[i]}, {"a": noise}) for i in indices if i in times], {"a": 1000}

    return timer, calls


def test_near_winners_are_timed_again_and_the_second_look_decides():
    timer, calls = timer_of({0: 100.0, 1: 101.0, 2: 104.0, 3: 120.0}, {0: 110.0, 1: 100.0, 2: 104.0})
    choice = choose([0, 1, 2, 3], timer)
    assert calls == [[0, 1, 2, 3], [0, 1, 2]]
    assert (choice.winner.index, choice.timed, choice.behind) == (1, 4, 0.0)


def test_what_was_there_is_timed_again_however_it_fared_and_so_are_six_others():
    first = {n: 100.0 + n / 10 for n in range(9)} | {9: 130.0}  # the last one met a busy moment
    order = [8, 7, 6, 5, 4, 3, 2, 1, 0, 9]
    for previous, again in ((9, [5, 4, 3, 2, 1, 0, 9]), (7, [7, 5, 4, 3, 2, 1, 0]), (None, [5, 4, 3, 2, 1, 0])):
        timer, calls = timer_of(first, dict.fromkeys(first, 100.0))
        assert choose(order, timer, previous).winner.index == (5 if previous is None else previous)
        assert calls == [order, again]


def test_what_cannot_be_told_apart_is_decided_by_order_or_by_what_was_there():
    times = {0: 100.5, 1: 100.0, 2: 100.9}
    assert choose([0, 1, 2], timer_of(times)[0]).winner.index == 0
    assert choose([2, 1, 0], timer_of(times)[0]).winner.index == 2
    assert choose([0, 1, 2], timer_of(times)[0], previous=2).winner.index == 2
    # the spread widens what counts as equal, a real difference does not
    assert choose([0, 1], timer_of({0: 103.0, 1: 100.0})[0]).winner.index == 1
    assert choose([0, 1], timer_of({0: 103.0, 1: 100.0}, noise=0.04)[0]).winner.index == 0
    assert choose([0, 1], timer_of({0: 120.0, 1: 100.0})[0], previous=0).winner.index == 1


def test_a_long_load_does_not_outweigh_a_short_one():
    """And the larger spread of the two is what cannot be told apart."""
    nbytes = {"short": 1_000, "long": 100_000}

    def timer(indices, closely):
        seconds = {0: (1.0, 100.0), 1: (1.2, 95.0), 2: (1.03, 103.0)}
        spreads = {0: (0.0, 0.04), 1: (0.0, 0.0), 2: (0.0, 0.0)}
        return [Timed(i, dict(zip(nbytes, seconds[i])), dict(zip(nbytes, spreads[i]))) for i in indices], nbytes

    assert choose([1, 0], timer).winner.index == 0
    assert choose([2, 0], timer).winner.index == 2


def test_candidates_that_fail_while_they_are_timed_are_left_out():
    assert choose([0, 1], timer_of({})[0]) is None
    assert choose([0, 1], timer_of({1: 5.0})[0]).winner.index == 1
    assert choose([0, 1], timer_of({0: 4.0, 1: 5.0}, {})[0]) is None


# --- the journal


def test_the_journal_survives_a_torn_line(tmp_path):
    path = tmp_path / "x.journal.jsonl"
    journal = Journal(path)
    journal.put(["gate", {"b": 1, "a": 2}], {"problems": []})
    with path.open("a") as file:
        file.write('["abc", {"pro')
    journal = Journal(path)
    assert journal.get(["gate", {"a": 2, "b": 1}]) == {"problems": []} and len(journal) == 1
    journal.put("more", 1)
    assert Journal(path).get("more") == 1 and len(Journal(path)) == 2
    assert len(Journal(path, fresh=True)) == 0 and not path.exists()


# --- declaring an op


def declare(**changes: object):
    fields = {
        "kernels": [planted.scale_kernel], "space": {"BLOCK": (64,)}, "default": {"BLOCK": 64},
        "key": {"H": lambda x: x.shape[0]}, "inputs": lambda key, rows, randn: (randn(rows),), "reference": lambda x: x,
    }  # fmt: skip
    name = changes.pop("name", "declared")
    return tunable(name, **(fields | changes))(lambda x, config: x)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"default": {"BLOCK": 65}}, "default must choose"), ({"default": {}}, "default must choose"),
        ({"name": "not a name"}, "identifier"), ({"name": "linear"}, "is known already"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_named(changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        declare(**changes)
    assert "declared" not in SPACES


@interpreted
def test_an_op_knows_where_it_comes_from():
    assert planted.scale.home == "tests.autotune.planted"
    assert home_of(planted.scale._launch) == planted.scale.home
    x, weight = torch.randn(2, 100), torch.randn(100)
    explicit = planted.scale(x, weight, config=KernelConfig({"BLOCK": 64}, {"num_warps": 1}))
    assert torch.equal(explicit, x * weight)


@pytest.mark.parametrize("file", ["colorsys.py", "two.words.py"])
def test_a_file_does_not_hide_a_module_of_its_name(tmp_path, file: str):
    path, before = tmp_path / file, dict(sys.modules)
    path.write_text("def launch(): ...\n")
    load_file(path)
    try:
        (name,) = sys.modules.keys() - before.keys()  # dataclasses and Triton look a module up by its name
        assert hasattr(importlib.import_module("colorsys"), "rgb_to_hsv")
        assert home_of(sys.modules[name].launch) == str(path.resolve())  # what a worker loads
    finally:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]
