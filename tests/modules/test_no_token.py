"""A row without a usable logit ends its own sequence: NaN from the model, from its LM head alone, or from what
processes its logits. The others are whole, in every implementation, and the decoder goes on."""

from __future__ import annotations

import itertools
import pickle

import pytest
import torch

from orthrus_triton import ops
from orthrus_triton.modules import ConsensusDecoder, NonFiniteLogitsError, SamplingParams
from orthrus_triton.testing import TinyDualViewModel
from tests.modules.ledger_model import LedgerModel, oracle

VOCAB, POISON, MARK = 17, 5, 1e30
IMPLS = ["torch", "triton", "reference"]


class BadHead(LedgerModel):
    """Hidden states are finite, and after the poison the LM head makes NaN of them, in both views if asked."""

    def __init__(self, draft: bool = False) -> None:
        super().__init__(VOCAB)
        self.draft = draft

    def forward_view(self, input_ids, cache, view_pass):
        hidden = super().forward_view(input_ids, cache, view_pass)
        bad = self.draft if view_pass.view == "diffusion" else input_ids == POISON
        return torch.where(torch.as_tensor(bad)[..., None], MARK, hidden)

    def compute_logits(self, hidden, linear_impl="auto"):
        return torch.where(hidden == MARK, torch.nan, hidden)


class BadFusedHead(TinyDualViewModel):
    """Its `choose` has no logits to look at; after the poison it multiplies by a head of NaN."""

    def forward_view(self, input_ids, cache, view_pass):
        hidden = super().forward_view(input_ids, cache, view_pass)
        bad = (input_ids == POISON) & (view_pass.view == "ar")
        return torch.where(bad[..., None], MARK, hidden)

    def choose(self, hidden, impl="auto"):
        bad = ops.lm_head_choice(hidden, torch.full_like(self.lm_head.weight, torch.nan), impl=impl)
        return torch.where((hidden == MARK).all(-1), bad, super().choose(hidden, impl))


def until_poison(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(POISON) + 1] if POISON in tokens[:-1] else tokens


class Infinite(LedgerModel):
    """Behind position 3, one entry of the AR view's hidden states, and so one logit, is +inf."""

    def forward_view(self, input_ids, cache, view_pass):
        hidden = super().forward_view(input_ids, cache, view_pass).clone()
        if view_pass.view == "ar":
            hidden[..., 0] = torch.where(view_pass.positions > 3, torch.inf, hidden[..., 0])
        return hidden


@pytest.mark.parametrize("anchor_rows", [0, 1])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.9}, {"temperature": 0.9, "sampling": "rejection"}])
def test_an_infinite_logit_is_no_token_by_any_rule(how: dict, anchor_rows: int) -> None:
    decoder = ConsensusDecoder(Infinite(VOCAB, anchor_rows=anchor_rows), impl="torch", block_size=3)
    prompts = [torch.arange(1, last) for last in (3, 5, 6)]  # the second's first anchor is such a row
    with pytest.raises(NonFiniteLogitsError, match=r"\[0, 1, 2\] after \[3, 1, 0\]"):
        decoder.generate(prompts, max_new_tokens=8, eos_token_id=[], **how)


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_nan_ends_that_sequence_alone(anchor_rows: int) -> None:
    """And the error names it; the decoder goes on."""
    model = LedgerModel(VOCAB, poison=5, anchor_rows=anchor_rows)
    healthy = LedgerModel(VOCAB)
    decoder = ConsensusDecoder(model, impl="torch")
    prompts = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5])]
    with pytest.raises(NonFiniteLogitsError, match="sequence.s. .*2") as caught:
        decoder.generate(prompts, max_new_tokens=12, eos_token_id=[])
    error = caught.value
    assert 2 in error.failed and error.output.sequences[2].tolist() == [4, 5]
    for b, prompt in enumerate(prompts[:2]):
        expected = oracle(healthy, prompt.tolist(), 12, SamplingParams())
        if 5 in expected[:-1]:
            assert b in error.failed
            expected = expected[: expected.index(5) + 1]
        assert error.output.sequences[b].tolist() == prompt.tolist() + expected
    copy = pickle.loads(pickle.dumps(error))  # as between processes
    assert (copy.failed, str(copy)) == (error.failed, str(error)) and copy.output.stats == error.output.stats
    model.poison = None
    again = decoder.generate(prompts[2:], max_new_tokens=6, reuse_cache=True).sequences[0].tolist()
    assert again == [4, 5, *oracle(healthy, [4, 5], 6, SamplingParams())]


@pytest.mark.parametrize("mode", ["consensus", "ar", "rejection"])
@pytest.mark.parametrize("banned", [-torch.inf, torch.nan])
def test_processors_that_leave_no_token_end_that_sequence_alone(mode: str, banned: float) -> None:
    """In the middle of a block, too; the others are whole, in both kinds of processing."""
    model, prompts = LedgerModel(VOCAB), [torch.tensor([1, 2]), torch.tensor([3])]
    how = {"temperature": 1.0, "seed": 3}

    def give_up(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, banned) if input_ids.shape[1] >= 6 else scores

    decoder = ConsensusDecoder(model, impl="torch", mode="ar" if mode == "ar" else "consensus")
    options = {"max_new_tokens": 9, "sampling": "rejection" if mode == "rejection" else "coupled"}
    free = decoder.generate(prompts, **options, **how).sequences
    params = [SamplingParams(**how, sequence=0, logits_processor=give_up), SamplingParams(**how, sequence=1)]
    with pytest.raises(NonFiniteLogitsError, match=r"banned every token in sequence.s. \[0\] after \[4\]") as caught:
        decoder.generate(prompts, params=params, **options)
    got = caught.value.output.sequences
    assert torch.equal(got[0], free[0][:6]) and torch.equal(got[1], free[1])
    if banned == -torch.inf:
        params[0] = SamplingParams(**how, logit_bias=dict.fromkeys(range(VOCAB), banned))
        with pytest.raises(NonFiniteLogitsError, match=r"\[0\] after \[0\]"):
            decoder.generate(prompts, params=params, **options)


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_what_is_no_token_is_counted_nowhere(mode: str) -> None:
    """It lies between two sequences that go on, so that every step is of it, too."""
    decoder, prompts = ConsensusDecoder(LedgerModel(poison=5), impl="torch", mode=mode), [[2], [1, 5], [3]]
    params = [SamplingParams(frequency_penalty=0.7, logit_bias={5: -torch.inf})] * 3
    with pytest.raises(NonFiniteLogitsError) as caught:
        decoder.generate([*map(torch.tensor, prompts)], max_new_tokens=12, params=params)
    sequences = caught.value.output.sequences
    for b in (0, 2):
        assert sequences[b].tolist() == prompts[b] + oracle(LedgerModel(), prompts[b], 12, params[b])
    assert caught.value.failed == [1] and sequences[1].tolist() == prompts[1]


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_a_sequence_that_is_stopped_before_it_fails_has_not_failed(mode: str) -> None:
    """Wherever the two lie in a block: AR decoding stops and never comes to the row without a token."""
    prompt = torch.tensor([1, 2])
    expected = oracle(LedgerModel(VOCAB), prompt.tolist(), 8, SamplingParams())
    decoder = ConsensusDecoder(LedgerModel(VOCAB), impl="torch", mode=mode)
    for kept, failing in itertools.combinations_with_replacement(range(1, 7), 2):

        def give_up(ids: torch.Tensor, scores: torch.Tensor, length: int = 2 + failing) -> torch.Tensor:
            return torch.full_like(scores, -torch.inf) if ids.shape[1] >= length else scores

        def stop(_: int, new: list[int], length: int = kept) -> bool:
            return len(new) == length

        params = [SamplingParams(logits_processor=give_up)]
        output = decoder.generate([prompt], max_new_tokens=8, params=params, stop=stop)
        assert output.sequences[0].tolist() == prompt.tolist() + expected[:kept]


@pytest.mark.parametrize(
    ("mode", "impl"),
    # Triton's rejection kernel is below: whole runs of it are slow in the interpreter
    [
        (mode, impl)
        for mode in ("consensus", "ar", "rejection")
        for impl in IMPLS
        if (mode, impl) != ("rejection", "triton")
    ],
)
def test_an_lm_head_that_gives_nan_ends_that_sequence_alone(mode: str, impl: str) -> None:
    """Hidden states are finite and nothing processes the logits: the choice itself has to notice."""
    prompts = [torch.tensor([1, 2]), torch.tensor([4, POISON]), torch.tensor([3])]
    how = {"temperature": 0.9, "top_p": 0.9, "seed": 3} if mode == "rejection" else {}
    options = {"max_new_tokens": 6, "sampling": "rejection" if mode == "rejection" else "coupled", **how}
    decoder = ConsensusDecoder(BadHead(), impl=impl, mode="ar" if mode == "ar" else "consensus", block_size=3)
    healthy = ConsensusDecoder(LedgerModel(VOCAB), impl=impl, mode=decoder.mode, block_size=3)
    expected = [until_poison(ids[1 + (len(p) > 1) :].tolist()) for p, ids in
                zip(prompts, healthy.generate(prompts, **options).sequences)]  # fmt: skip
    with pytest.raises(NonFiniteLogitsError, match="logits must be finite") as caught:
        decoder.generate(prompts, **options)
    new = [ids[len(p) :].tolist() for p, ids in zip(prompts, caught.value.output.sequences)]
    assert new == [expected[0], [], expected[2]]
    assert caught.value.failed == [b for b, tokens in enumerate(new) if len(tokens) < 6]
    again = decoder.generate(prompts[2:], **{**options, "max_new_tokens": 1}).sequences[0].tolist()
    assert len(again) == 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_the_fused_choice_notices_too(mode: str, impl: str) -> None:
    torch.manual_seed(0)
    model = BadFusedHead(hidden_size=32, num_layers=1, intermediate_size=32, num_heads=2, block_size=3)
    prompts = [torch.tensor([1, 2]), torch.tensor([4, POISON])]
    decoder = ConsensusDecoder(model, impl=impl, mode=mode)
    expected = decoder.generate(prompts[:1], max_new_tokens=4, eos_token_id=[]).sequences[0]
    assert POISON not in expected and len(expected) == 6
    with pytest.raises(NonFiniteLogitsError, match=r"sequence.s. \[1\] after \[0\]") as caught:
        decoder.generate(prompts, max_new_tokens=4, eos_token_id=[])
    assert torch.equal(caught.value.output.sequences[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_draft_without_a_token_changes_no_text(impl: str) -> None:
    """The draft view's logits are NaN everywhere: coupled and greedy text is AR's, and rejection draws from p."""
    prompts = [torch.tensor([1, 2]), torch.tensor([3])]
    for how in ({}, {"temperature": 0.9, "seed": 3}):
        bad, healthy = BadHead(draft=True), LedgerModel(VOCAB)
        decoder = ConsensusDecoder(bad, impl=impl, block_size=3)
        params = [SamplingParams(**how, sequence=b, logit_bias={POISON: -torch.inf}) for b in range(2)]
        output = decoder.generate(prompts, max_new_tokens=5, params=params)
        for prompt, ids, one in zip(prompts, output.sequences, params):
            assert ids.tolist() == prompt.tolist() + oracle(healthy, prompt.tolist(), 5, one)


@pytest.mark.parametrize("impl", IMPLS)
def test_rejection_without_a_draft_draws_from_the_ar_distribution(impl: str, monkeypatch) -> None:
    """As the bonus row does, which has no draft: the same logits and position as last row of a block."""
    monkeypatch.setattr(ops.rejection_kernels, "BLOCK", 32)
    n = 2 if impl == "triton" else 20
    logits = torch.randn(n, 2, VOCAB, generator=torch.Generator().manual_seed(1))
    fields = ((1.0, torch.float32), (0, torch.int32), (0.9, torch.float32), (0.0, torch.float32), (7, torch.int64))
    how = ops.SamplingTensors(
        *(torch.full((n,), value, dtype=dtype) for value, dtype in fields), torch.arange(n, dtype=torch.int32)
    )
    positions = torch.tensor([[9, 10]], dtype=torch.int32).repeat(n, 1)
    nothing = torch.full((n, 1, VOCAB), torch.nan)
    candidate = torch.tensor([[0, ops.VOID]]).repeat(n, 1)
    choice = ops.rejection_choice(logits, nothing, candidate, positions, how, impl=impl)
    turned = ops.rejection_choice(logits.flip(1), nothing, candidate, positions.flip(1), how, impl=impl)
    assert torch.equal(choice, turned.flip(1)) and choice[:, 0].any()
    logits[0, 0], logits[1, 1] = torch.nan, -torch.inf
    choice[0, 0] = choice[1, 1] = ops.VOID
    assert torch.equal(ops.rejection_choice(logits, nothing, candidate, positions, how, impl=impl), choice)


class Drafting(ConsensusDecoder):
    """Drafts `script` behind what is generated so far, or POISON."""

    script: tuple[int, ...] = ()

    def draft(self, cache, state, block_size, impl):
        drafted = super().draft(cache, state, block_size, impl).clone()
        rest = self.script[int(state.output_len[0]) :][: block_size - 1]
        drafted[0, 1:] = POISON
        drafted[0, 1 : 1 + len(rest)] = torch.tensor(rest, dtype=torch.int64)
        return drafted


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_a_function_of_a_grammar_never_sees_a_text_that_breaks_it(anchor_rows: int) -> None:
    """Whatever is drafted: no row behind a draft that the function bans is shown to it."""
    model, prompt = LedgerModel(VOCAB, anchor_rows=anchor_rows), torch.tensor([1, 2])

    def even_then_odd(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        new = ids[0, 2:]
        assert torch.equal(new % 2, torch.arange(len(new)) % 2), f"a text that breaks the grammar: {new.tolist()}"
        return scores.masked_fill(torch.arange(VOCAB) % 2 != len(new) % 2, -torch.inf)

    params = SamplingParams(logits_processor=even_then_odd)
    output = Drafting(model, impl="torch").generate([prompt], max_new_tokens=20, params=[params])
    assert output.sequences[0].tolist() == [1, 2, *oracle(model, [1, 2], 20, params)]


def overflowing(token: int, value: float, dtype: torch.dtype, window: int | None) -> TinyDualViewModel:
    """A model that never says POISON; reading `token` it computes K/V that are not finite."""
    torch.manual_seed(0)
    model = TinyDualViewModel(block_size=4, window=window)
    model.lm_head.weight.data[POISON] = 0
    model.embed_tokens.weight.data[token] = value
    return model.to(dtype)


OVERFLOWS = [
    (value, window, "torch", dtype)
    for value in (torch.nan, torch.inf)
    for window in (None, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("value", "window", "impl", "dtype"), [*OVERFLOWS, (torch.nan, None, "triton", torch.float32)])
def test_a_draft_that_overflows_is_a_draft_that_is_rejected(
    value: float, window: int | None, impl: str, dtype: torch.dtype
) -> None:
    model, prompt = overflowing(POISON, value, dtype, window), [torch.tensor([1, 2, 3])]
    tokens = 2 if impl == "triton" else 12  # the interpreter takes seconds for each
    said = ConsensusDecoder(model, mode="ar", impl=impl).generate(prompt, max_new_tokens=tokens).sequences[0]
    assert POISON not in said
    assert torch.equal(Drafting(model, impl=impl).generate(prompt, max_new_tokens=tokens).sequences[0], said)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_is_said_before_an_overflow_is_said_in_both_modes(impl: str) -> None:
    prompt, answers = [torch.tensor([1, 2, 3])], []
    healthy = overflowing(POISON, 0.0, torch.float32, None)
    whole = ConsensusDecoder(healthy, mode="ar", impl="torch").generate(prompt, max_new_tokens=12)
    script = whole.sequences[0][3:].tolist()
    at = 2 if impl == "triton" else 6  # the interpreter takes seconds for a token
    assert script[at] not in script[:at]
    model = overflowing(script[at], torch.nan, torch.float32, None)
    for decoder in (ConsensusDecoder(model, mode="ar", impl=impl), Drafting(model, impl=impl)):
        decoder.script = tuple(script)
        with pytest.raises(NonFiniteLogitsError) as caught:
            decoder.generate(prompt, max_new_tokens=12)
        answers.append(caught.value.output.sequences[0][3:].tolist())
    assert answers[0] == answers[1] == script[: at + 1]


@pytest.mark.parametrize(
    ("anchor_rows", "window", "impl"),
    [(0, None, "torch"), (0, 5, "torch"), (1, None, "torch"), (1, 5, "torch"), (1, None, "triton")],
)
def test_a_view_that_has_diverged_costs_time_and_no_token(anchor_rows: int, window: int | None, impl: str) -> None:
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([5, 6])]
    torch.manual_seed(0)
    model = TinyDualViewModel(block_size=4, anchor_rows=anchor_rows, window=window)
    new = 2 if impl == "triton" else 6  # the interpreter takes seconds for a token
    said = ConsensusDecoder(model, mode="ar", impl=impl).generate(prompts, max_new_tokens=new).sequences
    model.layers[0].self_attn.qkv_proj_diff.weight.data.fill_(torch.nan)
    drafted = ConsensusDecoder(model, impl=impl).generate(prompts, max_new_tokens=new).sequences
    assert all(map(torch.equal, drafted, said))
