"""How one sequence is to be decoded, as the caller says it: SamplingParams. And which kinds of choosing a run must be
ready for: Choosing, part of what a captured cycle is looked up by."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch

SamplingRule = Literal["coupled", "rejection"]
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
MIN_TEMPERATURE, MAX_TEMPERATURE, MAX_PENALTY = 1e-30, 1e4, 1e4  # divided by less, logits may exceed fp32
SEED_LIMIT = 2**63
MOST_NEW_TOKENS = 2**30  # a position behind any prompt is an int32


@dataclass(frozen=True)
class SamplingParams:
    """What one sequence samples by. The defaults are greedy.

    Args:
        temperature: 0 is greedy; else logits are divided by it.
        top_k: keep tokens as large as the k-th largest; 0 keeps all.
        top_p: keep the likeliest tokens until they have this mass, in (0, 1].
        min_p: keep tokens at least this times as likely as the likeliest, in [0, 1].
        seed, sequence: key the noise. The same pair, prompt and parameters give the same text, in any batch; with
            rejection, for one block size.
        repetition_penalty: > 0, for tokens in prompt or output; 1 is off.
        presence_penalty, frequency_penalty: subtracted from logits of generated tokens, once, and per occurrence.
        min_new_tokens: no stop token is chosen before.
        logit_bias: added to logits, by token; -inf bans one.
        logits_processor: a function of (input_ids [1, L], scores [1, V] fp32) -> scores, such as transformers'
            LogitsProcessorList. It runs on the host for every row, before temperature and filters, and must depend on
            its arguments alone. What it gets never goes on behind a stop token that was generated, or with a token that
            it has banned.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sequence: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logits_processor: Processor | None = None

    def __post_init__(self) -> None:
        _require(_is_number(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE,
                 "temperature", f"in 0..{MAX_TEMPERATURE:g}", self.temperature)  # fmt: skip
        _require(self.temperature == 0 or self.temperature >= MIN_TEMPERATURE,
                 "temperature", f"0, which is greedy, or at least {MIN_TEMPERATURE:g}", self.temperature)  # fmt: skip
        _require(_is_int(self.top_k) and 0 <= self.top_k < 2**31, "top_k", "an integer in 0..2**31-1", self.top_k)
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        _require(_is_int(self.seed) and -SEED_LIMIT <= self.seed < SEED_LIMIT,
                 "seed", "an integer of 64 bits", self.seed)  # fmt: skip
        _require(_is_int(self.sequence) and 0 <= self.sequence < 2**31, "sequence", "in 0..2**31-1", self.sequence)
        _require(_is_number(self.repetition_penalty) and 0 < self.repetition_penalty <= MAX_PENALTY,
                 "repetition_penalty", f"in (0, {MAX_PENALTY:g}]", self.repetition_penalty)  # fmt: skip
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(_is_number(value) and abs(value) <= MAX_PENALTY, name, f"in +-{MAX_PENALTY:g}", value)
        _require(_is_int(self.min_new_tokens) and 0 <= self.min_new_tokens <= MOST_NEW_TOKENS,
                 "min_new_tokens", f"an integer in 0..{MOST_NEW_TOKENS}", self.min_new_tokens)  # fmt: skip
        _require(isinstance(self.logit_bias, Mapping), "logit_bias", "numbers by token id", self.logit_bias)
        for token, bias in self.logit_bias.items():
            _require(_is_int(token) and token >= 0, "logit_bias", "keyed by token ids", token)
            _require(_is_number(bias) or bias == -math.inf, "logit_bias", "finite or -inf", bias)
        _require(self.logits_processor is None or callable(self.logits_processor),
                 "logits_processor", "callable or None", self.logits_processor)  # fmt: skip

    @property
    def is_processed(self) -> bool:
        """A penalty, bias or minimum length changes logits."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.min_new_tokens
            or self.logit_bias
        )  # fmt: skip

    def require_vocab(self, vocab_size: int) -> None:
        """Raise a ValueError if `logit_bias` names a token that does not exist."""
        for token in self.logit_bias:
            _require(token < vocab_size, "logit_bias", f"of tokens in 0..{vocab_size - 1}", token)


class Choosing(NamedTuple):
    """What a run's cycles do to get from logits to tokens: sample (else greedy), by rejection (else coupled), after
    processing on the device, or by functions on the host."""

    sampled: bool = False
    rejection: bool = False
    processed: bool = False
    hosted: bool = False

    @classmethod
    def of(cls, params: Sequence[SamplingParams], rule: SamplingRule = "coupled") -> Choosing:
        """What these sequences need.

        Raises:
            ValueError: `rule` is not "coupled" or "rejection".
        """
        if rule not in ("coupled", "rejection"):
            raise ValueError(f"sampling must be 'coupled' or 'rejection', but got {rule!r}")
        sampled = any(one.temperature > 0 for one in params)
        return cls(
            sampled, sampled and rule == "rejection", any(one.is_processed for one in params),
            any(one.logits_processor is not None for one in params),
        )  # fmt: skip

    def require(self, params: SamplingParams) -> None:
        """Raise a ValueError if a run opened for this cannot decode a sequence with `params`."""
        needed = Choosing.of([params])
        for name in ("sampled", "processed", "hosted"):
            if getattr(needed, name) and not getattr(self, name):
                raise ValueError(f"params need a run that is open for them: open(..., choosing=...) with {name}=True")


def _is_number(value: object) -> bool:
    # by their classes in the numbers' tower, to which numpy's belong as well
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, but got {value!r}")


GREEDY_PARAMS = SamplingParams()


def params_of(
    count: int, params: Sequence[SamplingParams] | None, options: Mapping[str, Any], vocab_size: int
) -> Sequence[SamplingParams]:
    """One SamplingParams per sequence: `params` as they are, or from keywords, with noise of its own for each.

    Raises:
        ValueError: not one for each, keywords beside them, or a token that does not exist.
        TypeError: a keyword that is no field, or `params` of something else.
    """
    known = [one.name for one in fields(SamplingParams)]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"generate() got options it does not know: {unknown}; of sampling it knows {known}")
    if params is None:
        params = [SamplingParams(**{"sequence": b} | options) for b in range(count)]
    elif isinstance(params, SamplingParams) or not all(isinstance(one, SamplingParams) for one in params):
        raise TypeError(
            f"params must be a sequence of SamplingParams, one for each of {count} prompts, but got {params!r}"
        )
    elif options or len(params) != count:
        raise ValueError(
            f"params must be one SamplingParams for each of {count} prompts, with no keyword of it beside them, "
            f"but got {len(params)} and {sorted(options)}"
        )
    for one in params:
        one.require_vocab(vocab_size)
    return params
