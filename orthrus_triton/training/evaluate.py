"""What a view is worth: tokens per cycle, acceptance by block position and by domain, repetition beside them,
exactness against AR decoding, and wall-clock against it, all from the same prompts in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from orthrus_triton.modules import ConsensusDecoder, DecodeStats, first_difference
from orthrus_triton.modules.decode_options import BlockSize
from orthrus_triton.modules.dual_view_model import DualViewModel

REPEAT_GRAM = 4
WARM_UP_TOKENS = 8


@dataclass
class Answer:
    """How one prompt was decoded. runs: statistics by decoder; equal: AR gave the same ids, None if not checked."""

    domain: str
    prompt_tokens: int
    ids: list[int]
    runs: dict[str, DecodeStats] = field(default_factory=dict)
    equal: bool | None = None
    differs_at: int | None = None


def evaluate(
    model: DualViewModel,
    prompts: Sequence[tuple[str, list[int]]],
    *,
    max_new_tokens: int = 128,
    block_size: BlockSize | None = None,
    impl: str = "auto",
    check_exact: bool = True,
    baseline: bool = True,
    on_answer: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Decode every prompt, one at a time: the dual-view cycle, then AR decoding of the same prompt.

    Runs of one prompt follow each other, so that whatever else the machine does falls on all of them alike.

    Args:
        model: a dual-view model.
        prompts: (domain, token ids) of each.
        max_new_tokens: most tokens per prompt, >= 2: the first one is the prefill's, and no cycle's.
        block_size: rows of a block, or "auto"; by default the model's own.
        impl: "auto", "triton" or "torch".
        check_exact: decode in mode="ar" too and compare the ids.
        baseline: time the cheapest one-row AR pass too (`exact=False`). Where that is the exact pass itself, the two
            figures differ by noise alone.
        on_answer: called after each prompt.

    Returns:
        JSON-ready. Of all prompts, and of each of `domains`:
        `tokens_per_cycle`: all tokens but each prompt's first, over all cycles; with `_per_question` the mean over
        prompts. `tpf`, tokens per forward pass, likewise.
        `acceptance_by_position`: share of cycles that accepted the draft at each of the K-1 positions and all before;
        with "auto", cycles of a shorter block count too, and those of AR, which draft nothing.
        `acceptance_given_previous`: of the cycles that accepted all drafts before it.
        `repetition_share`: 4-grams that the same answer holds already.
        `seconds`, `decode_seconds`, `tokens_per_second`: by decoder.
        `speedup`: over each other decoder, None where an answer differs from AR's.
        Besides, `exactness`, and `questions` with figures of each prompt.

    Raises:
        ValueError: no prompt, or an option out of range.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, but got none")
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens must be >= 2, but got {max_new_tokens}")
    decoders = {"consensus": ConsensusDecoder(model, block_size=block_size, impl=impl)}
    if check_exact:
        decoders["ar"] = ConsensusDecoder(model, mode="ar", impl=impl)
    if baseline:
        decoders["ar_one_row"] = ConsensusDecoder(model, mode="ar", impl=impl, exact=False)
    for decoder in decoders.values():
        decoder.generate([torch.tensor(prompts[0][1])], max_new_tokens=WARM_UP_TOKENS)
    answers = []
    for domain, ids in prompts:
        answers.append(_answer(decoders, domain, ids, max_new_tokens))
        on_answer()
    domains = dict.fromkeys(domain for domain, _ in prompts)
    return {
        **_summary(answers),
        "block_size": "auto" if block_size == "auto" else decoders["consensus"].block_size,
        "max_new_tokens": max_new_tokens,
        "exactness": _exactness(answers) if check_exact else None,
        "domains": {name: _summary([answer for answer in answers if answer.domain == name]) for name in domains},
        "questions": [_question(answer) for answer in answers],
    }


def repetition_share(ids: Sequence[int]) -> float:
    """Share of the n-grams of a sequence that it holds already further left. Loops inflate acceptance; this tells."""
    grams = [tuple(ids[i : i + REPEAT_GRAM]) for i in range(len(ids) - REPEAT_GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _answer(decoders: dict[str, ConsensusDecoder], domain: str, ids: list[int], max_new_tokens: int) -> Answer:
    prompt, tokens = [torch.tensor(ids)], {}
    answer = Answer(domain, len(ids), [])
    for name, decoder in decoders.items():
        output = decoder.generate(prompt, max_new_tokens=max_new_tokens)
        tokens[name] = output.sequences[0][len(ids) :].tolist()
        answer.runs[name] = output.stats
    answer.ids = tokens["consensus"]
    if "ar" in tokens:
        answer.differs_at = first_difference(answer.ids, tokens["ar"])
        answer.equal = answer.differs_at is None
    return answer


def _summary(answers: Sequence[Answer]) -> dict[str, Any]:
    runs = [answer.runs["consensus"] for answer in answers]
    tokens, cycles = sum(run.tokens for run in runs), sum(run.cycles for run in runs)
    # a prompt answered by the prefill alone has no cycle to speak of
    per_question = [run.tokens_per_cycle for run in runs if run.cycles]
    summary = {
        "prompts": len(answers),
        "tokens": tokens,
        "cycles": cycles,
        "tokens_per_cycle": (tokens - len(runs)) / cycles if cycles else 0.0,
        "tokens_per_cycle_per_question": _mean(per_question),
        "tpf": tokens / sum(run.forward_passes for run in runs),
        "tpf_per_question": _mean([run.tpf for run in runs]),
        "repetition_share": _mean([repetition_share(answer.ids) for answer in answers]),
        **_acceptance(runs),
    }
    names = list(answers[0].runs)
    rates, summary["seconds"], summary["decode_seconds"] = {}, {}, {}
    for name in names:
        of_name = [answer.runs[name] for answer in answers]
        decode = sum(run.decode_seconds for run in of_name)
        seconds = decode + sum(run.prefill_seconds for run in of_name)
        summary["seconds"][name], summary["decode_seconds"][name] = seconds, decode
        # answers may differ in length where rounding differs (one-row AR), so rates are compared, not seconds
        rates[name] = sum(run.tokens for run in of_name) / seconds if seconds else 0.0
    exact = all(answer.equal is not False for answer in answers)
    summary["tokens_per_second"] = rates
    summary["speedup"] = {
        name: rates["consensus"] / rates[name] if exact and rates[name] else None for name in names[1:]
    }
    return summary


def _acceptance(runs: Sequence[DecodeStats]) -> dict[str, list[float | None]]:
    """From cycles by accepted length to rates by draft position."""
    histogram = [sum(column) for column in zip(*(run.accepted_histogram for run in runs))]
    reached = [sum(histogram[a:]) for a in range(len(histogram))]
    return {
        "acceptance_by_position": [n / reached[0] if reached[0] else None for n in reached[1:]],
        "acceptance_given_previous": [n / before if before else None for before, n in zip(reached, reached[1:])],
    }


def _exactness(answers: Sequence[Answer]) -> dict[str, Any]:
    different = [n for n, answer in enumerate(answers) if not answer.equal]
    return {
        "checked": len(answers),
        "equal": len(answers) - len(different),
        "different": [{"prompt": n, "token": answers[n].differs_at} for n in different],
    }


def _question(answer: Answer) -> dict[str, Any]:
    run = answer.runs["consensus"]
    return {
        "domain": answer.domain,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": run.tokens,
        "cycles": run.cycles,
        "tokens_per_cycle": run.tokens_per_cycle,
        "tpf": run.tpf,
        "repetition_share": repetition_share(answer.ids),
        "equal": answer.equal,
        "tokens_per_second": {name: stats.tokens_per_second for name, stats in answer.runs.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
