"""How requests of a scheduler end, and what they leave: their tokens to the last one, the reason, a slot for others."""

from __future__ import annotations

import threading

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.run_to_end import WHY_NO_TOKEN
from orthrus_triton.serving import Request, Scheduler
from tests.modules.ledger_model import LedgerModel, oracle
from tests.serving.watched import GREEDY, Watched, wait_for

VOCAB = 17


@pytest.fixture
def schedulers():
    """Makes schedulers of a model; they are closed in the end."""
    made: list[Scheduler] = []

    def make(model: LedgerModel, **options) -> Scheduler:
        made.append(Scheduler(ConsensusDecoder(model, impl="torch"), **{"slots": 1, "max_len": 64} | options))
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def agreeing(**options) -> LedgerModel:
    """Its drafts are all right, so that a cycle commits whole blocks."""
    model = LedgerModel(VOCAB, **options)
    model.by_sum *= 0.01
    return model


def ask(scheduler: Scheduler, *arguments, **options) -> Watched:
    asked = Watched(*arguments, **options)
    scheduler.submit(asked.request)
    return asked


@pytest.mark.parametrize("count", [1, 2, 3, 6, 9])
def test_a_stop_inside_a_block_is_the_last_token(count: int, schedulers) -> None:
    """Nothing behind it is delivered or counted, nor does it matter that the text could have gone on or failed."""
    model, seen = agreeing(), []

    def stop(new: list[int]) -> bool:
        seen.append(list(new))
        return len(new) == count

    scheduler, text = schedulers(model), oracle(model, [1, 2], 9, GREEDY)
    assert ask(scheduler, [1, 2], 9, stop).wait() == (text[:count], "stop", "")
    assert seen == [text[:n] for n in range(1, count + 1)]
    wait_for(lambda: scheduler.running == 0)
    assert scheduler._run.slots[0].tokens == text[:count] and scheduler.tokens == count - 1
    assert ask(scheduler, [1, 2], 9).wait() == (text, "length", "")


def test_a_failure_behind_a_stop_is_none(schedulers) -> None:
    model = agreeing()
    text = oracle(model, [1, 2], 5, GREEDY)
    model.poison = text[2]
    assert text[2] not in (1, 2, *text[:2])
    scheduler = schedulers(model)
    assert ask(scheduler, [1, 2], 9, lambda new: len(new) == 3).wait() == (text[:3], "stop", "")
    assert ask(scheduler, [1, 2], 9).wait()[1] == "error"


def test_a_stop_token_that_is_the_last_allowed_is_a_stop(schedulers) -> None:
    model = agreeing()
    text = oracle(model, [1, 2], 5, GREEDY)
    at = max(n for n in range(5) if text[n] not in text[:n])
    model.eos_token_ids = [text[at]]
    scheduler = schedulers(model)
    assert ask(scheduler, [1, 2], at + 1).wait() == (text[: at + 1], "stop", "")
    assert ask(scheduler, [1, 2], at).wait() == (text[:at], "length", "")
    assert ask(scheduler, [1, 2], 9).wait() == (text[: at + 1], "stop", "")


@pytest.mark.parametrize("room", [512, 600])
def test_prompt_and_text_may_fill_the_context(room: int, schedulers) -> None:
    """512 is as many rows as a cache for 512 tokens has, and 600 more than one for less."""
    model = LedgerModel(VOCAB)
    scheduler = schedulers(model, max_len=room)
    for tokens in (12, 1):
        prompt = [3] * (room - tokens)
        assert ask(scheduler, prompt, tokens).wait() == (oracle(model, prompt, tokens, GREEDY), "length", "")
        with pytest.raises(ValueError, match=f"max_tokens must be in 1..{tokens} with a prompt"):
            ask(scheduler, prompt, tokens + 1)
    with pytest.raises(ValueError, match=f"prompt must have at most {room - 1} tokens, but has {room}"):
        ask(scheduler, [3] * room, 1)
    with pytest.raises(ValueError, match="max_tokens must be in 1.."):
        ask(scheduler, [3], 0)


def test_what_cannot_run_is_refused_or_fails_alone(schedulers) -> None:
    scheduler = schedulers(LedgerModel(VOCAB))
    evens = SamplingParams(logits_processor=lambda ids, scores: scores.index_fill(1, torch.arange(0, VOCAB, 2), -1e9))
    both = [ask(scheduler, [1], 9, params=params) for params in (evens, GREEDY)]
    for watched, params in zip(both, (evens, GREEDY)):
        assert watched.wait()[0] == oracle(LedgerModel(VOCAB), [1], 9, params)
    odd = Watched([1], 5)
    odd.request.prompt = odd.request.prompt.float()
    with pytest.raises(ValueError, match="prompt must hold integers, but got torch.float32"):
        scheduler.submit(odd.request)
    assert ask(scheduler, [1], 5).wait()[0] == oracle(LedgerModel(VOCAB), [1], 5, GREEDY)
    model = scheduler.decoder.model
    passes = model.forward_view

    def refuses_once(*arguments):
        model.forward_view = passes
        raise ValueError("no such thing")

    model.forward_view = refuses_once
    assert ask(scheduler, [2], 5).wait() == ([], "error", "no such thing")
    assert ask(scheduler, [2], 5).wait()[0] == oracle(model, [2], 5, GREEDY)


def test_the_slot_of_a_failed_stop_function_is_free_at_once(schedulers) -> None:
    scheduler = schedulers(LedgerModel(VOCAB), max_len=400)
    assert ask(scheduler, [1], 390, lambda new: 1 / 0).wait()[1:] == (
        "error",
        "stop: ZeroDivisionError: division by zero",
    )
    assert ask(scheduler, [2], 5).wait() == (oracle(LedgerModel(VOCAB), [2], 5, GREEDY), "length", "")


def gated(scheduler: Scheduler) -> threading.Event:
    """The scheduler stands still until this is set."""
    go_on, cycle = threading.Event(), scheduler._cycle
    scheduler._cycle = lambda: go_on.wait(20) and cycle()
    return go_on


def test_first_come_first_served(schedulers) -> None:
    scheduler, order = schedulers(LedgerModel(VOCAB)), []
    go_on = gated(scheduler)
    for n in range(4):
        deliver = lambda tokens, reason, error, n=n: reason and order.append(n)  # noqa: E731
        scheduler.submit(Request(torch.tensor([n + 1]), 3, GREEDY, deliver))
    go_on.set()
    wait_for(lambda: len(order) == 4)
    assert order == [0, 1, 2, 3]


def test_one_that_is_cancelled_leaves_the_queue_and_hears_nothing(schedulers) -> None:
    scheduler = schedulers(LedgerModel(VOCAB), max_waiting=1)
    go_on = gated(scheduler)
    gone, other = ask(scheduler, [1], 5), ask(scheduler, [2], 5)
    scheduler.cancel(gone.request)
    assert scheduler.waiting == 1
    third = ask(scheduler, [3], 5)  # its place is free
    go_on.set()
    assert third.wait()[1] == other.wait()[1] == "length" and gone.parts == []


def test_one_that_is_cancelled_while_it_decodes_hears_nothing_more(schedulers) -> None:
    scheduler = schedulers(LedgerModel(VOCAB), max_len=512)
    gone = Watched([1], 500)

    def stop(new: list[int]) -> bool:
        if len(new) == 20:
            scheduler.cancel(gone.request)
        return False

    gone.request.stop = stop
    scheduler.submit(gone.request)
    wait_for(lambda: scheduler.tokens)
    heard = gone.tokens
    assert 0 < len(heard) < 20 and heard == oracle(LedgerModel(VOCAB), [1], len(heard), GREEDY)
    assert len(scheduler._run.slots[0].tokens) < 30 and not gone.parts[-1][1]


def test_those_who_wait_outlive_an_error_of_those_who_run(schedulers) -> None:
    model = LedgerModel(VOCAB)
    scheduler, passes = schedulers(model, slots=2), model.forward_view

    def fails_once(*arguments):
        model.forward_view = passes
        raise RuntimeError("out of memory")

    model.forward_view, go_on = fails_once, gated(scheduler)
    first, *others = [ask(scheduler, [n], 5) for n in (1, 2, 3)]
    go_on.set()
    assert first.wait() == ([], "error", "RuntimeError: out of memory")
    for n, other in enumerate(others, 2):
        assert other.wait() == (oracle(model, [n], 5, GREEDY), "length", "")


def test_one_that_fails_is_no_concern_of_the_others(schedulers) -> None:
    """The next step is of its slot, too, and counts tokens for penalties: it has said none that could be counted."""
    model, params = LedgerModel(VOCAB, poison=5), SamplingParams(logit_bias={5: -torch.inf}, frequency_penalty=0.5)
    scheduler = schedulers(model, slots=3)
    asked = [ask(scheduler, prompt, 40, params=params) for prompt in ([1], [1, 5], [2])]
    assert asked[1].wait() == ([], "error", WHY_NO_TOKEN)
    for prompt, one in (([1], asked[0]), ([2], asked[2])):
        assert one.wait() == (oracle(model, prompt, 40, params), "length", "")


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_requests_sample_by_the_rule_of_the_scheduler(rule: str, schedulers) -> None:
    model, params = LedgerModel(VOCAB), SamplingParams(temperature=1.5, seed=3)
    text = ask(schedulers(model, sampling=rule), [1, 2], 40, params=params).wait()[0]
    decoder = ConsensusDecoder(model, impl="torch")
    expected = decoder.generate([torch.tensor([1, 2])], max_new_tokens=40, params=[params], sampling=rule)
    assert text == expected.sequences[0][2:].tolist()
    assert (text == oracle(model, [1, 2], 40, params)) == (rule == "coupled")
