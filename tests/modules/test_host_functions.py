"""What a function on the host gets: texts that decoding may say, none of which goes on behind its end."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from orthrus_triton.modules import Choosing, ConsensusDecoder, SamplingParams
from tests.modules.ledger_model import LedgerModel, oracle
from tests.modules.test_cuda_graph import StandInGraphs

VOCAB, EOS = 17, [4, 9]


@pytest.mark.parametrize("anchor_rows", [0, 1])
@pytest.mark.parametrize(("rule", "temperature"), [("coupled", 0.0), ("coupled", 1.0), ("rejection", 1.0)])
def test_no_text_goes_on_behind_its_end(anchor_rows: int, rule: str, temperature: float) -> None:
    model, ended = LedgerModel(VOCAB, anchor_rows=anchor_rows), 0

    def grammar(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """No token twice in a row, and nothing behind a stop token."""
        new = ids[0, 2:].tolist()
        assert not set(new) & set(EOS), f"a text that goes on behind its end: {new}"
        assert all(a != b for a, b in zip(new, new[1:])), f"a text that breaks the grammar: {new}"
        return scores.index_fill(1, ids[0, -1:], -torch.inf)

    decoder = ConsensusDecoder(model, impl="torch")
    for seed in range(12):
        params = SamplingParams(temperature=temperature, seed=seed, logits_processor=grammar)
        prompt = [seed, (seed + 5) % VOCAB]
        output = decoder.generate(
            [torch.tensor(prompt)], max_new_tokens=20, eos_token_id=EOS, params=[params], sampling=rule
        )
        new = output.sequences[0][2:].tolist()
        ended += new[-1] in EOS
        if rule == "coupled":
            assert new == oracle(model, prompt, 20, params, EOS)
    assert ended


def test_a_draft_without_a_token_ends_it() -> None:
    """Where the function bans every token in a draft, what would stand there is no token it has allowed."""
    model = LedgerModel(VOCAB)

    def at_most_two(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert ids.shape[1] <= 4, f"a text with a token that was banned: {ids.tolist()}"
        if ids.shape[1] == 4:
            return torch.full_like(scores, -torch.inf)
        return scores

    params = SamplingParams(logits_processor=at_most_two)
    with pytest.raises(ValueError, match="banned every token"):
        ConsensusDecoder(model, impl="torch").generate([torch.tensor([1, 2])], max_new_tokens=9, params=[params])


@pytest.mark.parametrize("anchor_rows", [0, 1])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_a_draft_goes_on_from_what_it_drafts(rule: str, anchor_rows: int) -> None:
    """By each sequence's own draws: of other texts, what functions leave would fit no draft."""
    asked, behind = defaultdict(list), []

    class Watching(ConsensusDecoder):
        def draft(self, cache, state, block_size, impl):
            return self.watched(state, lambda: (super(Watching, self).draft(cache, state, block_size, impl),))[0]

        def draft_and_judge(self, cache, state, block_size, impl):
            return self.watched(state, lambda: super(Watching, self).draft_and_judge(cache, state, block_size, impl))

        def watched(self, state, draft) -> tuple[torch.Tensor, ...]:
            asked.clear()
            lengths = (2 + state.output_len).tolist()
            said = draft()
            for b, texts in asked.items() if len(lengths) == 3 else ():  # all of them, each in its own row
                block = said[0][b, 1 - anchor_rows :].tolist()
                for text in texts:
                    new = text[lengths[b] :]
                    assert new == block[: len(new)]
                    behind.append(len(new))
            return said

    def watch(b: int):
        return lambda ids, scores: asked[b].append(ids[0].tolist()) or scores

    params = [
        SamplingParams(temperature=temperature, seed=b, logits_processor=watch(b))
        for b, temperature in enumerate((1.0, 0.0, 2.0))
    ]
    prompts = [torch.tensor([b, 3]) for b in range(3)]
    decoder = Watching(LedgerModel(VOCAB, anchor_rows=anchor_rows), impl="torch")
    decoder.generate(prompts, max_new_tokens=12, params=params, sampling=rule)
    assert max(behind) > 2


@pytest.mark.parametrize("mode", ["consensus", "ar"])
def test_steps_are_captured_while_no_sequence_has_a_function(mode: str) -> None:
    model = LedgerModel(VOCAB)
    decoder = StandInGraphs(model, impl="torch", mode=mode)
    run = decoder.open(2, 64, eos_token_id=[], choosing=Choosing(sampled=True, processed=True, hosted=True))
    assert decoder.captures == 0
    run.prepare()
    assert decoder.captures == (2 if mode == "ar" else 1)

    def odd(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.arange(0, VOCAB, 2), -torch.inf)

    plain = SamplingParams(temperature=1.0, seed=3)
    of_function = SamplingParams(temperature=1.0, seed=4, logits_processor=odd)
    for limit, params in ((9, of_function), (12, plain), (9, of_function)):  # two of them in a slot of no function
        before = decoder.replays
        run.admit(0, torch.tensor([1, 2]), 40, plain)
        run.admit(1, torch.tensor([3]), limit, params)
        while not run.slots[1].finished:
            run.advance()
        assert (decoder.replays == before) == (params is of_function)
        assert run.slots[1].tokens == oracle(model, [3], limit, params, [])
        while not run.slots[0].finished:
            run.advance()
        assert run.slots[0].tokens == oracle(model, [1, 2], 40, plain, [])
        assert decoder.replays > before


def test_a_function_is_heeded_from_the_first_token_on() -> None:
    """Also where the steps before its sequence came were of none."""
    model, plain = LedgerModel(VOCAB), SamplingParams(temperature=1.0, seed=3)
    run = ConsensusDecoder(model, impl="torch", mode="ar").open(
        2, 128, eos_token_id=[], choosing=Choosing(sampled=True, processed=True, hosted=True)
    )

    def odd(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.arange(0, VOCAB, 2), -torch.inf)

    run.admit(0, torch.tensor([1, 2]), 60, plain)
    for seed in range(8):
        run.advance()
        params = SamplingParams(temperature=1.0, seed=seed, logits_processor=odd)
        run.admit(1, torch.tensor([3, seed]), 3, params)
        while not run.slots[1].finished:
            run.advance()
        assert run.slots[1].tokens == oracle(model, [3, seed], 3, params, [])


def test_greedy_runs_choose_in_one_way_from_beginning_to_end() -> None:
    """Of logits where functions may want them, also after the last function: a fused choice may round otherwise."""
    model = LedgerModel(VOCAB)
    fused = []
    model.choose = lambda hidden, impl: fused.append(hidden)
    run = ConsensusDecoder(model, impl="torch").open(2, 64, eos_token_id=[], choosing=Choosing(hosted=True))
    run.admit(0, torch.tensor([1, 2]), 30)
    run.admit(1, torch.tensor([3]), 2, SamplingParams(logits_processor=lambda ids, scores: scores))
    while not run.done:
        run.advance()
    assert fused == [] and run.slots[0].tokens == oracle(model, [1, 2], 30, SamplingParams(), [])
