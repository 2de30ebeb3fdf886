"""Tier B: consensus emits what AR emits, whatever is drafted, wherever it stops, whoever stands beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.kv_cache import CAPACITY_QUANTUM
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.drafts import ScriptedDrafts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 61


def make_model(dtype: torch.dtype = torch.float32, **options) -> TinyDualViewModel:
    torch.manual_seed(3)
    model = TinyDualViewModel(**{"vocab_size": VOCAB} | options).to(DEVICE, dtype)
    for layer in model.layers:  # larger weights than a fresh model's, so that the text is not one repeated token
        layer.self_attn.o_proj.weight.data *= 8
        layer.self_attn.copy_ar_to_diffusion()
    return model


MODELS = {
    "plain": make_model(),
    "qk_norm": make_model(qk_norm=True),
    "window": make_model(window=7),
    "low_rank": make_model(view_rank=4, qkv_bias=True),
    "bf16": make_model(torch.bfloat16, qk_norm=True),
    "norms_behind": make_model(norms="behind", qk_norm="whole", scale=0.2),
    "frozen_anchor": make_model(qk_norm=True, anchor_rows=1),
    "frozen_anchor_bf16": make_model(torch.bfloat16, window=7, view_rank=4, anchor_rows=1),
}


def prompts_of(seed: int, lengths: list[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def ar_answer(model: TinyDualViewModel, prompt: torch.Tensor, tokens: int, **options) -> torch.Tensor:
    """What AR decoding says to this prompt alone."""
    decoder = ConsensusDecoder(model, mode="ar", impl="torch", **options)
    return decoder.generate([prompt], max_new_tokens=tokens).sequences[0][len(prompt) :]


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 99), tokens=st.integers(1, 20),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), block_size=st.integers(2, 8),
    right=st.lists(st.integers(-1, 7), min_size=1, max_size=4),
    data=st.data(),
)  # fmt: skip
def test_consensus_is_ar_for_any_draft(name, seed, lengths, tokens, block_size, right, data) -> None:
    model, prompts = MODELS[name], prompts_of(seed, lengths)
    answers = [ar_answer(model, prompt, 20, block_size=block_size) for prompt in prompts]
    said = torch.cat(answers).tolist()
    eos = data.draw(st.lists(st.sampled_from(said), max_size=2))  # tokens that do occur
    decoder = ScriptedDrafts(model, answers, right, block_size=block_size, impl="torch")
    output = decoder.generate(prompts, max_new_tokens=tokens, eos_token_id=eos)
    for prompt, answer, sequence in zip(prompts, answers, output.sequences):
        stops = [i + 1 for i, token in enumerate(answer.tolist()) if token in eos]
        expected = answer[: min([tokens, *stops])]
        assert sequence.tolist() == prompt.tolist() + expected.tolist()
    stats = output.stats
    assert stats.forward_passes == 1 + 2 * stats.cycles
    assert stats.tokens == sum(len(sequence) - length for sequence, length in zip(output.sequences, lengths))
    assert sum(stats.accepted_histogram) == sum(stats.sequence_cycles)
    assert stats.tokens_per_cycle <= block_size + model.anchor_rows


@given(seed=st.integers(0, 99), shorter=st.integers(1, 30), longer=st.integers(1, 30), length=st.integers(1, 20))
def test_a_shorter_run_is_a_prefix(seed: int, shorter: int, longer: int, length: int) -> None:
    shorter, longer = sorted((shorter, longer))
    decoder = ConsensusDecoder(MODELS["qk_norm"], impl="torch")
    prompt = prompts_of(seed, [length])
    long_run = decoder.generate(prompt, max_new_tokens=longer).sequences[0]
    short_run = decoder.generate(prompt, max_new_tokens=shorter).sequences[0]
    assert torch.equal(short_run, long_run[: length + shorter])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_long_context_crosses_kv_tiles(name: str) -> None:
    """Tiles of the torch implementation are 256 keys: decode across two of their edges."""
    model, prompt = MODELS[name], prompts_of(5, [500])
    answer = ar_answer(model, prompt[0], 40)
    for right in ([-1], [7], [0, 3, 7, 1]):
        decoder = ScriptedDrafts(model, [answer], right, impl="torch")
        assert torch.equal(decoder.generate(prompt, max_new_tokens=40).sequences[0][500:], answer)


@pytest.mark.parametrize("name", ["qk_norm", "bf16", "frozen_anchor", "frozen_anchor_bf16"])
def test_cache_keeps_the_same_bits(name: str) -> None:
    """Not only the tokens: the K/V of every committed position is what AR decoding leaves there."""
    model, prompt = MODELS[name], prompts_of(6, [11])
    caches = []
    for mode in ("consensus", "ar"):
        decoder = ConsensusDecoder(model, mode=mode, impl="torch")
        decoder.generate(prompt, max_new_tokens=25)
        caches.append(decoder.cache)
    length = int(caches[0].context_len[0])
    assert length == int(caches[1].context_len[0]) == 11 + 25 - 1
    for ours, theirs in zip(caches[0].layers, caches[1].layers):
        assert torch.equal(ours.k[:, :, :length], theirs.k[:, :, :length])
        assert torch.equal(ours.v[:, :, :length], theirs.v[:, :, :length])


def test_garbage_in_the_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(7, [9, 4])
    model = MODELS["qk_norm"]
    expected = ConsensusDecoder(model, impl="torch").generate(prompts, max_new_tokens=15).sequences
    decoder = ConsensusDecoder(model, impl="torch")
    new_cache = model.new_cache

    def poisoned(*args, **options):
        cache = new_cache(*args, **options)
        for layer in cache.layers:
            for buffer in layer:
                buffer.fill_(torch.nan)
        return cache

    monkeypatch.setattr(model, "new_cache", poisoned)
    for sequence, wanted in zip(decoder.generate(prompts, max_new_tokens=15).sequences, expected):
        assert torch.equal(sequence, wanted)


def test_full_cache() -> None:
    """A prompt up to the cache's end, and blocks that reach past it."""
    model, (prompt,) = MODELS["plain"], prompts_of(8, [CAPACITY_QUANTUM - 3])
    answer = ar_answer(model, prompt, 4)
    for tokens in (1, 2, 4):
        decoder = ScriptedDrafts(model, [answer], [7], impl="torch", max_cache_len=CAPACITY_QUANTUM)
        output = decoder.generate([prompt], max_new_tokens=tokens)
        assert decoder.cache.capacity == CAPACITY_QUANTUM
        assert torch.equal(output.sequences[0][len(prompt) :], answer[:tokens])
    with pytest.raises(ValueError, match=f"max_cache_len={CAPACITY_QUANTUM}.* is {CAPACITY_QUANTUM + 1}"):
        decoder.generate([prompt], max_new_tokens=5)


def test_all_right_drafts_fill_every_block() -> None:
    model, (prompt,) = MODELS["plain"], prompts_of(9, [5])
    answer = ar_answer(model, prompt, 33)
    output = ScriptedDrafts(model, [answer], [7], impl="torch").generate([prompt], max_new_tokens=33)
    assert output.stats.cycles == 4 and output.stats.tokens_per_cycle == 8
    assert output.stats.accepted_histogram == [0] * 7 + [4]
    assert output.stats.tpf == pytest.approx(33 / 9)


def test_one_token_needs_no_cycle() -> None:
    output = ConsensusDecoder(MODELS["plain"], impl="torch").generate(prompts_of(1, [3]), max_new_tokens=1)
    assert (output.stats.cycles, output.stats.forward_passes, output.stats.tokens) == (0, 1, 1)


@pytest.mark.parametrize("chunk", [1, 7, 8, 64])
def test_prefill_chunks(chunk: int) -> None:
    prompts = prompts_of(10, [20, 3, 33])
    model = MODELS["qk_norm"]
    whole = ConsensusDecoder(model, impl="torch").generate(prompts, max_new_tokens=10)
    cut = ConsensusDecoder(model, impl="torch", prefill_chunk=chunk).generate(prompts, max_new_tokens=10)
    assert all(torch.equal(a, b) for a, b in zip(whole.sequences, cut.sequences))


def test_prefill_asks_for_last_logits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt must not cost [prompt, vocab] logits; the draft's last row proposes nothing and gets none."""
    model = make_model()
    shapes = []
    choose = model.choose

    def spy(hidden, *args):
        shapes.append(tuple(hidden.shape[:2]))
        return choose(hidden, *args)

    monkeypatch.setattr(model, "choose", spy)
    ConsensusDecoder(model, impl="torch", prefill_chunk=16).generate(prompts_of(1, [50, 7]), max_new_tokens=2)
    assert shapes == [(1, 1), (1, 1), (2, 7), (2, 8)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side: str) -> None:
    prompts = prompts_of(11, [6, 2, 9])
    model = MODELS["plain"]
    padded, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for b, prompt in enumerate(prompts):
        where = slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt))
        padded[b, where], mask[b, where] = prompt, 1
    decoder = ConsensusDecoder(model, impl="torch")
    ragged = decoder.generate(prompts, max_new_tokens=8).sequences
    for sequence, wanted in zip(decoder.generate(padded, mask, max_new_tokens=8).sequences, ragged):
        assert torch.equal(sequence, wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[1, VOCAB]])}, "ids in 0..60, but got 61"),
        ({"input_ids": torch.tensor([[1, -3]])}, "but got -3"),
        ({"input_ids": []}, "at least one prompt"),
        ({"input_ids": [torch.tensor([], dtype=torch.int64)]}, "at least one token"),
        ({"input_ids": torch.ones(1, 2)}, "must hold integers"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.bool)}, "must hold integers, but got torch.bool"),
        ({"input_ids": {"input_ids": torch.ones(1, 2)}}, "input_ids must be .* but got a dict"),
        ({"input_ids": ["the text"]}, "input_ids must be .* of integers, but: .*str"),
        ({"logits_processor": lambda ids, scores: None}, r"must return a tensor \[1, 61\], but got a NoneType"),
        ({"input_ids": "the text"}, "input_ids must be .* but got a str"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 0, 1]])}, "holes"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 2)}, "attention_mask"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "attention_mask": [[1, 1]]}, r"tensor \[B, L\], .* a list"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, but got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer >= 1, but got 2.5"),
        ({"block_size": 4.0}, "block_size must be in 2..8, .* but got 4.0"),
        ({"block_size": 9}, "block_size must be in 2..8"),
        ({"block_size": 1}, "block_size must be in 2..8"),
        ({"eos_token_id": VOCAB}, "eos_token_id must be in 0..60"),
    ],
)
def test_bad_arguments_leave_the_decoder_usable(arguments: dict, message: str) -> None:
    decoder = ConsensusDecoder(MODELS["plain"], impl="torch")
    good = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 5}
    expected = decoder.generate(**good).sequences[0]
    with pytest.raises(ValueError, match=message):
        decoder.generate(**(good | arguments))
    assert torch.equal(decoder.generate(**good).sequences[0], expected)


def test_bad_options() -> None:
    for name, value in (
        ("mode", "greedy"), ("impl", "cuda"), ("prefill_chunk", 0), ("prefill_chunk", 2.5), ("max_cache_len", -1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must be .* got {value!r}"):
            ConsensusDecoder(MODELS["plain"], **{name: value})


def test_a_model_must_have_the_members_of_the_protocol() -> None:
    with pytest.raises(TypeError, match=r"a Linear has no \['block_size', .*'compute_logits'\]"):
        ConsensusDecoder(torch.nn.Linear(2, 2))
    model = make_model()
    model.block_size = 1
    with pytest.raises(ValueError, match="model.block_size must be at least 2, .* but is 1"):
        ConsensusDecoder(model)


@pytest.mark.parametrize("params", [SamplingParams(), [{}]], ids=["one", "of dicts"])
def test_params_are_a_sequence_of_sampling_params(params: object) -> None:
    with pytest.raises(TypeError, match="params must be a sequence of SamplingParams"):
        ConsensusDecoder(MODELS["plain"]).generate([torch.tensor([1])], max_new_tokens=2, params=params)


def test_streamer_sees_every_token_once() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.tokens, self.ended = [], False

        def put(self, ids: torch.Tensor) -> None:
            self.tokens += ids.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    recorder = Recorder()
    decoder = ConsensusDecoder(MODELS["qk_norm"], impl="torch")
    output = decoder.generate(prompts_of(12, [4]), max_new_tokens=20, streamer=recorder)
    assert recorder.tokens == output.sequences[0].tolist() and recorder.ended


@pytest.mark.parametrize("name", ["qk_norm", "window", "frozen_anchor", "frozen_anchor, window"])
def test_triton_consensus_is_triton_ar(name: str) -> None:
    """The whole cycle on the kernels: AR mode runs single rows, consensus runs blocks, and the tokens agree."""
    torch.manual_seed(4)
    options = {
        "qk_norm": {"qk_norm": True}, "window": {"window": 3}, "frozen_anchor": {"anchor_rows": 1},
        "frozen_anchor, window": {"anchor_rows": 1, "window": 3, "qk_norm": True},
    }[name]  # fmt: skip
    model = TinyDualViewModel(num_layers=1, num_heads=2, num_kv_heads=1, block_size=4, **options).to(DEVICE)
    prompts = prompts_of(13, [3, 6])
    ar = ConsensusDecoder(model, mode="ar", impl="triton")
    answers = [s[len(p) :] for s, p in zip(ar.generate(prompts, max_new_tokens=5).sequences, prompts)]
    consensus = ScriptedDrafts(model, answers, [3, -1, 1], impl="triton")
    output = consensus.generate(prompts, max_new_tokens=5)
    assert [s[len(p) :].tolist() for s, p in zip(output.sequences, prompts)] == [a.tolist() for a in answers]
    length = int(ar.cache.context_len.min())
    for ours, theirs in zip(consensus.cache.layers, ar.cache.layers):
        assert torch.equal(ours.k[:, :, :length], theirs.k[:, :, :length])


@pytest.mark.usefixtures("without_c")
@pytest.mark.parametrize(
    ("impl", "exact", "read", "products"),
    [
        ("torch", True, "library", "torch"), ("torch", False, "library", "library"),
        ("triton", False, "library", "triton"), ("reference", True, "reference", "reference"),
    ],
)  # fmt: skip
def test_ar_takes_single_rows(
    impl: str, exact: bool, read: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AR mode is no verify pass in disguise; exact=False trades its bits for the library's products, but not Triton's.
    What is asked to be the reference has no product of the library."""
    model = make_model()
    passes = []
    forward_view = model.forward_view

    def spy(input_ids, cache, view_pass):
        passes.append((input_ids.shape[1], view_pass.linear_impl))
        return forward_view(input_ids, cache, view_pass)

    monkeypatch.setattr(model, "forward_view", spy)
    ConsensusDecoder(model, mode="ar", impl=impl, exact=exact).generate(prompts_of(1, [3]), max_new_tokens=3)
    assert passes == [(8, read), (1, products), (1, products)]


def test_batch_invariant_prefill_leaves_the_bits_of_decoding() -> None:
    """The prompt's K/V too are then what token-by-token decoding would have left: prefill it, or say it."""
    model, (prompt,) = MODELS["qk_norm"], prompts_of(14, [6])
    decoders = [ConsensusDecoder(model, impl="torch", batch_invariant_prefill=True) for _ in range(2)]
    said = decoders[0].generate([prompt], max_new_tokens=20).sequences[0]
    again = decoders[1].generate([said[:-5]], max_new_tokens=5).sequences[0]
    assert torch.equal(again, said)
    for ours, theirs in zip(decoders[0].cache.layers, decoders[1].cache.layers):
        assert torch.equal(ours.k[:, :, :25], theirs.k[:, :, :25])
        assert torch.equal(ours.v[:, :, :25], theirs.v[:, :, :25])
