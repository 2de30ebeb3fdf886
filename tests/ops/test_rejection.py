"""Rejection sampling: its joint distribution by exact enumeration, its acceptance at the optimum, Triton equal to
torch; and the processors against transformers' own."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from orthrus_triton import ops
from orthrus_triton.ops import (
    ProcessorTensors,
    filtered_probs,
    kept_spans,
    process_logits,
    rejection_choice,
    rejection_kernels,
    row_spans,
    sample_choice,
)
from orthrus_triton.ops.gumbel import ACCEPT, CHOICE, DRAFT, gumbel_torch, row_key_torch, uniform_torch
from orthrus_triton.ops.kept_spans import launch_kept_spans
from orthrus_triton.ops.logits_filter import kept_reference, mass_of_torch, scaled_torch
from orthrus_triton.ops.portable_math import portable_exp_torch
from orthrus_triton.ops.process_logits import IN_PROMPT
from orthrus_triton.ops.rejection import _accept_or_replace
from orthrus_triton.ops.sample_torch import LISTED
from tests.ops.sampling_cases import DEVICE, make_logits, mixed_sampling, positions_of, sampling_of


def draft(logits: torch.Tensor, anchor: torch.Tensor, positions: torch.Tensor, how) -> torch.Tensor:
    drafted = sample_choice(logits, positions[:, : logits.shape[1]], how, stream=DRAFT, impl="torch")
    return torch.cat((anchor[:, None], drafted), dim=1)


def use_spans(patch: pytest.MonkeyPatch, span: int, block: int) -> None:
    for module in (row_spans, kept_spans, rejection_kernels):
        patch.setattr(module, "SPAN", span)
        patch.setattr(module, "BLOCK", block)
    patch.setattr(kept_spans, "PASS_BLOCK", block)


@pytest.mark.parametrize("span", [8192, 32])
def test_triton_torch_and_definition_choose_alike(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_spans(monkeypatch, span, 16)
    how = sampling_of(
        8, temperature=[1.0, 0.0, 0.8, 1.5, 1.0, 1.0, 1.0, 1.0], top_k=[0, 0, 20, 0, 5, 3, 0, 30],
        top_p=[1, 1, 1, 0.8, 1, 0.9, 0.7, 0.95], min_p=[0, 0, 0.02, 0, 0, 0, 0.1, 0],
    )  # fmt: skip
    p, q = make_logits(1, 8, 3, 60), make_logits(2, 8, 2, 60)
    q = p[:, :2] + q.nan_to_num(neginf=0.0) - 3.0
    positions = positions_of(8, 3)
    candidate = draft(q, torch.zeros(8, dtype=torch.int64, device=DEVICE), positions, how)
    ids = {
        impl: rejection_choice(p, q, candidate, positions, how, impl=impl) for impl in ("triton", "torch", "reference")
    }
    assert torch.equal(ids["triton"], ids["torch"])
    assert torch.equal(ids["torch"], ids["reference"])
    assert (ids["torch"][:, :2] == candidate[:, 1:]).any() and (ids["torch"][:, :2] != candidate[:, 1:]).any()


@pytest.mark.parametrize(
    ("scale", "shift"), [(1.5, 0.0), (3.0, 20.0), (9.0, -5.0), (1e-30, 0.0), (3e38, 0.0), (3.0, -1e7)]
)
def test_spans_keep_what_the_filters_keep(scale: float, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities from the smallest kept key and the mass that the kernels find, to the bit: wide and crowded logits,
    huge ones, and those on both sides of zero, where most keys are."""
    logits = make_logits(9, 8, 1, 60, scale=scale) + shift
    how = sampling_of(
        8, temperature=[1.0, 1.0, 1.0, 0.7, 2.0, 1.0, 1.0, 1.0], top_k=[0, 0, 0, 20, 0, 9, 1, 0],
        top_p=[0.3, 0.6, 0.9, 0.95, 1 - 2**-24, 1.0, 0.5, 1e-60], min_p=[0, 0, 0, 0, 0, 0.05, 1, 0],
    )  # fmt: skip
    use_spans(monkeypatch, 32, 16)
    kept = launch_kept_spans(logits, *how[:4])
    z = scaled_torch(logits, how.temperature)[:, 0]
    bits = z.view(torch.int32).long()
    keys = torch.where(bits < 0, -bits - 1, bits + 2**31)  # those of `order_key`
    weight = portable_exp_torch(z - z.amax(-1, keepdim=True))
    masses = torch.where((keys >= kept.keys[:, None]) & (weight >= how.min_p[:, None]), mass_of_torch(weight), 0)
    assert torch.equal(masses.sum(-1), kept.masses.sum(-1))
    probs = masses.to(torch.float32) / masses.sum(-1, keepdim=True).to(torch.float32)
    assert torch.equal(probs, filtered_probs(logits, how)[:, 0])


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_keeps_more_tokens_than_are_listed_at_first_where_it_takes_them(spread: float) -> None:
    logits, how = make_logits(5, 2, 2, 8 * LISTED, scale=spread), sampling_of(2, top_p=[0.9, 0.5])
    kept = filtered_probs(logits, how) > 0
    assert torch.equal(kept, kept_reference(logits, how))
    assert (kept.sum(-1) > LISTED).any() == (spread < 4)


def test_every_decision_is_the_rule() -> None:
    """Accept and replace as written down: with u and the noise uniform and Gumbel (tested with the noise), the exact
    enumeration below is then a statement about this op."""
    p_logits, q_logits = make_logits(3, 500, 2, 9, scale=1.0), make_logits(4, 500, 1, 9, scale=1.0)
    how, positions = sampling_of(500, seed=5, top_p=0.9), positions_of(500, 2)
    candidate = draft(q_logits, torch.zeros(500, dtype=torch.int64, device=DEVICE), positions, how)
    choice = rejection_choice(p_logits, q_logits, candidate, positions, how, impl="torch")
    p, q = filtered_probs(p_logits, how), filtered_probs(q_logits, how)
    u = uniform_torch(*row_key_torch(how.seed, how.sequence, positions[:, 0], ACCEPT))
    noise = gumbel_torch(9, *row_key_torch(how.seed, how.sequence, positions[:, 0], CHOICE)).double()
    accepted = 0
    for b in range(500):
        d = int(candidate[b, 1])
        if u[b] * q[b, 0, d] < p[b, 0, d]:
            expected, accepted = d, accepted + 1
        else:
            expected = int(((p[b, 0] - q[b, 0]).clamp(min=0).double().log() + noise[b]).argmax())
        assert int(choice[b, 0]) == expected
    assert 100 < accepted < 490


def test_a_draft_is_kept_where_rounding_left_nothing_to_replace_it() -> None:
    """p sums to a little less than q does: here to much less, so that every draft comes to it."""
    n, positions = 400, positions_of(400, 2)
    p, q = (torch.tensor(probs, device=DEVICE) for probs in ([0.2, 0.3, 0.0], [0.3, 0.6, 0.1]))
    candidate = (torch.arange(2 * n, device=DEVICE) % 2).view(n, 2)
    rows = (torch.zeros(n, 2, 3, device=DEVICE), p.expand(n, 2, 3), q.expand(n, 1, 3))
    choice = _accept_or_replace(*rows, candidate, positions, sampling_of(n))
    assert torch.equal(choice[:, 0], candidate[:, 1])


def test_joint_distribution_by_enumeration() -> None:
    """All paths of draft, accept and replace over two cycles of K = 3 in a vocabulary of 3, in fp64: the chance of
    every text of three tokens is the AR chain's, and the acceptance rate is one minus the total variation."""
    generator = torch.Generator().manual_seed(0)
    how = sampling_of(1, temperature=0.8, top_p=0.95)
    # p depends on the last token, q on the anchor and the distance only: a drafter that guesses in parallel
    p = filtered_probs(torch.randn(1, 3, 3, generator=generator).to(DEVICE), how)[0].double().cpu()
    q = filtered_probs(torch.randn(3, 2, 3, generator=generator).to(DEVICE), sampling_of(3))[:].double().cpu()

    def decode(text: tuple[int, ...], length: int) -> dict[tuple[int, ...], float]:
        """Chance of every text of `length` tokens that begins with `text`."""
        if len(text) >= length:
            return {text[:length]: 1.0}
        outcomes: dict[tuple[int, ...], float] = {}

        def add(found: tuple[int, ...], chance: float) -> None:
            if chance:
                for whole, further in decode(found, length).items():
                    outcomes[whole] = outcomes.get(whole, 0.0) + chance * further

        for drafts in itertools.product(range(3), repeat=2):
            chance = float(q[text[-1], 0, drafts[0]] * q[text[-1], 1, drafts[1]])
            now = text
            for distance, d in enumerate(drafts):
                p_row, q_row = p[now[-1]], q[text[-1], distance]
                accept = min(1.0, float(p_row[d] / q_row[d])) if q_row[d] else 0.0
                rest = (p_row - q_row).clamp(min=0)
                for token in range(3):
                    if float(rest.sum()):
                        add((*now, token), chance * (1 - accept) * float(rest[token] / rest.sum()))
                chance, now = chance * accept, (*now, d)
            for token in range(3):
                add((*now, token), chance * float(p[now[-1]][token]))
        return outcomes

    outcomes = decode((0,), 4)
    for text in itertools.product(range(3), repeat=3):
        expected = float(p[0][text[0]] * p[text[0]][text[1]] * p[text[1]][text[2]])
        assert abs(outcomes.get((0, *text), 0.0) - expected) < 1e-6


def test_joint_distribution_of_the_op_and_its_acceptance() -> None:
    """The ops in a loop as the decoder runs them, 20,000 sequences of a Markov chain, three tokens: chi-square, and
    the first draft is accepted as often as any method could."""
    generator = torch.Generator().manual_seed(6)
    p_table, q_table = torch.randn(4, 4, generator=generator), torch.randn(4, 2, 4, generator=generator)
    p_table, q_table = p_table.to(DEVICE), (q_table + p_table[:, None]).to(DEVICE)
    n = 20_000
    how = sampling_of(n, seed=3)
    text = torch.zeros(n, 8, dtype=torch.int64, device=DEVICE)
    length = torch.zeros(n, dtype=torch.int64, device=DEVICE)  # the anchor's place in text
    rows, first_accepted = torch.arange(3, device=DEVICE), None
    for _ in range(3):
        anchor = text.gather(1, length[:, None])[:, 0]
        positions = (length[:, None] + rows + 1).to(torch.int32)
        candidate = draft(q_table[anchor], anchor, positions, how)
        choice = rejection_choice(p_table[candidate], q_table[anchor], candidate, positions, how, impl="torch")
        accepted = (choice[:, :2] == candidate[:, 1:]).long().cumprod(1).sum(1)
        first_accepted = (accepted > 0).double().mean() if first_accepted is None else first_accepted
        for t in range(3):
            at = (length + t + 1).clamp(max=7)[:, None]
            kept = torch.where((t <= accepted)[:, None], choice[:, t : t + 1], text.gather(1, at))
            text.scatter_(1, at, kept)
        length = (length + accepted + 1).clamp(max=4)
    counts = torch.bincount((text[:, 1] * 4 + text[:, 2]) * 4 + text[:, 3], minlength=64).double().cpu()
    p = p_table.double().cpu().softmax(-1)
    expected = n * (p[0][:, None, None] * p[:, :, None] * p[None]).flatten()
    assert float(((counts - expected) ** 2 / expected).sum()) < 103.4  # 99.9 % of 63 degrees of freedom
    optimum = float(torch.minimum(p[0], q_table[0, 0].double().cpu().softmax(-1)).sum())
    assert abs(float(first_accepted) - optimum) < 4 * (optimum * (1 - optimum) / n) ** 0.5


def processors_of(batch: int, vocab: int, **values: torch.Tensor) -> ProcessorTensors:
    fp32, int32 = {"dtype": torch.float32, "device": DEVICE}, {"dtype": torch.int32, "device": DEVICE}
    neutral = ProcessorTensors(
        torch.ones(batch, **fp32), torch.zeros(batch, **fp32), torch.zeros(batch, **fp32), torch.zeros(batch, **int32),
        torch.zeros(batch, vocab, **fp32), torch.zeros(batch, vocab + 1, **int32),
    )  # fmt: skip
    return neutral._replace(**{name: value.to(DEVICE) for name, value in values.items()})


@pytest.mark.parametrize("block", [2048, 16])
def test_processors_know_each_rows_history(block: int, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(importlib.import_module("orthrus_triton.ops.process_logits"), "BLOCK", block)
    vocab, prompt, generated = 40, [1, 2, 2, 30], [7, 7, 5]
    candidate = torch.tensor([[5, 7, 9, 9, 2]], device=DEVICE)
    logits, eos = make_logits(8, 1, 5, vocab).nan_to_num(neginf=-50.0), torch.tensor([3, -1], device=DEVICE)
    history = torch.zeros(1, vocab + 1, dtype=torch.int32)
    for token in prompt:
        history[0, token] |= IN_PROMPT
    for token in generated:
        history[0, token] += 1
    bias = torch.zeros(1, vocab)
    bias[0, 11] = -torch.inf
    processors = processors_of(
        1, vocab, repetition_penalty=torch.tensor([1.7]), presence_penalty=torch.tensor([0.5]),
        frequency_penalty=torch.tensor([0.25]), min_position=torch.tensor([12], dtype=torch.int32), bias=bias,
        history=history,
    )  # fmt: skip
    out = {
        impl: process_logits(logits, positions_of(1, 5, 9), candidate, eos, processors, impl=impl)
        for impl in ("triton", "torch")
    }
    assert torch.equal(out["triton"], out["torch"])
    for t in range(5):
        own = generated + candidate[0, 1 : t + 1].tolist()
        ids = torch.tensor([prompt + own], device=DEVICE)
        expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits[:, t].clone())[0]
        for token in range(vocab):
            expected[token] -= 0.25 * own.count(token) + 0.5 * (token in own)
        expected[11] = -torch.inf
        if 9 + t < 12:
            expected[3] = -torch.inf
        torch.testing.assert_close(out["torch"][0, t], expected, rtol=1e-6, atol=1e-6)
    for rows, impl in itertools.product((1, 2), out):  # of a shorter block
        few = (tensor[:, :rows] for tensor in (logits, positions_of(1, 5, 9), candidate))
        assert torch.equal(process_logits(*few, eos, processors, impl=impl), out[impl][:, :rows])
    without = process_logits(logits, positions_of(1, 5, 9), None, eos, processors, impl="triton")
    assert torch.equal(without, process_logits(logits, positions_of(1, 5, 9), None, eos, processors, impl="torch"))
    assert torch.equal(without[:, 0], out["torch"][:, 0])


def test_parameters_may_lie_apart() -> None:
    """Those that are a column of something are read as what they are."""
    batch, rows, vocab = 8, 2, 40
    logits, positions, how = make_logits(1, batch, rows, vocab), positions_of(batch, rows), mixed_sampling()
    candidate = draft(make_logits(2, batch, rows - 1, vocab), torch.zeros_like(positions[:, 0]).long(), positions, how)
    generator = torch.Generator(DEVICE).manual_seed(0)
    neutral = processors_of(batch, vocab)
    processors = neutral._replace(
        bias=torch.randn(batch, vocab, generator=generator, device=DEVICE),
        frequency_penalty=torch.rand(batch, generator=generator, device=DEVICE),
        history=torch.randint(0, 3, neutral.history.shape, generator=generator, device=DEVICE, dtype=torch.int32),
    )

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack((tensor, tensor.flip(0)), dim=-1)[..., 0]

    def chosen(layout) -> tuple[torch.Tensor, ...]:
        sampling = type(how)(*map(layout, how))
        return (
            sample_choice(logits, positions, sampling, impl="triton"),
            rejection_choice(logits, logits[:, 1:] / 2, candidate, positions, sampling, impl="triton"),
            process_logits(
                logits, positions, candidate, layout(torch.tensor([3, 5], device=DEVICE)),
                type(processors)(*map(layout, processors)), impl="triton",
            ),
        )  # fmt: skip

    for got, expected in zip(chosen(apart), chosen(torch.clone)):
        assert torch.equal(got, expected)


def test_ops_are_registered_as_they_behave() -> None:
    logits, positions, how = make_logits(1, 8, 3, 20), positions_of(8, 3), mixed_sampling()
    ids = torch.zeros(8, 3, dtype=torch.int64, device=DEVICE)
    processors = processors_of(8, 20)
    calls = {
        "sample_choice": (logits, positions, *how, CHOICE, "torch"),
        "rejection_choice": (logits, logits[:, :2], ids, positions, *how, "torch"),
        "process_logits": (logits, positions, ids, ids[0], *processors, "torch"),
        "void_rows": (ids, logits, "torch"),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.orthrus_triton, name).default, arguments)


def test_void_rows_are_those_that_are_not_finite() -> None:
    hidden, choice = torch.randn(2, 3, 5, device=DEVICE), torch.arange(6, device=DEVICE).view(2, 3)
    hidden[0, 1, 4], hidden[1, 2, 0] = torch.nan, -torch.inf
    for impl in ("triton", "torch"):
        assert ops.void_rows(choice, hidden, impl=impl).tolist() == [[0, ops.VOID, 2], [3, 4, ops.VOID]]


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty", "min_position"])
def test_processors_of_other_sequences_are_refused(field: str) -> None:
    values, V = torch.ones(2), 9
    processors = ProcessorTensors(
        values, values, values, values.int(), torch.zeros(2, V), torch.zeros(2, V + 1, dtype=torch.int32)
    )._replace(**{field: torch.ones(1)})
    with pytest.raises(ValueError, match=rf"{field} must have shape \(2,\), but got \(1,\)"):
        process_logits(torch.zeros(2, 1, V), torch.zeros(2, 1, dtype=torch.int32), None, torch.tensor([3]), processors)
