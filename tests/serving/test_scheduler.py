"""The scheduler without HTTP: what goes wrong in one request, or in all of them, and who hears of it."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.run_to_end import WHY_NO_TOKEN
from orthrus_triton.serving import QueueFullError, Request, Scheduler
from orthrus_triton.serving.apart import run_apart
from tests.modules.ledger_model import LedgerModel, oracle

VOCAB = 17


def test_an_error_ends_what_ran_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LedgerModel(VOCAB, poison=5)
    scheduler = Scheduler(ConsensusDecoder(model, impl="torch"), slots=2, max_len=64, max_waiting=2)

    def ask(prompt: list[int], tokens: int) -> tuple[list[int], str, str]:
        done, got = threading.Event(), []

        def deliver(tokens, reason, error) -> None:
            got.extend(tokens)
            if reason:
                got.append((reason, error))
                done.set()

        scheduler.submit(Request(torch.tensor(prompt), tokens, SamplingParams(logit_bias={5: -torch.inf}), deliver))
        assert done.wait(20)
        return got[:-1], *got[-1]

    healthy = oracle(LedgerModel(VOCAB), [1], 6, SamplingParams(logit_bias={5: -torch.inf}))
    assert ask([1], 6) == (healthy, "length", "")
    assert ask([1, 5], 6) == ([], "error", WHY_NO_TOKEN)
    with monkeypatch.context() as patch:
        patch.setattr(LedgerModel, "forward_view", lambda *args: 1 / 0)
        assert ask([1, 2, 3, 4], 6)[1:] == ("error", "ZeroDivisionError: division by zero")
    # nothing of that prompt counts as cached
    healthy = oracle(LedgerModel(VOCAB), [1, 2, 3, 4], 6, SamplingParams(logit_bias={5: -torch.inf}))
    assert ask([1, 2, 3, 4], 6) == (healthy, "length", "")
    with pytest.raises(ValueError, match=r"prompt must hold ids in 0\.\.16, but got -1"):
        ask([3, -1], 6)
    scheduler.close()
    with pytest.raises(RuntimeError, match="the server is closing"):
        ask([1], 6)
    with pytest.raises(ValueError, match="slots must be an integer >= 1, but got 0"):
        Scheduler(ConsensusDecoder(model, impl="torch"), slots=0)
    with pytest.raises(ValueError, match="sampling must be 'coupled' or 'rejection', but got 'nucleus'"):
        Scheduler(ConsensusDecoder(model, impl="torch"), sampling="nucleus")
    assert issubclass(QueueFullError, RuntimeError)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_listener_that_fails_is_dropped_alone() -> None:
    scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), slots=2, max_len=64)
    got, done = [], threading.Event()

    def deliver(tokens, reason, error) -> None:
        got.extend(tokens)
        if reason:
            done.set()

    scheduler.submit(Request(torch.tensor([1]), 30, SamplingParams(), lambda *_: 1 / 0))
    scheduler.submit(Request(torch.tensor([2]), 30, SamplingParams(), deliver))
    assert done.wait(20) and got == oracle(LedgerModel(VOCAB), [2], 30, SamplingParams())
    wait_for(lambda: scheduler.running == 0)
    scheduler.close()


def test_a_stop_function_that_fails_ends_its_request_alone() -> None:
    scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), slots=2, max_len=64)
    got, failed = [], []

    def stop(new: list[int]) -> bool:
        return len(new) == 3 and 1 / 0

    scheduler.submit(Request(torch.tensor([2]), 30, SamplingParams(), lambda *part: got.append(part)))
    scheduler.submit(Request(torch.tensor([1]), 30, SamplingParams(), lambda *part: failed.append(part), stop))
    wait_for(lambda: got and got[-1][1] and failed and failed[-1][1])
    assert failed[-1][1:] == ("error", "stop: ZeroDivisionError: division by zero")
    assert got[-1][1:] == ("length", "")
    assert [token for part in got for token in part[0]] == oracle(LedgerModel(VOCAB), [2], 30, SamplingParams())
    scheduler.close()


def test_a_lost_device_is_said_to_all_who_wait_and_come(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), slots=1, max_len=64)
    heard: list[str] = []

    def lost(*_: object, **__: object) -> None:
        time.sleep(0.1)  # until both have come
        raise RuntimeError("device lost")

    monkeypatch.setattr(LedgerModel, "forward_view", lost)
    monkeypatch.setattr(ConsensusDecoder, "open", lost)
    for _ in range(2):
        scheduler.submit(Request(torch.tensor([1]), 6, SamplingParams(), lambda *part: heard.append(part[2])))
    wait_for(lambda: len(heard) == 2)
    assert heard == ["RuntimeError: device lost", "the model cannot run any more: RuntimeError: device lost"]
    with pytest.raises(RuntimeError, match="cannot run any more: RuntimeError: device lost"):
        scheduler.submit(Request(torch.tensor([1]), 6, SamplingParams(), print))
    scheduler.close()


def test_the_caller_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has computed on a CPU keeps worker threads, which slow down whoever computes next."""
    computed: set[str] = set()

    def note(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def noted(*arguments, **options):
            computed.add(threading.current_thread().name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    note(LedgerModel, "new_cache")
    note(LedgerModel, "forward_view")
    scheduler, done = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), slots=2, max_len=64), []
    scheduler.submit(Request(torch.tensor([1]), 6, SamplingParams(), lambda *part: done.append(part[1])))
    wait_for(lambda: done and done[-1])
    scheduler.close()
    assert len(computed) == 2 and threading.current_thread().name not in computed


def no_model() -> None:
    raise FileNotFoundError("no such model")


def test_work_done_apart_gives_its_result_or_its_error() -> None:
    assert run_apart(lambda: threading.current_thread() is not threading.main_thread())
    with pytest.raises(FileNotFoundError, match="no such model"):
        run_apart(no_model)
