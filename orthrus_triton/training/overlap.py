"""Held-out prompts must not be training prompts in other words: exact duplicates and shared word 4-grams."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

GRAM = 4
COMMON_SHARE = 0.005  # 4-grams in more training prompts than that are phrasing ("write a python function"), not content
THRESHOLD = 0.5


class Overlap(NamedTuple):
    """A held-out prompt, a training prompt like it, and how much of the former's own 4-grams the latter has; 1.0 for
    the same words."""

    held_out: int
    training: int
    share: float


def find_overlaps(held_out: Sequence[str], training: Sequence[str]) -> list[Overlap]:
    """Pairs of a held-out and a training prompt, by index, of which the latter repeats the former wholly or nearly.

    Case and punctuation do not count, nor do 4-grams of mere phrasing, which many training prompts share. A held-out
    prompt made of nothing else is compared as a whole.

    Args:
        held_out, training: prompts as text.
    """
    words = [_words(text) for text in training]
    grams = [_grams(prompt) for prompt in words]
    counts = Counter(gram for prompt in grams for gram in prompt)
    common = {gram for gram, count in counts.items() if count > max(2, COMMON_SHARE * len(training))}
    holders, same = defaultdict(list), defaultdict(list)
    for n, prompt in enumerate(words):
        same[prompt].append(n)
        for gram in grams[n] - common:
            holders[gram].append(n)
    overlaps = []
    for h, text in enumerate(held_out):
        prompt = _words(text)
        own = _grams(prompt) - common
        shared = Counter(n for gram in own for n in holders.get(gram, ()))
        shares = {n: count / len(own) for n, count in shared.items()} | dict.fromkeys(same.get(prompt, ()), 1.0)
        overlaps += [Overlap(h, n, share) for n, share in shares.items() if share >= THRESHOLD]
    return overlaps


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _grams(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1))}
