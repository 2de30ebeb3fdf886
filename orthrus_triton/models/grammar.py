"""Texts that keep to a grammar or a JSON schema: of the tokens that may come next, llguidance knows which are allowed.
In drafts, too: what the diffusion view proposes keeps to it, so that it is seldom rejected for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

# between two parts of a JSON text; without a bound, a small model may never come to the next part
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,64}"
NUMBER_LIMITS, MOST_EXACT = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), 2**53
# of a schema: values, and schemas by a name of their own, which may be that of a keyword
NO_SCHEMAS, NAMED_SCHEMAS = (
    ("const", "enum", "default", "examples"),
    ("properties", "patternProperties", "$defs", "definitions"),
)


class Grammars:
    """What a tokenizer's tokens are, as grammars have to know it.

    Args:
        tokenizer: of transformers, a fast one.
        vocab_size: of the model's logits.
        eos_token_ids: which end a text, once the grammar lets it end.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: the tokenizer is not one that llguidance can read, or no token ends a text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ImportError(f"schemas and grammars need more: pip install 'llguidance>=1.8' ({error})") from error
        if not eos_token_ids:
            raise ValueError("eos_token_ids must name a token that ends a text, but there is none")
        try:
            self._tokens = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except Exception as error:  # ValueError, or what Rust calls an exception
            raise ValueError(f"tokenizer must be one that llguidance can read, but {error}") from error

    def of_schema(self, schema: Mapping[str, Any] | None, prompt_len: int) -> GrammarProcessor:
        """JSON that keeps to a JSON schema, or any object for None.

        Raises:
            ValueError: it is no schema, or asks for what llguidance does not know.
        """
        return self.of(f"start: %json {json_grammar(schema)}", prompt_len)

    def of(self, grammar: str, prompt_len: int) -> GrammarProcessor:
        """What keeps the text behind a prompt of `prompt_len` tokens to a grammar in the syntax of llguidance, which
        is Lark's with additions.

        Raises:
            ValueError: it is no grammar, or too much for llguidance.
        """
        from llguidance import LLMatcher

        failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._tokens)
        if failed:
            raise ValueError(
                f"grammar must be one that llguidance can keep to, but: {messages[0].partition(chr(10))[0]}"
            )
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        matcher.compute_bitmask()  # some grammars only turn out to be too large, or without any text, when it starts
        if matcher.is_error():
            raise ValueError(f"grammar must be one that llguidance can keep to, but: {_first_line(matcher)}")
        return GrammarProcessor(matcher, prompt_len)


def json_grammar(schema: Mapping[str, Any] | None) -> str:
    """What stands behind `%json` in a grammar: JSON that keeps to a JSON schema, or any object for None.

    Raises:
        ValueError: JSON cannot say it, or llguidance would keep to another.
    """
    schema = {"type": "object"} if schema is None else schema
    try:  # as text: of a dict that is nested deeply, llguidance overflows its stack and ends the process
        text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})
        _check_limits(schema)
    except (RecursionError, TypeError) as error:
        raise ValueError(f"schema must be one that JSON can say, but: {error}") from error
    return text


def _check_limits(schema: Any) -> None:
    """llguidance takes limits for float64 numbers; integers beyond 2**53 are others then."""
    if isinstance(schema, list):
        for part in schema:
            _check_limits(part)
    elif isinstance(schema, Mapping):
        for name in NUMBER_LIMITS:
            limit = schema.get(name)
            if isinstance(limit, (int, float)) and abs(limit) > MOST_EXACT:
                raise ValueError(f"schema: {name} must be within +-2**53, but got {limit}")
        for name, part in schema.items():
            if name not in NO_SCHEMAS:
                _check_limits(list(part.values()) if name in NAMED_SCHEMAS and isinstance(part, Mapping) else part)


def _first_line(matcher: Any) -> str:
    return matcher.get_error().partition("\n")[0]


class GrammarProcessor:
    """A `logits_processor` of one sequence: a function of the text alone, though it remembers the last one it saw,
    since the next mostly goes on from there or from some tokens before.

    Attributes:
        error: why there is no text that could go on, where every token is banned; "" before.
    """

    def __init__(self, matcher: Any, prompt_len: int) -> None:
        self.error = ""
        self._start, self._matcher, self._prompt_len = matcher.deep_copy(), matcher, prompt_len
        self._text: list[int] = []

    def behind(self, prompt_len: int) -> GrammarProcessor:
        """Another that keeps to the same, behind a prompt of `prompt_len` tokens."""
        return GrammarProcessor(self._start.deep_copy(), prompt_len)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids [1, L], scores [1, V] -> scores with -inf for every token that may not come next."""
        text = input_ids[0, self._prompt_len :].tolist()
        if not self._go_to(text):  # some limit of the parser, which a way there without turning back may keep
            self._matcher, self._text = self._start.deep_copy(), []
            self._go_to(text)
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self.error = _first_line(self._matcher)
            return torch.full_like(scores, -torch.inf)
        allowed = np.unpackbits(mask, count=scores.shape[1], bitorder="little").astype(bool)
        return scores.masked_fill(torch.from_numpy(~allowed).to(scores.device), -torch.inf)

    def _go_to(self, text: list[int]) -> bool:
        common = next((n for n, pair in enumerate(zip(text, self._text)) if pair[0] != pair[1]), None)
        common = min(len(text), len(self._text)) if common is None else common
        back, on = len(self._text) - common, text[common:]
        self._text = text
        return (back == 0 or self._matcher.rollback(back)) and (not on or self._matcher.consume_tokens(on))
