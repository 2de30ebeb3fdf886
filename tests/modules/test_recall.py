"""What is recalled is what followed the longest earlier match; the chain prefers it; the text stays AR's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_triton.models import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules import choose as choose_module
from orthrus_triton.modules.batch_prefill import BatchPrefill
from orthrus_triton.modules.draft_chain import DraftChain
from orthrus_triton.modules.recall import LONGEST, Recalled, recall
from tests.models.tiny_bases import base_config, build_base, random_ids, randomise_view


def recall_by_hand(ids: list[int], count: int) -> tuple[list[int] | None, list[float]]:
    best = (0, 0)
    for place in range(len(ids) - 1):
        length = 0
        while length < min(LONGEST, place + 1) and ids[place - length] == ids[-1 - length]:
            length += 1
        best = max(best, (length, place))
    length, place = best
    if not length:
        return None, [0.0] * count
    text = list(ids)
    while len(text) <= place + count:
        text.append(text[place + 1 + len(text) - len(ids)])
    bonus = [float(min(length - 1 + t, LONGEST)) for t in range(count)]
    return text[place + 1 : place + 1 + count], bonus


@given(
    sequences=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=3),
    count=st.integers(1, 9),
    noise=st.integers(-2, 5),
)
@settings(deadline=None, max_examples=200)
def test_the_longest_match_goes_on_as_it_did(sequences: list[list[int]], count: int, noise: int) -> None:
    ids = torch.full((len(sequences), 32), noise)
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = torch.tensor(sequence)
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], dtype=torch.int32)
    tokens, bonus = recall(ids, last, count)
    assert (tokens >= 0).all()
    for b, sequence in enumerate(sequences):
        expected, expected_bonus = recall_by_hand(sequence, count)
        assert bonus[b].tolist() == expected_bonus
        if expected is not None:
            assert tokens[b].tolist() == expected


def test_a_sequence_at_the_end_of_its_cache_is_no_error() -> None:
    tokens, bonus = recall(torch.arange(6)[None], torch.tensor([6]), 4)
    assert tokens.shape == bonus.shape == (1, 4)


def test_the_chain_follows_what_it_recalls_as_long_as_it_does() -> None:
    torch.manual_seed(3)
    chain, (T, H, V) = DraftChain(24, 10), (5, 24, 300)
    hidden, head, own = torch.randn(1, T, H), torch.randn(V, H), torch.tensor([7])
    logits = hidden @ head.T
    plain = chain.choose(hidden, logits, own, head, head)[0].tolist()
    said = logits.argsort(-1)[0, :, 100].tolist()  # not among the candidates by themselves
    sure = torch.full((1, T), 1e4)
    with torch.no_grad():
        assert (
            chain.choose(hidden, logits, own, head, head, None, Recalled(torch.tensor([said]), sure))[0].tolist()
            == said
        )
        # the first is outbid, so nothing behind it was ever said after what stands there
        sure[0, 0] = 0
        assert (
            chain.choose(hidden, logits, own, head, head, None, Recalled(torch.tensor([said]), sure))[0].tolist()
            == plain
        )


@pytest.mark.parametrize("together", [False, True], ids=["one_by_one", "together"])
@pytest.mark.parametrize("anchor_view", ["diffusion", "ar"])
def test_a_decoder_looks_back_at_prompt_and_output(
    anchor_view: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build_base(base_config("llama", eos_token_id=None))
    model = randomise_view(OrthrusForCausalLM.from_base(base, block_size=5, anchor_view=anchor_view, chain_width=16))
    seen: list[tuple[list[int], int]] = []

    def watched(ids: torch.Tensor, last: torch.Tensor, count: int) -> Recalled:
        assert count == 4
        seen.extend((row[: end + 1].tolist(), b) for b, (row, end) in enumerate(zip(ids, last.tolist())))
        return recall(ids, last, count)

    monkeypatch.setattr(choose_module, "recall", watched)
    prompts = [random_ids(length, seed=length)[0] for length in (5, 11)]
    decoder = ConsensusDecoder(model, impl="torch")
    run = decoder.open(2, 64, eos_token_id=[])
    if together:
        run.admit_together([0, 1], prompts, 20, BatchPrefill(model, 16, 2))
    else:
        for b in range(2):
            run.admit(b, prompts[b], 20)
    while not run.done:
        run.advance()
    said = [prompt.tolist() + slot.tokens for prompt, slot in zip(prompts, run.slots)]
    assert len(seen) >= 2 * 20 // 6
    # a sequence that has ended drafts on until its neighbour has, and nobody looks
    assert all(ids == said[b][: len(ids)] for ids, b in seen if len(ids) <= len(said[b]))
    known = 5 + (anchor_view == "ar") + (not together)
    assert min(len(ids) for ids, b in seen if b == 0) == known
