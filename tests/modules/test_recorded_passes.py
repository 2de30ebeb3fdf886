"""Passes that a CPU replays: the bits of those that it does not."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from orthrus_triton.modules import ConsensusDecoder, SharedKVCache, recorded_passes
from orthrus_triton.modules.decoder_layer import OrthrusDecoderLayer
from orthrus_triton.modules.projection import Linear
from orthrus_triton.ops.cpu import recording
from orthrus_triton.ops.cpu.kernels import c_library, has_product
from tests.modules.recorded_cases import PROMPTS, make_model, replays

pytestmark = pytest.mark.skipif(c_library() is None, reason="no C kernels here")
MODELS = {
    "plain": {},
    "norms and biases": {"qk_norm": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "norms behind": {"norms": "behind", "qk_norm": "whole", "scale": 0.2},
    "norms on both sides": {
        "norms": "both", "norm_offset": 1.0, "activation": "gelu_pytorch_tanh", "view_rank": 3, "anchor_rows": 1,
    },
    "low rank": {"view_rank": 3},
    "anchor": {"anchor_rows": 1, "view_rank": 2},
    "anchor and norms": {"anchor_rows": 1, "qk_norm": True},
    "window": {"window": 20},
    "anchor and window": {"anchor_rows": 1, "window": 20},
}  # fmt: skip


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["consensus", "ar"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_replay_has_the_bits_of_the_pass_itself(options: dict, mode: str, dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype, **options)
    has_ours = dtype == torch.float32 or has_product(torch.empty(0, dtype=dtype))  # not on CPUs with AMX
    for prompts in (PROMPTS[:1], PROMPTS):
        decoder = ConsensusDecoder(model, mode=mode)
        assert_same_text(decoder, prompts, tokens=18)
        assert len(replays(decoder)) >= (1 if mode == "ar" else 2) * has_ours


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


def test_a_run_looks_once_at_what_may_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, outline = [], recorded_passes._Snapshot._new_outline
    monkeypatch.setattr(
        recorded_passes._Snapshot, "_new_outline", lambda snapshot: looks.append(None) or outline(snapshot)
    )
    decoder = ConsensusDecoder(make_model(), mode="ar")
    for run in (1, 2, 3):
        decoder.generate(PROMPTS[:1], max_new_tokens=20)
        assert len(looks) == run


def test_memory_is_the_cpus_whatever_the_default_device() -> None:
    decoder = ConsensusDecoder(make_model(), mode="ar")
    run = decoder.open(1, 100)
    run.admit(0, PROMPTS[0], 50)
    with torch.device("meta"):
        run.advance()
        (recorded,) = replays(decoder)
    assert {block.device.type for block in recorded._recording._blocks.values()} == {"cpu"}


def test_int8_copies_for_drafts_are_read_once_they_are_there() -> None:
    model = make_model()
    decoder = ConsensusDecoder(model)
    decoder.generate(PROMPTS[:1], max_new_tokens=20)
    copies = []
    for layer in model.layers:
        layer.self_attn.quantize_for_drafts()
        layer.mlp.quantize_for_drafts()
        copies += [layer.self_attn.qkv_proj_diff.draft_weight, layer.mlp.down_proj.draft_weight]
    decoder.generate(PROMPTS[:1], max_new_tokens=20)
    draft, verify = replays(decoder)
    assert [[recorded._recording.reads(copy) for copy in copies] for recorded in (draft, verify)] == [
        [True] * len(copies), [False] * len(copies),
    ]  # fmt: skip
    assert_same_text(decoder, PROMPTS[:1])


def test_weights_in_int8_are_replayed_too() -> None:
    model = make_model()
    decoder = ConsensusDecoder(model)
    (before,) = decoder.generate(PROMPTS[:1], max_new_tokens=40).sequences
    for module in model.layers.modules():
        if isinstance(module, Linear):
            module.quantize()
    (after,) = decoder.generate(PROMPTS[:1], max_new_tokens=40).sequences
    assert len(replays(decoder)) == 2 and before.tolist() != after.tolist()
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


def test_recordings_that_were_used_lately_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_passes, "MOST", 4)
    decoder = ConsensusDecoder(make_model(block_size=8))
    kept = []
    for size in (2, 3, 2, 4):  # each a pass that drafts and one that verifies
        decoder.generate(PROMPTS[:1], max_new_tokens=20, block_size=size)
        kept.append(set(decoder.cache.recorded._passes))
    assert len(kept[0]) == 2 and len(kept[3]) == 4 and kept[0] < kept[3]


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


def test_threads_that_recorded_at_the_same_time_leave_the_compiler_as_it_was() -> None:
    recorders = [recording.Recorder() for _ in range(2)]
    threads = [ThreadPoolExecutor(1) for _ in range(2)]
    for step in ("__enter__", "__exit__"):  # left in the order in which they were entered
        for thread, recorder in zip(threads, recorders):
            arguments = (None, None, None) if step == "__exit__" else ()
            thread.submit(getattr(recorder, step), *arguments).result()
    for thread in threads:
        thread.shutdown()
    assert not is_in_torch_dispatch_mode()  # where torch.compile refuses to run


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
    assert recording.active_recorder() is None and not decoder.cache.recorded._passes
    assert_same_text(decoder, PROMPTS[:1])


def test_kernels_that_an_op_of_torch_calls_are_no_steps() -> None:
    """Nine rows of fp32 with `exact=False`: the library's products, and SwiGLU by way of its registered op."""
    model, prompts = make_model(), [torch.arange(n, n + 5) for n in range(9)]
    decoders = [ConsensusDecoder(model, mode="ar", exact=False, cuda_graph=graph) for graph in (None, False)]
    texts = [decoder.generate(prompts, max_new_tokens=12).sequences for decoder in decoders]
    assert all(map(torch.equal, *texts)) and not replays(decoders[0])
