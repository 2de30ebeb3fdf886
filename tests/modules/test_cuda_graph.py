"""Cycles as graphs. On a CPU a stand-in captures and replays: when, over which memory, and trimmed how.
On a GPU the real ones: a capture happened, nothing waits for the device, and the bits are the eager cycle's."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from orthrus_triton._capture import capture
from orthrus_triton.modules import Choosing, ConsensusDecoder, SamplingParams
from orthrus_triton.modules.cuda_graph import StepRunner, weight_addresses
from orthrus_triton.modules.decode_run import AR_STEPS
from orthrus_triton.modules.kv_cache import CAPACITY_QUANTUM
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.test_consensus_decoder import ar_answer, make_model, prompts_of

MODES = [("consensus", 0), ("consensus", 1), ("ar", 0)]


class StandInGraphs(ConsensusDecoder):
    """Captures like a GPU: two warm-up runs and one more; a replay insists on the memory the capture saw."""

    def _new_capture(self, device: torch.device):
        def addresses() -> list[int]:
            state = [value for value in vars(self._state).values() if isinstance(value, torch.Tensor)]
            buffers = [buffer for layer in self.cache.layers for buffer in layer]
            return [tensor.data_ptr() for tensor in (*state, *buffers, self.cache.context_len)]

        def capture(step):
            for _ in range(3):
                step()
            self.replays, seen = 0, [addresses(), weight_addresses(self.model)]

            def replay() -> None:
                assert seen == [addresses(), weight_addresses(self.model)]
                self.replays += 1
                step()

            return replay

        return capture

    @property
    def captures(self) -> int:
        return self._runner.captures


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may find an old graph, and destroying it would break the capture."""
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(KeyError), capture(None, pool=None):
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_old_buffers_are_gone_before_larger_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    decoder = ConsensusDecoder(model)
    prompt = prompts_of(1, [5])[0]
    decoder.generate([prompt], max_new_tokens=3)
    old, new_cache, freed = weakref.ref(decoder.cache.layers[0].k), model.new_cache, []
    monkeypatch.setattr(model, "new_cache", lambda *sizes: (freed.append(old() is None), new_cache(*sizes))[1])
    decoder.generate([prompt], max_new_tokens=CAPACITY_QUANTUM)
    assert freed == [True]


def test_each_key_is_captured_once_and_idle() -> None:
    log = []

    class Idle:
        def __enter__(self) -> None:
            log.append("idle")

        def __exit__(self, *_: object) -> None:
            log.append("live")

    runner = StepRunner(lambda step: (log.append("capture"), lambda: log.append("replay"))[1], Idle)
    for key in ("a", "a", "b", "a"):
        runner.run(key, lambda: log.append("step"))
    once = ["idle", "capture", "live", "replay"]
    assert log == [*once, "replay", *once, "replay"] and runner.captures == 2
    eager = StepRunner(None, nullcontext)
    eager.run("a", lambda: log.append("eager"))
    assert log[-1] == "eager" and not eager.captures_steps and eager.captures == 0


@pytest.mark.parametrize(("mode", "anchor_rows"), MODES)
def test_replayed_runs_give_the_eager_tokens(mode: str, anchor_rows: int) -> None:
    model, prompts = make_model(qk_norm=True, anchor_rows=anchor_rows), prompts_of(31, [7, 2])
    answers = [ar_answer(model, prompt, 30) for prompt in prompts]
    decoder = StandInGraphs(model, impl="torch", mode=mode)
    eos = int(answers[0][17])
    for tokens in (1, 2, AR_STEPS, 30):
        output = decoder.generate(prompts, max_new_tokens=tokens, eos_token_id=eos)
        for prompt, answer, sequence in zip(prompts, answers, output.sequences):
            said = answer.tolist()
            expected = said[: min(tokens, said.index(eos) + 1 if eos in said else tokens)]
            assert sequence[len(prompt) :].tolist() == expected
        assert output.stats.tokens == sum(output.stats.sequence_tokens)
        if mode == "ar":  # passes of a replay behind the end are not counted
            assert output.stats.sequence_cycles == [n - 1 for n in output.stats.sequence_tokens]
    assert decoder.run.lag == 1
    # AR: one graph of several passes and one for the rest; consensus: one graph
    assert decoder.captures == (2 if mode == "ar" else 1)


def test_ar_replays_several_passes() -> None:
    decoder = StandInGraphs(make_model(), impl="torch", mode="ar")
    seconds, cycle, heard = [0.0], decoder.cycle, []

    def timed(*arguments) -> None:
        cycle(*arguments)
        seconds[0] += 1

    decoder.cycle, decoder.clock = timed, lambda: seconds[0]
    run = decoder.open(1, 64)
    run._rule(1).observe = lambda size, seconds, accepted: heard.append(seconds)
    run.admit(0, prompts_of(1, [4])[0], 1 + 2 * AR_STEPS + 3)
    while not run.done:
        run.advance()
    assert decoder.replays == 2 + 3 and run.slots[0].cycles == {1: 2 * AR_STEPS + 3}
    assert run.cycles_known == 2 * AR_STEPS + 3 and heard == [1.0] * 5  # seconds of a pass, not of a replay


def test_a_function_on_the_host_is_not_captured() -> None:
    model, prompts, heard = make_model(), prompts_of(1, [4]), []
    decoder = StandInGraphs(model, impl="torch")
    options = {"max_new_tokens": 6, "logits_processor": lambda ids, scores: heard.append(ids) or scores}
    assert torch.equal(decoder.generate(prompts, **options).sequences[0][4:], ar_answer(model, prompts[0], 6))
    assert heard and decoder.captures == 0


def test_what_needs_a_new_capture_and_what_does_not() -> None:
    model, prompts = make_model(), prompts_of(2, [5, 9])
    decoder = StandInGraphs(model, impl="torch")
    counts = []

    def captured(*args: object, **options: object) -> int:
        before = decoder._runner
        decoder.generate(*args, **options)
        counts.append(decoder.captures)
        return decoder.captures if decoder._runner is not before else 0

    assert captured(prompts[:1], max_new_tokens=4) == 1
    # from the first token to the cache's end, other stop tokens, another prompt: the same graph
    captured(prompts[:1], max_new_tokens=CAPACITY_QUANTUM - 5, eos_token_id=[3, 4])
    captured(prompts[1:], max_new_tokens=4)
    assert counts == [1, 1, 1]
    captured(prompts[1:], max_new_tokens=4, block_size=4)  # another block size: one more
    captured(prompts[1:], max_new_tokens=4)
    assert counts[3:] == [2, 2]
    with torch.no_grad():  # weights changed in place are read by the replay
        model.lm_head.weight.mul_(-1)
    expected = ar_answer(model, prompts[0], 12)
    assert torch.equal(decoder.generate(prompts[:1], max_new_tokens=12).sequences[0][5:], expected)
    assert decoder.captures == 2
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())  # weights replaced: elsewhere in memory
    expected = ar_answer(model, prompts[0], 12)
    assert captured(prompts[:1], max_new_tokens=12) == 1
    assert decoder.run.slots[0].tokens == expected.tolist()
    model.layers[0].mlp.quantize_for_drafts()  # buffers of the model that a replay would read, or would have read
    assert captured(prompts[:1], max_new_tokens=4) == 1
    assert captured(prompts, max_new_tokens=4) == 1  # another batch size: new buffers
    assert captured(prompts, max_new_tokens=CAPACITY_QUANTUM) == 1  # a larger cache: new buffers


@pytest.mark.parametrize(("name", "value"), [("impl", "reference"), ("block_size", 4)])
def test_what_captures_are_of_cannot_be_assigned(name: str, value: object) -> None:
    with pytest.raises(AttributeError, match=name):
        setattr(ConsensusDecoder(make_model()), name, value)


def test_auto_captures_every_size_before_the_first_token() -> None:
    model, (prompt,) = make_model(), prompts_of(4, [6])
    decoder = StandInGraphs(model, impl="torch", block_size="auto")
    run = decoder.open(1, 64)
    assert decoder.captures == 4  # 8, 4, and AR as several passes and as one
    run.admit(0, prompt, 30)
    while not run.done:
        run.advance()
    assert decoder.captures == 4 and run.slots[0].tokens == ar_answer(model, prompt, 30).tolist()


def test_cuda_graph_is_refused_where_there_is_none() -> None:
    model = make_model().cpu()
    with pytest.raises(ValueError, match="cuda_graph=True needs impl='triton' on a GPU, but the model is on cpu"):
        ConsensusDecoder(model, impl="torch", cuda_graph=True).generate(torch.tensor([1]), max_new_tokens=2)


def gpu_model(dtype: torch.dtype = torch.bfloat16, **options) -> TinyDualViewModel:
    shape = {"vocab_size": 1000, "hidden_size": 256, "num_layers": 3, "intermediate_size": 512, "block_size": 16}
    return make_model(dtype, qk_norm=True, **shape, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("mode", "anchor_rows"), MODES)
def test_gpu_graph_is_the_eager_cycle(mode: str, anchor_rows: int, dtype: torch.dtype) -> None:
    model, prompts = gpu_model(dtype, anchor_rows=anchor_rows), prompts_of(5, [40, 3, 300])
    eager = ConsensusDecoder(model, mode=mode, cuda_graph=False)
    graphed = ConsensusDecoder(model, mode=mode)
    for tokens in (1, 5, 200):
        expected = eager.generate(prompts, max_new_tokens=tokens)
        output = graphed.generate(prompts, max_new_tokens=tokens)
        assert [s.tolist() for s in output.sequences] == [s.tolist() for s in expected.sequences]
        assert output.stats.accepted_histogram == expected.stats.accepted_histogram
    assert graphed._runner.captures == (2 if mode == "ar" else 1) and eager._runner.captures == 0
    for ours, theirs in zip(graphed.cache.layers, eager.cache.layers):
        for b, length in enumerate(graphed.cache.context_len.tolist()):
            assert torch.equal(ours.k[b, :, :length], theirs.k[b, :, :length])
            assert torch.equal(ours.v[b, :, :length], theirs.v[b, :, :length])


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "anchor_rows"), MODES)
def test_gpu_graph_is_replayed_and_nothing_waits(mode: str, anchor_rows: int) -> None:
    model, (prompt,) = gpu_model(anchor_rows=anchor_rows), prompts_of(6, [20])
    decoder = ConsensusDecoder(model, mode=mode, block_size=16)
    run = decoder.open(1, 400)
    run.admit(0, prompt, 380)
    run.poll(lag=0)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                assert run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    events = {event.key: event.count for event in profile.key_averages()}
    assert sum(count for key, count in events.items() if "GraphLaunch" in key) == 4, events
    assert any("dual_view_attention_kernel" in key for key in events), events
    # besides the graph a step is one copy to pinned memory: no kernel is launched on its own
    assert not any("LaunchKernel" in key for key in events), events
    assert len(run.slots[0].tokens) == 1  # nothing was looked at meanwhile
    captures = decoder._runner.captures
    while not run.done:
        run.advance()
    # the graph was made before the first token and served to the cache's end
    assert decoder._runner.captures == captures and len(run.slots[0].tokens) == 380


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "anchor_rows"), MODES)
def test_gpu_a_prompt_enters_between_replays(mode: str, anchor_rows: int) -> None:
    """Chunk by chunk, behind what the other slot holds of it. Replays are of both slots all the while."""
    model, (prompt, more) = gpu_model(anchor_rows=anchor_rows), prompts_of(8, [100, 300])
    options = {"mode": mode, "batch_invariant_prefill": True}
    run = ConsensusDecoder(model, prefill_chunk=64, **options).open(2, 800)
    run.admit(0, prompt, 400)
    for _ in range(3):
        run.advance()
    longer = torch.cat((prompt, torch.tensor(run.slots[0].tokens, dtype=torch.int64), more))
    run.copy_prefix(0, 1, longer)
    cached, chunks = run.cached_prefix(1, longer), 0
    assert cached > 100
    while (now := run.prefill_ahead(1, longer, cached)) > cached:
        cached, chunks = now, chunks + 1
        run.advance()
    run.admit(1, longer, 60, cached=cached)
    while not run.done:
        run.advance()
    alone = ConsensusDecoder(model, cuda_graph=False, **options)
    for b, ids, tokens in ((0, prompt, 400), (1, longer, 60)):
        assert run.slots[b].tokens == alone.generate([ids], max_new_tokens=tokens).sequences[0][len(ids) :].tolist()
    assert chunks == 4


@pytest.mark.gpu
def test_gpu_new_weights_are_noticed() -> None:
    model, prompts = gpu_model(), prompts_of(7, [20])
    decoder = ConsensusDecoder(model)

    def both() -> tuple[list[int], list[int]]:
        eager = ConsensusDecoder(model, cuda_graph=False)
        return tuple(d.generate(prompts, max_new_tokens=40).sequences[0].tolist() for d in (decoder, eager))

    first, expected = both()
    assert first == expected
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.1)
    second, expected = both()
    assert second == expected != first and decoder._runner.captures == 1
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    third, expected = both()
    assert third == expected != second and decoder._runner.captures == 1


@pytest.mark.gpu
def test_gpu_auto_is_ar() -> None:
    model, prompts = gpu_model(), prompts_of(8, [20, 7])
    ar = ConsensusDecoder(model, mode="ar").generate(prompts, max_new_tokens=150)
    auto = ConsensusDecoder(model, block_size="auto").generate(prompts, max_new_tokens=150)
    assert [s.tolist() for s in auto.sequences] == [s.tolist() for s in ar.sequences]
    assert len(auto.stats.cycles_by_block_size) > 1


@pytest.mark.gpu
def test_gpu_long_prompt() -> None:
    """128k tokens: memory grows with the chunk, no offset overflows, and the modes still agree."""
    model, (prompt,) = gpu_model(), prompts_of(9, [131_000])
    said = []
    for mode in ("consensus", "ar"):
        decoder = ConsensusDecoder(model, mode=mode, max_cache_len=131_072)
        torch.cuda.reset_peak_memory_stats()
        decoder.open(1, 131_072)
        before = torch.cuda.memory_allocated()
        said.append(decoder.generate([prompt], max_new_tokens=40).sequences[0][-40:].tolist())
        # attention's workspace is bounded by 256 MiB and used a few times over; a [128k, 128k] matrix is not there
        assert torch.cuda.max_memory_allocated() - before < 2 * 2**30
        del decoder
    assert said[0] == said[1]


def test_what_is_captured_at_first_is_for_sequences_that_sample() -> None:
    """And a run of greedy ones alone, which draft otherwise under rejection, is captured when it comes."""
    decoder = StandInGraphs(make_model(), impl="torch")
    run = decoder.open(1, 64, choosing=Choosing(sampled=True, rejection=True), eos_token_id=[])
    assert decoder.captures == 1
    for params, captures in ((SamplingParams(temperature=1.0), 1), (SamplingParams(), 2), (SamplingParams(), 2)):
        run.admit(0, prompts_of(3, [5])[0], 9, params)
        while not run.done:
            run.advance()
        assert decoder.captures == captures
