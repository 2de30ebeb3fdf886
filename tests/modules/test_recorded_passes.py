"""Passes that a CPU replays: the bits of those that it does not, whatever was changed since they were recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from orthrus_triton.modules import ConsensusDecoder, SharedKVCache, recorded_passes
from orthrus_triton.modules.decoder_layer import OrthrusDecoderLayer
from orthrus_triton.modules.rms_norm import RMSNorm
from orthrus_triton.ops.cpu import recording
from orthrus_triton.ops.cpu.kernels import c_library
from orthrus_triton.testing import TinyDualViewModel

pytestmark = pytest.mark.skipif(c_library() is None, reason="no C kernels here")
MODELS = {
    "plain": {},
    "norms and biases": {"qk_norm": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "low rank": {"view_rank": 3},
    "anchor": {"anchor_rows": 1, "view_rank": 2},
    "anchor and norms": {"anchor_rows": 1, "qk_norm": True},
    "window": {"window": 20},
    "anchor and window": {"anchor_rows": 1, "window": 20},
}


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> TinyDualViewModel:
    torch.manual_seed(seed)
    model = TinyDualViewModel(**options).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 2:
            parameter.normal_(std=0.15)
    return model


def replays(decoder: ConsensusDecoder) -> list:
    return [recorded for recorded in decoder.cache.recorded._passes.values() if recorded is not None]


def assert_same_text(decoder: ConsensusDecoder, prompts: list[torch.Tensor], tokens: int = 30) -> None:
    """By this decoder and by one that records nothing, to the bits of the cache."""
    model = decoder.model
    eager = ConsensusDecoder(model, mode=decoder.mode, block_size=decoder.block_size, cuda_graph=False)
    expected, got = (d.generate(prompts, max_new_tokens=tokens) for d in (eager, decoder))
    assert eager.cache.recorded is None
    for ours, theirs in zip(got.sequences, expected.sequences):
        assert torch.equal(ours, theirs)
    for b, sequence in enumerate(got.sequences):
        rows = sequence.numel() - 1
        for ours, theirs in zip(decoder.cache.layers, eager.cache.layers):
            assert torch.equal(ours.k[b, :, :rows], theirs.k[b, :, :rows])
            assert torch.equal(ours.v[b, :, :rows], theirs.v[b, :, :rows])


PROMPTS = [torch.arange(1, 12), torch.tensor([7]), torch.arange(30, 50)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["consensus", "ar"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_replay_has_the_bits_of_the_pass_itself(options: dict, mode: str, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype, **options)
    for prompts in (PROMPTS[:1], PROMPTS):
        decoder = ConsensusDecoder(model, mode=mode)
        assert_same_text(decoder, prompts)
        assert len(replays(decoder)) >= (1 if mode == "ar" else 2)


def test_a_replay_runs_no_module() -> None:
    model, calls = make_model(), []
    decoder = ConsensusDecoder(model, mode="ar")
    run = decoder.open(1, 100)
    run.admit(0, PROMPTS[0], 50)
    original = OrthrusDecoderLayer.forward
    try:
        OrthrusDecoderLayer.forward = lambda *arguments: calls.append(None) or original(*arguments)
        counts = []
        for _ in range(5):
            run.advance()
            counts.append(len(calls))
    finally:
        OrthrusDecoderLayer.forward = original
    assert counts == [2, 2, 2, 2, 2]  # recorded, then replayed


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


def negated(_module: nn.Module, arguments: tuple) -> tuple:
    return (-arguments[0], *arguments[1:])


def doubled_mlp(module: nn.Module, _arguments: tuple, result: object) -> object:
    return (result[0] * 2, *result[1:]) if type(module).__name__ == "SwiGLU" else result


@pytest.mark.parametrize("between", ["calls", "steps"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_after_the_recording_is_heeded(change: Callable, between: str) -> None:
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
                if (step == 8 and between == "steps") or (step == 0 and between == "calls"):
                    handle = change(model)
                run.advance()
        finally:
            torch.set_num_threads(threads)
            if hasattr(handle, "remove"):
                handle.remove()
        texts.append(run.slots[0].tokens)
    assert texts[0] == texts[1]


def test_int8_copies_for_drafts_are_read_once_they_are_there() -> None:
    model = make_model()
    decoder = ConsensusDecoder(model)
    decoder.generate(PROMPTS[:1], max_new_tokens=20)
    before = len(replays(decoder))
    for layer in model.layers:
        layer.self_attn.quantize_for_drafts()
        layer.mlp.quantize_for_drafts()
    decoder.generate(PROMPTS[:1], max_new_tokens=20)
    assert len(replays(decoder)) == before - 1  # the draft is no longer made of C kernels alone
    assert_same_text(decoder, PROMPTS[:1])


def test_other_peoples_modules_are_run_each_time() -> None:
    class Layer(OrthrusDecoderLayer):
        """Looks at its input on the host, which a recording would not see."""

        def forward(self, hidden, *arguments, **options):
            sign = 1.0 if float(hidden.numpy().sum()) > 0 else -1.0
            return super().forward(hidden * sign, *arguments, **options)

    model = make_model()
    model.layers[0] = Layer(48, 4, 2, 64, 96).requires_grad_(False)
    decoder = ConsensusDecoder(model)
    assert_same_text(decoder, PROMPTS[:1])
    assert not replays(decoder)


def test_slots_that_come_and_go_have_recordings_of_their_own() -> None:
    texts = []
    for graph in (False, None):
        decoder = ConsensusDecoder(make_model(), cuda_graph=graph)
        run = decoder.open(3, 200)
        for step in range(60):
            if step in (0, 5, 12):
                run.admit((0, 5, 12).index(step), PROMPTS[(0, 5, 12).index(step)], 40)
            if step == 9:
                run.release(0)
            run.advance()
        texts.append([slot.tokens for slot in run.slots])
    assert texts[0] == texts[1] and len(replays(decoder)) > 4


def test_recordings_are_of_one_cache_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_passes, "MOST", 5)
    decoder = ConsensusDecoder(make_model(block_size=8))
    decoder.generate(PROMPTS[:1], max_new_tokens=20)
    first = decoder.cache.recorded
    decoder.generate(PROMPTS, max_new_tokens=20)  # a larger batch has buffers of its own
    assert decoder.cache.recorded is not first
    for size in range(2, 9):
        decoder.generate(PROMPTS, max_new_tokens=20, block_size=size)
    assert len(decoder.cache.recorded._passes) == 5
    assert_same_text(decoder, PROMPTS)


def test_a_copy_of_a_decoder_or_a_cache_takes_no_recording_along() -> None:
    decoder = ConsensusDecoder(make_model())
    decoder.generate(PROMPTS[:1], max_new_tokens=20)
    assert not copy.deepcopy(decoder.cache).recorded._passes and replays(decoder)
    assert SharedKVCache(1, 1, 8, batch_size=1, max_len=8, block_size=2, dtype=torch.float32).recorded is None


def test_autograd_hears_of_keys_that_a_replay_writes_over() -> None:
    decoder = ConsensusDecoder(make_model(), mode="ar")
    run = decoder.open(1, 100)
    run.admit(0, PROMPTS[0], 50)
    for _ in range(4):
        run.advance()
    versions = [buffer._version for layer in decoder.cache.layers for buffer in layer[:2]]
    run.advance()
    assert all(buffer._version > v for buffer, v in zip((b for la in decoder.cache.layers for b in la[:2]), versions))


def test_memory_is_used_again_within_a_pass() -> None:
    decoder = ConsensusDecoder(make_model(num_layers=12))
    decoder.generate(PROMPTS[:1], max_new_tokens=20)
    seen = set()
    for recorded in replays(decoder):
        blocks = {block.data_ptr() for block in recorded._recording._blocks.values()}
        assert len(recorded._recording._blocks) > 80 and len(blocks) < 15
        seen |= blocks
    assert len(seen) < 20  # and by the next pass


def test_a_pass_that_needs_much_memory_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_BYTES", 20_000)
    decoder = ConsensusDecoder(make_model())
    assert_same_text(decoder, PROMPTS)
    assert not replays(decoder)


def test_recorder_is_left_when_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    decoder = ConsensusDecoder(model, mode="ar")
    run = decoder.open(1, 100)
    run.admit(0, PROMPTS[0], 50)

    def failing(*_arguments: object, **_options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(model.layers[1].mlp), "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            run.advance()
    assert recording.active_recorder() is None
    assert_same_text(decoder, PROMPTS[:1])
