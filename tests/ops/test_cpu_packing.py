"""Weights laid out for oneDNN: the same bits, never a stale copy, none of what does not stay, and a bound on memory."""

from __future__ import annotations

import gc

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.ops import _cpu_packing
from orthrus_triton.ops._cpu_packing import forget_changed, has_onednn, packed_weight

pytestmark = [
    pytest.mark.skipif(not has_onednn(torch.float32), reason="this torch has no oneDNN"),
    pytest.mark.usefixtures("with_and_without_c"),  # with them, products of few rows take no packed weight
]
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if has_onednn(dtype)]


def parameter(dtype: torch.dtype = torch.float32, N: int = 48, K: int = 64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(N, K).to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 24, 300])
@torch.no_grad()
def test_packed_weights_have_the_bits_of_plain_ones(dtype, rows):
    x, weight, bias = torch.randn(rows, 64).to(dtype), parameter(dtype), torch.randn(48).to(dtype)
    assert packed_weight(weight) is not None and packed_weight(weight.detach()) is None
    packed = ops.linear(x, weight, bias, impl="torch")
    assert torch.equal(packed, ops.linear(x, weight.detach(), bias, impl="torch"))


@torch.no_grad()
def test_a_changed_parameter_is_packed_again():
    x, weight = torch.eye(64)[:5], parameter()

    def agrees() -> bool:
        return torch.equal(ops.linear(x, weight, impl="torch"), weight.T[:5])

    assert agrees()
    weight.mul_(2)
    assert agrees()
    weight.data = torch.randn(48, 64)
    assert agrees()
    for rows in (slice(48), slice(20, 22), slice(47, 48)):
        # leaves no trace in the version: until then the old weight may be used
        weight.data[rows].copy_(torch.randn(48, 64)[rows])
        forget_changed()
        assert agrees()


KINDS = {
    "transposed": lambda weight: weight.T,
    "bf16": lambda weight: weight.bfloat16(),
    "on a GPU": pytest.param(lambda weight: weight.cuda(), marks=pytest.mark.gpu),
}


@pytest.mark.parametrize("become", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_weight_that_became_another_kind_of_tensor_is_forgotten(become):
    """And does not fail the next run of whatever model."""
    weight = parameter(N=64)
    assert packed_weight(weight) is not None
    weight.data = become(weight.data)
    forget_changed()
    assert id(weight) not in _cpu_packing._packed


@torch.no_grad()
def test_a_decoder_notices_weights_that_changed_behind_its_back():
    from orthrus_triton.modules import ConsensusDecoder
    from tests.modules.test_consensus_decoder import make_model, prompts_of

    model, prompt = make_model(), prompts_of(3, [6])
    ConsensusDecoder(model, impl="torch").generate(prompt, max_new_tokens=3)
    for weight in model.parameters():
        weight.data.copy_(torch.randn_like(weight) * weight.std())
    changed = ConsensusDecoder(model, impl="torch").generate(prompt, max_new_tokens=12)
    _cpu_packing._packed.clear()
    afresh = ConsensusDecoder(model, impl="torch").generate(prompt, max_new_tokens=12)
    assert torch.equal(changed.sequences[0], afresh.sequences[0])


def test_packed_weights_go_with_their_parameters_and_are_bounded(monkeypatch):
    _cpu_packing._packed.clear()
    weight = parameter()
    assert packed_weight(weight) is packed_weight(weight) and len(_cpu_packing._packed) == 1
    room = int(1.5 * weight.nbytes / _cpu_packing.MEMORY_SHARE)
    monkeypatch.setattr(_cpu_packing, "_memory_bytes", lambda: room)
    assert packed_weight(parameter()) is None  # no room for a second one
    del weight
    gc.collect()
    assert len(_cpu_packing._packed) == 0 and packed_weight(parameter()) is not None


def test_a_weight_that_changes_while_it_is_packed_is_packed_again(monkeypatch):
    weight, pack = parameter(), _cpu_packing.pack

    def pack_and_change(weight: torch.Tensor) -> torch.Tensor:
        packed = pack(weight)
        with torch.no_grad():
            weight.mul_(2)
        return packed

    with monkeypatch.context() as patch:
        patch.setattr(_cpu_packing, "pack", pack_and_change)
        early = packed_weight(weight)
    late = packed_weight(weight)
    assert late is not early
    assert torch.equal(ops.linear(torch.eye(64), weight, impl="torch"), weight.detach().T)


def test_garbage_may_be_collected_at_any_time():
    """A collection, which Python may start wherever something is allocated, forgets the weights it collects."""
    kept = [parameter() for _ in range(8)]
    thresholds = gc.get_threshold()
    try:
        for later in range(1, 20):
            gc.disable()
            for weight in kept:
                packed_weight(weight)
            pairs = [(later, n) for n in range(3000)]  # more than Python has in store: the next ones are allocated
            cycle: list = [parameter()]
            packed_weight(cycle[0])
            cycle.append(cycle)
            del cycle
            gc.set_threshold(gc.get_count()[0] + later)
            gc.enable()
            forget_changed()
            del pairs
    finally:
        gc.enable()
        gc.set_threshold(*thresholds)


def test_inference_parameters_are_not_packed():
    with torch.inference_mode():
        weight = parameter()
        x = torch.randn(3, 64)
        assert packed_weight(weight) is None
        assert torch.allclose(ops.linear(x, weight, impl="torch"), x @ weight.T, atol=1e-5)
