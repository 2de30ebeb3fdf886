"""The scheduler without HTTP: what goes wrong in one request, or in all of them, and who hears of it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from orthrus_triton.modules import ConsensusDecoder, DecodeRun, SamplingParams
from orthrus_triton.modules.run_to_end import WHY_NO_TOKEN
from orthrus_triton.serving import QueueFullError, Request, Scheduler
from orthrus_triton.serving.apart import run_apart
from tests.modules.ledger_model import LedgerModel, oracle
from tests.modules.test_cuda_graph import StandInGraphs
from tests.serving.watched import Watched, wait_for

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
    assert not scheduler._thread.is_alive()
    with pytest.raises(RuntimeError, match="the server is closing"):
        ask([1], 6)
    with pytest.raises(ValueError, match="slots must be an integer >= 1, but got 0"):
        Scheduler(ConsensusDecoder(model, impl="torch"), slots=0)
    with pytest.raises(ValueError, match="sampling must be 'coupled' or 'rejection', but got 'nucleus'"):
        Scheduler(ConsensusDecoder(model, impl="torch"), sampling="nucleus")
    assert issubclass(QueueFullError, RuntimeError)


def test_a_prompt_is_integers_in_a_tensor_or_a_list() -> None:
    scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), slots=2, max_len=64)
    answers = []
    for prompt in ([1, 2], torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int16)):
        got, done = [], threading.Event()
        deliver = lambda tokens, reason, _, got=got, done=done: (got.extend(tokens), reason and done.set())  # noqa: E731
        scheduler.submit(Request(prompt, 5, SamplingParams(), deliver))
        assert done.wait(20)
        answers.append(got)
    assert answers == [oracle(LedgerModel(VOCAB), [1, 2], 5, SamplingParams())] * 3
    for wrong in ([1.0, 2.0], torch.tensor([True])):  # at once, not by an error that is delivered
        with pytest.raises(ValueError, match="prompt must hold integers, but got torch"):
            scheduler.submit(Request(wrong, 5, SamplingParams(), print))
    scheduler.close()


def test_a_listener_that_fails_is_dropped_alone() -> None:
    scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), slots=2, max_len=64)
    got, failed, done = [], [], threading.Event()

    def deliver(tokens, reason, error) -> None:
        got.extend(tokens)
        if reason:
            done.set()

    scheduler.submit(Request(torch.tensor([1]), 30, SamplingParams(), lambda *part: failed.append(part) or 1 / 0))
    scheduler.submit(Request(torch.tensor([2]), 30, SamplingParams(), deliver))
    assert done.wait(20) and got == oracle(LedgerModel(VOCAB), [2], 30, SamplingParams())
    wait_for(lambda: scheduler.running == 0)
    assert len(failed) == 1
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


@pytest.mark.parametrize("which", ["stop", "logits_processor"])
def test_one_whose_function_fails_gives_its_slot_back(which: str) -> None:
    """The latter fails while the prompt is read. Who decodes beside it goes on."""
    scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch", mode="ar"), slots=2, max_len=64)
    if which == "stop":
        failing = Watched([1], 50, stop=lambda new: len(new) == 3 and 1 / 0)
    else:
        failing = Watched([1], 50, params=SamplingParams(logits_processor=lambda ids, scores: scores[:, :3]))
    neighbour, next_one = Watched([3], 60), Watched([2], 9)
    for watched in (neighbour, failing, next_one):
        scheduler.submit(watched.request)
    assert failing.wait()[1] == "error" and which in failing.wait()[2]
    for watched, prompt, count in ((neighbour, [3], 60), (next_one, [2], 9)):
        assert watched.wait() == (oracle(LedgerModel(VOCAB), prompt, count, SamplingParams()), "length", "")
    scheduler.close()


def test_no_request_waits_for_a_capture() -> None:
    decoder = StandInGraphs(LedgerModel(VOCAB), impl="torch")
    scheduler = Scheduler(decoder, slots=2, max_len=64)
    assert decoder.captures == 1
    scheduler.close()


def test_a_lost_device_is_said_to_all_who_wait_and_come(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch"), slots=1, max_len=64)
    heard: list[str] = []

    def lost(*_: object, **__: object) -> None:
        time.sleep(0.1)  # until both have come
        raise RuntimeError("device lost")

    assert scheduler.why_closed is None
    monkeypatch.setattr(LedgerModel, "forward_view", lost)
    monkeypatch.setattr(ConsensusDecoder, "open", lost)
    for _ in range(2):
        scheduler.submit(Request(torch.tensor([1]), 6, SamplingParams(), lambda *part: heard.append(part[2])))
    wait_for(lambda: len(heard) == 2)
    assert heard == ["RuntimeError: device lost", "the model cannot run any more: RuntimeError: device lost"]
    with pytest.raises(RuntimeError, match="cannot run any more: RuntimeError: device lost"):
        scheduler.submit(Request(torch.tensor([1]), 6, SamplingParams(), print))
    assert scheduler.why_closed == heard[1]
    scheduler.close()


def test_what_an_error_ended_counts_with_its_tokens_and_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what was still being read into a slot, which holds another's tokens."""
    scheduler = Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch", mode="ar"), slots=1, max_len=64)
    first = Watched([1], 9)
    scheduler.submit(first.request)
    wait_for(lambda: first.ended)
    forward, passes = LedgerModel.forward_view, []

    def break_down(*arguments):
        passes.append(1)
        return forward(*arguments) if len(passes) <= 4 else 1 / 0

    monkeypatch.setattr(LedgerModel, "forward_view", break_down)
    running, entering = Watched([2], 40), Watched([3], 40)
    for watched in (running, entering):
        scheduler.submit(watched.request)
        wait_for(lambda watched=watched: watched.ended == "error")
    scheduler.close()
    assert len(running.tokens) == 4 and not entering.tokens
    assert scheduler.tokens == scheduler.cycles == 8 + 3


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


AT_THE_END = """
import torch
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.serving import Scheduler
from tests.modules.ledger_model import LedgerModel
from tests.serving.watched import Watched, wait_for

class Long(Watched):
    def _deliver(self, tokens, reason, error):
        super()._deliver(tokens, reason, error)
        if reason:
            print(reason, error, flush=True)

scheduler = Scheduler(ConsensusDecoder(LedgerModel(17), impl="torch"), slots=1, max_len=90_000)
long = Long([1], 80_000)
scheduler.submit(long.request)
wait_for(lambda: long.parts)
"""


def test_a_program_may_end_while_sequences_run() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "error the server is closing\n"), done.stderr


def test_a_program_ends_though_a_listener_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthrus_triton.serving.scheduler.EXIT_SECONDS", 0.05)
    scheduler, heard, go_on = (
        Scheduler(ConsensusDecoder(LedgerModel(VOCAB), impl="torch")),
        threading.Event(),
        threading.Event(),
    )
    scheduler.submit(Request([1], 5, SamplingParams(), lambda *_: (heard.set(), go_on.wait(20))))
    assert heard.wait(20)
    started = time.monotonic()
    scheduler._close_at_exit()
    assert time.monotonic() - started < 10 and scheduler._thread.is_alive()
    go_on.set()
    scheduler.close()


def chunks_read(monkeypatch: pytest.MonkeyPatch, heard: list) -> None:
    """Every chunk of a prompt that is read ahead is noted in `heard`, with how far it reaches."""
    ahead = DecodeRun.prefill_ahead

    def noted(run: DecodeRun, b: int, prompt: torch.Tensor, cached: int, on_logits: object) -> int:
        now = ahead(run, b, prompt, cached, on_logits)
        if now > cached:
            heard.append(now)
        return now

    monkeypatch.setattr(DecodeRun, "prefill_ahead", noted)


def test_others_go_on_while_a_long_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list = []
    chunks_read(monkeypatch, heard)
    decoder = ConsensusDecoder(LedgerModel(VOCAB), impl="torch", mode="ar", prefill_chunk=10)
    scheduler = Scheduler(decoder, slots=2, max_len=200)
    short = Watched([1], 150, heard=heard)
    prompt = torch.tensor(list(range(16)) * 3)
    long = Watched(prompt, 9, heard=heard)
    prompt.fill_(0)  # its owner's, for something else
    scheduler.submit(short.request)
    wait_for(lambda: short.parts)
    scheduler.submit(long.request)
    wait_for(lambda: short.ended and long.ended)
    scheduler.close()
    assert short.tokens == oracle(LedgerModel(VOCAB), [1], 150, SamplingParams())
    assert long.tokens == oracle(LedgerModel(VOCAB), list(range(16)) * 3, 9, SamplingParams())
    marks = [n for n, what in enumerate(heard) if isinstance(what, int)]
    assert [heard[n] for n in marks] == [10, 20, 30, 40]  # and 8 as it is admitted
    for before, after in zip(marks, marks[1:]):  # one cycle between two chunks
        assert [what[0] for what in heard[before + 1 : after]] == [short]


def test_one_that_leaves_or_fails_while_it_is_read_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list = []
    chunks_read(monkeypatch, heard)
    decoder = ConsensusDecoder(LedgerModel(VOCAB), impl="torch", prefill_chunk=2)
    scheduler = Scheduler(decoder, slots=1, max_len=400)
    gone, next_one = Watched([2] * 390, 5), Watched([2] * 9, 5)
    scheduler.submit(gone.request)
    wait_for(lambda: heard)
    scheduler.cancel(gone.request)
    scheduler.submit(next_one.request)
    wait_for(lambda: next_one.ended)
    assert heard[-1] < 300 and heard.count(2) == 2 and not gone.parts  # nothing of what was half read counts as cached
    assert next_one.tokens == oracle(LedgerModel(VOCAB), [2] * 9, 5, SamplingParams())
    with monkeypatch.context() as patch:
        patch.setattr(LedgerModel, "forward_view", lambda *args: 1 / 0)
        broken = Watched([3] * 9, 5)
        scheduler.submit(broken.request)
        wait_for(lambda: broken.ended)
    assert broken.parts == [([], "error", "ZeroDivisionError: division by zero")]
    again = Watched([3] * 9, 5)
    scheduler.submit(again.request)
    wait_for(lambda: again.ended)
    scheduler.close()
    assert again.tokens == oracle(LedgerModel(VOCAB), [3] * 9, 5, SamplingParams())


def test_what_prompts_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one is still being answered."""
    heard: list = []
    chunks_read(monkeypatch, heard)
    decoder = ConsensusDecoder(LedgerModel(VOCAB), impl="torch", mode="ar", prefill_chunk=10)
    scheduler = Scheduler(decoder, slots=3, max_len=400)
    shared = list(range(16)) * 3
    first, *others = (Watched([*shared, user], tokens) for user, tokens in ((1, 300), (2, 9), (3, 9)))
    scheduler.submit(first.request)
    wait_for(lambda: first.parts)
    heard.clear()
    rows, forward = [], LedgerModel.forward_view
    monkeypatch.setattr(
        LedgerModel, "forward_view", lambda model, ids, *rest: rows.append(ids.shape[1]) or forward(model, ids, *rest)
    )
    for other in others:
        scheduler.submit(other.request)
    wait_for(lambda: all(other.ended for other in others))
    assert heard == [] and not first.ended
    assert [count for count in rows if count > 1] == [8, 8]  # the one token of their own, as they are admitted
    assert [watched.request.cached for watched in (first, *others)] == [0, 48, 48]
    wait_for(lambda: scheduler.running == 1)
    assert scheduler.tokens == scheduler.cycles == 2 * 8  # in AR mode, without the first tokens
    scheduler.close()
    for user, other in enumerate(others, 2):
        assert other.tokens == oracle(LedgerModel(VOCAB), [*shared, user], 9, SamplingParams())
