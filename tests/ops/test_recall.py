"""What is recalled is what followed the longest earlier match: Triton and torch against a search by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orthrus_triton import ops
from orthrus_triton.ops.recall import BLOCK, BONUS, LONGEST
from tests.ops.sampling_cases import DEVICE

pytestmark = pytest.mark.usefixtures("with_and_without_c")


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
    bonus = [BONUS * min(length - 1 + t, LONGEST) for t in range(count)]
    return text[place + 1 : place + 1 + count], bonus


def buffers_of(texts: list[list[int]], prompt_lens: list[int], garbage: int, length: int) -> tuple[torch.Tensor, ...]:
    """prompt_ids, output_ids, prompt_len, newest, last; the newest token is in neither buffer."""
    prompts, outputs = (torch.full((len(texts), length), garbage) for _ in range(2))
    for b, (text, prompt_len) in enumerate(zip(texts, prompt_lens)):
        prompt, output = text[:-1][:prompt_len], text[:-1][prompt_len:]
        prompts[b, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        outputs[b, : len(output)] = torch.tensor(output, dtype=torch.int64)
    newest = torch.tensor([text[-1] for text in texts])
    lens, last = (torch.tensor(n, dtype=torch.int32) for n in (prompt_lens, [len(text) - 1 for text in texts]))
    return tuple(tensor.to(DEVICE) for tensor in (prompts, outputs, lens, newest, last))


def check(arguments: tuple[torch.Tensor, ...], texts: list[list[int]], count: int, impl: str) -> None:
    tokens, bonus = ops.recall(*arguments, count, impl=impl)
    assert tokens.dtype == torch.int64 and bonus.dtype == torch.float32 and (tokens >= 0).all()
    for b, text in enumerate(texts):
        expected, expected_bonus = recall_by_hand(text, count)
        assert bonus[b].tolist() == expected_bonus, impl
        assert expected is None or tokens[b].tolist() == expected, impl


@given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=1, max_size=3),
    share=st.floats(0, 1),
    count=st.integers(1, 9),
    garbage=st.integers(-2, 3),
)
@example(texts=[[1] * 30], share=0.0, count=9, garbage=1)
@settings(deadline=None, max_examples=60)
def test_the_longest_match_goes_on_as_it_did(texts: list[list[int]], share: float, count: int, garbage: int) -> None:
    arguments = buffers_of(texts, [int(share * len(text)) for text in texts], garbage, 32)
    for impl in ("triton", "torch"):
        check(arguments, texts, count, impl)


@pytest.mark.parametrize("place", [5, BLOCK - 2, BLOCK - 1, BLOCK, BLOCK + 3])
def test_a_match_at_the_edge_of_what_is_read_at_once(place: int) -> None:
    text = torch.arange(10, 10 + BLOCK + 60).tolist()
    text[place : place + 4] = [1, 2, 3, 4]  # the match ends with 2
    text += [1, 2]
    arguments = buffers_of([text], [BLOCK // 2], 1, 2 * BLOCK)
    for impl in ("triton", "torch"):
        check(arguments, [text], 3, impl)
        assert ops.recall(*arguments, 2, impl=impl)[0].tolist() == [[3, 4]]


def test_a_sequence_at_the_end_of_its_cache_is_no_error() -> None:
    ids = torch.arange(12, device=DEVICE).view(2, 6)
    lens = torch.tensor([4, 6], dtype=torch.int32, device=DEVICE)
    for impl in ("triton", "torch"):
        tokens, bonus = ops.recall(ids, ids, lens, lens.long(), lens + 5, 4, impl=impl)
        assert tokens.shape == bonus.shape == (2, 4) and (tokens >= 0).all()


def test_it_is_registered_as_it_behaves() -> None:
    arguments = buffers_of([[1, 2, 1], [3]], [1, 1], 0, 16)
    torch.library.opcheck(torch.ops.orthrus_triton.recall.default, (*arguments, 4, "torch"))
    with pytest.raises(ValueError, match="count must be >= 1, but got 0"):
        ops.recall(*arguments, 0)
    with pytest.raises(ValueError, match="newest must have shape"):
        ops.recall(*arguments[:3], arguments[3][:1], arguments[4], 2)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("beyond", [0, 1 << 24])
def test_a_newest_token_beyond_the_buffers_recalls_some_tokens(beyond: int, impl: str) -> None:
    """A slot that has filled its cache is in the batch until it leaves; its neighbour is not disturbed."""
    full, text = list(range(20)), [1, 2, 3, 1, 2]
    arguments = list(buffers_of([full, text], [9, 2], 0, 20))
    alone = ops.recall(*(tensor[1:] for tensor in arguments), 3, impl=impl)
    arguments[4] = arguments[4] + torch.tensor([1 + beyond, 0], dtype=torch.int32, device=DEVICE)
    tokens, bonus = ops.recall(*arguments, 3, impl=impl)
    assert (tokens[0] >= 0).all() and (tokens[0] < 20).all()
    assert torch.equal(tokens[1:], alone[0]) and torch.equal(bonus[1:], alone[1])
