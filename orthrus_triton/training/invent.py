"""Prompts that the frozen model invents itself: sampled as a user's message, so that no corpus is needed.
What a view is trained on then resembles what the model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from orthrus_triton.models.modeling import OrthrusForCausalLM
from orthrus_triton.modules import ConsensusDecoder
from orthrus_triton.modules.sampling_params import SamplingParams
from orthrus_triton.training.answers import answer_all
from orthrus_triton.training.prompts import Prompt

MARK = "<the message>"  # stands for it in a chat template
FEWEST_WORDS = 4
MOST_TRIES = 1000  # of which a tenth must count, or the model is given up


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
    on_prompt: Callable[[str], None] = lambda text: None,
) -> list[Prompt]:
    """Let the AR view write the user's messages of chats, each of one line, no two alike.

    A message counts if the model ends it by itself within `max_new_tokens`, and if it has four words or more.

    Args:
        model: only its AR view is used.
        tokenizer: of transformers, with a chat template.
        count: messages to return.
        beginnings: how messages begin, in turn; "" leaves the model all freedom.
        domain: of the prompts returned.
        temperature, top_p: see `SamplingParams`.
        max_new_tokens: most tokens after the beginning.
        batch_size: messages written side by side.
        seed: another one gives other messages.
        impl: "auto", "triton" or "torch".
        on_prompt: called with each message that counts.

    Raises:
        ValueError: an argument out of range, a tokenizer without a chat template, or a model that invents hardly
            anything that counts.

    Source: Magpie, arXiv 2406.08464.
    """
    for name, value in (("count", count), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, but got {value!r}")
    if not beginnings:
        raise ValueError("beginnings must hold at least one text, which may be empty")
    before = _before_message(tokenizer)
    starts = [tokenizer(before + text, add_special_tokens=False)["input_ids"] for text in beginnings]
    decoder = ConsensusDecoder(model, mode="ar", exact=False, impl=impl)
    found: dict[str, None] = {}
    begun = 0
    while len(found) < count:
        # of the messages begun, perhaps half will count
        numbers = range(begun, begun + 2 * (count - len(found)))
        begun = numbers.stop
        params = [SamplingParams(temperature=temperature, top_p=top_p, seed=seed, sequence=n) for n in numbers]
        taken = [starts[n % len(starts)] for n in numbers]
        messages = {}
        for i, tokens in answer_all(decoder, taken, max_new_tokens, batch_size, params_of=params.__getitem__):
            text = beginnings[numbers[i] % len(starts)] + tokenizer.decode(tokens[:-1])
            if tokens[-1] in model.eos_token_ids and _counts(text):
                messages[i] = text
                on_prompt(text)
        # in the order in which they were begun, whichever ended first
        found |= dict.fromkeys(messages[i] for i in sorted(messages))
        if begun > MOST_TRIES and 10 * len(found) < begun:
            raise ValueError(
                f"model must invent messages that count, but only {len(found)} of {begun} did: it may not be trained "
                "for chats, or max_new_tokens may be too few"
            )
    return [Prompt(text, domain, chat=True) for text in list(found)[:count]]


def _before_message(tokenizer: Any) -> str:
    """What the chat template writes before a user's first message."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer must have a chat template to invent a user's messages, but has none")
    text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    before, mark, _ = text.partition(MARK)
    if not mark:
        raise ValueError("tokenizer's chat template must write a user's message as it is, but leaves it out")
    return before


def _counts(text: str) -> bool:
    return "\n" not in text and text.isprintable() and len(text.split()) >= FEWEST_WORDS
