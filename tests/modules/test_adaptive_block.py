"""The rule that chooses block sizes, on invented times and drafts; and that no choice of its ever moves a token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthrus_triton.modules import ConsensusDecoder, SamplingParams
from orthrus_triton.modules.adaptive_block import AR, AdaptiveBlock, auto_sizes
from tests.modules.drafts import ScriptedDrafts
from tests.modules.ledger_model import LedgerModel, oracle
from tests.modules.test_consensus_decoder import MODELS, ar_answer, prompts_of

CPU_TIMES = {1: 49.0, 4: 104.0, 8: 108.0, 16: 128.0, 32: 160.0}  # a pass per row count, two per drafted cycle
GPU_TIMES = {1: 3.5, 4: 7.0, 8: 7.0, 16: 7.05, 32: 7.1}


def play(rule: AdaptiveBlock, times: dict[int, float], agreed: list[int]) -> list[int]:
    """Run one cycle for each entry of `agreed`, the drafts that a long enough block would get right."""
    sizes = []
    for right in agreed:
        size = rule.next_size()
        sizes.append(size)
        rule.observe(size, times[size], [min(right, size - 1)])
    return sizes


def calibrated(times: dict[int, float], right: int) -> AdaptiveBlock:
    rule = AdaptiveBlock(times)
    play(rule, times, [right] * rule.SAMPLES * len(times))
    return rule


def test_every_size_is_timed_once_the_largest_first() -> None:
    rule = AdaptiveBlock(CPU_TIMES)
    sizes = play(rule, CPU_TIMES, [3] * 15)
    assert sizes == [size for size in (32, 16, 8, 4, 1) for _ in range(rule.SAMPLES)]
    rule.start()
    assert set(play(rule, CPU_TIMES, [3] * 5)) <= {4, 8}  # a new text needs no new times


@pytest.mark.parametrize(
    ("times", "right", "best"),
    [
        (CPU_TIMES, 0, 1), (CPU_TIMES, 1, 1), (CPU_TIMES, 6, 8), (CPU_TIMES, 31, 32),
        (GPU_TIMES, 0, 1), (GPU_TIMES, 31, 32),
    ],
)  # fmt: skip
def test_it_settles_on_the_fastest(times: dict[int, float], right: int, best: int) -> None:
    sizes = play(calibrated(times, right), times, [right] * 60)
    assert sizes[-20:].count(best) >= 18 and sizes[-1] == best


@pytest.mark.parametrize(("odd", "factor"), [(1, 20), (4, 0.01)])
def test_one_odd_cycle_is_no_reason(odd: int, factor: float) -> None:
    """A stall while a size is timed does not condemn it, nor does a clock that skipped recommend it: the median
    decides."""
    rule = AdaptiveBlock(CPU_TIMES)
    for n in range(15):
        size = rule.next_size()
        rule.observe(size, CPU_TIMES[size] * (factor if n == odd else 1), [min(31, size - 1)])
    assert rule.next_size() == 32


def test_a_machine_that_was_busy_is_timed_again() -> None:
    """8 rows were timed while something else ran; in the end they are found to be the fastest, and cost few cycles."""
    fast = {1: 49.0, 4: 51.0, 8: 54.0, 16: 90.0}
    rule = calibrated({**fast, 8: 200.0}, 7)
    sizes = play(rule, fast, [7] * 800)
    assert 8 not in sizes[:200] and sizes[-256:].count(8) > 240
    assert 1 not in sizes  # only sizes next to the one in use are timed again
    # and one that becomes busy is left
    assert set(play(rule, {**fast, 8: 200.0}, [7] * 20)[-5:]) == {16}


def test_a_larger_block_that_was_timed_on_a_busy_machine_is_timed_again() -> None:
    times = {1: 49.0, 4: 51.0, 8: 54.0}
    assert play(calibrated({**times, 8: 200.0}, 7), times, [7] * 400)[-1] == 8


@pytest.mark.parametrize(
    ("times", "right"),
    [({4: 100.0, 8: 101.0}, [3, 4, 3, 4, 2, 3, 4]), ({4: 100.0, 8: 130.0}, [5, 1, 4, 4, 7, 2, 4, 6])],
)
def test_near_ties_do_not_flutter(times: dict[int, float], right: list[int]) -> None:
    sizes = play(calibrated(times, 3), times, right * 20)
    assert sum(a != b for a, b in zip(sizes, sizes[1:])) <= 1


def test_ar_is_left_again_when_drafts_become_good() -> None:
    rule = calibrated(CPU_TIMES, 0)
    sizes = play(rule, CPU_TIMES, [0] * 300)
    drafted = [n for n, size in enumerate(sizes) if size != AR]
    # probes, ever rarer
    gaps = [b - a for a, b in zip(drafted[1:], drafted[2:])]
    assert 2 <= len(drafted) <= 12 and gaps == sorted(gaps)
    assert play(rule, CPU_TIMES, [31] * 600)[-1] == 32


def test_probes_stay_rare_but_never_end_and_start_anew_after_drafts_that_were_good() -> None:
    rule = calibrated(CPU_TIMES, 0)
    drafted = [n for n, size in enumerate(play(rule, CPU_TIMES, [0] * 3000)) if size != AR]
    assert drafted[-1] - drafted[-2] == drafted[-2] - drafted[-3] == rule.LAST_PROBE + 1
    assert play(rule, CPU_TIMES, [31] * 600)[-1] == 32
    sizes = play(rule, CPU_TIMES, [0] * 100)  # the text changes, and drafts do not fit any more
    left = sizes.index(AR)
    assert sizes[left : left + rule.FIRST_PROBE] == [AR] * rule.FIRST_PROBE
    assert sizes[left + rule.FIRST_PROBE] != AR


def test_a_new_text_is_probed_as_early_as_the_first() -> None:
    rule = calibrated(CPU_TIMES, 0)
    play(rule, CPU_TIMES, [0] * 1000)  # by now probes are far apart
    rule.start()
    drafted = [size != AR for size in play(rule, CPU_TIMES, [0] * 60)]
    assert drafted.index(True) <= rule.FIRST_PROBE


def test_how_drafts_fared_on_the_last_text_is_only_a_hint() -> None:
    rule = AdaptiveBlock([1, 8])
    for _ in range(100):
        rule.observe(8, 1.0, [7])
    before, _ = rule.expected_tokens(8), rule.start()
    rule.observe(8, 1.0, [0])
    again = AdaptiveBlock([1, 8])
    for _ in range(100):
        again.observe(8, 1.0, [7])
    again.observe(8, 1.0, [0])  # in one text, one bad cycle hardly counts
    assert rule.expected_tokens(8) < again.expected_tokens(8) - 1 and before > 7


def test_where_there_is_ar_alone_nothing_is_probed() -> None:
    assert set(play(AdaptiveBlock([AR]), {AR: 1.0}, [0] * 100)) == {AR}


def test_expected_tokens() -> None:
    rule = AdaptiveBlock([1, 4, 8])
    for _ in range(400):
        rule.observe(8, 1.0, [2, 0])
    # half the cycles accept exactly two: chances 1/2, 1, 0
    assert rule.expected_tokens(1) == 1
    assert rule.expected_tokens(4) == pytest.approx(2.0, abs=0.15)
    assert rule.expected_tokens(8) == pytest.approx(rule.expected_tokens(4), abs=0.1)
    # what the frozen view says while drafting comes besides, and not in AR
    anchored = AdaptiveBlock([1, 4, 8], anchor_rows=1)
    assert anchored.expected_tokens(1) == 1
    assert anchored.expected_tokens(4) == 1 + AdaptiveBlock([1, 4, 8]).expected_tokens(4)


def test_sizes() -> None:
    assert auto_sizes(32) == (1, 4, 8, 16, 32) and auto_sizes(8) == (1, 4, 8)
    assert auto_sizes(6) == (1, 4, 6) and auto_sizes(2) == (1, 2)
    with pytest.raises(ValueError, match="sizes must be block sizes >= 1"):
        AdaptiveBlock([0, 4])


class Forced(AdaptiveBlock):
    """Takes the sizes of a script, one after the other."""

    def __init__(self, script: list[int]) -> None:
        super().__init__([1, 2, 3, 4, 8])
        self.script, self.at, self.seen = script, 0, []

    def next_size(self) -> int:
        self.at += 1
        return self.script[(self.at - 1) % len(self.script)]

    def observe(self, size: int, seconds: float, accepted: list[int]) -> None:
        self.seen.append((size, accepted))
        super().observe(size, seconds, accepted)


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(MODELS)),
    script=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=6),
    right=st.lists(st.integers(-1, 7), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    tokens=st.integers(1, 20),
    seed=st.integers(0, 9),
    stop=st.integers(0, 19),
)
def test_switching_at_every_cycle_moves_no_token(name, script, right, lengths, tokens, seed, stop) -> None:
    model, prompts = MODELS[name], prompts_of(seed, lengths)
    answers = [ar_answer(model, prompt, 20) for prompt in prompts]
    eos = int(answers[0][stop])
    decoder = ScriptedDrafts(model, answers, right, impl="torch", block_size="auto")
    decoder._adaptive[len(prompts)] = rule = Forced(script)
    output = decoder.generate(prompts, max_new_tokens=tokens, eos_token_id=eos)
    for prompt, answer, sequence in zip(prompts, answers, output.sequences):
        said = answer.tolist()
        expected = said[: min(tokens, said.index(eos) + 1 if eos in said else tokens)]
        assert sequence[len(prompt) :].tolist() == expected
    stats = output.stats
    assert sum(stats.cycles_by_block_size.values()) == sum(stats.sequence_cycles)
    assert [size for size, _ in rule.seen] == (script * (1 + len(rule.seen)))[: len(rule.seen)]
    assert set(stats.cycles_by_block_size) <= set(script)


@pytest.mark.parametrize("anchor_rows", [0, 1])
def test_penalties_count_all_that_a_larger_block_committed(anchor_rows: int) -> None:
    model, prompt = LedgerModel(17, block_size=8, certainty=9.0, anchor_rows=anchor_rows), [3, 1]
    params = SamplingParams(frequency_penalty=0.7, presence_penalty=0.5, repetition_penalty=1.2)
    decoder = ConsensusDecoder(model, impl="torch", block_size="auto")
    decoder._adaptive[1] = Forced([8, AR, 8, 2])
    output = decoder.generate([torch.tensor(prompt)], max_new_tokens=60, params=[params])
    assert output.sequences[0][2:].tolist() == oracle(model, prompt, 60, params)
    assert output.stats.tokens_per_cycle > 1.5


def test_auto_on_a_clock_that_likes_ar() -> None:
    """The decoder times its cycles and follows the rule: with a clock on which drafting is dear, AR wins."""
    model, (prompt,) = MODELS["qk_norm"], prompts_of(3, [9])
    answer = ar_answer(model, prompt, 90)
    cost, finishes = {1: 1.0, 4: 30.0, 8: 40.0}, {}
    for favourite, right in ((1, [7]), (8, [7])):
        if favourite == 8:
            cost[8] = 1.1
        decoder = ScriptedDrafts(model, [answer], right, impl="torch", block_size="auto")
        now = [0.0]
        decoder.clock = lambda now=now: now[0]
        run_cycle = decoder.run_cycle

        def timed(cache, state, size, impl, now=now, run_cycle=run_cycle):
            now[0] += cost[size]
            run_cycle(cache, state, size, impl)

        decoder.run_cycle = timed
        output = decoder.generate([prompt], max_new_tokens=90)
        assert torch.equal(output.sequences[0][9:], answer)
        finishes[favourite] = output.stats.cycles_by_block_size
    assert finishes[1][1] > 20 and finishes[1][8] == 3
    assert finishes[8][8] > 6 and finishes[8][1] == 3


def test_auto_is_refused_nothing_else() -> None:
    with pytest.raises(ValueError, match="2..8, the size the view was made for, or 'auto', but got 'fast'"):
        ConsensusDecoder(MODELS["plain"], block_size="fast")
    ar = ConsensusDecoder(MODELS["plain"], mode="ar", block_size="auto", impl="torch")
    assert ar.generate([torch.tensor([1, 2])], max_new_tokens=3).stats.cycles_by_block_size == {1: 2}
