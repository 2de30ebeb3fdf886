"""Kept: what the layers of a pass all work out from one tensor, such as its positions, worked out once.
An answer lives as long as its tensor does and nobody writes to it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

Answer = TypeVar("Answer")


class Kept(Generic[Answer]):
    """Answers by tensor and key."""

    def __init__(self) -> None:
        self._answers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def get(self, tensor: torch.Tensor, key: Hashable, work_out: Callable[[], Answer], keep: bool = True) -> Answer:
        """The answer kept for `key` and this very tensor, as it is now; else what `work_out` returns.

        With keep=False none is kept: for compiled code, which writes new numbers into old tensors and tells nobody.
        """
        if not keep or tensor.is_inference():  # such tensors do not tell whether they changed
            return work_out()
        version, answers = self._answers.get(tensor, (None, None))
        if version != tensor._version:
            answers = {}
            self._answers[tensor] = (tensor._version, answers)
        if key not in answers:
            answers[key] = work_out()
        return answers[key]
