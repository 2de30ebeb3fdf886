"""Coupled sampling: one answer from Triton, torch and the definition; filters as transformers has them; a row's token
depends on that row alone; and its distribution is softmax's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orthrus_triton._triton import EXACT_LAUNCH, tl, triton
from orthrus_triton.ops import (
    VOID,
    SamplingTensors,
    filtered_probs,
    greedy_choice,
    row_spans,
    sample_choice,
    sample_torch,
    sampling,
)
from orthrus_triton.ops.gumbel import (
    ACCEPT,
    CHOICE,
    DRAFT,
    SMALL,
    exponential,
    exponential_torch,
    gumbel_torch,
    noise_words_torch,
    row_key_torch,
    uniform_torch,
)
from orthrus_triton.ops.logits_filter import kept_reference
from orthrus_triton.ops.portable_math import portable_exp, portable_exp_torch, portable_log, portable_log_torch
from tests.ops.sampling_cases import DEVICE, make_logits, mixed_sampling, positions_of, sampling_of

pytestmark = pytest.mark.usefixtures("with_and_without_c")


def use_spans(patch: pytest.MonkeyPatch, span: int, block: int, rounds: int = 3) -> None:
    for module in (row_spans, sampling):
        patch.setattr(module, "SPAN", span)
        patch.setattr(module, "BLOCK", block)
    patch.setattr(sampling, "ROUNDS", rounds)


@pytest.mark.parametrize(
    ("span", "block", "rounds"),
    [(8192, 2048, 3), (64, 64, 3), (32, 16, 2), (48, 16, 1)],  # one span; two; four; three, and choose_kernel searches
)
def test_triton_torch_and_definition_choose_alike(
    span: int, block: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_spans(monkeypatch, span, block, rounds)
    vocab, rows = 100, 2 if span > 100 else 1
    logits, positions, how = make_logits(block, 8, rows, vocab), positions_of(8, rows), mixed_sampling()
    ids = {impl: sample_choice(logits, positions, how, impl=impl) for impl in ("triton", "torch", "reference")}
    assert torch.equal(ids["triton"], ids["torch"]) and {found.dtype for found in ids.values()} == {torch.int64}
    assert torch.equal(ids["torch"], ids["reference"])
    assert torch.equal(ids["torch"][0], greedy_choice(logits[0]))  # temperature 0


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 3.0, 60.0, 3e4]), data=st.data())
def test_no_winner_is_passed_over(seed: int, scale: float, data: st.DataObject) -> None:
    """Blocks are left out when none of their tokens can win; whatever the numbers, the best score of all wins."""
    how = sampling_of(
        2, temperature=data.draw(st.sampled_from([0.02, 1.0, 30.0])), seed=seed,
        top_p=data.draw(st.sampled_from([1.0, 0.9, 0.3])), top_k=data.draw(st.sampled_from([0, 9])),
    )  # fmt: skip
    logits, positions = make_logits(seed, 2, 1, 80, scale=scale), positions_of(2, 1)
    with pytest.MonkeyPatch.context() as patch:
        use_spans(patch, 32, 8)
        ids = sample_choice(logits, positions, how, impl="triton")
        patch.setattr(sample_torch, "LISTED", 16)
        assert torch.equal(ids, sample_choice(logits, positions, how, impl="torch"))


def test_scores_that_rounding_makes_equal_go_to_the_lowest_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million is a whole number in fp32, and so is its score: no noise words may rule such a token out."""
    use_spans(monkeypatch, 8, 4)
    logits = 1e7 + 2 * torch.randn(40, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits, positions, how = logits.float().to(DEVICE), positions_of(40, 1), sampling_of(40)
    keys = row_key_torch(how.seed[:, None], how.sequence[:, None], positions, CHOICE)
    expected = (logits + gumbel_torch(8, *keys)).argmax(dim=-1)
    for impl, listed in (("triton", 4), ("torch", 4), ("torch", 8)):
        monkeypatch.setattr(sample_torch, "LISTED", listed)
        assert torch.equal(sample_choice(logits, positions, how, impl=impl), expected)


def test_equal_logits_stand_or_fall_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where zeros differ in their sign; without noise, the lowest id is chosen wherever the others lie."""
    use_spans(monkeypatch, 64, 16)
    logits, positions = torch.full((6, 1, 70), -1.0, device=DEVICE), positions_of(6, 1)
    logits[..., [21, 5, 37, 69]] = torch.tensor([0.0, -0.0, 0.0, -0.0], device=DEVICE)
    how = sampling_of(6, top_k=1, temperature=[0.0, *[1.0] * 5])
    expected = sample_choice(logits, positions, how, impl="reference")
    assert expected[0] == 5 and {5, 69} & set(expected[1:, 0].tolist()) and {21, 37} & set(expected[1:, 0].tolist())
    for impl in ("triton", "torch"):
        assert torch.equal(sample_choice(logits, positions, how, impl=impl), expected)


def test_top_p_drops_what_has_exactly_its_share_above_it() -> None:
    logits = torch.full((40, 1, 9), -torch.inf, device=DEVICE)
    logits[..., 5], logits[..., 2] = 0.0, -1e-17  # a hair less likely: the same mass, in fixed point and in fp64
    how = sampling_of(40, top_p=[0.5, 0.51] * 20)
    for impl in ("triton", "torch", "reference"):
        ids = sample_choice(logits, positions_of(40, 1), how, impl=impl)[:, 0]
        assert set(ids[::2].tolist()) == {5} and set(ids[1::2].tolist()) == {5, 2}


def test_top_p_is_a_share_of_what_top_k_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    use_spans(monkeypatch, 64, 32)
    logits = torch.full((12, 1, 60), -1.0, device=DEVICE)  # together far likelier than the three that are kept
    logits[..., [7, 40, 3]] = torch.tensor([0.0, -0.1, -0.2], device=DEVICE)
    for impl in ("triton", "torch"):
        ids = sample_choice(logits, positions_of(12, 1), sampling_of(12, top_k=3, top_p=[0.6, 0.8] * 6), impl=impl)
        assert set(ids[::2].flatten().tolist()) == {7, 40} and set(ids[1::2].flatten().tolist()) == {7, 40, 3}


@pytest.mark.parametrize("listed", [3, 9])
def test_a_top_p_too_small_for_fp32_keeps_the_likeliest(listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_torch, "LISTED", listed)
    logits = torch.zeros(30, 1, 9, device=DEVICE)
    logits[:, 0, 7:] = -1.0
    how = sampling_of(30, top_p=1e-60)
    ids = [sample_choice(logits, positions_of(30, 1), how, impl=impl) for impl in ("triton", "torch")]
    assert torch.equal(*ids) and set(ids[0].flatten().tolist()) == set(range(7))
    assert torch.equal(filtered_probs(logits, how)[:, 0, :7], torch.full((30, 7), 1 / 7, device=DEVICE))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), vocab=st.integers(6, 60), top_k=st.sampled_from([0, 1, 3, 4, 5, 20, 59, 70]),
    listed=st.sampled_from([1, 4, 20, 128]), data=st.data(),
)  # fmt: skip
def test_torch_is_the_definition(seed: int, vocab: int, top_k: int, listed: int, data: st.DataObject) -> None:
    """Whether the filters leave what the list of the largest holds, or more."""
    logits = make_logits(seed, 2, 4, vocab, scale=data.draw(st.sampled_from([0.1, 1.0, 8.0, 60.0])))
    how = sampling_of(
        2, temperature=data.draw(st.sampled_from([0.05, 0.5, 1.0, 3.0])), top_k=top_k, seed=seed,
        top_p=data.draw(st.sampled_from([1.0, 0.93, 0.51, 0.02])), min_p=data.draw(st.sampled_from([0.0, 0.03, 0.6])),
    )  # fmt: skip
    positions = positions_of(2, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_torch, "LISTED", listed)
        ids = sample_choice(logits, positions, how, impl="torch")
    assert torch.equal(ids, sample_choice(logits, positions, how, impl="reference"))
    probs = filtered_probs(logits, how)
    # what is kept and too unlikely for fixed point has probability 0
    assert torch.equal(probs > 1e-9, kept_reference(logits, how) & (probs > 1e-9))
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(probs[..., 0]))


@pytest.mark.parametrize("listed", [3, 4, 20])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_list_of_the_largest_may_end_where_top_k_does(
    listed: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the k-th largest itself, within its equals, before or behind it."""
    monkeypatch.setattr(sample_torch, "LISTED", listed)
    logits = (make_logits(7, 4, 16, 60, scale=0.6) * 3).round() / 3  # many equals
    positions, how = positions_of(4, 16), sampling_of(4, top_k=[3, 4, 20, 21], top_p=top_p)
    assert torch.equal(
        sample_choice(logits, positions, how, impl="torch"), sample_choice(logits, positions, how, impl="reference")
    )


@pytest.mark.parametrize("filters", [{"min_p": 0.5}, {"top_p": 0.3}], ids=str)
def test_what_the_filters_keep_behind_the_list_may_be_chosen(
    filters: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight equals of which the list holds two: a little likelier than min_p, or where the mass of top_p ends."""
    monkeypatch.setattr(sample_torch, "LISTED", 3)
    logits = torch.full((60, 1, 9), -0.6, device=DEVICE)
    logits[..., 4] = 0.0
    ids = sample_choice(logits, positions_of(60, 1), sampling_of(60, **filters), impl="torch")
    assert set(ids.flatten().tolist()) == set(range(9))


@pytest.mark.parametrize("listed", [1, 128])
def test_without_top_p_the_rarest_token_may_be_chosen(listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the others have all of the mass, and the noise of this sequence is the luck of one in 600 million."""
    monkeypatch.setattr(sample_torch, "LISTED", listed)
    logits = torch.tensor([[[0.0, -19.5]]], device=DEVICE)
    for impl in ("triton", "torch", "reference"):
        assert sample_choice(logits, positions_of(1, 1), sampling_of(1, sequence=63_277_339), impl=impl) == 1


def test_rows_do_not_know_of_each_other() -> None:
    """Any row alone, with its position and parameters, gives what it gave in the batch: block size and place in the
    batch change nothing."""
    logits, positions, how = make_logits(3, 8, 4, 97), positions_of(8, 4), mixed_sampling()
    together = sample_choice(logits, positions, how, impl="torch")
    for b in range(8):
        alone = SamplingTensors(*(tensor[b : b + 1] for tensor in how))
        for t in range(4):
            at = (slice(b, b + 1), slice(t, t + 1))
            assert sample_choice(logits[at].contiguous(), positions[at], alone, impl="torch") == together[b, t]
    alone = SamplingTensors(*(tensor[5:6] for tensor in how))
    assert torch.equal(sample_choice(logits[5:6, 1:3], positions[5:6, 1:3], alone, impl="triton"), together[5:6, 1:3])


def test_filters_are_those_of_transformers() -> None:
    logits = torch.randn(1, 1, 80, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 2
    for temperature, top_k, top_p, min_p in [
        (0.7, 10, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.2), (0.9, 30, 0.6, 0.05), (2.0, 79, 0.99, 0.01),
    ]:  # fmt: skip
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            warpers.append(MinPLogitsWarper(min_p))
        theirs = warpers(None, logits[0]).softmax(-1)
        ours = filtered_probs(logits, sampling_of(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))[0]
        assert torch.equal(ours > 0, theirs > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_joint_distribution_of_a_chain_is_the_models() -> None:
    """Three tokens of a Markov chain, 30,000 sequences: chi-square over all 4**3 outcomes."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).to(DEVICE) * 1.5
    n, rows = 30_000, []
    how = sampling_of(n, seed=11)
    token = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    for step in range(3):
        token = sample_choice(table[token][:, None], positions_of(n, 1, start=step), how, impl="torch")[:, 0]
        rows.append(token)
    counts = torch.bincount((rows[0] * 4 + rows[1]) * 4 + rows[2], minlength=64).double()
    p = table.double().softmax(-1)
    expected = n * (p[0][:, None, None] * p[:, :, None] * p[None])
    chi_square = float(((counts - expected.flatten()) ** 2 / expected.flatten()).sum())
    assert chi_square < 103.4  # the 99.9 % point of 63 degrees of freedom


def test_noise_is_gumbel_and_streams_are_independent() -> None:
    keys = [row_key_torch(torch.arange(400), torch.tensor(0), torch.tensor(3), stream) for stream in (CHOICE, DRAFT)]
    first, second = (gumbel_torch(500, *key).double() for key in keys)
    for noise in (first, second):
        u = torch.exp(-torch.exp(-noise)).flatten().sort().values
        grid = (torch.arange(u.numel(), dtype=torch.float64) + 0.5) / u.numel()
        assert float((u - grid).abs().max()) * u.numel() ** 0.5 < 1.95  # Kolmogorov-Smirnov, 99.9 %
    assert abs(float(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1])) < 0.0075


@triton.jit
def exponential_kernel(high_ptr, low_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    high, low = tl.load(high_ptr + at).to(tl.uint32), tl.load(low_ptr + at).to(tl.uint32)
    tl.store(out_ptr + at, exponential(high, low))


def test_noise_is_precise_at_both_ends() -> None:
    """Noise words are a fraction of 64 bits, and of its least and of its largest values none is lost."""
    highs, lows = (0, 1, SMALL - 1, SMALL, 2**31, 2**32 - 2, 2**32 - 1, 12345678), (0, 2**20, 2**32 - 2**20, 2**32 - 1)
    words = [(high, low) for high in highs for low in lows]
    high, low = torch.tensor(words, device=DEVICE).T.contiguous()
    found = torch.empty(len(words), device=DEVICE)
    exponential_kernel[(1,)](high, low, found, BLOCK=len(words), **EXACT_LAUNCH)
    assert torch.equal(found, exponential_torch(high, low))
    for (h, l), noise in zip(words, found.tolist()):
        twice = 2 * (h * 2**32 + l) + 1  # of 2**65
        near = twice / 2**65
        expected = -math.log1p(-near) if near < 0.5 else -math.log((2**65 - twice) / 2**65)
        assert noise == pytest.approx(expected, rel=4e-7), (h, l)


@triton.jit
def exp_and_log_kernel(x_ptr, y_ptr, exp_ptr, log_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(exp_ptr + at, portable_exp(tl.load(x_ptr + at)))
    tl.store(log_ptr + at, portable_log(tl.load(y_ptr + at)))


def test_portable_exp_and_log_have_the_bits_of_the_kernels() -> None:
    """Also where exp ends, and halfway between two powers of two."""
    x = -torch.arange(0.0, 128, 0.5) / math.log2(math.e)
    x[-4:] = torch.tensor([-87.0, -87.00001, -100.0, -torch.inf])
    y = torch.logspace(-25, 25, 256)
    y[:3] = torch.tensor([0x3F3504F2, 0x3F3504F3, 0x3F800000], dtype=torch.int32).view(torch.float32)
    x, y = x.to(DEVICE), y.to(DEVICE)
    found = torch.empty(2, 256, device=DEVICE)
    exp_and_log_kernel[(1,)](x, y, *found, BLOCK=256, **EXACT_LAUNCH)
    assert torch.equal(found, torch.stack((portable_exp_torch(x), portable_log_torch(y))))


def philox_in_integers(c0: int, c1: int, key: int) -> tuple[int, int]:
    for _ in range(7):
        product = c0 * 0xD256D193
        c0, c1, key = (product >> 32) ^ key ^ c1, product & 0xFFFFFFFF, (key + 0x9E3779B9) & 0xFFFFFFFF
    return c0, c1


@pytest.mark.parametrize("seed", [0, -7, 2**40 + 5, 2**63 - 1])
@pytest.mark.parametrize(("sequence", "position"), [(0, 0), (70_000, 65_537), (2**31 - 1, 2**31 - 1)])
def test_known_noise_stays_as_it_is(seed: int, sequence: int, position: int) -> None:
    """A sampled text must be the same in the next release: these words are computed with Python's integers."""
    for number, stream in enumerate((CHOICE, DRAFT, ACCEPT)):
        words = philox_in_integers(position, sequence, seed % 2**32)
        words = philox_in_integers(*words, (seed >> 32) % 2**32 ^ number)
        keys = row_key_torch(*map(torch.tensor, (seed, sequence, position)), stream)
        assert tuple(map(int, keys)) == words
        assert float(uniform_torch(*keys)) == (philox_in_integers(*words, words[0] ^ words[1])[0] >> 8) / 2**24
        assert [int(word) for word in noise_words_torch(torch.tensor([9]), *keys)] == [
            *philox_in_integers(9, words[1], words[0])
        ]


def test_portable_exp_and_log_are_accurate() -> None:
    x = torch.linspace(-86, 0, 200_001)
    relative = (portable_exp_torch(x).double() / x.double().exp() - 1).abs().max()
    assert float(relative) < 4 * 2.0**-24
    y = torch.cat((torch.linspace(0.5, 2, 100_001), torch.logspace(-25, 25, 100_001)))
    error = (portable_log_torch(y).double() - y.double().log()).abs() / y.double().log().abs().clamp(min=1e-3)
    assert float(error.max()) < 4 * 2.0**-24


def test_rows_without_a_choice_give_no_id() -> None:
    logits = torch.full((2, 1, 9), torch.nan, device=DEVICE)
    logits[0, 0, ::2], logits[1] = -torch.inf, -torch.inf
    for impl, temperature in itertools.product(("triton", "torch", "reference"), (0.0, 1.0)):
        how = sampling_of(2, temperature=temperature, top_p=0.5)
        assert sample_choice(logits, positions_of(2, 1), how, impl=impl).tolist() == [[VOID], [VOID]]
    logits[0, 0, 4], logits[1] = -1e38, -3e38  # too low to be divided: one row is left with nothing, and one is not
    for impl in ("triton", "torch", "reference"):
        how = sampling_of(2, temperature=[0.5, 0.01])
        assert sample_choice(logits, positions_of(2, 1), how, impl=impl).tolist() == [[4], [VOID]]
    logits[0, 0, 4] = torch.inf  # nor does it get something beside a row whose best logit is infinite
    for impl in ("triton", "torch"):
        assert sample_choice(logits, positions_of(2, 1), how, impl=impl).tolist() == [[4], [VOID]]
    logits[1] = -torch.inf
    logits[1, 0, 6] = 1.0
    for impl in ("triton", "torch"):
        assert sample_choice(logits, positions_of(2, 1), sampling_of(2), impl=impl).tolist() == [[4], [6]]
    logits[0, 0, 2] = 3.1e38  # as large as can be told apart
    for impl in ("triton", "torch", "reference"):
        greedy = sampling_of(2, temperature=0.0)
        assert sample_choice(logits, positions_of(2, 1), greedy, impl=impl).tolist() == [[2], [6]]


def test_wrong_arguments_are_named() -> None:
    logits, positions = make_logits(0, 2, 3, 9), positions_of(2, 3)
    with pytest.raises(ValueError, match="positions must have shape"):
        sample_choice(logits, positions[:, :2], sampling_of(2))
    with pytest.raises(ValueError, match="positions must have dtype torch.int32"):
        sample_choice(logits, positions.long(), sampling_of(2))
    with pytest.raises(ValueError, match="temperature must have shape"):
        sample_choice(logits, positions, sampling_of(3))
    with pytest.raises(ValueError, match="top_k must have dtype"):
        sample_choice(logits, positions, sampling_of(2)._replace(top_k=torch.zeros(2, device=DEVICE)))
    with pytest.raises(TypeError, match="logits must be floating point"):
        sample_choice(logits.long(), positions, sampling_of(2))
