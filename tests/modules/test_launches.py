"""How many kernels a cycle launches: docs/cycle.md says why each is there, and this that there is no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from orthrus_triton._triton import is_interpreted
from orthrus_triton.autotune.defaults import RULES
from orthrus_triton.autotune.store import forget
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.testing import TinyDualViewModel

VOCAB = 61  # of the tiny model
TILES = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
# torch's own work on a device; views, allocations and metadata are free
TORCH_KERNELS = {
    "aten::add", "aten::arange", "aten::cat", "aten::clamp", "aten::copy_", "aten::cos", "aten::embedding",
    "aten::fill_", "aten::gather", "aten::mul", "aten::sin", "aten::where", "aten::mm", "aten::addmm", "aten::bmm",
    "aten::sum", "aten::max", "aten::argmax", "aten::pow", "aten::masked_fill_", "aten::scatter_",
}  # fmt: skip


@pytest.fixture
def triton_launches(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Kernels are counted by name and not run."""
    if not is_interpreted():
        pytest.skip("counts in Triton's interpreter, which is off where there is a GPU")
    from triton.runtime.interpreter import InterpretedFunction

    launches: Counter = Counter()

    def count(kernel, _grid):
        def launch(*arguments, **_options):
            launches[kernel.fn.__name__] += 1
            if kernel.fn.__name__ == "best_tile_kernel":
                arguments[2].zero_()  # ids go on to be looked up

        return launch

    monkeypatch.setattr(InterpretedFunction, "__getitem__", count)
    # what the tests' conftest adds to every allocation
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return launches


def cycle_launches(launches: Counter, num_layers: int, block_size: int, **model: object) -> tuple[Counter, Counter]:
    """(Triton kernels, torch kernels) of one cycle over a batch of two."""
    decoder = ConsensusDecoder(TinyDualViewModel(num_layers=num_layers, **{"qk_norm": True, **model}), impl="triton")
    run = decoder.open(2, 64)
    launches.clear()
    with torch.no_grad(), torch.profiler.profile() as profile:
        decoder.run_cycle(run.cache, run.state, block_size, "triton")
    torch_kernels = Counter({event.key: event.count for event in profile.key_averages() if event.key in TORCH_KERNELS})
    return Counter(launches), torch_kernels


@pytest.fixture(params=[1, 2])
def split_k(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Into how many parts all products are split but that of the head."""

    def rule(*_: object, N: int, K: int) -> tuple[dict[str, int], dict[str, int]]:
        return {**TILES, "SPLIT_K": 1 if N == VOCAB else request.param}, {"num_warps": 4}

    monkeypatch.setitem(RULES, "linear", rule)
    forget()
    yield request.param
    forget()


@pytest.mark.parametrize(("block_size", "passes"), [(8, 2), (1, 1)])
def test_a_layer_launches_what_the_table_lists(
    triton_launches: Counter, split_k: int, block_size: int, passes: int
) -> None:
    """However the products are split: whatever comes after one takes its splits."""
    one, torch_one = cycle_launches(triton_launches, 1, block_size)
    three, torch_three = cycle_launches(triton_launches, 3, block_size)
    assert torch_one == torch_three  # a layer runs no torch kernel: no copy, no reshape, no addition
    layer = {name: (three[name] - one[name]) / 2 / passes for name in three}
    combines = layer.pop("combine_splits_kernel")  # attention's alone
    gate_up = {"linear_swiglu_kernel": 1} if split_k == 1 else {"combine_swiglu_kernel": 1}
    assert {name: count for name, count in layer.items() if count} == {
        "linear_kernel": 3 if split_k == 1 else 4, "combine_norm_kernel": 2, "rope_cache_kernel": 1, **gate_up,
        "dual_view_attention_kernel": 1,
    }  # fmt: skip
    assert combines == 1


@pytest.mark.parametrize(
    ("options", "norms", "in_all"),
    [
        ({"norms": "both"}, {"add_normed_kernel": 2}, (9, 12)),
        ({"norms": "behind"}, {"add_normed_kernel": 2}, (9, 12)),
        ({"norms": "both", "norm_offset": 1.0, "activation": "gelu_pytorch_tanh"}, {"add_normed_kernel": 2}, (10, 13)),
        ({"qk_norm": "whole"}, {"norm_spans_kernel": 1, "combine_norm_kernel": 2}, (10, 12)),
        ({"norms": "behind", "qk_norm": "whole"}, {"add_normed_kernel": 2, "norm_spans_kernel": 1}, (10, 14)),
    ],
)
def test_a_layer_with_norms_elsewhere_launches_what_the_text_says(
    triton_launches: Counter, split_k: int, options: dict, norms: dict[str, int], in_all: tuple[int, int]
) -> None:
    """And nothing of torch's."""
    (one, torch_one), (three, torch_three) = (
        cycle_launches(triton_launches, layers, 8, **options) for layers in (1, 3)
    )
    assert torch_one == torch_three
    layer = {name: (three[name] - one[name]) / 4 for name in three}
    assert {name: count for name, count in layer.items() if "norm" in name and count} == norms
    assert sum(layer.values()) == in_all[split_k - 1]


@pytest.mark.parametrize(
    ("options", "more_kernels", "copies"),
    [
        ({}, {"linear_kernel": 2, "rope_cache_kernel": 1, "combine_norm_kernel": 1}, 3),
        (
            {"norms": "behind", "qk_norm": "whole"},
            {"linear_kernel": 2, "rope_cache_kernel": 1, "norm_spans_kernel": 1},
            2,
        ),
    ],
)
def test_an_anchor_of_its_own_costs_what_the_text_says(
    triton_launches: Counter, options: dict, more_kernels: dict[str, int], copies: int
) -> None:
    """More than a layer of the paper's cycle launches, where the frozen view reads the anchor."""
    layers = []
    for anchor_rows in (0, 1):
        one, three = (
            cycle_launches(triton_launches, layers, 8, anchor_rows=anchor_rows, **options) for layers in (1, 3)
        )
        layers.append([Counter({name: (b[name] - a[name]) // 2 for name in b}) for a, b in zip(one, three)])
    (plain, plain_torch), (own, own_torch) = layers
    more = own - plain
    more.pop("combine_splits_kernel", None)
    assert more == more_kernels
    assert own_torch - plain_torch == {"aten::cat": copies}  # in a batch, too


@pytest.mark.parametrize(("block_size", "anchor_rows", "passes", "most"), [(8, 0, 2, 34), (8, 1, 2, 55), (1, 0, 1, 12)])
def test_around_the_layers(triton_launches: Counter, block_size: int, anchor_rows: int, passes: int, most: int) -> None:
    kernels, torch_kernels = cycle_launches(triton_launches, 1, block_size, anchor_rows=anchor_rows)
    three, _ = cycle_launches(triton_launches, 3, block_size, anchor_rows=anchor_rows)
    around = {name: count - (three[name] - count) // 2 for name, count in kernels.items()}
    commits = 1 + anchor_rows
    assert {name: count for name, count in around.items() if count} == {
        "rms_norm_kernel": passes, "lm_head_kernel": passes, "best_tile_kernel": passes, "void_rows_kernel": commits,
        "consensus_kernel": commits,
    }  # fmt: skip
    assert torch_kernels["aten::embedding"] == torch_kernels["aten::cos"] == torch_kernels["aten::sin"] == passes
    assert sum(torch_kernels.values()) <= most, torch_kernels
