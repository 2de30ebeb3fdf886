"""What one cycle really runs: nothing multiplies matrices or reduces but the library's own kernels.
An allowlist: an operation nobody thought of fails until someone shows that it cannot move a bit."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

import pytest
import torch
from torch.autograd import DeviceType

from orthrus_triton import ops
from orthrus_triton.modules import ConsensusDecoder, decoder_layer
from tests.modules.test_consensus_decoder import make_model, prompts_of

VIEWS = (
    "alias", "as_strided", "expand", "expand_as", "flatten", "narrow", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "transpose", "unfold", "unsqueeze", "view",
)  # fmt: skip
MEMORY = (
    "_to_copy", "clone", "contiguous", "copy_", "empty", "empty_like", "empty_strided", "fill_", "new_empty", "resize_",
    "set_", "to", "zero_",
)  # fmt: skip
# one result from one place: no order of summation to choose
ELEMENTWISE = ("add", "arange", "clamp", "cos", "mul", "sin", "sub", "where")
GATHERS = ("cat", "embedding", "gather", "index_select", "repeat")
ALLOWED_OPS = {f"aten::{name}" for name in (*VIEWS, *MEMORY, *ELEMENTWISE, *GATHERS)}

ALLOWED_KERNELS = re.compile(r"elementwise_kernel|gather|index_?select|CatArray|Memcpy|Memset|arange", re.IGNORECASE)
FORBIDDEN_KERNELS = re.compile(
    r"reduce|gemm|gemv|dot_kernel|softmax|scan|sort|radix|nvjet|cutlass|xmma|split_?k|cublas|cudnn|flash|fmha",
    re.IGNORECASE,
)


def own_kernels() -> set[str]:
    """Names of every Triton kernel of the library."""
    found = pkgutil.walk_packages(ops.__path__, "orthrus_triton.ops.")
    modules = [importlib.import_module(info.name) for info in found]
    return {
        name for module in modules for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn")
    }  # fmt: skip


def foreign_ops(decoder: ConsensusDecoder, prompt_len: int = 5) -> set[str]:
    """Operations of one cycle that are neither the library's nor allowed. The profiler looks into the library's ops
    too: what they leave to torch counts."""
    run = decoder.open(1, 64)
    run.admit(0, prompts_of(1, [prompt_len])[0], 30)
    with torch.profiler.profile() as profile:
        assert run.step()
    seen = {event.key for event in profile.key_averages()}
    assert "orthrus_triton::dual_view_attention" in seen and "orthrus_triton::consensus_" in seen, seen
    return {name for name in seen if name.startswith(("aten::", "mkldnn::"))} - ALLOWED_OPS


def make_decoder(mode: str = "consensus", **options) -> ConsensusDecoder:
    return ConsensusDecoder(make_model(qk_norm=True, num_layers=1), mode=mode, impl="triton", block_size=4, **options)


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_a_cycle_leaves_nothing_to_torch(mode: str) -> None:
    assert foreign_ops(make_decoder(mode)) == set()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """Ways to put a foreign reduction or product into the cycle."""

    def argmax_in_the_choice() -> None:
        def choose(self, hidden, state, view_pass, candidate=None):
            return self.model.compute_logits(hidden, view_pass.linear_impl).argmax(dim=-1)

        monkeypatch.setattr(ConsensusDecoder, "choose", choose)

    def mean_inside_an_op() -> None:
        def launch(x, residual, weight, eps, norm_offset):
            h = x if residual is None else x + residual
            return h * (h.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight, h

        module = importlib.import_module("orthrus_triton.ops.rms_norm")  # ops.rms_norm is the function
        monkeypatch.setattr(module, "launch_rms_norm", launch)

    def library_product_in_the_mlp() -> None:
        forward = decoder_layer.GatedMLP.forward
        monkeypatch.setattr(
            decoder_layer.GatedMLP, "forward",
            lambda self, *arguments, **options: forward(self, *arguments, **options | {"linear_impl": "library"}),
        )  # fmt: skip

    yield {
        "argmax": argmax_in_the_choice, "mean": mean_inside_an_op, "linear": library_product_in_the_mlp,
    }  # fmt: skip


@pytest.mark.usefixtures("without_c")  # of few rows, a CPU's fastest product would be ours
@pytest.mark.parametrize("planted", ["argmax", "mean", "linear"])
def test_a_planted_reduction_is_found(planted: str, plant: dict) -> None:
    plant[planted]()
    found = foreign_ops(make_decoder())
    assert {f"aten::{planted}", f"mkldnn::_{planted}_pointwise"} & found, found


def foreign_kernels(decoder: ConsensusDecoder) -> tuple[set[str], set[str]]:
    """(foreign kernels, own kernels) that one eager cycle ran on the GPU."""
    own = own_kernels()
    run = decoder.open(2, 600)
    for b, prompt in enumerate(prompts_of(1, [300, 20])):
        run.admit(b, prompt, 100)
    assert run.step()  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        assert run.step()
        torch.cuda.synchronize()
    names = {event.name for event in profile.events() if event.device_type == DeviceType.CUDA}
    foreign = {
        name for name in names - own if FORBIDDEN_KERNELS.search(name) or not ALLOWED_KERNELS.search(name)
    }  # fmt: skip
    return foreign, names & own


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["consensus", "ar"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_a_cycle_runs_our_kernels_only(dtype: torch.dtype, mode: str) -> None:
    model = make_model(dtype, qk_norm=True, hidden_size=256, intermediate_size=512, block_size=16)
    foreign, own = foreign_kernels(ConsensusDecoder(model, mode=mode, cuda_graph=False))
    assert not foreign, foreign
    assert {"dual_view_attention_kernel", "linear_kernel", "consensus_kernel"} <= own


@pytest.mark.gpu
@pytest.mark.parametrize("planted", ["argmax", "mean", "linear"])
def test_gpu_a_planted_reduction_is_found(planted: str, plant: dict) -> None:
    plant[planted]()
    model = make_model(torch.bfloat16, qk_norm=True, hidden_size=256, intermediate_size=512, block_size=16)
    assert foreign_kernels(ConsensusDecoder(model, cuda_graph=False))[0]
