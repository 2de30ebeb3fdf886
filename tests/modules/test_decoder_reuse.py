"""A decoder that is called again: in or out of inference mode, after a failure, after its weights were written, and
before it has come to an end."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SharedKVCache
from orthrus_triton.modules.batch_prefill import BatchPrefill
from orthrus_triton.modules.decode_state import DecodeState
from orthrus_triton.modules.slot import Slot
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.test_consensus_decoder import DEVICE, ar_answer, make_model, prompts_of

PROMPTS = prompts_of(21, [7, 3])
SAMPLED = {"temperature": 0.9, "seed": 4, "repetition_penalty": 1.2, "max_new_tokens": 9}


@pytest.mark.parametrize("options", [{"max_new_tokens": 9}, SAMPLED], ids=["greedy", "sampled, processed"])
@pytest.mark.parametrize("inside", [(True, False), (False, True)], ids=["first call", "second call"])
def test_calls_may_be_in_inference_mode_or_not(options: dict, inside: tuple[bool, bool]) -> None:
    decoder, said = ConsensusDecoder(make_model(), impl="torch"), []
    for mode in inside:
        with torch.inference_mode(mode):
            said.append(decoder.generate(PROMPTS, **options).sequences)
    assert all(torch.equal(first, second) for first, second in zip(*said))
    assert not any(ids.is_inference() for sequences in said for ids in sequences)


def test_a_run_opened_in_inference_mode_goes_on_outside_it() -> None:
    decoder = ConsensusDecoder(make_model(), impl="torch")
    with torch.inference_mode():
        run = decoder.open(2, 40, eos_token_id=[])
        together = BatchPrefill(decoder.model, 8, 1)
        run.admit(0, PROMPTS[0], 9)
        run.step()
    run.admit_together([1], PROMPTS[1:], 9, together)
    while not run.done:
        run.advance()
    assert [len(slot.tokens) for slot in run.slots] == [9, 9]
    assert torch.equal(torch.tensor(run.slots[0].tokens), ar_answer(decoder.model, PROMPTS[0], 9))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_changes_neither_tokens_nor_drafts(dtype: torch.dtype, autocast: torch.dtype) -> None:
    """Also for a model that leaves its products to torch."""

    class OwnHead(TinyDualViewModel):
        choose = None

        def compute_logits(self, hidden: torch.Tensor, linear_impl: str = "auto") -> torch.Tensor:
            return torch.nn.functional.linear(hidden, self.lm_head.weight).float()

    torch.manual_seed(0)
    for options in ({"view_rank": 4}, {"anchor_rows": 1}, {"qk_norm": True, "anchor_rows": 1, "window": 7}):
        decoder, answers = ConsensusDecoder(OwnHead(**options).to(DEVICE, dtype), impl="torch"), []
        for enabled in (False, True):
            with torch.autocast(DEVICE.type, autocast, enabled=enabled):
                output = decoder.generate(PROMPTS, max_new_tokens=9)
            answers.append(([ids.tolist() for ids in output.sequences], output.stats.accepted_histogram))
            answers[-1] += (decoder.cache.layers[1].k.clone(),)
        assert answers[0][:2] == answers[1][:2] and torch.equal(answers[0][2], answers[1][2])


def test_a_call_that_fails_does_not_hide_that_the_weights_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> None:
        raise torch.OutOfMemoryError("no room")

    decoder = ConsensusDecoder(make_model(), impl="torch")
    text = decoder.generate([PROMPTS[0]], max_new_tokens=9, eos_token_id=[]).sequences[0]
    with torch.no_grad():
        for parameter in decoder.model.parameters():
            parameter.copy_(parameter.flip(0))
    with monkeypatch.context() as patch:
        patch.setattr(type(decoder._state), "reset", fail)
        with pytest.raises(torch.OutOfMemoryError):
            decoder.generate([text], max_new_tokens=9, reuse_cache=True)
    run = decoder.open(1, 64, eos_token_id=[])
    assert run.cached_prefix(0, text) == 0


def test_buffers_that_could_not_be_made_do_not_break_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_args: object) -> None:
        raise torch.OutOfMemoryError("no room")

    decoder = ConsensusDecoder(make_model(), impl="torch")
    with monkeypatch.context() as patch:
        patch.setattr(DecodeState, "allocate", too_large)
        with pytest.raises(torch.OutOfMemoryError):
            decoder.generate(PROMPTS, max_new_tokens=5)
    assert len(decoder.generate(PROMPTS, max_new_tokens=5).sequences) == 2


def test_buffers_are_of_the_size_that_the_decoder_may_need() -> None:
    """Not of the call's own: larger ones would hold nothing of the conversation that goes on."""
    decoder = ConsensusDecoder(make_model(), impl="torch", max_cache_len=1000)
    decoder.open(1, 8, block_size=2)
    buffers = decoder.cache
    assert buffers.capacity == 1024
    decoder.open(1, 1000)
    assert decoder.cache is buffers
    sized = ConsensusDecoder(decoder.model, impl="torch")
    for longest, capacity in ((512, 512), (513, 1024), (1024, 1024), (1025, 1536)):
        sized.open(1, longest)
        assert sized.cache.capacity == capacity


def test_a_prompt_written_over_by_the_caller_is_not_taken_for_what_a_slot_holds() -> None:
    decoder, ids = ConsensusDecoder(make_model(), impl="torch"), PROMPTS[0].clone()
    run = decoder.open(2, 40, eos_token_id=[])
    run.admit(0, ids, 1)
    run.copy_prefix(0, 1, ids)
    run.advance()
    ids.copy_(PROMPTS[0].flip(0))
    assert [run.cached_prefix(b, PROMPTS[0]) for b in range(2)] == [PROMPTS[0].numel() - 1] * 2


@pytest.mark.parametrize(("first", "then", "kept"), [(9, 9, 8), (10, 10, 9), (10, 11, 0), (11, 10, 0), (11, 12, 0)])
def test_rotary_angles_that_depend_on_a_prompts_length_are_not_mixed(first: int, then: int, kept: int) -> None:
    """A model may have other angles for prompts longer than this."""
    model = make_model()
    model.static_rope_len = 10
    run = ConsensusDecoder(model, impl="torch").open(1, 40, eos_token_id=[])
    prompt = prompts_of(4, [12])[0]
    run.admit(0, prompt[:first], 1)
    run.advance()
    assert run.cached_prefix(0, prompt[:then]) == kept


@pytest.mark.parametrize(
    ("ids", "held"), [([1, 2, 3, 4, 5, 6], 4), ([1, 2, 3, 4], 3), ([1, 2, 9, 4, 5], 2), ([9, 2, 3], 0), ([1], 0)]
)
def test_a_slot_holds_a_prompt_up_to_the_first_token_that_differs(ids: list[int], held: int) -> None:
    slot = Slot(torch.tensor([1, 2, 3]), tokens=[4, 5])  # 5 is not cached yet
    assert slot.holds_beginning_of(torch.tensor(ids)) == held
    slot.failed = True
    assert slot.holds_beginning_of(torch.tensor(ids)) == 0


def test_a_slot_that_was_half_copied_is_nobodys_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = ConsensusDecoder(make_model(), impl="torch")
    run = decoder.open(2, 40, eos_token_id=[])
    for b, prompt in enumerate(PROMPTS):
        run.admit(b, prompt, 1)
    run.advance()
    copied = SharedKVCache.copy_sequence

    def copy_and_fail(*arguments) -> None:
        copied(*arguments)
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="device lost"):
        patch.setattr(SharedKVCache, "copy_sequence", copy_and_fail)
        run.copy_prefix(0, 1, PROMPTS[0])
    run = decoder.open(2, 40, eos_token_id=[])  # it takes over what the slots are said to hold
    assert [run.cached_prefix(b, prompt) for b, prompt in enumerate(PROMPTS)] == [PROMPTS[0].numel() - 1, 0]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU can capture")
def test_a_graph_that_cannot_be_is_refused_each_time() -> None:
    decoder = ConsensusDecoder(make_model(), cuda_graph=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="cuda_graph=True needs impl='triton' on a GPU, but the model is on cpu"):
            decoder.generate(PROMPTS, max_new_tokens=5)


def test_a_cache_is_not_used_again_when_the_weights_were_replaced() -> None:
    """By a cast, whose K/V have another dtype; by another checkpoint, whose K/V of the same ids are others."""
    model, (prompt,) = make_model(), prompts_of(12, [9])
    decoder = ConsensusDecoder(model, impl="torch")
    first = decoder.generate([prompt], max_new_tokens=8).sequences[0]
    model.embed_tokens.weight = torch.nn.Parameter(model.embed_tokens.weight.detach().flip(0))
    turn = torch.cat((first, prompt))
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        said = decoder.generate([turn], max_new_tokens=8, reuse_cache=True).sequences[0]
        assert torch.equal(said[len(turn) :], ar_answer(model, turn, 8))


@pytest.mark.parametrize("by", ["in place", "load_state_dict"])
def test_a_cache_is_not_used_again_when_the_weights_were_written(by: str) -> None:
    model, other = make_model(), make_model().embed_tokens.weight.detach().flip(0)
    decoder = ConsensusDecoder(model, impl="torch")
    first = decoder.generate(PROMPTS[:1], max_new_tokens=8).sequences[0]
    if by == "in place":
        with torch.no_grad():
            model.embed_tokens.weight.copy_(other)
    else:
        model.load_state_dict(model.state_dict() | {"embed_tokens.weight": other})
    turn, buffers = torch.cat((first, PROMPTS[1])), decoder.cache
    said = decoder.generate([turn], max_new_tokens=8, reuse_cache=True).sequences[0]
    assert torch.equal(said[len(turn) :], ar_answer(model, turn, 8))
    assert decoder.cache is buffers


def test_weights_written_behind_torchs_back_are_those_of_the_next_call() -> None:
    """What a CPU packed of them is of those before, and `.data` does not tell."""
    model = make_model()
    decoder = ConsensusDecoder(model, impl="torch")
    first = decoder.generate(PROMPTS[:1], max_new_tokens=5).sequences[0]
    model.lm_head.weight.data.neg_()
    said = decoder.generate(PROMPTS[:1], max_new_tokens=5).sequences[0]
    expected = ConsensusDecoder(copy.deepcopy(model), impl="torch").generate(PROMPTS[:1], max_new_tokens=5).sequences[0]
    assert torch.equal(said, expected) and not torch.equal(said, first)


def test_calls_from_several_threads_wait_for_each_other() -> None:
    model = make_model()
    decoder, prompts = ConsensusDecoder(model, impl="torch"), prompts_of(22, [3, 9, 5, 14] * 4)
    expected = [ar_answer(model, prompt, 24) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        said = threads.map(lambda prompt: decoder.generate([prompt], max_new_tokens=24).sequences[0], prompts)
        for prompt, wanted, sequence in zip(prompts, expected, said):
            assert torch.equal(sequence[len(prompt) :], wanted)


def test_a_run_in_another_thread_changes_nothing() -> None:
    model = make_model()
    decoder, expected = ConsensusDecoder(model, impl="torch"), ar_answer(model, PROMPTS[0], 24)

    def drive() -> None:
        run = decoder.open(1, 60, eos_token_id=[])
        run.admit(0, PROMPTS[1], 50)
        while not run.done:
            run.advance()

    with ThreadPoolExecutor(1) as thread:
        for _ in range(8):
            other = thread.submit(drive)
            said = decoder.generate(PROMPTS[:1], max_new_tokens=24).sequences[0]
            assert torch.equal(said[len(PROMPTS[0]) :], expected)
            assert other.exception() is None or "newer run of the same decoder" in str(other.exception())


def test_a_copy_of_a_decoder_has_a_turn_of_its_own() -> None:
    decoder = ConsensusDecoder(make_model(), impl="torch")
    said = decoder.generate(PROMPTS, max_new_tokens=5).sequences
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert other.turn is not decoder.turn
        assert all(map(torch.equal, other.generate(PROMPTS, max_new_tokens=5).sequences, said))


def _doubled(forward):
    return lambda hidden, *rest, **options: forward(hidden * 2, *rest, **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.layers[0].self_attn, "window", 3),
        lambda model: setattr(model.layers[0].self_attn, "scale", 0.02),
        lambda model: setattr(model.layers[1].input_layernorm, "eps", 5e3),
        lambda model: model.layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2, *inputs[1:])),
        lambda model: setattr(model.layers[0], "forward", _doubled(model.layers[0].forward)),
    ],
    ids=["window", "scale", "eps", "hook", "patched"],
)
def test_keys_of_other_settings_are_not_used_again(change) -> None:
    torch.manual_seed(0)
    model, prompt = TinyDualViewModel(), [torch.arange(1, 40)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    decoder = ConsensusDecoder(model, batch_invariant_prefill=True, max_cache_len=200)
    before = decoder.generate(prompt, max_new_tokens=20).sequences[0]
    change(model)
    fresh = ConsensusDecoder(model, mode="ar", batch_invariant_prefill=True).generate(prompt, max_new_tokens=20)
    again = decoder.generate(prompt, max_new_tokens=20, reuse_cache=True).sequences[0]
    assert torch.equal(again, fresh.sequences[0]) and not torch.equal(again, before)
