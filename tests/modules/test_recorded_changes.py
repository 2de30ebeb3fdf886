"""What a user changes about a model is heeded by passes that a CPU replays: other memory, layers and threads at once,
everything else from the next run on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.decoder_layer import GatedMLP
from orthrus_triton.modules.rms_norm import RMSNorm
from orthrus_triton.ops.cpu.kernels import c_library
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.recorded_cases import PROMPTS, make_model, replays

pytestmark = pytest.mark.skipif(c_library() is None, reason="no C kernels here")


def write(weight: torch.Tensor) -> None:
    weight.mul_(1.5)


CHANGES: dict[str, Callable[[TinyDualViewModel], object]] = {
    "written": lambda model: write(model.layers[1].mlp.down_proj.weight),
    "written through data": lambda model: write(model.layers[1].mlp.down_proj.weight.data),
    "other memory": lambda model: setattr(
        model.layers[0].self_attn.o_proj.weight, "data", model.layers[0].self_attn.o_proj.weight * -1
    ),
    "another parameter": lambda model: setattr(
        model.layers[0].mlp.down_proj, "weight", nn.Parameter(model.layers[0].mlp.down_proj.weight * 2, False)
    ),
    "a bias more": lambda model: setattr(
        model.layers[0].self_attn.qkv_proj, "bias", nn.Parameter(torch.ones(8 * 64), False)
    ),
    "another module": lambda model: setattr(model.layers[1], "mlp", make_model(seed=3).layers[0].mlp),
    "another layer": lambda model: model.layers.__setitem__(0, make_model(seed=4).layers[1]),
    "another norm": lambda model: setattr(model, "norm", make_norm(2.0)),
    "another epsilon": lambda model: setattr(model.layers[0].input_layernorm, "eps", 0.5),
    "a window": lambda model: setattr(model.layers[0].self_attn, "window", 4),
    "a method": lambda model: setattr(model.layers[0].mlp, "forward", doubling(model.layers[0].mlp.forward)),
    "another method": lambda model: setattr(
        model.layers[0].mlp.down_proj, "add_and_norm", doubling(model.layers[0].mlp.down_proj.add_and_norm)
    ),
    "another class": lambda model: setattr(model.layers[0].mlp, "__class__", Doubling),
    "a hook": lambda model: model.layers[0].mlp.register_forward_hook(doubled),
    "a hook before": lambda model: model.layers[1].self_attn.register_forward_pre_hook(negated),
    "a hook for all": lambda model: nn.modules.module.register_module_forward_hook(doubled_mlp),
    "threads": lambda model: torch.set_num_threads(3),
}  # fmt: skip


def make_norm(scale: float) -> RMSNorm:
    norm = RMSNorm(48).requires_grad_(False)
    norm.weight.fill_(scale)
    return norm


def doubling(forward: Callable) -> Callable:
    return lambda *arguments, **options: doubled(None, arguments, forward(*arguments, **options))


def doubled(_module: nn.Module | None, _arguments: tuple, result: tuple) -> tuple:
    return (result[0] * 2, result[1])


class Doubling(GatedMLP):
    def forward(self, *arguments, **options):
        return doubled(None, arguments, super().forward(*arguments, **options))


def negated(_module: nn.Module, arguments: tuple) -> tuple:
    return (-arguments[0], *arguments[1:])


def doubled_mlp(module: nn.Module, _arguments: tuple, result: object) -> object:
    return (result[0] * 2, *result[1:]) if type(module).__name__ == "GatedMLP" else result


AT_ONCE = {
    "written", "written through data", "other memory", "another layer", "another norm", "a hook for all", "threads",
}  # fmt: skip


@pytest.mark.parametrize("at", [0, 8], ids=["before a run", "in a run"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_recording_is_heeded(change: str, at: int) -> None:
    threads = torch.get_num_threads()
    texts = []
    for graph in (False, None):
        model = make_model()
        decoder = ConsensusDecoder(model, cuda_graph=graph)
        decoder.generate(PROMPTS[:1], max_new_tokens=20)
        run = decoder.open(1, 100)
        run.admit(0, PROMPTS[0], 60)
        handle = None
        try:
            for step in range(16):
                if step == at:
                    handle = CHANGES[change](model)
                run.advance()
            later = decoder.generate(PROMPTS[:1], max_new_tokens=20).sequences[0].tolist()
        finally:
            torch.set_num_threads(threads)
            if hasattr(handle, "remove"):
                handle.remove()
        texts.append((later, run.slots[0].tokens if at == 0 or change in AT_ONCE else None))
    assert texts[0] == texts[1]


def raising(forward: Callable) -> Callable:
    return lambda *arguments, **options: raised(None, arguments, forward(*arguments, **options))


def raised(_module: nn.Module | None, _arguments: tuple, result: tuple) -> tuple:
    return (result[0] + 1, result[1])


@pytest.mark.parametrize("how", ["a hook", "a method", "a tensor"])
def test_what_was_changed_before_the_recording_may_change_again(how: str) -> None:
    texts, recorded = [], []
    for graph in (False, None):
        model = make_model()
        mlp, projection = model.layers[0].mlp, model.layers[0].self_attn.o_proj
        if how == "a hook":
            handle = mlp.register_forward_hook(raised)
        elif how == "a method":
            mlp.forward = raising(mlp.forward)
        else:
            weight = projection.weight.detach()
            del projection.weight
            projection.weight = weight
        decoder = ConsensusDecoder(model, cuda_graph=graph)
        run = decoder.open(1, 100)
        run.admit(0, PROMPTS[0], 60)
        for step in range(24):
            if step == 6:
                run = decoder.open(1, 100)
                run.admit(0, PROMPTS[0], 60)
                recorded.append(graph is None and len(replays(decoder)))
                if how == "a hook":
                    handle.remove()
                elif how == "a method":
                    del mlp.forward
                else:
                    projection.weight = projection.weight * -1
            run.advance()
        texts.append(run.slots[0].tokens)
    assert texts[0] == texts[1] and len(replays(decoder)) == 2
    assert recorded == [False, 2 if how == "a tensor" else 0]


def test_weights_that_are_cast_leave_no_memory_behind() -> None:
    model = make_model()
    decoder = ConsensusDecoder(model)
    decoder.generate(PROMPTS[:1], max_new_tokens=20)
    assert replays(decoder)
    before = [StorageWeakRef(parameter.untyped_storage()) for parameter in model.layers.parameters()]
    model.to(torch.bfloat16)
    assert all(storage.expired() for storage in before)


def test_a_weight_that_is_turned_is_refused_as_it_is_without_a_recording() -> None:
    model = make_model(hidden_size=256)
    decoder = ConsensusDecoder(model, mode="ar")
    run = decoder.open(1, 100)
    run.admit(0, PROMPTS[0], 50)
    run.advance()
    assert replays(decoder)
    weight = model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data.t()
    run = decoder.open(1, 100)
    with pytest.raises(ValueError, match="contiguous"):
        run.admit(0, PROMPTS[0], 50)
        run.advance()
