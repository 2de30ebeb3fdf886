"""Which slot a request takes, and whose cache it begins with."""

from __future__ import annotations

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, DecodeRun
from orthrus_triton.serving.placing import TEMPLATE_TAIL, find_place
from tests.modules.ledger_model import LedgerModel

SYSTEM = [9] * 20  # what every conversation begins with


def turn(user: int, count: int = 10) -> list[int]:
    """A first turn of a user: nothing after the instructions is another's."""
    return [*SYSTEM, *[user] * count]


def answered(slots: int, prompts: dict[int, list[int]], live: tuple[int, ...] = ()) -> DecodeRun:
    """A run in which these were answered in this order, and those in `live` still are."""
    run = ConsensusDecoder(LedgerModel(), impl="torch", mode="ar").open(slots, 128, eos_token_id=[])
    for b, prompt in prompts.items():
        run.admit(b, torch.tensor(prompt), 60 if b in live else 3)
        while b not in live and not run.slots[b].finished:
            run.advance()
    return run


def place(run: DecodeRun, prompt: list[int]) -> tuple[int, int]:
    free = [b for b, slot in enumerate(run.slots) if slot.finished]
    found = find_place(run, free, torch.tensor(prompt))
    assert found.cached == run.cached_prefix(found.source, torch.tensor(prompt))
    return found.slot, found.source


def test_a_conversation_goes_on_where_it_was() -> None:
    run = answered(3, {1: turn(1), 2: turn(2)})
    for b in (1, 2):
        text = [*run.slots[b].prompt.tolist(), *run.slots[b].tokens]
        assert place(run, [*text, 3, 4]) == (b, b)
        assert place(run, text[:30]) == (b, b)  # the same turn again
        assert place(run, [*text[: 29 - TEMPLATE_TAIL], 5, 6, 7]) == (b, b)  # a template that ends prompts otherwise


@pytest.mark.parametrize("later", [0, 1])
def test_of_two_turns_of_a_conversation_the_later_one_goes_on(later: int) -> None:
    text = [*turn(1), 5, 6]
    run = answered(2, {1 - later: turn(1), later: text})
    assert place(run, [*text, 7]) == (later, later)


def test_a_new_one_leaves_conversations_alone_and_copies_what_all_begin_with() -> None:
    run = answered(4, {1: turn(1), 2: turn(2)})
    assert place(run, turn(3)) == (0, 1)  # 0 was never used
    assert place(run, [4] * 30) == (0, 0)  # nobody holds any of it
    run.admit(0, torch.tensor(turn(3)), 3, cached=0)
    run.admit(3, torch.tensor(turn(4)), 3, cached=0)
    while not run.done:
        run.advance()
    assert place(run, turn(5)) == (1, 1)  # all were used; 1 longest ago, and it holds as much as the others
    assert place(run, [*turn(2)[:27], 5, 5]) == (2, 2)
    assert place(run, [*turn(2)[:20], 5, 5]) == (1, 1)
    run.prefill_ahead(3, torch.tensor(turn(6)), 0)  # somebody who left while the prompt was read: it holds nothing
    assert place(run, turn(7)) == (3, 0)


def test_short_prompts_that_only_begin_alike_are_other_conversations() -> None:
    run = answered(3, {1: [9, 1, 1], 2: [2, 1, 1]})
    assert place(run, [9, 3, 3]) == (0, 1) and place(run, [4, 3, 3]) == (0, 0)
    assert place(run, [9, 1, 1]) == (1, 1)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_on_a_cpu_steps_stay_narrow(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = answered(6, {0: turn(1), 5: turn(5), 3: turn(3)}, live=(3,))
    monkeypatch.setattr(ConsensusDecoder, "needs_all_slots", on_gpu)
    text = [*run.slots[5].prompt.tolist(), *run.slots[5].tokens, 4]
    # beside the one that decodes, with a copy of what lies far from it
    assert place(run, text) == ((5, 5) if on_gpu else (2, 5))
    assert place(run, turn(2)) == ((1, 0) if on_gpu else (2, 0))
    assert place(run, turn(3)) == ((1, 3) if on_gpu else (2, 3))  # what goes on is copied, too
