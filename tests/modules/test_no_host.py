"""No host in the loop, shown without a GPU: a cycle over tensors that have a place and no values.
Whatever reads a value on the host, or brings in a tensor from there, stops it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.library_products import LibraryProducts
from orthrus_triton._triton import is_interpreted
from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder, DecodeRun, SamplingParams
from orthrus_triton.modules.sampling_params import Choosing
from tests.models.tiny_bases import base_config, build_base

DEVICE = "meta"  # like a GPU it is not the host; unlike one it is everywhere, and holds nothing that could be read


class OnlyThere(TorchDispatchMode):
    """Counts operations, looks into the library's own, and refuses tensors of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        self.seen[name] += 1
        if name in OPDEFS and name.startswith("orthrus_triton::"):
            with self:  # what it launches from, not what it tells the compiler
                return OPDEFS[name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        elsewhere = {str(leaf.device) for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        if elsewhere - {DEVICE}:
            raise AssertionError(f"{func} touches {elsewhere}")
        return out


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that would run; none does."""
    if not is_interpreted():
        pytest.skip("stands in for Triton's interpreter, which is off where there is a GPU: tests with real ones run")
    from triton.runtime.interpreter import InterpretedFunction

    names: set[str] = set()

    def note(kernel, _grid):
        return lambda *arguments, **options: names.add(kernel.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", note)
    return names


def open_run(
    choosing: Choosing, mode: str = "consensus", batch_size: int = 3, decoder_type: type = ConsensusDecoder, **options
) -> DecodeRun:  # fmt: skip
    base = build_base(base_config("qwen3", eos_token_id=None, head_dim=64), torch.bfloat16)
    model = OrthrusForCausalLM.from_base(base, block_size=5, **options).to(DEVICE)
    return decoder_type(model, impl="triton", mode=mode).open(batch_size, 64, choosing=choosing)


def one_cycle(run: DecodeRun, block_size: int) -> Counter:
    with torch.no_grad(), OnlyThere() as watch:
        run._decoder.run_cycle(run.cache, run.state, block_size, "triton")
        run.state.write_report()
    return watch.seen


CHOOSING = {
    "greedy": Choosing(),
    "coupled": Choosing(sampled=True),
    "rejection": Choosing(sampled=True, rejection=True),
    "processed": Choosing(sampled=True, processed=True),
    "processed, by rejection": Choosing(sampled=True, rejection=True, processed=True),
}
MODELS = {
    "paper": {},
    "frozen anchor": {"anchor_view": "ar"},
    "chain": {"chain_width": 16},
    "frozen anchor and chain": {"anchor_view": "ar", "chain_width": 16},
    "low rank": {"view_rank": 4},
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("choosing", CHOOSING)
@pytest.mark.parametrize("model", MODELS)
def test_a_cycle_never_asks_the_host(model: str, choosing: str, batch_size: int, launched: set[str]) -> None:
    seen = one_cycle(open_run(CHOOSING[choosing], batch_size=batch_size, **MODELS[model]), 5)
    assert seen["orthrus_triton::dual_view_attention"] == 4  # both passes over both layers
    assert {"dual_view_attention_kernel", "linear_kernel", "consensus_kernel"} <= launched


@pytest.mark.parametrize("choosing", ["greedy", "coupled", "processed"])
def test_a_pass_of_ar_never_asks_the_host(choosing: str) -> None:
    assert one_cycle(open_run(CHOOSING[choosing], "ar"), 1)["orthrus_triton::dual_view_attention"] == 2


@pytest.mark.parametrize(("mode", "block_size"), [("consensus", 5), ("ar", 1)])
def test_a_cycle_with_the_librarys_products_never_asks_the_host(
    mode: str, block_size: int, launched: set[str]
) -> None:  # fmt: skip
    """So it can be captured, and what exactness costs is measured between two graphs."""
    seen = one_cycle(open_run(Choosing(), mode, decoder_type=LibraryProducts), block_size)
    assert seen["orthrus_triton::dual_view_attention"] == (4 if mode == "consensus" else 2)
    assert "dual_view_attention_kernel" in launched and not launched & {"linear_kernel", "lm_head_kernel"}


def watch_copies(run: DecodeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `contiguous` raises where it would copy what outlives a cycle; intermediate results it may."""
    state, sampling = run.state, run.state.sampling
    lasting = [*run._decoder.model.parameters(), *run._decoder.model.buffers(), run.cache.context_len]
    lasting += [run.cache.prompt_len, *(side for layer in run.cache.layers for side in (layer.k, layer.v))]
    lasting += [value for name, value in vars(state).items() if isinstance(value, torch.Tensor) and name != "block"]
    if sampling is not None:
        lasting += [*sampling.sampling, *(sampling.processors or ())]
    storages = {tensor.untyped_storage()._cdata for tensor in lasting}
    contiguous = torch.Tensor.contiguous

    def without_copy(tensor: torch.Tensor, *arguments, **options) -> torch.Tensor:
        if not tensor.is_contiguous() and tensor.untyped_storage()._cdata in storages:
            raise AssertionError(f"copies {tuple(tensor.shape)} with strides {tensor.stride()}")
        return contiguous(tensor, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "contiguous", without_copy)


@pytest.mark.parametrize("mode", ["consensus", "ar"])
@pytest.mark.parametrize("choosing", CHOOSING)
@pytest.mark.parametrize("model", MODELS)
def test_a_cycle_copies_no_weight_and_no_state(
    model: str, choosing: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """What wrappers lay out anew for other callers, the library passes as it must lie."""
    run = open_run(CHOOSING[choosing], mode, **MODELS[model])
    watch_copies(run, monkeypatch)
    one_cycle(run, 5 if mode == "consensus" else 1)


def test_a_planted_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(CHOOSING["coupled"])
    how = run.state.sampling.sampling
    run.state.sampling.sampling = how._replace(top_p=torch.stack((how.top_p, how.top_p), dim=-1)[:, 0])
    watch_copies(run, monkeypatch)
    with pytest.raises(AssertionError, match="copies \\(3,\\) with strides \\(2,\\)"):
        one_cycle(run, 5)


def plant(monkeypatch: pytest.MonkeyPatch, read) -> DecodeRun:
    run = open_run(Choosing())
    commit = run.state.commit
    monkeypatch.setattr(run.state, "commit", lambda *arguments: (read(run), commit(*arguments)))
    return run


PLANTED = {
    "a length is read": lambda run: int(run.cache.context_len[0]),
    "rows are counted": lambda run: run.state.finished.nonzero(),
    "something is decided": lambda run: bool(run.state.finished.all()),
    "a number is copied there": lambda run: run.cache.context_len + torch.tensor([1, 2, 3]).to(DEVICE),
    "values are waited for": lambda run: run.state.report.cpu(),
}


@pytest.mark.parametrize("how", PLANTED)
def test_a_planted_look_is_found(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        one_cycle(plant(monkeypatch, PLANTED[how]), 5)


def test_parameters_of_a_sequence_are_written_before_its_cycles() -> None:
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=3, repetition_penalty=1.2, logit_bias={4: 1.0})
    run = open_run(Choosing.of([params]))
    run.state.sampling.start(params, torch.arange(5))
    one_cycle(run, 5)
