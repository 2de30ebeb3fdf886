"""Prompts that the frozen model invents itself: sampled as a user's message, so that no corpus is needed.
What a view is trained on then resembles what the model was trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.sampling_params import SamplingParams
from orthrus_triton.training.answers import answer_all
from orthrus_triton.training.prompts import Prompt

MARK = "<the message>"  # stands for it in a chat template
FEWEST_WORDS = 4
FIRST_TRIES = 1000  # from then on a tenth of all must have counted, or the model is given up


def invent(
    model: OrthrusForCausalLM,
    tokenizer: Any,
    count: int,
    *,
    beginnings: Sequence[str] = ("",),
    domain: str = "chat",
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 48,
    batch_size: int = 64,
    seed: int = 0,
    impl: str = "auto",
    seconds: float | None = None,
    on_prompt: Callable[[Prompt], None] = lambda prompt: None,
) -> list[Prompt]:
    """Let the AR view write the user's messages of chats, each of one line, no two alike.

    A message counts if the model ends it with a stop token, or with the token that the template writes behind a
    message (Mistral's [/INST]), within `max_new_tokens`, and if it is plain text of four
    words or more. Those that count are taken in the order in which they were begun, whatever `batch_size` is.

    Args:
        model: only its AR view is used.
        tokenizer: of transformers, with a chat template.
        count: messages to return.
        beginnings: how messages begin, in turn; "" leaves the model free.
        domain: of the prompts returned.
        temperature, top_p: see `SamplingParams`.
        max_new_tokens: most tokens after the beginning.
        batch_size: messages written side by side.
        seed: another one gives other messages.
        impl: "auto", "triton" or "torch".
        seconds: stop after so long, with the messages found by then: the first of those that a whole run returns.
        on_prompt: called with each message returned, as soon as it is known.

    Raises:
        ValueError: an argument out of range, a tokenizer without a chat template, or a model that invents hardly
            anything that counts.

    Source: Magpie, arXiv 2406.08464.
    """
    for name, value in (("count", count), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, but got {value!r}")
    if isinstance(beginnings, str) or not beginnings:
        raise ValueError(f"beginnings must hold at least one text, which may be empty, but got {beginnings!r}")
    before, after = _around_message(tokenizer)
    starts = [tokenizer(before + text, add_special_tokens=False)["input_ids"] for text in beginnings]
    if not all(starts):
        raise ValueError(
            "beginnings must not be empty where the chat template writes nothing before a user's message: the model "
            "has no token to go on from"
        )
    stop_ids = [*model.eos_token_ids, *_ending(tokenizer, after)]
    decoder = ConsensusDecoder(model, mode="ar", exact=False, impl=impl)
    found: dict[str, Prompt] = {}
    numbers, started = range(0), time.perf_counter()
    while True:
        # perhaps half of the messages begun will count
        numbers = range(numbers.stop, numbers.stop + 2 * (count - len(found)))
        params = [SamplingParams(temperature=temperature, top_p=top_p, seed=seed, sequence=n) for n in numbers]
        taken = [starts[n % len(starts)] for n in numbers]
        answers = answer_all(
            decoder, taken, max_new_tokens, batch_size, params_of=params.__getitem__, stop_ids=stop_ids
        )
        for n, tokens in zip(numbers, _in_order(answers)):
            if tokens[-1] in stop_ids:
                text = _message(tokenizer, beginnings[n % len(starts)], starts[n % len(starts)], tokens[:-1])
                if text is not None and text not in found:
                    found[text] = Prompt(text, domain, chat=True)
                    on_prompt(found[text])
            if len(found) == count or (seconds is not None and time.perf_counter() - started > seconds):
                return list(found.values())  # what was begun later is not needed
            tried = n + 1
            if tried >= FIRST_TRIES and 10 * len(found) < tried:
                raise ValueError(
                    f"model must invent messages that count, but only {len(found)} of {tried} did: it may not be "
                    "trained for chats, max_new_tokens may be too few, or it may repeat itself"
                )


def _in_order(answers: Iterator[tuple[int, list[int]]]) -> Iterator[list[int]]:
    """The answers by number, whichever ended first; each as soon as it and all before it have ended."""
    ended, upcoming = {}, 0
    for i, tokens in answers:
        ended[i] = tokens
        while upcoming in ended:
            yield ended.pop(upcoming)
            upcoming += 1


def _around_message(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before a user's first message, and behind it."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer must have a chat template to invent a user's messages, but has none")
    text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    before, mark, after = text.partition(MARK)
    if not mark:
        raise ValueError("tokenizer's chat template must write a user's message as it is, but leaves it out")
    return before, after


def _ending(tokenizer: Any, after: str) -> list[int]:
    """The token that ends a message in the template; none where its first token behind one is plain text."""
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"][:1]
    return [token for token in ids if tokenizer.decode([token], skip_special_tokens=True) == ""]


def _message(tokenizer: Any, beginning: str, start: list[int], tokens: list[int]) -> str | None:
    """What `tokens` behind `start` make of a beginning; None if it does not count."""
    # read together, for alone some tokenizers would drop the space between the two
    said = tokenizer.decode(start + tokens)[len(tokenizer.decode(start)) :]
    if tokenizer.decode(tokens) != tokenizer.decode(tokens, skip_special_tokens=True):
        return None  # the template's own tokens are no text of a user's
    text = (beginning + said).strip(" ")
    return text if text.isprintable() and len(text.split()) >= FEWEST_WORDS else None
